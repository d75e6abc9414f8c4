"""Two peers of benchmarks/training.py in the loop that every trainer has inside, on batches that it has written.

    python plain_loop.py REQUEST

REQUEST is a JSON file: engine (marian or torch), bf16, batches (a file of torch.save: for each batch source, target and
labels, (rows, length), padded with 0), the model's sizes, dropout, label_smoothing, clip_norm, learning_rate,
warmup_steps, threads, warm. Both models share one table between source, target and output.
"""
import json
import math
import sys
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from turns import Turns, keep_memory

PAD, BOS, EOS = 0, 2, 3


def marian(r):
    "transformers' MarianMTModel; the loss is that of transformers' Trainer with label_smoothing_factor"
    from transformers import MarianConfig, MarianMTModel
    from transformers.trainer_pt_utils import LabelSmoother
    sides = {f"{side}_{name}": r[key.format(side)] for side in ("encoder", "decoder")
             for name, key in (("layers", "{}_layers"), ("attention_heads", "heads"), ("ffn_dim", "d_ff"))}
    model = MarianMTModel(MarianConfig(
        vocab_size=r["vocab_size"], d_model=r["d_model"], **sides, dropout=r["dropout"], attention_dropout=0.0,
        activation_dropout=0.0, activation_function="relu", scale_embedding=True, max_position_embeddings=512,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, decoder_start_token_id=BOS,
        attn_implementation=r["attention"]))
    smoother = LabelSmoother(epsilon=r["label_smoothing"])

    def loss(batch):
        logits = model(input_ids=batch["source"], attention_mask=batch["mask"], decoder_input_ids=batch["target"],
                       use_cache=False)
        return smoother(logits, batch["labels"])

    def prepare(batch): # what its data collator makes of sentences
        labels = batch["labels"]
        return batch | {"mask": (batch["source"] != PAD).long(), "labels": labels.where(labels != PAD, -100)}
    return model, loss, prepare


class Torch(nn.Module):
    "torch.nn.Transformer, with embeddings, sinusoidal positions and an output that shares the embeddings' table"
    def __init__(self, r):
        super().__init__()
        d = r["d_model"]
        self.table, self.dropout = nn.Embedding(r["vocab_size"], d), nn.Dropout(r["dropout"])
        self.transformer = nn.Transformer(d, r["heads"], r["encoder_layers"], r["decoder_layers"], r["d_ff"],
                                          r["dropout"], batch_first=True, norm_first=True)
        nn.init.normal_(self.table.weight, std=d ** -0.5)
        for module in self.transformer.modules():                       # dropout where ours has it and nowhere else
            if isinstance(module, nn.MultiheadAttention): module.dropout = 0.0
            if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)): module.dropout.p = 0.0
        angle = torch.arange(512)[:, None] * 10000 ** (-torch.arange(0, d, 2) / d)
        self.register_buffer("positions", torch.stack([angle.sin(), angle.cos()], -1).reshape(512, d))

    def embed(self, ids):
        return self.dropout(self.table(ids) * math.sqrt(self.table.embedding_dim) + self.positions[:ids.shape[1]])

    def forward(self, source, target):
        hidden = source == PAD
        causal = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        out = self.transformer(self.embed(source), self.embed(target), tgt_mask=causal, tgt_is_causal=True,
                               src_key_padding_mask=hidden, memory_key_padding_mask=hidden)
        return nn.functional.linear(out, self.table.weight)


def plain_torch(r):
    model = Torch(r)

    def loss(batch):
        logits = model(batch["source"], batch["target"])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=PAD,
                                           label_smoothing=r["label_smoothing"])
    return model, loss, lambda batch: batch


def main():
    r = json.loads(Path(sys.argv[1]).read_text())
    keep_memory()
    torch.set_num_threads(r["threads"])
    torch.manual_seed(0)
    model, loss_of, prepare = {"marian": marian, "torch": plain_torch}[r["engine"]](r)
    saved = torch.load(r["batches"])
    tokens = [int((batch["labels"] != PAD).sum()) for batch in saved]
    ready = [prepare(batch) for batch in saved]
    optimiser = torch.optim.AdamW(model.parameters(), r["learning_rate"], betas=(0.9, 0.98), weight_decay=0.0,
                                  fused=True)
    warmup = r["warmup_steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5))
    facts = {"torch": torch.__version__, "parameters": sum(p.numel() for p in model.parameters())}
    if r["engine"] == "marian":
        import transformers
        facts |= {"transformers": transformers.__version__, "attention": r["attention"]}
    losses = []
    if r["engine"] == "torch" and r["attention"] == "math": sdpa_kernel(SDPBackend.MATH).__enter__()
    turns = Turns(r["warm"], lambda: facts | {"loss": sum(map(float, losses)) / len(losses)})
    model.train()
    for batch, n in cycle(zip(ready, tokens)):
        with torch.autocast("cpu", torch.bfloat16) if r["bf16"] else nullcontext(): loss = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), r["clip_norm"])
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses = losses[-11:] + [loss.detach()]
        turns.done(n)


if __name__ == "__main__": main()
