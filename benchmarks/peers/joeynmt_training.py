"""JoeyNMT as a peer of benchmarks/training.py: its own command, data pipeline and trainer, taking turns.

    python joeynmt_training.py REQUEST

REQUEST is a JSON file: train and validation (prefixes of text files), source and target (their endings), the model's
sizes, dropout, label_smoothing, clip_norm, learning_rate, warmup_steps, tokens_per_batch, threads, warm, and work, a
folder.
"""
import json
import logging
import re
import sys
from pathlib import Path

import joeynmt
import sentencepiece
import torch
import yaml
from joeynmt.__main__ import main as joeynmt_command
from joeynmt.training import TrainManager
from turns import Turns, keep_memory

SPECIAL = {"unk": "<unk>", "pad": "<pad>", "bos": "<s>", "eos": "</s>"}        # in the order of their ids


def learn_tokenizer(r, work):
    "One SentencePiece BPE model for both languages; JoeyNMT reads its pieces from a file of their own"
    ids = {f"{name}_id": i for i, name in enumerate(SPECIAL)}
    pieces = {f"{name}_piece": piece for name, piece in SPECIAL.items()}
    sentencepiece.SentencePieceTrainer.train(
        input=[f"{r['train']}.{r[side]}" for side in ("source", "target")], model_prefix=str(work / "joint"),
        model_type="bpe", vocab_size=r["vocab_size"], character_coverage=1.0, minloglevel=2, **ids, **pieces)
    model = sentencepiece.SentencePieceProcessor(model_file=str(work / "joint.model"))
    (work / "pieces.txt").write_text("".join(f"{model.id_to_piece(i)}\n" for i in range(len(model))), "utf-8")


def configuration(r, work):
    "Ours in its words"
    def language(side):
        return {"lang": r[side], "level": "bpe", "lowercase": False, "normalize": False, "max_length": 100,
                "voc_file": str(work / "pieces.txt"), "voc_limit": r["vocab_size"], "voc_min_freq": 1,
                "tokenizer_type": "sentencepiece",
                "tokenizer_cfg": {"model_file": str(work / "joint.model"), "model_type": "bpe"}}

    def side(layers):
        return {"type": "transformer", "num_layers": layers, "num_heads": r["heads"], "hidden_size": r["d_model"],
                "ff_size": r["d_ff"], "dropout": r["dropout"], "layer_norm": "pre", "activation": "relu",
                "embeddings": {"embedding_dim": r["d_model"], "scale": True, "dropout": r["dropout"]}}
    symbols = {f"{name}_token": piece for name, piece in SPECIAL.items()}
    symbols |= {f"{name}_id": i for i, name in enumerate(SPECIAL)}
    return {
        "name": "peer", "joeynmt_version": joeynmt.__version__, "model_dir": str(work / "run"), "use_cuda": False,
        "data": {"dataset_type": "plain", "train": r["train"], "dev": r["validation"], "test": r["validation"],
                 "src": language("source"), "trg": language("target"), "special_symbols": symbols},
        "model": {"initializer": "xavier_uniform", "bias_initializer": "zeros", "embed_initializer": "xavier_uniform",
                  "tied_embeddings": True, "tied_softmax": True,
                  "encoder": side(r["encoder_layers"]), "decoder": side(r["decoder_layers"])},
        "training": {"optimizer": "adamw", "adam_betas": [0.9, 0.98], "weight_decay": 0.0, "normalization": "tokens",
                     "loss": "crossentropy", "label_smoothing": r["label_smoothing"],
                     "clip_grad_norm": r["clip_norm"], "scheduling": "warmupinversesquareroot",
                     "learning_rate": r["learning_rate"], "learning_rate_warmup": r["warmup_steps"],
                     "learning_rate_min": 1e-9, "batch_size": r["tokens_per_batch"], "batch_type": "token",
                     "batch_multiplier": 1, "shuffle": True, "epochs": 1000, "logging_freq": 2,
                     "validation_freq": 10**6, "early_stopping_metric": "loss", "overwrite": True},
        "testing": {"beam_size": 1, "batch_size": 64, "max_output_length": 60, "eval_metrics": ["bleu"]},
    }


class OwnFigures(logging.Handler):
    "Keeps the speeds and losses that JoeyNMT itself logs"
    rates, losses = [], []

    def emit(self, record):
        if found := re.search(r"Batch Loss: +([\d.]+).*Tokens per Sec: +(\d+)", record.getMessage()):
            self.losses.append(float(found[1]))
            self.rates.append(int(found[2]))


def main():
    r = json.loads(Path(sys.argv[1]).read_text())
    if r["keep"]: keep_memory()
    torch.set_num_threads(r["threads"])
    work = Path(r["work"])
    work.mkdir(parents=True, exist_ok=True)
    learn_tokenizer(r, work)
    (work / "config.yaml").write_text(yaml.safe_dump(configuration(r, work)))
    own, train_step, before = OwnFigures(), TrainManager._train_step, []
    facts = {"joeynmt": joeynmt.__version__, "torch": torch.__version__}
    turns = Turns(r["warm"], lambda: facts | {"logged": own.rates, "loss": own.losses[-1:]})

    def step(manager, batch): # called with the next batch, when the one before is wholly done, optimiser and all
        if before: turns.done(before.pop())
        else:
            logging.getLogger("joeynmt.training").addHandler(own)  # no earlier: JoeyNMT sets up bare loggers only
            facts["parameters"] = sum(p.numel() for p in manager.model.parameters())
        before.append(batch.ntokens)
        return train_step(manager, batch)
    TrainManager._train_step = step
    sys.argv[1:] = ["train", str(work / "config.yaml"), "--skip-test"]
    joeynmt_command()


if __name__ == "__main__": main()
