"The command line, from text to pictures, and one line for whatever is wrong."
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flash_transformer.attention import backends
from flash_transformer.config import load_recipe
from flash_transformer.data import load_corpus

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def process(*arguments, **more):
    "The command in a process of its own"
    script = "import sys; from flash_transformer.cli import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


# ---- what it is for ----

def test_the_whole_way(text, finished, tmp_path, command, contents, metrics):
    run, recipe = tmp_path / "run", text / "tiny.yaml"
    status, out, _ = command("preprocess", "--config", recipe, "--run", run)
    assert status == 0 and "300 training pairs, " in out
    assert "12 validation pairs; vocabulary of 400 tokens" in out and str(run / "data") in out
    prepared = contents(run / "data")
    assert contents(run).keys() == {"data", *(f"data/{name}" for name in prepared)}

    status, out, _ = command("train", "--config", recipe, "--run", run)
    assert status == 0 and "step 20, epoch" in out and str(run / "model.safetensors") in out
    assert contents(run / "data") == prepared
    left = {"config.yaml", "tokenizer.json", "model.safetensors", "metrics.jsonl", "checkpoints", "data"}
    assert {p.name for p in run.iterdir()} == {p.name for p in finished.iterdir()} == left
    for name in left - {"checkpoints", "metrics.jsonl", "data"}:      # prepared before or not: the same run
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name
    assert all(len(line["samples"]) == 3 for line in metrics(run) if "samples" in line)
    assert load_recipe(run / "config.yaml").to_dict() == yaml.safe_load((run / "config.yaml").read_text())

    status, out, _ = command("evaluate", run)
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert status == 0 and "12 sentences" in out and f"BLEU {found['bleu']:.2f}  {found['bleu_signature']}" in out
    pairs = load_corpus(test=text / "test")["test"]
    assert [row["source"] for row in found["sentences"]] == pairs["source"][:]
    assert command("evaluate", run, "--data", text / "test")[:2] == (0, out)      # the same text by its name
    status, out, _ = command("evaluate", run, "--split", "validation", "--beam", "1")
    assert status == 0 and json.loads((run / "evaluation.json").read_text())["sentences"] != found["sentences"]

    lines = "".join(f"{line}\n" for line in pairs["source"]).encode()
    status, out, error = command("translate", run, stdin=lines)
    assert (status, error) == (0, []) and out.splitlines() == [row["translation"] for row in found["sentences"]]

    status, out, _ = command("plot", run)
    pictures = [Path(line) for line in out.splitlines()]
    assert status == 0 and {"learning_curves.png", "attention.png", "embeddings.png"} <= {p.name for p in pictures}
    assert all(p.parent == run / "plots" and p.read_bytes().startswith(b"\x89PNG") for p in pictures)

    status, out, _ = command("backends")
    *listed, training = out.splitlines()
    assert status == 0 and [line.split()[:2] for line in listed] == [[b.name, "yes" if b.available else "no"]
                                                                     for b in backends()]
    assert all(line.endswith(f"  {b.reason}") for line, b in zip(listed, backends()))
    assert len({line.index(b.reason) for line, b in zip(listed, backends())}) == 1       # in columns
    assert training.split()[-1] in {b.name for b in backends() if b.available}


@pytest.mark.parametrize("stdin, count", [
    (b"\n", 1), (b"", 0), (b"The dog sleeps.", 1), (b"\n\n  \nThe dog sleeps.\r\n\n", 5),
    ("a\u2028b\x0bc\n".encode(), 1), ("\ufeff你好 🙂\n".encode(), 1), (b"a\0b\n", 1)])
def test_as_many_lines_out_as_in(finished, command, stdin, count):
    status, out, error = command("translate", finished, "--beam", "1", stdin=stdin)
    assert (status, error) == (0, []) and out.count("\n") == count
    empty = [not line.strip() for line in stdin.splitlines()] if count == 5 else [stdin == b"\n"] * count
    assert all(line == "" for line, nothing in zip(out.split("\n"), empty) if nothing)


def test_a_process_reads_and_writes_utf8(finished, command, text):
    "Whatever the locale says; nothing but translations on standard output, nothing on standard error"
    sentences = b"".join((text / "test.en").read_bytes().splitlines(True)[:3]) + "Grüße an Zoë.\n\n".encode()
    child = process("translate", finished, env=os.environ | {"LC_ALL": "C", "LANG": "C"})
    out, error = child.communicate(sentences)
    assert (child.returncode, error) == (0, b"")
    assert out.decode("utf-8") == command("translate", finished, stdin=sentences)[1]


def test_a_reader_that_has_enough(finished):
    child = process("translate", finished, "--beam", "1")
    child.stdout.close()                                  # as `head` does
    error = child.communicate(b"The dog sleeps.\n" * 3)[1]
    assert (child.returncode, error) == (0, b"")


def test_a_process_says_one_line(finished):
    child = process("train", "--run", finished, "--train.max_steps", "1")
    out, error = child.communicate()
    assert (child.returncode, out) == (2, b"") and error.count(b"\n") == 1
    assert error.startswith(b"flash-transformer: ") and str(finished).encode() in error


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in (
    "preprocess", "train", "evaluate", "translate", "plot", "backends", "benchmark"))], ids=lambda args: args[0])
def test_help(command, arguments):
    status, out, error = command(*arguments)
    assert (status, error) == (0, []) and "usage: flash-transformer" in out
    if arguments[0] == "train": assert "--data.train" in out and "--model.d_model" in out and "--train.seed" in out


@pytest.mark.parametrize("path", RECIPES, ids=[path.name for path in RECIPES])
def test_recipes_of_the_house(path):
    recipe = load_recipe(path, train__max_steps=7)
    assert recipe.train.max_steps == 7 and recipe.model.heads == yaml.safe_load(path.read_text())["model"]["heads"]


def test_multi30k(tmp_path, command, metrics):
    folder = os.environ.get("FLASH_TRANSFORMER_DATA")
    if not folder: pytest.skip("FLASH_TRANSFORMER_DATA names no folder with multi30k")
    if not Path(folder, "multi30k").is_dir(): pytest.skip(f"no multi30k in {folder}")
    status, out, error = command("train", "--config", ROOT / "configs" / "multi30k.yaml", "--run", tmp_path / "run",
        "--data.train", f"{folder}/multi30k/train", "--data.validation", f"{folder}/multi30k/val",
        "--train.max_steps", "2", "--train.average", "1")
    assert status == 0, error
    assert "29,000 pairs" in out and metrics(tmp_path / "run")[-1]["validation_loss"] < 10


# ---- odd, but right ----

def test_empty_and_endless_lines_in_training_text(text, tmp_path, command):
    "Pairs with an empty side are dropped and counted, and so is what is longer than max_length"
    for language, more in ("en", ["", "one", "ab " * 33_334, "a" * 100_000]), ("de", ["zwei", "", "x", "b" * 100_000]):
        lines = (text / f"train.{language}").read_text(encoding="utf-8").splitlines() + more
        (tmp_path / f"train.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    options = ["--config", text / "tiny.yaml", "--run", tmp_path / "run", "--data.train", tmp_path / "train"]
    for _ in range(2):                                     # a second time: what is there is taken, and said alike
        status, out, _ = command("preprocess", *options)
        counts = {line.split()[0]: line.split()[1] for line in out.splitlines()[:4]}
        assert status == 0 and counts == {"pairs": "304", "empty": "2", "too_long": "2", "kept": "300"}
        assert "300 training pairs, " in out
    assert command("train", *options, "--train.max_steps", "2")[0] == 0


def test_overwrite_and_resume(run, text, command, contents, finished):
    (run / "evaluation.json").write_text("{}")
    status, _, error = command("train", "--config", text / "tiny.yaml", "--run", run, "--overwrite")
    assert (status, error) == (0, [])
    assert not (run / "evaluation.json").exists()         # of the run before
    assert (run / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    before = contents(run)
    assert command("train", "--run", run, "--resume")[0] == 0 and contents(run) == before     # it was finished
    assert command("train", "--run", run, "--resume", "--train.max_steps", "22")[0] == 0
    assert load_recipe(run / "config.yaml").train.max_steps == 22


def test_a_cosine_over_epochs_is_resumed_as_it_was(text, tmp_path, command, metrics):
    "Packed epochs differ by some steps: the cosine's end is that of the first one, in whichever epoch a run goes on"
    run = tmp_path / "run"
    assert command("train", "--config", text / "tiny.yaml", "--run", run, "--train.max_steps", "null",
        "--train.max_epochs", 3, "--train.schedule", "cosine", "--train.keep_checkpoints", 50)[0] == 0
    whole, rates = load_file(run / "model.safetensors"), [line.get("learning_rate") for line in metrics(run)]
    steps = {line["step"]: line["epoch"] for line in metrics(run) if "validation_loss" in line}
    for step, epoch in steps.items():
        if epoch >= 2: shutil.rmtree(run / "checkpoints" / f"{step:08d}")
    (run / "model.safetensors").unlink()
    assert command("train", "--run", run, "--resume")[0] == 0
    assert [line.get("learning_rate") for line in metrics(run)] == rates
    again = load_file(run / "model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_mistake_does_not_cost_the_run_that_is_there(run, text, command, contents):
    before = contents(run)
    for mistake in ["--data.train", text / "nowhere"], ["--data.joint", "false"], ["--train.tokens_per_batch", "5"]:
        status, _, error = command("train", "--config", text / "tiny.yaml", "--run", run, "--overwrite", *mistake)
        assert status == 2 and len(error) == 1 and contents(run) == before, mistake


# ---- what is wrong: one line, which names it ----

@pytest.fixture(scope="session")
def mess(text, tmp_path_factory):
    "A folder of files with something wrong in each"
    folder = tmp_path_factory.mktemp("mess")
    for name, en, de in (
        ("unequal", b"a\nb\nc\n", b"x\ny\n"), ("empty", b"", b""), ("half", b"a\n", b""),
        ("blank", b"\n\n", b"\n\n"), ("latin", b"caf\xe9\n", b"x\n"), ("nul", b"a\n", b"x\0y\n"),
        ("long", b"ab " * 33_334 + b"\n", b"x\n"),
    ):
        (folder / f"{name}.en").write_bytes(en), (folder / f"{name}.de").write_bytes(de)
    (folder / "alone.en").write_text("a\n")
    (folder / "folder").mkdir()
    recipe = yaml.safe_load((text / "tiny.yaml").read_text())
    for name, section, field, value in (
        ("unknown", "model", "widht", 3), ("typed", "model", "d_model", "wide"), ("fraction", "model", "heads", 1.5),
        ("corpus", "data", "corpus", "europarl"), ("nothing", "train", "tokens_per_batch", None),
        ("heads", "model", "heads", 3), ("boolean", "data", "joint", "perhaps"), ("list", "train", "max_steps", [1, 2]),
    ):
        changed = recipe | {section: recipe[section] | {field: value}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(changed))
    for name, content in (
        ("section", yaml.safe_dump(recipe | {"modle": {"heads": 2}})),
        ("word", yaml.safe_dump(recipe | {"model": "large"})), ("lists", yaml.safe_dump(recipe | {"train": [1, 2]})),
        ("broken", "model: {heads: 2\ntrain: ["), ("tabs", "model:\n\theads: 2\n"), ("items", "- a\n- b\n"),
        ("text", "hello"),
    ): (folder / f"{name}.yaml").write_text(content)
    (folder / "binary.yaml").write_bytes(b"model: \xff\xfe\0")
    return folder


TRAIN = {  # what is added to a good command, and what the one line names
    "unequal files": ("--data.train {mess}/unequal", "unequal.en has 3 lines, {mess}/unequal.de has 2"),
    "empty files": ("--data.train {mess}/empty", "empty.en is empty"),
    "one empty file": ("--data.validation {mess}/half", "half.de is empty"),
    "empty lines only": ("--data.train {mess}/blank", "No training pairs left: of 2, empty took 2"),
    "invalid UTF-8": ("--data.train {mess}/latin", "latin.en, line 1: byte 4 (0xe9) is not UTF-8"),
    "NUL byte": ("--data.validation {mess}/nul", "nul.de, line 1: a NUL byte"),
    "no such prefix": ("--data.train {mess}/nowhere", "nowhere.en"),
    "no such folder": ("--data.train {mess}/no/where", "no such folder as {mess}/no"),
    "one language": ("--data.test {mess}/alone", "alone.de"),
    "other language": ("--data.target fr", "train.fr"),
    "one language twice": ("--data.target en", "'en'"),
    "everything too long": ("--data.train {mess}/long", "too_long took 1. Look at the text, data.clean and"),
    "longer than a batch": ("--train.tokens_per_batch 5", "tokens_per_batch=5"),
    "unknown field": ("--model.widht 3", "widht"),
    "unknown section": ("--modle.heads 2", "modle"),
    "wrong type": ("--model.d_model wide", "d_model"),
    "fraction": ("--model.heads 1.5", "heads"),
    "not a number": ("--train.learning_rate nan", "train.learning_rate"),
    "heads": ("--model.heads 3", "3 heads do not divide a width of 16"),
    "odd width": ("--model.d_model 15 --model.heads 3", "d_model must be even"),
    "dropout": ("--model.dropout 1.0", "dropout must be in [0, 1)"),
    "norm": ("--model.norm between", "norm"),
    "two vocabularies tied": ("--data.joint false", "tie_embeddings"),
    "small vocabulary": ("--data.vocab_size 200", "vocab_size=200"),
    "unknown corpus": ("--data.corpus europarl", "europarl"),
    "unknown tokenizer": ("--data.tokenizer syllable", "syllable"),
    "no hub folder": ("--data.corpus multi30k --data.path {mess}/hub --data.train null --data.validation null "
                      "--data.test null", "{mess}/hub"),
    "no validation split": ("--data.validation null", "needs a validation split"),
    "no train split": ("--data.train null", "needs a train split"),
    "no end": ("--train.max_steps null", "train.max_steps or train.max_epochs"),
    "average": ("--train.average 4", "train.average"),
    "precision": ("--train.precision fp64", "fp64"),
    "beam": ("--decode.beam 0", "decode.beam"),
    "flag with a value": ("--resume 3", "3"),
    "no config": ("--config {mess}/nowhere.yaml", "nowhere.yaml"),
    "a folder": ("--config {mess}/folder", "{mess}/folder"),
    "unknown field in YAML": ("--config {mess}/unknown.yaml", "widht"),
    "wrong type in YAML": ("--config {mess}/typed.yaml", "d_model"),
    "fraction in YAML": ("--config {mess}/fraction.yaml", "heads"),
    "corpus in YAML": ("--config {mess}/corpus.yaml", "europarl"),
    "null in YAML": ("--config {mess}/nothing.yaml", "tokens_per_batch"),
    "heads in YAML": ("--config {mess}/heads.yaml", "3 heads do not divide a width of 16"),
    "boolean in YAML": ("--config {mess}/boolean.yaml", "joint"),
    "list in YAML": ("--config {mess}/list.yaml", "max_steps"),
    "unknown section in YAML": ("--config {mess}/section.yaml", "modle"),
    "section is a word": ("--config {mess}/word.yaml", "model"),
    "section is a list": ("--config {mess}/lists.yaml", "train"),
    "broken YAML": ("--config {mess}/broken.yaml", "broken.yaml"),
    "tabs in YAML": ("--config {mess}/tabs.yaml", "tabs.yaml"),
    "a list of YAML": ("--config {mess}/items.yaml", "items.yaml"),
    "a word of YAML": ("--config {mess}/text.yaml", "text.yaml"),
    "binary YAML": ("--config {mess}/binary.yaml", "binary.yaml"),
}


def wrong(result, names):
    status, _, error = result
    assert status == 2 and len(error) == 1, error
    assert error[0].startswith("flash-transformer: ") and names in error[0], error[0]
    return error[0]


@pytest.mark.parametrize("more, names", TRAIN.values(), ids=TRAIN)
def test_recipe_or_text_that_is_wrong(mess, text, tmp_path, command, more, names):
    run, base = tmp_path / "run", [] if ".yaml" in more else ["--config", text / "tiny.yaml"]
    wrong(command("train", *base, *more.format(mess=mess).split(), "--run", run), names.format(mess=mess))
    assert not run.exists() or {p.name for p in run.iterdir()} <= {"data"}   # which the next attempt may replace


@pytest.mark.parametrize("arguments, names", [
    ("", "ommand"), ("trian", "trian"), ("train", "run"), ("train --run", "--run"), ("translate", "run"),
    ("backends extra", "extra"), ("translate run --beam many", "many"), ("translate run --bean 2", "bean"),
    ("evaluate run more", "more")])
def test_command_that_is_none(command, tmp_path, monkeypatch, arguments, names):
    monkeypatch.chdir(tmp_path)
    wrong(command(*arguments.split()), names)
    assert not list(tmp_path.iterdir())


# ---- run folders ----

def test_existing_run_is_left_alone(run, text, command, contents):
    before = contents(run)
    for name in "train", "preprocess":
        error = wrong(command(name, "--config", text / "tiny.yaml", "--run", run), f"{run} already exists")
        assert "--overwrite" in error and contents(run) == before


@pytest.mark.parametrize("strange", ["thesis.txt", "config.yaml"])
@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
def test_folder_that_is_no_run_is_left_alone(text, tmp_path, command, contents, strange, flag):
    "Not even a config.yaml makes it one: many programs have such a file"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / strange).write_text("port: 80\n"), (tmp_path / "mine" / "letters").mkdir()
    (tmp_path / "mine" / "letters" / "dear.txt").write_text("years of work")
    before = contents(tmp_path)
    result = command("train", "--config", text / "tiny.yaml", "--run", tmp_path / "mine", *flag)
    error = wrong(result, "mine")
    assert contents(tmp_path) == before
    assert ("letters" if flag else "already exists") in error


@pytest.mark.parametrize("flag", [[], ["--overwrite"], ["--resume"]])
def test_file_where_a_run_should_be(text, tmp_path, command, flag):
    (tmp_path / "run").write_text("not a folder")
    wrong(command("train", "--config", text / "tiny.yaml", "--run", tmp_path / "run", *flag), str(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "not a folder"


def test_resume_without_a_checkpoint(text, run, tmp_path, command, contents):
    "Says so, and leaves nothing that would be in the way of training without --resume, as it advises"
    where = tmp_path / "new"
    result = command("train", "--config", text / "tiny.yaml", "--run", where, "--resume")
    error = wrong(result, f"{where} holds no checkpoint")
    assert "without --resume" in error and not where.exists()
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    wrong(command("train", "--run", run, "--resume"), f"{run} holds no checkpoint")
    assert contents(run) == before


def test_what_cannot_change_on_the_way(run, text, tmp_path, command, contents):
    "The shape of what is resumed; the text of what is prepared"
    before = contents(run)
    wrong(command("train", "--run", run, "--resume", "--model.d_ff", "64"), "model.d_ff")
    wrong(command("train", "--run", run, "--resume", "--overwrite"), "--overwrite")
    assert contents(run) == before
    options = ["--config", text / "tiny.yaml", "--run", tmp_path / "new"]
    assert command("preprocess", *options)[0] == 0
    before = contents(tmp_path / "new")
    for name in "train", "preprocess": wrong(command(name, *options, "--data.vocab_size", "300"), "data.vocab_size")
    assert contents(tmp_path / "new") == before


def test_resume_from_a_damaged_checkpoint(run, command):
    last = run / "checkpoints" / "00000020"
    (last / "optimiser.safetensors").write_bytes(b"")
    wrong(command("train", "--run", run, "--resume"), str(last))
    shutil.rmtree(last)
    assert command("train", "--run", run, "--resume")[0] == 0


class Evil:
    "When unpickled, makes a folder"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def weights(change): return lambda run: change(run / "model.safetensors")
def without(name): return lambda path: save_file({k: v for k, v in load_file(path).items() if name not in k}, path)
def unlink(name): return lambda run: (run / name).unlink()
def write(name, content): return lambda run: (run / name).write_bytes(content)


RUNS = {
    "no such folder": (shutil.rmtree, "run is no run folder"),
    "no config": (unlink("config.yaml"), "run is no run folder: it has no config.yaml"),
    "no weights": (unlink("model.safetensors"), "no weights at "),
    "no tokenizer": (unlink("tokenizer.json"), "run has no tokenizer.json"),
    "weights cut off": (weights(lambda p: p.write_bytes(p.read_bytes()[:-7])), "is not a whole safetensors file"),
    "foreign weights": (weights(lambda p: save_file({"embed.weight": torch.ones(3, 3)}, p)), "another model"),
    "a tensor is missing": (weights(without("out_proj.bias")), "out_proj.bias is missing in the file"),
    "a pickle": (weights(lambda p: p.write_bytes(pickle.dumps(Evil(p.parent / "executed")))), "is not a whole"),
    "broken config": (write("config.yaml", b"model: {heads: 2\n"), "config.yaml is damaged"),
    "config of bytes": (write("config.yaml", b"\xff\0"), "config.yaml is damaged"),
    "config of something else": (write("config.yaml", b"port: 80\n"), "config.yaml describes no model"),
    "damaged tokenizer": (write("tokenizer.json", b"{}"), "tokenizer.json"),
}


@pytest.mark.parametrize("damage, names", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("name", ["evaluate", "translate", "plot"])
def test_run_that_does_not_serve(run, command, name, damage, names):
    damage(run)
    wrong(command(name, run, stdin=b"The dog sleeps.\n"), names)
    assert not (run / "executed").exists() and not (run / "plots").exists()


@pytest.mark.parametrize("change, names", [
    (lambda recipe: recipe.pop("data"), "config.yaml"), (lambda recipe: recipe["data"].update(extra=1), "extra"),
    (lambda recipe: recipe.update(data="toy"), "config.yaml")], ids=["no data", "unknown field", "a word"])
def test_run_that_does_not_say_its_text(run, command, change, names):
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    change(recipe)
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    wrong(command("evaluate", run), names)


OF_EVALUATE = [("--split dev", "no dev split, only train, validation, test"), ("--data {text}/nowhere", "nowhere.en"),
               ("--data {mess}/unequal", "has 3 lines")]
OF_BOTH = [("--beam 0", "beam must be at least 1"), ("--beam -3", "beam"), ("--device toaster", "toaster"),
           ("--device cuda:99", "cuda")]


@pytest.mark.parametrize("name, more, names", [(name, *case) for name, cases in (
    ("evaluate", OF_EVALUATE + OF_BOTH), ("translate", OF_BOTH)) for case in cases])
def test_option_that_is_wrong(finished, command, contents, text, mess, name, more, names):
    before = contents(finished)
    wrong(command(name, finished, *more.format(text=text, mess=mess).split(), stdin=b"The dog sleeps.\n"), names)
    assert contents(finished) == before


def test_standard_input_that_is_not_utf8(finished, command):
    error = wrong(command("translate", finished, stdin=b"a dog\ncaf\xe9\n"), "standard input, line 2")
    assert "not UTF-8" in error and "byte 4" in error


def test_a_line_of_100_000_characters_to_translate(finished, command):
    wrong(command("translate", finished, stdin=b"a dog\n" + b"xy " * 33_334 + b"\n"), "begins 'xy xy xy")


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_recipe_needs_both_stacks(stack, text, tmp_path, command):
    "said before anything is prepared"
    run = tmp_path / "run"
    status, _, said = command("train", "--config", text / "tiny.yaml", "--run", run, f"--model.{stack}_layers", "0")
    assert status == 2 and f"model.{stack}_layers must be at least 1" in said[-1] and not run.exists()
