"Checkpoints: going on bit for bit, death at any operation, full disks, foreign and malicious files, many processes."
import errno
import json
import os
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import launch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flash_transformer.training import checkpoints
from flash_transformer.training.checkpoints import (
    RunFolder,
    flush,
    load_checkpoint,
    load_model,
    save_checkpoint,
    whole,
)

OPTIMISERS = {
    "fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "plain": lambda p: torch.optim.SGD(p, lr=1e-2),
}


def make(seed=0, kind="fused", width=8):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 4))
    return model, OPTIMISERS[kind](model.parameters())


def train(model, optimiser, first, last):
    for step in range(first, last):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        (model(x) - x).pow(2).mean().backward()
        optimiser.step()


def same(model, other): return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


@pytest.fixture
def run(tmp_path):
    "A run folder with checkpoints at steps 3 and 6, and a line of metrics a step"
    run, (model, optimiser) = RunFolder(tmp_path / "run"), make()
    for step in 3, 6:
        train(model, optimiser, step - 3, step)
        for line in range(step - 2, step + 1): run.log(step=line, loss=1 / line)
        (run.path / "config.yaml").write_text("train: {seed: 1}\n")
        save_checkpoint(run.checkpoint(step), model, optimiser, {"step": step})
    return run


def names(folder): return sorted(p.name for p in folder.iterdir())


# ---- going on ----

@pytest.mark.parametrize("kind", OPTIMISERS)
def test_goes_on_bit_for_bit(tmp_path, kind):
    model, optimiser = make(kind=kind)
    train(model, optimiser, 0, 7)
    save_checkpoint(tmp_path / "checkpoints" / "00000007", model, optimiser, {"step": 7})
    again, its = make(seed=5, kind=kind)
    train(again, its, 50, 53)                            # whatever was there before
    assert load_checkpoint(tmp_path / "checkpoints" / "00000007", again, its) == {"step": 7}
    for m, o in (model, optimiser), (again, its): train(m, o, 7, 20)
    assert same(model, again)
    without, new = make(seed=5, kind=kind)               # the optimiser's part is part of it
    load_model(without, tmp_path / "checkpoints" / "00000007" / "model.safetensors")
    train(without, new, 7, 20)
    assert same(model, without) == (kind == "plain")


def test_what_a_checkpoint_holds(run):
    last = run.checkpoint(6)
    assert names(last) == ["config.yaml", "model.safetensors", "optimiser.safetensors", "state.json"]
    assert (last / "config.yaml").read_bytes() == (run.path / "config.yaml").read_bytes()
    model, optimiser = make()
    train(model, optimiser, 0, 6)
    tensors = load_file(last / "optimiser.safetensors")
    assert len(tensors) == 12
    for name, p in model.named_parameters():
        for kind, value in optimiser.state[p].items(): assert torch.equal(tensors.pop(f"{kind}.{name}"), value)
    assert not tensors


def test_loading_maps_no_file(run):
    "What was read stays as it is when the file changes"
    model, optimiser = make(1)
    load_checkpoint(run.checkpoint(6), model, optimiser)
    for name in "model", "optimiser":
        path = run.checkpoint(6) / f"{name}.safetensors"
        with open(path, "r+b") as file: file.write(bytes(path.stat().st_size))
    other, its = make()
    train(other, its, 0, 6)
    for m, o in (model, optimiser), (other, its): train(m, o, 6, 9)
    assert same(model, other)


def test_the_same_step_again_replaces_its_state_alone(run):
    model, optimiser = make(9)
    before = {p.name: (p.stat().st_ino, p.read_bytes()) for p in run.checkpoint(6).iterdir()}
    save_checkpoint(run.checkpoint(6), model, optimiser, {"step": 6, "best": 1.5})
    after = {p.name: (p.stat().st_ino, p.read_bytes()) for p in run.checkpoint(6).iterdir()}
    assert json.loads(after.pop("state.json")[1]) == {"step": 6, "best": 1.5}
    assert before.pop("state.json") and after == before


def test_what_cannot_be_saved(run):
    model, optimiser = make()
    with pytest.raises(TypeError, match="JSON"): save_checkpoint(run.checkpoint(9), model, optimiser, {"step": {1}})
    with pytest.raises(ValueError, match="over the parameters of this very model"):
        save_checkpoint(run.checkpoint(9), model, make()[1], {"step": 9})
    assert names(run.path / "checkpoints") == ["00000003", "00000006"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_as_readable_as_others(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        model, optimiser = make()
        run = RunFolder(tmp_path / "run")
        for step in 1, 2: save_checkpoint(run.checkpoint(step), model, optimiser, {"step": step})
        save_checkpoint(run.checkpoint(2), model, optimiser, {"step": 2})
        run.log(step=1)
        run.log(step=3)
        run.rewind(2)
        run.write_weights(2, 2)
    finally: os.umask(before)
    files = [p for p in run.path.rglob("*") if p.is_file()]
    assert len(files) == 8 and {stat.S_IMODE(p.stat().st_mode) for p in files} == {mode}


# ---- death at every operation ----

class Killed(BaseException): "As kill -9: nothing is tidied up behind it"


OPERATIONS = {os: ("replace", "fsync", "open", "close"), shutil: ("rmtree", "copyfile"), checkpoints: ("save_file",),
              Path: ("mkdir", "chmod", "write_text", "write_bytes")}


def die(monkeypatch, number):
    "At the so-manieth operation, and then no other; returns how many there were"
    count = [0]

    def watched(operation):
        def called(*args, **more):
            count[0] += 1
            if count[0] > number: raise Killed
            return operation(*args, **more)
        return called
    for place, operations in OPERATIONS.items():
        for name in operations: monkeypatch.setattr(place, name, watched(getattr(place, name)))
    return count


def everything(run):
    "What a trainer does when it resumes, at a checkpoint, then at the end of a run"
    run.rewind(6)
    model, optimiser = make()
    train(model, optimiser, 0, 9)
    save_checkpoint(run.checkpoint(9), model, optimiser, {"step": 9})
    save_checkpoint(run.checkpoint(9), model, optimiser, {"step": 9, "best": 2})
    run.prune(1, 3)
    run.remove(3)
    run.write_weights(1, 9)


def test_whatever_moment_it_dies_at(run, tmp_path, monkeypatch):
    expected = {}
    for step in 3, 6, 9:
        expected[step] = make()[0]
        train(expected[step], torch.optim.Adam(expected[step].parameters(), lr=1e-2, fused=True), 0, step)
    metrics, number, seen = [(run.path / "metrics.jsonl").read_bytes()], 0, set()
    run.log(step=7, loss=1)
    metrics.append((run.path / "metrics.jsonl").read_bytes())
    while True:
        copy = RunFolder(shutil.copytree(run.path, tmp_path / f"copy{number}"))
        with monkeypatch.context() as patch:
            count = die(patch, number)
            try: everything(copy)
            except Killed: pass
        steps = [int(p.name) for p in copy.checkpoints()]
        assert steps in ([3, 6], [3, 6, 9], [3, 9], [9]), (number, steps)
        seen.add((*steps, (copy.path / "model.safetensors").exists()))
        for folder in copy.checkpoints():
            model, optimiser = make(1)
            state = load_checkpoint(folder, model, optimiser)
            assert same(model, expected[state["step"]]), number
            assert int(folder.name) == state["step"] and state.keys() <= {"step", "best"}
        assert (copy.path / "metrics.jsonl").read_bytes() in metrics
        if (copy.path / "model.safetensors").exists():
            load_model(model, copy.path / "model.safetensors")
            assert same(model, expected[9])
        copy.tidy()
        assert not {p.name for p in copy.path.rglob("*")} - {"checkpoints", "metrics.jsonl", "config.yaml",
            "model.safetensors", "optimiser.safetensors", "state.json", *(f"{step:08d}" for step in steps)}
        if count[0] <= number: break
        number += 1
    assert number > 60 and len(seen) >= 5, (number, seen)


def test_on_the_disk_before_it_has_its_name(run, monkeypatch):
    "Each file and folder that a rename makes visible was flushed after it was last changed; then the parent"
    flushed, log, fsync, replace = {}, [], os.fsync, os.replace

    def now(p): return p.stat().st_mtime_ns, p.stat().st_size
    def noting(handle):
        fsync(handle)
        status = os.fstat(handle)
        flushed[status.st_ino] = status.st_mtime_ns, status.st_size
    def renamed(source, target):
        tree = [Path(source), *Path(source).rglob("*")]
        log.append((Path(target).name, len(tree), all(flushed.get(p.stat().st_ino) == now(p) for p in tree)))
        replace(source, target)
    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", renamed)
    model, optimiser = make()
    save_checkpoint(run.checkpoint(9), model, optimiser, {"step": 9})
    save_checkpoint(run.checkpoint(9), model, optimiser, {"step": 9})
    run.rewind(5)
    log = [entry for entry in log if not entry[0].endswith(".removed")]
    assert log == [("00000009", 5, True), ("state.json", 1, True), ("metrics.jsonl", 1, True)]
    for folder in run.path, run.path / "metrics.jsonl": assert flushed[folder.stat().st_ino] == now(folder), folder


def test_storage_that_cannot_flush_a_folder(tmp_path, monkeypatch):
    fsync = os.fsync

    def picky(number):
        def call(handle):
            if stat.S_ISDIR(os.fstat(handle).st_mode) or number == errno.EIO: raise OSError(number, os.strerror(number))
            fsync(handle)
        return call
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(os, "fsync", picky(errno.EINVAL))
    flush(tmp_path)
    flush(tmp_path / "file")
    monkeypatch.setattr(os, "fsync", picky(errno.EIO))
    for path in tmp_path, tmp_path / "file":
        with pytest.raises(OSError): flush(path)


# ---- a full disk ----

def no_space(number, word):
    def save(*_): raise SafetensorError(f"Error while serializing: I/O error: {word} (os error {number})")
    def write(*_, **__): raise OSError(number, word)
    return save, write


@pytest.mark.parametrize("where", ["save_file", "fsync", "write_text", "mkdir", "copyfile"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_full_disk(run, contents, monkeypatch, where, number):
    before = contents(run.path)
    save, write = no_space(number, os.strerror(number))
    model, optimiser = make()
    with monkeypatch.context() as patch:
        place = {"save_file": checkpoints, "fsync": os, "write_text": Path, "mkdir": Path, "copyfile": shutil}[where]
        patch.setattr(place, where, save if where == "save_file" else write)
        with pytest.raises(OSError) as caught: save_checkpoint(run.checkpoint(9), model, optimiser, {"step": 9})
    advice = "put that right" if number == errno.EROFS else "free some space"
    assert str(caught.value) == (f"checkpoint {run.checkpoint(9)} could not be written ({os.strerror(number)}): "
        f"{advice}, then go on with --resume; the last good checkpoint is {run.checkpoint(6)}")
    assert contents(run.path) == before
    save_checkpoint(run.checkpoint(9), model, optimiser, {"step": 9})          # and now there is room again
    assert len(run.checkpoints()) == 3


def test_full_disk_before_the_first_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "save_file", no_space(28, "No space left on device")[0])
    with pytest.raises(OSError, match="free some space, then start again, since there is no checkpoint yet"):
        save_checkpoint(RunFolder(tmp_path / "run").checkpoint(1), *make(), {"step": 1})


class Limit:
    "While entered, no file of this process may grow beyond so many bytes: a real EFBIG, after a part was written"
    def __init__(self, size): self.size = size

    def __enter__(self):
        self.resource = pytest.importorskip("resource", reason="Windows has no such limits")
        self.before = self.resource.getrlimit(self.resource.RLIMIT_FSIZE)
        self.resource.setrlimit(self.resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_): self.resource.setrlimit(self.resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("size", [0, 100, 600, 1500])
def test_file_limit(run, contents, size):
    "Some of its files fit, one does not"
    before, (model, optimiser) = contents(run.path), make()
    with pytest.raises(OSError, match="could not be written .*File too large.*free some space.*00000006"), Limit(size):
        save_checkpoint(run.checkpoint(9), model, optimiser, {"step": 9, "more": "x" * 2000})
    with pytest.raises(OSError, match="model.safetensors could not be written .*free some space"), Limit(50):
        run.write_weights(0, 6)
    assert contents(run.path) == before


def test_file_limit_and_metrics(run, contents):
    before = contents(run.path)
    size = (run.path / "metrics.jsonl").stat().st_size
    with pytest.raises(OSError, match="a line of .*metrics.jsonl could not be written .*free some space.*00000006"):
        with Limit(size + 9): run.log(step=7, loss=0.25)
    assert contents(run.path) == before
    with pytest.raises(OSError, match="metrics.jsonl could not be written .*free some space"), Limit(9): run.rewind(4)
    assert contents(run.path) == before
    run.log(step=7, loss=0.25)
    assert json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1]) == {"step": 7, "loss": 0.25}


def test_an_error_while_writing_leaves_no_trace(tmp_path):
    (tmp_path / "file").write_text("before")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), whole(tmp_path / "file") as new:
            new.write_text("half")
            raise error
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "before"


# ---- the run folder ----

def test_rewind(run):
    metrics = run.path / "metrics.jsonl"
    good = metrics.read_bytes()
    junk = b"\0\0\0\n" + b"[" * 100_000 + b'\n{"step": null}\n{"loss": 2}\n[1]\n7\n\xff\n\n'
    metrics.write_bytes(good[:40].partition(b"\n")[0] + b"\n" + junk + good.partition(b"\n")[2] + b'{"step": 7, "lo')
    run.rewind(6)
    assert metrics.read_bytes() == good and len(run.checkpoints()) == 2
    before = metrics.stat().st_mtime_ns, metrics.stat().st_ino
    run.rewind(6)                                        # nothing to do: nothing is written
    assert (metrics.stat().st_mtime_ns, metrics.stat().st_ino) == before
    run.rewind(4)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4]
    assert run.checkpoints() == [run.checkpoint(3)]
    run.rewind(-1)
    assert metrics.read_bytes() == b"" and run.checkpoints() == []
    RunFolder(run.path.with_name("none")).rewind(-1)
    assert names(run.path.parent) == ["run"]


def test_half_removed_looks_like_none(run, monkeypatch):
    "Also where its files cannot be removed, as on network storage where somebody reads them"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        run.prune(1, None)
        assert run.checkpoints() == [run.checkpoint(6)]
        assert names(run.path / "checkpoints") == ["00000003.removed", "00000006"]
    run.tidy()
    assert names(run.path / "checkpoints") == ["00000006"]
    run.remove(3)                                        # not there: no matter


def test_order_is_by_number(tmp_path):
    run = RunFolder(tmp_path)
    for step in 5, 99_999_999, 100_000_000, 20: run.checkpoint(step).mkdir(parents=True)
    for name in "notes", "00000030.unfinished", "00000030.removed", "²": (tmp_path / "checkpoints" / name).mkdir()
    assert [int(p.name) for p in run.checkpoints()] == [5, 20, 99_999_999, 100_000_000]
    run.prune(2, 5)
    assert [int(p.name) for p in run.checkpoints()] == [5, 99_999_999, 100_000_000]


# ---- averaging ----

def test_average_is_numpys(tmp_path):
    run, random = RunFolder(tmp_path), np.random.default_rng(0)
    values = [random.normal(size=(3, 50)).astype("float32") * 10 ** random.uniform(-6, 6, (3, 50)) for _ in range(7)]
    for step, value in enumerate(values):
        run.checkpoint(step).mkdir(parents=True)
        save_file({"w": torch.tensor(value, dtype=torch.float32), "b": torch.tensor([1e8 + 8 * step, 1.0])},
                  run.checkpoint(step) / "model.safetensors")
    for n in 1, 3, 7, 9:
        mean = run.average(n)
        right = np.mean([v.astype("float32").astype("float64") for v in values[-n:]], axis=0).astype("float32")
        np.testing.assert_array_max_ulp(mean["w"].numpy(), right, 1)
    assert mean["b"].tolist() == [1e8 + 24, 1.0] and mean["b"].dtype == torch.float32
    run.write_weights(3, 0)
    assert torch.equal(load_file(run.path / "model.safetensors")["w"], run.average(3)["w"])
    run.write_weights(0, 2)
    assert torch.equal(load_file(run.path / "model.safetensors")["w"], torch.tensor(values[2], dtype=torch.float32))
    (run.checkpoint(5) / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="00000005 is damaged.*remove it"): run.average(3)
    with pytest.raises(FileNotFoundError, match="nothing to average"): RunFolder(tmp_path / "no").average(1)


def grown(path):
    "Bytes by which a process that has averaged one checkpoint grows while it averages ten"
    import resource
    RunFolder(path).average(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    RunFolder(path).average(10)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)


def test_average_of_many_needs_room_for_one(tmp_path):
    run, tensor = RunFolder(tmp_path), torch.ones(2 ** 19)                            # 2 MB
    for step in range(10):
        run.checkpoint(step).mkdir(parents=True)
        save_file({f"w{i}": tensor * (i + step) for i in range(10)}, run.checkpoint(step) / "model.safetensors")
    assert launch(1, grown, tmp_path)[0] < 60e6     # all ten are 200 MB; what malloc holds varies by some 20 MB


# ---- what somebody else wrote ----

class Malice:
    def __init__(self, witness): self.witness = witness
    def __reduce__(self): return open, (str(self.witness), "w")


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "optimiser.safetensors", "state.json", "pytorch_model.bin",
                                  "optimizer.pt", "data.pkl"])
def test_no_code_runs(run, tmp_path, name, legacy):
    witness = tmp_path / "witness"
    evil = run.checkpoint(6) / name
    torch.save({"a": Malice(witness)}, evil, _use_new_zipfile_serialization=not legacy)
    model, optimiser = make(1)
    untouched = make(1)[0]
    with pytest.raises(ValueError) as caught: load_checkpoint(run.checkpoint(6), model, optimiser)
    said = str(caught.value)
    assert str(run.checkpoint(6)) in said and "remove it" in said and "\n" not in said and len(said) < 500
    assert not witness.exists() and same(model, untouched) and not optimiser.state
    torch.load(shutil.copy(evil, tmp_path / "evil.pt"), weights_only=False)
    assert witness.exists()                              # it was a real one
    witness.unlink()
    shutil.copy(evil, run.path / "model.safetensors")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_model(model, run.path / "model.safetensors")
    assert not witness.exists()


STATE = {"step": int, "best": float, "best_step": int | None, "scaler": dict | None}
GOOD = {"step": 6, "best": float("inf"), "best_step": None, "scaler": None}


@pytest.mark.parametrize("good", [GOOD, GOOD | {"best": 5, "best_step": 3, "scaler": {"scale": 2.0}}])
def test_state_of_the_expected_shape(run, good):
    save_checkpoint(run.checkpoint(6), *make(), good)
    assert load_checkpoint(run.checkpoint(6), *make(), STATE) == good


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "{}", '{"step": 6}', "[" * 100_000, "\x80", *(
    json.dumps(GOOD | change) for change in ({"step": "6"}, {"step": None}, {"step": 6.5}, {"step": True},
        {"best": None}, {"best_step": []}, {"scaler": 3}, {"more": 1}))])
def test_state_of_another_shape(run, text):
    (run.checkpoint(6) / "state.json").write_bytes(text.encode("latin-1"))
    model, optimiser = make(1)
    with pytest.raises(ValueError, match="00000006 is damaged .*remove it to go on from the one before") as caught:
        load_checkpoint(run.checkpoint(6), model, optimiser, STATE)
    assert "\n" not in str(caught.value) and same(model, make(1)[0])


def cut(path): path.write_bytes(path.read_bytes()[:-9])
def empty(path): path.write_bytes(b"")
def zeros(path): path.write_bytes(bytes(path.stat().st_size))     # as some file systems leave it without power
def folder(path): path.unlink(), path.mkdir()


@pytest.mark.parametrize("damage", [cut, empty, zeros, folder, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimiser.safetensors", "state.json"])
def test_damaged(run, name, damage):
    damage(run.checkpoint(6) / name)
    with pytest.raises(ValueError, match="00000006 is damaged .*remove it to go on from the one before") as caught:
        load_checkpoint(run.checkpoint(6), *make())
    assert "\n" not in str(caught.value)
    shutil.rmtree(run.checkpoint(6))
    assert load_checkpoint(run.checkpoints()[-1], *make()) == {"step": 3}


def test_of_another_model(run):
    with pytest.raises(ValueError, match=r"weights of another model: 0.bias is \(8,\) in the file, \(9,\) in this"):
        load_checkpoint(run.checkpoint(6), *make(width=9))
    shutil.copy(run.checkpoint(6) / "model.safetensors", run.checkpoint(6) / "optimiser.safetensors")
    with pytest.raises(ValueError, match="00000006 is damaged"): load_checkpoint(run.checkpoint(6), *make())
    save_file({"exp_avg.0.bias": torch.zeros(9)}, run.checkpoint(6) / "optimiser.safetensors")
    with pytest.raises(ValueError, match=r"00000006 is damaged \(exp_avg.0.bias has shape \(9,\)"):
        load_checkpoint(run.checkpoint(6), *make())


# ---- several processes ----

def transformer(seed):
    from flash_transformer.model import Transformer, TransformerConfig
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(d_model=16, d_ff=24, heads=2, encoder_layers=2, decoder_layers=1, dropout=0.0,
        source_vocab_size=31, target_vocab_size=31, tie_embeddings="all")).double()


def batch(step):
    random = torch.Generator().manual_seed(step)
    return (torch.randint(4, 31, (3, 5), generator=random), torch.tensor([5, 4, 2]),
            torch.randint(4, 31, (3, 6), generator=random))


def several(parallel, path, load, first, last, save):
    """Each process: load checkpoint `load` unless None, train on the same batches in all processes (their mean is each
    one's gradient, to rounding: hence float64), save. Returns all, whole."""
    from flash_transformer.training.processes import distribute, full_tensor, start_accelerator
    accelerator = start_accelerator("float32")
    model = transformer(first)
    wrapped, optimiser = distribute(model, OPTIMISERS["fused"], parallel, accelerator)
    optimiser, run = optimiser.optimizer, RunFolder(path)
    if load is not None: assert load_checkpoint(run.checkpoint(load), model, optimiser, {"step": int}) == {"step": load}
    for step in range(first, last):
        optimiser.zero_grad()
        accelerator.backward(wrapped(*batch(step)).logsumexp(-1).mean())
        optimiser.step()
    if hasattr(model, "unshard"): model.unshard()        # as FSDP2 itself leaves the outermost ones at times
    if save is not None:
        save_checkpoint(run.checkpoint(save), model, optimiser, {"step": save}, write=accelerator.is_main_process)
        assert run.checkpoint(save).exists()             # in every process: nobody is ahead of the one that writes
    found = {}
    for module in model.modules():
        if hasattr(module, "reshard"): module.reshard()
    for name, p in model.named_parameters():
        found[name] = full_tensor(p.detach()).numpy()
        for kind, value in optimiser.state[p].items(): found[f"{kind}.{name}"] = full_tensor(value.detach()).numpy()
    return found


def equal(found, path):
    saved = load_file(path / "model.safetensors") | load_file(path / "optimiser.safetensors")
    assert found.keys() == saved.keys() and len(saved) > 40
    return all(np.array_equal(found[name], saved[name].numpy()) for name in saved)


def test_saved_by_some_loaded_by_others(tmp_path):
    "Weights and averages are the same numbers however many processes hold them, and training goes on alike"
    folders = {step: RunFolder(tmp_path).checkpoint(step) for step in (4, 7, 8, 9)}
    for found in launch(2, several, "fsdp", tmp_path, None, 0, 4, 4): assert equal(found, folders[4])
    one, = launch(1, several, "ddp", tmp_path, 4, 4, 7, 7)
    two, _ = launch(2, several, "fsdp", tmp_path, 4, 4, 7, 8)
    for name in one: np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-12)
    for found in launch(3, several, "fsdp", tmp_path, 7, 7, 7, 9): assert equal(found, folders[7])
    for name in "model", "optimiser":                    # there and back
        assert (folders[7] / f"{name}.safetensors").read_bytes() == (folders[9] / f"{name}.safetensors").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("writers, parallel", [(2, "fsdp"), (3, "fsdp"), (4, "fsdp"), (2, "ddp"), (1, "ddp")])
def test_saved_by_any_loaded_by_any(tmp_path, writers, parallel):
    path = RunFolder(tmp_path).checkpoint(4)
    for found in launch(writers, several, parallel, tmp_path, None, 0, 4, 4): assert equal(found, path)
    for readers, how in (1, "ddp"), (2, "fsdp"), (3, "fsdp"), (4, "fsdp"), (2, "ddp"):
        for found in launch(readers, several, how, tmp_path, 4, 4, 4, None): assert equal(found, path)


def writer_fails(path):
    from flash_transformer.training.processes import distribute, start_accelerator
    accelerator = start_accelerator("float32")
    model = transformer(0)
    _, optimiser = distribute(model, OPTIMISERS["fused"], "fsdp", accelerator)
    if accelerator.is_main_process: checkpoints.save_file = no_space(28, "No space left on device")[0]
    try: save_checkpoint(RunFolder(path).checkpoint(1), model, optimiser.optimizer, {}, accelerator.is_main_process)
    except OSError as e: return str(e)


def test_all_processes_hear_of_a_full_disk(tmp_path):
    first, second = launch(2, writer_fails, tmp_path)
    assert "No space left on device" in first and "free some space" in first
    assert "00000001 could not be written: the process that writes says why" in second
    assert names(tmp_path / "checkpoints") == []
