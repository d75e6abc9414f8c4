"The recipes of WMT14 against the paper, the dry run against what happens, and the way through a hub."
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub_server import HubServer

from flash_transformer.config import load_recipe
from flash_transformer.data import prepare
from flash_transformer.model import Transformer, TransformerConfig
from flash_transformer.training import adam, distribute, dry_run, plan_for, start_accelerator
from flash_transformer.training.dry_run import _batch_bytes, _kept, _loss

ROOT = Path(__file__).parent.parent
RECIPES = {name: ROOT / "configs" / f"wmt14-{name}.yaml" for name in ("base", "big")}


# ---- the recipes ----

# Vaswani et al. 2017: sections 3 and 5, table 3, section 6.1
PAPER = {
    "data": dict(corpus="wmt14", source="en", target="de", tokenizer="bpe", vocab_size=37000, joint=True),
    "model": dict(encoder_layers=6, decoder_layers=6, norm="post", tie_embeddings="all", attention_dropout=0.0),
    "train": dict(warmup_steps=4000, label_smoothing=0.1, learning_rate=None, clip_norm=None, max_epochs=None),
    "decode": dict(beam=4, length_penalty=0.6, extra_length=50),
}
OWN = {"base": dict(d_model=512, d_ff=2048, heads=8, dropout=0.1, max_steps=100_000, average=5, seconds_a_step=0.4),
       "big": dict(d_model=1024, d_ff=4096, heads=16, dropout=0.3, max_steps=300_000, average=20, seconds_a_step=1.0)}


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_of_the_paper(name):
    recipe, own = load_recipe(RECIPES[name]), OWN[name]
    for section, fields in PAPER.items():
        assert {field: getattr(getattr(recipe, section), field) for field in fields} == fields
    for field in ("d_model", "d_ff", "heads", "dropout"): assert getattr(recipe.model, field) == own[field]
    train = recipe.train
    assert (train.max_steps, train.average) == (own["max_steps"], own["average"])
    assert train.average <= train.keep_checkpoints
    assert train.tokens_per_batch * train.accumulate == 25_000 and train.accumulate == 8
    assert train.checkpoint_every * own["seconds_a_step"] == 600                                   # ten minutes
    sizes = dict(source_vocab_size=37000, target_vocab_size=37000)
    assert replace(recipe.model, **sizes) == getattr(TransformerConfig, name)()
    settings = adam([torch.nn.Parameter(torch.zeros(1))], 1.0).defaults
    assert settings["betas"] == (0.9, 0.98) and settings["eps"] == 1e-9 and not settings["weight_decay"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_has_its_source(name):
    section = re.compile(r"\b[3-6]\.\d|table 3|open:")
    fields = [line for line in RECIPES[name].read_text().splitlines() if re.match(r"  \w+:", line)]
    unsaid = {line.split(":")[0].strip() for line in fields if not section.search(line.partition("#")[2])}
    # said in the line before or behind, or of no effect on the result
    assert unsaid == {"target", "decoder_layers", "max_ratio", "keep_checkpoints", "log_every", "seed"}


# ---- the dry run ----

@pytest.fixture
def recipe(text): return load_recipe(text / "tiny.yaml")


def run(recipe, folder=None, **changes):
    sections = {name: replace(getattr(recipe, name), **changes.get(name, {})) for name in ("data", "model", "train")}
    return dry_run(*sections.values(), folder)


def test_before_anything_is_prepared(recipe, tmp_path, contents):
    found = run(recipe, tmp_path / "run" / "data")
    assert not found.problems and str(found).splitlines()[-1] == "Nothing stands against training."
    assert found.numbers["pairs"] == 300 and found.numbers["steps"] == 20 and found.numbers["hours"] > 0
    assert contents(tmp_path) == {}                                             # nothing is left behind
    assert {"corpus", "tokens", "steps", "model", "disk", "memory", "speed", "use", "time"} == found.lines.keys()


def test_of_what_is_prepared_it_knows_exactly(recipe, tmp_path):
    prepared = prepare(recipe.data, tmp_path / "data")
    found = run(recipe, tmp_path / "data", train=dict(accumulate=3, max_epochs=7, max_steps=None))
    plan, _ = plan_for(prepared.train, recipe.train.tokens_per_batch, packed=True)
    assert found.numbers["steps_an_epoch"] == -(-len(plan) // 3) and found.numbers["epochs"] == 7
    assert found.numbers["steps"] == 7 * found.numbers["steps_an_epoch"]
    sizes = dict(source_vocab_size=prepared.tokenizers.source_size, target_vocab_size=prepared.tokenizers.target_size)
    model = Transformer(replace(recipe.model, **sizes))
    assert found.numbers["parameters"] == sum(p.numel() for p in model.parameters())
    estimated = run(recipe, None, train=dict(accumulate=3, max_epochs=7, max_steps=None)).numbers["steps"]
    assert abs(estimated - found.numbers["steps"]) <= 0.25 * found.numbers["steps"]
    assert not found.problems
    other = run(recipe, tmp_path / "data", data=dict(max_length=99))
    assert any("other data settings" in problem for problem in other.problems)


def test_all_problems_are_told_at_once(recipe, monkeypatch, tmp_path):
    disk = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda place: disk)
    module = sys.modules["flash_transformer.training.dry_run"]        # the room gives its name to the function
    monkeypatch.setattr(module, "_free_bytes", lambda device: 2e6)
    found = run(recipe, data=dict(train=str(tmp_path / "missing")), train=dict(tokens_per_batch=5000))
    assert len(found.problems) == 3, found.problems
    assert all(any(word in problem for problem in found.problems) for word in
               ("missing.en", "only 0 MB are free there", "lower train.tokens_per_batch and raise train.accumulate"))
    assert not any("\n" in problem for problem in found.problems) and str(found).endswith(f"- {found.problems[-1]}")


@pytest.mark.parametrize("changes, words", [
    (dict(train=dict(tokens_per_batch=200)), "data.max_length = 256 tokens would not fit into a batch of 200"),
    (dict(train=dict(trackers=["nobody"])), "nobody"),
    (dict(data=dict(clean=["nonsense"])), "nonsense"),
    (dict(data=dict(vocab_size=100)), "vocab_size=100 is too small"),
    (dict(data=dict(validation=None)), "data.validation"),
    (dict(data=dict(train=None, validation=None, test=None, corpus="wmt14", path="/nowhere")), "/nowhere"),
    (dict(data=dict(max_length=2)), "No pairs left"),
])
def test_one_problem(recipe, changes, words):
    found = run(recipe, **changes)
    assert len(found.problems) == 1 and words in found.problems[0], found.problems
    if "model" in found.lines: assert found.numbers["parameters"] > 0           # and the rest is told all the same


def test_files_of_unequal_length(recipe, text, tmp_path):
    for language, more in ("en", "one more\n"), ("de", ""):
        lines = (text / f"train.{language}").read_text(encoding="utf-8")
        (tmp_path / f"train.{language}").write_text(lines + more, encoding="utf-8")
    [problem] = run(recipe, data=dict(train=str(tmp_path / "train"))).problems
    assert "301 lines" in problem and "300" in problem


def test_on_the_command_line(text, command, tmp_path):
    status, out, error = command("train", "--dry-run", "--config", text / "tiny.yaml", "--run", tmp_path / "run")
    assert (status, error) == (0, []) and "Nothing stands against training." in out and not (tmp_path / "run").exists()
    status, out, error = command("train", "--dry-run", "--config", text / "tiny.yaml", "--run", tmp_path / "run",
                                 "--train.tokens_per_batch", "200")
    assert status == 2 and len(error) == 1 and "would not fit into a batch of 200" in error[0] and "parameters" in out


# ---- memory ----

def peak_bytes(work):
    "The most that tensors take at a time while `work` runs, as PyTorch's profiler sees each allocation"
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen: work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_memory_of_a_batch(precision, recompute):
    "The estimate, from one and two pairs, against every allocation of a whole batch"
    torch.manual_seed(0)
    config = TransformerConfig(128, 512, 4, 3, 3, dropout=0.1, source_vocab_size=2000, target_vocab_size=2000)
    accelerator = start_accelerator(precision)
    model = Transformer(config)
    model.recompute = recompute
    wrapped, _ = distribute(model, lambda p: adam(p, 1e-3), "ddp", accelerator)
    rows, length = 16, 64
    estimate = _batch_bytes(model, rows, length)
    from flash_transformer.data import Batch
    ids, lengths = torch.full((rows, length), 5), torch.full((rows,), length)
    batch = Batch(ids, lengths, ids, ids, lengths)
    _loss(wrapped, batch).backward()                       # the gradients are there from now on
    measured = peak_bytes(lambda: _loss(wrapped, batch).backward())
    assert 0.8 * measured < estimate < 1.4 * measured, (estimate / 1e6, measured / 1e6)
    kept = [_kept(model, n, length) for n in (4, 8, 16)]
    assert 1.9 < (kept[2] - kept[1]) / (kept[1] - kept[0]) < 2.1               # linear in the pairs


# ---- through a hub ----

def hub_layout(root, corpus):
    "The folder of a hub that has `corpus` (split -> list of pairs) as wmt/wmt14"
    folder = root / "wmt" / "wmt14" / "de-en"
    folder.mkdir(parents=True)
    for split, pairs in corpus.items():
        rows = pa.array([{"de": de, "en": en} for en, de in pairs], pa.struct({"de": pa.string(), "en": pa.string()}))
        pq.write_table(pa.table({"translation": rows}), folder / f"{split}-00000-of-00001.parquet", row_group_size=100)
    splits = "".join(f"  - split: {split}\n    path: de-en/{split}-*\n" for split in corpus)
    (folder.parent / "README.md").write_text(f"---\nconfigs:\n- config_name: de-en\n  data_files:\n{splits}---\n")
    return root


def through_hub(hub, tmp_path, *changes):
    "The user's three commands with the recipe of WMT14 in a new process, its hub here and its cache empty"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    script = """if True:
        import sys
        from flash_transformer.cli import main
        for command in (["train", "--dry-run"], ["preprocess"], ["train"]):
            if main(command + sys.argv[1:]): sys.exit(f"{command} failed")"""
    arguments = ["--config", RECIPES["base"], "--run", tmp_path / "run", *changes]
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SMALL = ("--model.d_model 32 --model.d_ff 64 --model.heads 2 --model.encoder_layers 1 --model.decoder_layers 1 "
         "--train.tokens_per_batch 600 --train.accumulate 2 --train.warmup_steps 20 --train.checkpoint_every 15 "
         "--train.learning_rate 0.01 --train.log_every 5").split()


def test_the_way_through_a_hub(tmp_path, metrics):
    "A generated corpus in the hub's layout, with noise; the recipe, scaled down; and the loss falls"
    from flash_transformer.data import toy_corpus
    corpus = {split: list(zip(pairs["source"], pairs["target"])) for split, pairs in toy_corpus(400, 20, 20).items()}
    corpus["train"] += [("", "leer"), ("The dog sleeps.", "The dog sleeps."), ("Москва", "Москва"), corpus["train"][0]]
    with HubServer(hub_layout(tmp_path / "hub", corpus)) as hub:
        out = through_hub(hub, tmp_path, "--data.vocab_size", "400", "--train.max_steps", "30", *SMALL)
        asked = [path for method, path in hub.asked if path.endswith(".parquet")]
    assert "wmt/wmt14 de-en: about 40" in out and "Nothing stands against training." in out
    assert any("train-00000" in path for path in asked)
    report = json.loads((tmp_path / "run" / "data" / "report.json").read_text())
    assert report["pairs"] == 404 and report["kept"] == 400
    assert {rule: n for rule, n in report["taken"].items() if n} == dict(empty=1, script=1, copy=1, duplicates=1)
    validations = [line["validation_loss"] for line in metrics(tmp_path / "run") if "validation_loss" in line]
    first = [line["plain_loss"] for line in metrics(tmp_path / "run") if "plain_loss" in line][0]
    assert len(validations) == 2 and validations[1] < validations[0] < first + 0.5 and validations[1] < first - 1
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_hub_without_the_corpus(tmp_path):
    script = "import sys; from flash_transformer.cli import main; sys.exit(main())"
    with HubServer(tmp_path) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", script, "train", "--dry-run", "--config", RECIPES["base"], "--run",
            tmp_path / "run", *SMALL], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"could not read wmt/wmt14 de-en from {hub.url}" in last and "--data.path" in last
    assert "parameters" in done.stdout and "memory" in done.stdout             # the rest is told all the same


def test_the_real_sample(tmp_path, metrics):
    "A few steps on real sentences"
    data = os.environ.get("FLASH_TRANSFORMER_DATA")
    if not data: pytest.skip("FLASH_TRANSFORMER_DATA names no folder with wmt14-sample")
    if not Path(data, "wmt14-sample").is_dir(): pytest.skip(f"no wmt14-sample in {data}")
    (tmp_path / "hub" / "wmt").mkdir(parents=True)
    (tmp_path / "hub" / "wmt" / "wmt14").symlink_to(Path(data, "wmt14-sample").resolve(), target_is_directory=True)
    with HubServer(tmp_path / "hub") as hub:
        out = through_hub(hub, tmp_path, "--data.vocab_size", "2000", "--train.max_steps", "30", *SMALL)
    assert "Nothing stands against training." in out
    validations = [line["validation_loss"] for line in metrics(tmp_path / "run") if "validation_loss" in line]
    assert len(validations) == 2 and validations[1] < validations[0]
