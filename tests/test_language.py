"Language models: trained, resumed, asked and scored from the command line, and one line for what is wrong."
import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Value
from hub_server import HubServer
from safetensors.torch import load_file

from flash_transformer.data import (
    EOS,
    EncodedText,
    LabelledTexts,
    MaskedText,
    TokenizerPair,
    encode_text,
    load_labelled,
    toy_corpus,
    toy_sentiment,
)
from flash_transformer.language import (
    MaskFiller,
    TextClassifier,
    TextGenerator,
    accuracy,
    score_classes,
    score_gaps,
    score_text,
)
from flash_transformer.model import CausalLM, Classifier, SampleConfig, TransformerConfig
from flash_transformer.training import batch_loss

TEXT = "\n".join(toy_corpus(300, 1, 1)["train"]["source"])
GPT = """
data: {{corpus: text, train: {file}, tokenizer: {tokenizer}, vocab_size: 300, max_length: 32}}
model: {{d_model: 16, d_ff: 32, heads: 2, encoder_layers: 0, decoder_layers: 1, norm: pre, positions: rotary}}
train: {{max_steps: 20, tokens_per_batch: 256, learning_rate: 0.01, schedule: cosine, warmup_steps: 5,
        weight_decay: 0.1, label_smoothing: 0.0, precision: float32, log_every: 2, checkpoint_every: 5,
        keep_checkpoints: 3}}
"""

BERT = """
data: {{corpus: labelled, train: {folder}/train.csv, validation: {folder}/validation.csv, test: {folder}/test.csv,
        vocab_size: 300, max_length: 24, mask: {mask}}}
model: {{d_model: 16, d_ff: 32, heads: 2, encoder_layers: 2, decoder_layers: 0, norm: pre, positions: learned,
        max_length: 24, dropout: 0.0}}
train: {{max_steps: 20, tokens_per_batch: 256, learning_rate: 0.01, warmup_steps: 5, label_smoothing: 0.0,
        precision: float32, log_every: 2, checkpoint_every: 5, keep_checkpoints: 3}}
"""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    "A text file, and a recipe for a GPT of letters and one of pieces that is trained on it"
    folder = tmp_path_factory.mktemp("language")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    for tokenizer in ("char", "bpe"):
        (folder / f"{tokenizer}.yaml").write_text(GPT.format(file=folder / "text.txt", tokenizer=tokenizer))
    for split, texts in toy_sentiment(300, 40, 40).items():
        texts.cast_column("label", Value("string")).to_csv(folder / f"{split}.csv", index=False)
    for name, mask in (("masked", 0.15), ("classes", 0.0)):
        (folder / f"{name}.yaml").write_text(BERT.format(folder=folder, mask=mask))
    return folder


@pytest.fixture(scope="module")
def trained(recipes, tmp_path_factory):
    "Run folders that nobody writes into"
    from flash_transformer.cli import main
    runs = tmp_path_factory.mktemp("runs")
    for name in ("char", "bpe", "masked", "classes"):
        start = ["--train.start", str(runs / "masked")] if name == "classes" else []
        assert main(["train", "--config", str(recipes / f"{name}.yaml"), "--run", str(runs / name), *start]) == 0
    return runs


def wrong(result, *names):
    status, out, said = result
    assert status == 2 and len(said) == 1 and said[0].startswith("flash-transformer: "), said
    for name in names: assert str(name) in said[0], said
    assert not out


# ---- GPT: from text to text ----

def test_the_whole_way(recipes, trained, tmp_path, command, contents, metrics):
    run, recipe = tmp_path / "run", recipes / "char.yaml"
    status, out, _ = command("preprocess", "--config", recipe, "--run", run)
    assert status == 0 and "training windows" in out and "prepared in" in out
    status, out, _ = command("train", "--config", recipe, "--run", run)
    assert status == 0 and "windows, float32 on cpu" in out and "step 20, epoch" in out
    for name in ("config.yaml", "tokenizer.json", "model.safetensors"):
        assert (run / name).read_bytes() == (trained / "char" / name).read_bytes(), name
    lines = metrics(run)
    assert all(len(line["samples"]) == 1 for line in lines if "validation_loss" in line)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert max(rates) < 0.01 + 1e-9 and rates[-1] == pytest.approx(0.001)         # a tenth at the last step


def test_resumed_is_undisturbed(recipes, trained, tmp_path, command):
    run = tmp_path / "run"
    train = ("train", "--config", recipes / "bpe.yaml", "--run", run)
    shutil.copytree(trained / "bpe", run)
    for step in (15, 20): shutil.rmtree(run / "checkpoints" / f"{step:08d}")
    (run / "model.safetensors").unlink()
    assert command(*train, "--resume")[0] == 0
    one, two = (load_file(folder / "model.safetensors") for folder in (run, trained / "bpe"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    wrong(command(*train, "--resume", "--model.d_ff", "64"), "model.d_ff")
    wrong(command(*train), "already exists")


@pytest.mark.parametrize("name", ["char", "bpe"])
def test_a_sample_is_what_the_model_says(trained, command, name):
    "Greedily: the likeliest token, one after the other, each from all the others"
    generator = TextGenerator.from_run(trained / name)
    prompt, ids = "the old", generator.encode("the old")
    assert generator.tokenizers.decode_source(ids) == "\nthe old"
    for _ in range(20):                     # 28 tokens at the most: all of them in sight
        with torch.no_grad(): ids = [*ids, int(generator.model(torch.tensor([ids]))[0, -1].argmax())]
    expected = generator.tokenizers.decode_source(ids)[1:]
    assert generator.write(prompt, max_new_tokens=20, temperature=0.0) == expected
    assert "".join(generator.stream(prompt, SampleConfig(20), temperature=0.0)) == expected.removeprefix(prompt)
    options = ("--prompt", prompt, "--max_new_tokens", 20, "--temperature", 0)
    assert command("sample", trained / name, *options) == (0, expected + "\n", [])


def test_samples_are_seeded(trained, command):
    def once(seed): return command("sample", trained / "char", "--max_new_tokens", 60, "--seed", seed)[1]
    assert once(1) == once(1) != once(2) and len(once(1)) > 50


def test_it_looks_back_on_its_windows_only(trained):
    "Beyond 32 tokens the oldest are forgotten, and writing goes on"
    generator = TextGenerator.from_run(trained / "char")
    assert generator.context == 32
    assert len(generator.write("the ", max_new_tokens=100)) > 80
    long = "she sees the old house. " * 20
    assert generator.write(long, max_new_tokens=5, seed=3).startswith(long)


def test_pieces_of_letters_are_whole(trained):
    "Byte-level tokens cut characters: what is streamed is whole characters, and nothing is lost"
    generator = TextGenerator.from_run(trained / "bpe")
    text = "für 東京 🙂 ë"
    ids = generator.tokenizers.encode_inner(text)
    assert any("\ufffd" in generator.tokenizers.decode_source(ids[:n]) for n in range(len(ids)))

    class Parrot(torch.nn.Module):         # says these ids, one after the other
        def __init__(self):
            super().__init__()
            self.config, self.weight = generator.model.config, torch.nn.Parameter(torch.zeros(1))
        def cache(self, n): return generator.model.cache(n)
        def forward(self, ids, cache, keep):
            self.said = getattr(self, "said", -1) + 1
            logits = torch.zeros(1, self.config.target_vocab_size)
            logits[0, spoken[self.said]] = 1
            return logits
    spoken = ids
    parrot = TextGenerator(Parrot(), generator.tokenizers)
    pieces = list(parrot.stream("a ", max_new_tokens=len(ids), temperature=0.0))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_score_is_the_mean_over_the_text(trained, tmp_path, command):
    "Against cross-entropy written out window by window, and characters counted in the text itself"
    generator, text = TextGenerator.from_run(trained / "bpe"), TEXT[:3000]
    ids = torch.from_numpy(encode_text(text, generator.tokenizers).astype(np.int64))
    with torch.no_grad():                                                        # the last window is shorter
        logits = torch.cat([generator.model(window[None])[0] for window in ids[:-1].split(32)])
    expected = torch.nn.functional.cross_entropy(logits, ids[1:])
    found = score_text(generator, text)
    assert found.loss == pytest.approx(float(expected), abs=1e-5) and found.tokens == len(ids) - 1
    assert found.characters == len(text) - len(generator.tokenizers.decode_source([int(ids[0])]))
    (tmp_path / "text.txt").write_text(text)
    run = shutil.copytree(trained / "bpe", tmp_path / "run")
    status, out, said = command("evaluate", run, "--data", tmp_path / "text.txt")
    assert status == 0, said
    assert f"{found.loss:.4f} nats a token" in out
    saved = json.loads((run / "evaluation.json").read_text())
    assert saved["per_character"] == pytest.approx(found.loss * found.tokens / found.characters)
    status, out, _ = command("evaluate", run)
    held_out = score_text(generator, TEXT[len(TEXT) * 9 // 10:])
    for short in ("", "a"):
        if len(encode_text(short, generator.tokenizers)) < 2:
            with pytest.raises(ValueError, match="nothing to predict"): score_text(generator, short)
    assert status == 0 and f"perplexity {math.exp(held_out.loss):.3f}" in out


def test_gzipped_text_and_a_text_to_validate_on(recipes, tmp_path, command, metrics):
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file: file.write(TEXT)
    (tmp_path / "b.txt").write_text(TEXT[:2000])
    status, out, _ = command("train", "--config", recipes / "char.yaml", "--run", tmp_path / "run",
        "--train.max_steps", 5, "--data.train", tmp_path / "a.txt.gz", "--data.validation", tmp_path / "b.txt")
    assert status == 0 and "step 5" in out


def test_shakespeare_in_the_layout_of_the_hub(recipes, tmp_path, command):
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split, text in (("train", TEXT), ("validation", TEXT[:900]), ("test", TEXT[900:1800])):
        Dataset.from_dict({"text": [text]}).to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    status, out, said = command("train", "--config", recipes / "char.yaml", "--run", tmp_path / "run",
        "--data.corpus", "shakespeare", "--data.train", "null", "--data.path", tmp_path / "hub", "--train.max_steps", 5)
    assert status == 0, said
    windows = EncodedText(encode_text(TEXT, TokenizerPair.load(tmp_path / "run")), 32)
    assert f"{len(windows):,} windows" in out


# ---- BERT: from gaps to verdicts ----

def test_gaps_are_learned_and_resumed(recipes, trained, tmp_path, command, metrics):
    run = shutil.copytree(trained / "masked", tmp_path / "run")
    assert TokenizerPair.load(run).mask_id == 4
    lines = metrics(run)
    assert all(0 <= line["accuracy"] <= 1 for line in lines if "validation_loss" in line)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    for step in (15, 20): shutil.rmtree(run / "checkpoints" / f"{step:08d}")
    assert command("train", "--config", recipes / "masked.yaml", "--run", run, "--resume")[0] == 0
    one, two = (load_file(folder / "model.safetensors") for folder in (run, trained / "masked"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_loss_and_accuracy_of_gaps(trained, command, tmp_path, recipes):
    "Against all logits, without `keep`"
    filler = MaskFiller.from_run(trained / "masked")
    texts = load_labelled(train=recipes / "train.csv", validation=recipes / "validation.csv")["validation"]
    text = "\n".join(texts["text"])
    masked = MaskedText(encode_text(text, filler.tokenizers), 24, 4, filler.tokenizers.source_size)
    batch = masked.batch(np.arange(len(masked)))
    with torch.no_grad(): logits = filler.model(batch.source, batch.source_lengths)
    gaps = batch.labels != 0
    one = torch.nn.functional.cross_entropy(logits[gaps], batch.labels[gaps], reduction="sum")
    assert float(batch_loss(filler.model, batch, 0.0)[0].detach()) == pytest.approx(float(one), rel=1e-5)
    right = (logits.argmax(-1)[gaps] == batch.labels[gaps]).float().mean()
    assert accuracy(filler.model, masked, 1 << 20) == pytest.approx(float(right))
    found = score_gaps(filler.model, masked)
    assert found.gaps == int(gaps.sum()) and 0 < found.loss < 7
    run = shutil.copytree(trained / "masked", tmp_path / "run")
    status, out, _ = command("evaluate", run)
    assert status == 0 and f"{found.gaps} gaps" in out and json.loads((run / "evaluation.json").read_text())["gaps"]


@pytest.mark.parametrize("text, word", [("The <mask> was good.", " story"), ("<mask> story was good.", "The"),
    ("The story was good<mask>", "."), ("The story <mask> good.", " was")])
def test_a_gap_takes_the_space_before_it(trained, text, word):
    "What is encoded around a gap is what the whole text is encoded as"
    filler = MaskFiller.from_run(trained / "masked")
    ids = filler.encode(text)
    at = ids.index(filler.tokenizers.mask_id)
    pieces = filler.tokenizers.encode_inner(word if at > 1 else " " + word)
    whole = text.replace(" <mask>", word).replace("<mask>", word)
    assert ids[:at] + pieces + ids[at + 1:] == filler.tokenizers.encode_target([whole])[0]


def test_what_may_stand_there(trained):
    filler = MaskFiller.from_run(trained / "masked")
    found = filler.fill("The <mask> was <mask>.", n=3)
    assert [len(row) for row in found] == [3, 3]
    ids = torch.tensor([filler.encode("The <mask> was <mask>.")])
    with torch.no_grad(): p = filler.model(ids)[ids == 4].softmax(-1)
    for row, expected in zip(found, p):
        assert [q for _, q in row] == pytest.approx(expected.topk(3).values.tolist(), rel=1e-4)
    with pytest.raises(ValueError, match="no gap"): filler.fill("The story was good.")
    with pytest.raises(ValueError, match="data.mask"):
        MaskFiller(filler.model, TextGenerator.from_run(trained / "bpe").tokenizers)


def test_a_classifier_begins_with_what_filled_gaps(recipes, trained, tmp_path, command):
    "After a step too small to see, its encoder is the other run's; and so are its tokenizers"
    run = tmp_path / "run"
    assert command("train", "--config", recipes / "classes.yaml", "--run", run, "--train.start", trained / "masked",
        "--train.max_steps", 1, "--train.learning_rate", 1e-12)[0] == 0
    weights, before = (load_file(folder / "model.safetensors") for folder in (run, trained / "masked"))
    encoder = [name for name in weights if name.startswith("encoder.")]
    assert len(encoder) > 20 and all((weights[name] - before[name]).abs().max() < 1e-9 for name in encoder)
    assert (run / "tokenizer.json").read_bytes() == (trained / "masked" / "tokenizer.json").read_bytes()
    assert json.loads((run / "labels.json").read_text()) == ["0", "1"]


def test_classes(recipes, trained, tmp_path, command):
    "Each text alone, unpadded, gives what many give together; the score is a count"
    classifier = TextClassifier.from_run(trained / "classes")
    texts = load_labelled(train=recipes / "train.csv", test=recipes / "test.csv")["test"]
    found = classifier.probabilities(list(texts["text"]))
    for text, p in zip(texts["text"], found):
        ids = classifier.tokenizers.encode_target([text])[0]
        if len(ids) > 24: ids = [*ids[:23], EOS]
        with torch.no_grad(): assert torch.allclose(classifier.model(torch.tensor([ids])).softmax(-1)[0], p, atol=1e-5)
    assert classifier.probabilities([]).shape == (0, 2)
    right = (found.argmax(-1) == torch.tensor(texts["label"])).float().mean()
    assert score_classes(classifier, texts).accuracy == pytest.approx(float(right))
    encoded = LabelledTexts.encode(texts, classifier.tokenizers, 24)
    assert accuracy(classifier.model, encoded, 200) == pytest.approx(float(right))

    run = shutil.copytree(trained / "classes", tmp_path / "run")
    status, out, _ = command("evaluate", run)
    saved = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert status == 0 and f"40 texts, accuracy {float(right):.2%}" in out
    assert sum(sum(row.values()) for row in saved["confusion"].values()) == len(saved["texts"]) == 40
    assert command("evaluate", run, "--data", recipes / "test.csv")[:2] == (0, out)
    one = [text for text, label in zip(texts["text"], texts["label"]) if label == 1]          # of one class: it scores
    (tmp_path / "one.jsonl").write_text("".join(json.dumps({"text": text, "label": "1"}) + "\n" for text in one))
    status, out, said = command("evaluate", run, "--data", tmp_path / "one.jsonl")
    assert status == 0 and f"{len(one)} texts" in out, said
    status, out, _ = command("classify", run, stdin="\n \n".join(texts["text"]).encode())
    assert not any(out.splitlines()[1::2])                                                    # nothing of nothing
    lines = [line.split("\t") for line in out.splitlines()[::2]]
    assert [name for name, _ in lines] == [row["predicted"] for row in saved["texts"]]
    assert [float(p) for _, p in lines] == pytest.approx([row["probability"] for row in saved["texts"]], abs=1e-4)


def test_the_loss_of_classes(trained):
    "Against PyTorch's cross-entropy with label smoothing, gradients included"
    torch.manual_seed(0)
    model = Classifier(TransformerConfig(d_model=16, d_ff=32, heads=2, encoder_layers=1, decoder_layers=0, dropout=0.0,
        source_vocab_size=300), 3).double()
    tokenizers, texts = TokenizerPair.load(trained / "classes"), toy_sentiment(20, 2, 2)["train"]
    encoded = LabelledTexts.encode(texts, tokenizers)
    batch = encoded.batch(np.arange(20))
    smoothed, plain = batch_loss(model, batch, 0.1)
    logits = model(batch.source, batch.source_lengths)
    expected = torch.nn.functional.cross_entropy(logits, batch.labels[:, 0], label_smoothing=0.1, reduction="sum")
    ours, theirs = (torch.autograd.grad(loss, list(model.parameters())) for loss in (smoothed, expected))
    assert torch.allclose(smoothed, expected) and all(torch.allclose(a, b) for a, b in zip(ours, theirs))
    assert torch.allclose(plain, torch.nn.functional.cross_entropy(logits, batch.labels[:, 0], reduction="sum"))
    assert any((batch.labels == 0).flatten()) and all(g.abs().sum() > 0 for g in ours if g.dim() > 1)


# ---- from the hub ----

TRAIN = """
import sys
from flash_transformer.cli import main
sys.exit(max(main(["train", "--config", recipe, "--run", run, "--train.max_steps", "3", "--data.train", "null",
    "--data.validation", "null", "--data.test", "null", "--data.corpus", corpus])
    for recipe, run, corpus in zip(*[iter(sys.argv[1:])] * 3)) or main(["evaluate", sys.argv[5], "--split", "test"]))
"""


def test_trained_from_the_hub(recipes, tmp_path):
    "Shakespeare, and reviews for gaps and for verdicts, from a server that speaks as the hub does"
    hub, data = tmp_path / "hub", []
    for name, splits in {"karpathy/tiny_shakespeare/data": {"train": [TEXT], "validation": [TEXT[:900]]},
                         "stanfordnlp/imdb/plain_text": toy_sentiment(60, 30, 30)}.items():
        (hub / name).mkdir(parents=True)
        for split, texts in splits.items():
            data.append(hub / name / f"{split}-00000-of-00001.parquet")
            (texts if isinstance(texts, Dataset) else Dataset.from_dict({"text": texts})).to_parquet(data[-1])
    environment = {k: v for k, v in os.environ.items() if not k.upper().startswith("HF_") and "PROXY" not in k.upper()}
    runs = [(recipes / f"{name}.yaml", tmp_path / name, corpus)
            for name, corpus in (("char", "shakespeare"), ("classes", "imdb"), ("masked", "imdb"))]
    with HubServer(hub) as server:
        environment |= dict(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path), PYTHONPATH=str(Path(__file__).parent.parent))
        done = subprocess.run([sys.executable, "-c", TRAIN, *(str(x) for run in runs for x in run)], env=environment,
                              cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "classes" / "labels.json").read_text()) == ["neg", "pos"]
    assert len(json.loads((tmp_path / "classes" / "evaluation.json").read_text())["texts"]) == 30
    assert all((run / "model.safetensors").is_file() for _, run, _ in runs)


# ---- one line for what is wrong ----

@pytest.mark.parametrize("options, names", [
    ("--data.train /nowhere/text.txt", "/nowhere/text.txt"),
    ("--data.train null", "--data.train"),
    ("--model.encoder_layers 1", "model.encoder_layers must be 0"),
    ("--model.decoder_layers 0", "decoder_layers"),
    ("--data.max_length 3000", "data.max_length"),
    ("--data.mask 0.15", "model.decoder_layers must be 0"),
    ("--data.mask 1.5 --model.encoder_layers 1 --model.decoder_layers 0", "data.mask"),
    ("--data.streaming true", "data.streaming"),
    ("--data.clean [empty]", "data.clean"),
    ("--train.schedule linear", "train.schedule"),
    ("--train.weight_decay -1", "train.weight_decay"),
    ("--data.corpus toy --data.train null --data.mask 0.1", "data.mask"),
])
def test_recipe_that_is_wrong(recipes, tmp_path, command, options, names):
    "said before anything is left on the disk"
    run = tmp_path / "run"
    wrong(command("train", "--config", recipes / "char.yaml", "--run", run, *options.split()), names)
    assert not (run / "config.yaml").exists() and not (run / "checkpoints").exists()


@pytest.mark.parametrize("options, names", [
    ("--train.start /nowhere", "/nowhere"), ("--train.start {masked} --data.vocab_size 280", "data.vocab_size"),
    ("--train.start {run}", "itself"), ("--train.start {broken}", "config.yaml"),
    ("--model.max_length 20", "learned places"), ("--data.mask -0.1", "data.mask"),
    ("--train.start {bpe}", "model.encoder_layers"),
    ("--train.start {masked} --model.d_ff 64", "model.d_ff"), ("--data.train {text}", "text.txt"),
    ("--model.decoder_layers 1", "model.decoder_layers must be 0"), ("--data.corpus imdb --data.path x", "path"),
    ("--data.validation null", "--data.validation"), ("--data.max_length 2", "max_length")])
def test_recipe_of_a_classifier_that_is_wrong(recipes, trained, tmp_path, command, contents, options, names):
    broken, run = shutil.copytree(trained / "masked", tmp_path / "broken"), tmp_path / "run"
    (broken / "config.yaml").write_text("{")
    if "{run}" in options: shutil.copytree(trained / "masked", run)
    before = contents(run)
    options = options.format(bpe=trained / "bpe", masked=trained / "masked", text=recipes / "text.txt", broken=broken,
        run=run)
    for more in (["--overwrite"], ["--overwrite", "--dry-run"])[:1 + ("start" in options)]:
        wrong(command("train", "--config", recipes / "classes.yaml", "--run", run, *options.split(), *more), names)
    assert contents(run) == before if before else not (run / "checkpoints").exists()


@pytest.mark.parametrize("content", ["", "model: 3\ndata: {}", "data: {}", "- 1"])
def test_a_start_that_is_no_run(recipes, trained, tmp_path, command, content):
    start = shutil.copytree(trained / "masked", tmp_path / "start")
    (start / "config.yaml").write_text(content)
    wrong(command("train", "--config", recipes / "classes.yaml", "--run", tmp_path / "run", "--train.start", start),
        "config.yaml", "no recipe")


def test_what_is_resumed_keeps_its_task_and_its_classes(recipes, trained, tmp_path, command, contents):
    run = shutil.copytree(trained / "classes", tmp_path / "run")
    before, resume = contents(run), ("train", "--run", run, "--resume")
    wrong(command(*resume, "--data.mask", "0.15"), "data.mask")
    wrong(command(*resume, "--data.corpus", "shakespeare"), "shakespeare")
    assert contents(run) == before
    texts = (recipes / "train.csv").read_text().replace(",1\n", ",bad\n").replace(",0\n", ",awesome\n")
    (tmp_path / "train.csv").write_text(texts)
    other = ("--data.train", tmp_path / "train.csv", "--data.validation", tmp_path / "train.csv", "--data.test", "null")
    wrong(command(*resume, *other), "'awesome'")
    assert {name: x for name, x in contents(run).items() if not name.startswith("data")} == {
        name: x for name, x in before.items() if not name.startswith("data")}
    assert command(*resume, "--train.max_steps", 22)[0] == 0               # and it can still go on


def test_gaps_are_scored_on_labelled_files(recipes, trained, tmp_path, command):
    "Their texts, not their labels; every split there is"
    run = shutil.copytree(trained / "masked", tmp_path / "run")
    outs = [command("evaluate", run, *more) for more in (("--data", recipes / "test.csv"), ("--split", "test"))]
    assert outs[0] == outs[1] and outs[0][0] == 0


def test_a_word_model_of_one_line(tmp_path, command, recipes):
    "Neither newline nor space is a token: it writes all the same"
    (tmp_path / "line.txt").write_text(TEXT.replace("\n", " "))
    status, out, said = command("train", "--config", recipes / "char.yaml", "--run", tmp_path / "run",
        "--train.max_steps", 5, "--data.train", tmp_path / "line.txt", "--data.tokenizer", "word")
    assert status == 0, said
    assert command("sample", tmp_path / "run", "--max_new_tokens", 5)[0] == 0
    wrong(command("sample", tmp_path / "run", "--prompt", "The zebra"), "The zebra")


@pytest.mark.parametrize("damage", ["{", "[]", "[1, 2]", '{"a": 1}'])
def test_damaged_labels(trained, tmp_path, command, damage):
    run = shutil.copytree(trained / "classes", tmp_path / "run")
    (run / "labels.json").write_text(damage)
    wrong(command("classify", run, stdin=b"good\n"), "labels.json is damaged")


def test_labels_that_the_model_has_not(trained, tmp_path, command):
    run = shutil.copytree(trained / "classes", tmp_path / "run")
    (tmp_path / "other.csv").write_text("text,label\ngood,fine\nbad,awful\n")
    wrong(command("evaluate", run, "--data", tmp_path / "other.csv"), "'awful'", "0, 1")


@pytest.mark.parametrize("options, names", [("--temperature -1", "temperature"), ("--top_p 2", "top_p"),
    ("--max_new_tokens 0", "max_new_tokens"), ("--prompt 東", "'東'"), ("--seed -1", "seed"),
    ("--seed 99999999999999999999999", "seed"), ("--device cuda:77", "cuda:77")])
def test_sample_that_is_wrong(trained, command, options, names):
    wrong(command("sample", trained / "char", *options.split()), names)


def test_commands_for_other_models(trained, finished, command):
    "Each says what the run is for"
    wrong(command("translate", trained / "char", stdin=b"a dog\n"), "CausalLM", "flash-transformer sample")
    wrong(command("sample", finished), "Transformer", "flash-transformer translate")
    wrong(command("sample", trained / "masked"), "MaskedLM", "MaskFiller")
    wrong(command("classify", trained / "masked", stdin=b"a\n"), "MaskedLM")
    wrong(command("translate", trained / "classes", stdin=b"a\n"), "Classifier", "flash-transformer classify")
    wrong(command("evaluate", trained / "char", "--beam", "3"), "--beam")
    wrong(command("evaluate", trained / "char", "--split", "test"), "no test split")
    with pytest.raises(ValueError, match="holds a Transformer"): TextGenerator.from_run(finished)


@pytest.mark.parametrize("name, things",
    [("char", "windows"), ("masked", "windows"), ("classes", "texts")])
def test_dry_run(recipes, tmp_path, command, name, things):
    "says what it takes, and leaves nothing"
    status, out, said = command("train", "--config", recipes / f"{name}.yaml", "--run", tmp_path / "run", "--dry-run")
    assert status == 0 and f"training {things}" in out and "fits" in out and "Nothing stands against" in out, said
    assert not (tmp_path / "run").exists()


def test_a_generator_takes_a_model_at_hand(trained):
    generator = TextGenerator.from_run(trained / "char")
    assert isinstance(generator.model, CausalLM) and not generator.model.training
    again = TextGenerator(generator.model.train(), generator.tokenizers)
    assert again.write("a", max_new_tokens=3, seed=1) == generator.write("a", max_new_tokens=3, seed=1)
