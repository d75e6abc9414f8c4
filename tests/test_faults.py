"Training killed, stopped and starved of disk at any moment: what is resumed ends bit for bit as if nothing had been."
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from children import (
    afresh,
    at_call,
    at_operation,
    command,
    go_on,
    kill,
    one_line,
    preparing,
    same,
    saved,
    send,
    slow_fsync,
    start,
    wait,
)
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def recipe(prepared): return prepared.parent / "recipe.yaml"


@pytest.fixture(scope="module")
def undisturbed(prepared, recipe, tmp_path_factory):
    "A run that nothing befell; beside it operations.log, the file operations of it"
    folder = tmp_path_factory.mktemp("undisturbed")
    run, log = shutil.copytree(prepared, folder / "run"), folder / "operations.log"
    counting = partial(at_operation, run, kill, 10 ** 9, log=log)
    assert wait(start(command, afresh(run, recipe) + ["--overwrite"], counting, output=folder / "log")) == 0
    assert [int(p.name) for p in saved(run)] == [3, 9, 12, 15, 17]         # the best one and the last four
    return run


# ---- kill -9 ----

def killed(run, recipe, moment, operations, seconds, output):
    "Train until it is done or killed at this kind of moment; True if it is done"
    faults = {"operation": [partial(at_operation, run, kill, random.randrange(operations))],
              "checkpoint": [partial(slow_fsync, 0.01)]}.get(moment, [])
    child = start(command, go_on(run, recipe), *faults, output=output)
    if moment == "checkpoint":                               # wait for one that is being written
        nth = random.randrange(4)
        seen = set()
        while child.is_alive() and len(seen) <= nth:
            for _, folders, files in os.walk(run): seen |= {n for n in folders + files if "unfinished" in n}
            time.sleep(0.001)
    if moment != "operation":
        child.join(random.uniform(0, 0.1 if moment == "checkpoint" else seconds))
        if moment != "end": child.kill()
    status = wait(child)
    assert status in (0, -signal.SIGKILL), (status, moment, output.with_suffix(".err").read_text())
    return status == 0


def kill_often(times, recipe, prepared, undisturbed, tmp_path, seed=None):
    random.seed(seed := seed or time.time_ns() % 2 ** 32)
    print(f"seed {seed}")                                    # pytest shows it when the test fails
    operations, kills, runs = len((undisturbed.parent / "operations.log").read_text().splitlines()), 0, 0
    seconds = (undisturbed / "model.safetensors").stat().st_mtime - (undisturbed / "config.yaml").stat().st_mtime
    while kills < times:
        run = shutil.copytree(prepared, tmp_path / f"run{runs}")
        done, runs = False, runs + 1
        while not done:
            moment = random.choice(["time", "operation", "checkpoint"]) if kills < times else "end"
            done = killed(run, recipe, moment, operations, seconds + 0.2, tmp_path / "log")
            kills += not done
        same(run, undisturbed)


def test_the_scale_of_fp16_is_taken_up(recipe, prepared, metrics, tmp_path):
    "Killed in the second validation; the scale changes before and after, and steps are skipped where it was too large"
    whole, parts = (shutil.copytree(prepared, tmp_path / name) for name in ("whole", "parts"))
    changes = {"precision": "fp16", "max_steps": 9, "log_every": 1, "learning_rate": 0.003}
    fp16 = [word for name, value in changes.items() for word in (f"--train.{name}", str(value))]
    now = partial(at_call, "flash_transformer.training.trainer.validation_loss", kill, 1)
    for run, faults in (whole, []), (parts, [now]), (parts, []):
        child = start(command, go_on(run, recipe) + fp16, children.eager_scaler, *faults, output=tmp_path / "log")
        assert wait(child) == (-signal.SIGKILL if faults else 0), (tmp_path / "log.err").read_text()
    assert any(line.get("gradient_norm", 0) is None for line in metrics(whole) if line["step"] > 3)
    same(parts, whole)


def test_killed_at_thirty_moments(recipe, prepared, undisturbed, tmp_path):
    kill_often(30, recipe, prepared, undisturbed, tmp_path)


@pytest.mark.long
def test_killed_at_hundreds_of_moments(recipe, prepared, undisturbed, tmp_path):
    kill_often(300, recipe, prepared, undisturbed, tmp_path)


@pytest.mark.long
def test_killed_while_the_corpus_is_streamed(recipe, tmp_path):
    "Each window has ten batches or so; a resumed run opens the one it was in"
    streamed, run = tmp_path / "streamed.yaml", tmp_path / "undisturbed" / "run"
    streamed.write_text(recipe.read_text().replace("data: {", "data: {streaming: true, window: 130, "))
    (tmp_path / "empty").mkdir()
    counting = partial(at_operation, run, kill, 10 ** 9, log=run.parent / "operations.log")
    run.parent.mkdir()
    assert wait(start(command, afresh(run, streamed), counting, output=tmp_path / "log")) == 0
    kill_often(60, streamed, tmp_path / "empty", run, tmp_path)


@pytest.mark.long
def test_killed_as_a_user_starts_it(recipe, prepared, undisturbed, tmp_path):
    "A new Python each time, which spends its first seconds with imports"
    random.seed(seed := time.time_ns() % 2 ** 32)
    print(f"seed {seed}")
    script, kills, runs = "import sys; from flash_transformer.cli import main; sys.exit(main())", 0, 0
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    while kills < 30:
        run, status = shutil.copytree(prepared, tmp_path / f"run{runs}"), -signal.SIGKILL
        runs += 1
        while status:
            with open(tmp_path / "said", "w") as said:
                child = subprocess.Popen([sys.executable, "-c", script, *map(str, go_on(run, recipe))], env=here,
                                         stdout=said, stderr=said)
            before = time.monotonic()
            while child.poll() is None and not any(p.suffix == ".jsonl" for p in run.iterdir()): time.sleep(0.01)
            try: child.wait(random.uniform(0, 1.5 * (time.monotonic() - before)))
            except subprocess.TimeoutExpired: child.kill()
            status = child.wait()
            assert status in (0, -signal.SIGKILL), (tmp_path / "said").read_text()
            kills += status != 0
        same(run, undisturbed)


# ---- a full disk ----

@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    (folder / "mnt").mkdir()
    return wait(start(children.can_mount, folder / "mnt", output=folder / "log")) == 0


def starved(how, room, before, run, first, then, output):
    child = start(children.starve, how, room, before, run, first, then, output, output=output)
    assert wait(child) == 0, Path(f"{output}.err").read_text()
    return Path(f"{output}.status").read_text().split()


@pytest.mark.parametrize("how, kilobytes", [("disk", 0), ("disk", 120), ("disk", 600), ("quota", 60), *(
    pytest.param(*case, marks=pytest.mark.long) for case in [
        *(("disk", kb) for kb in (20, 40, 80, 160, 200, 250, 300, 400, 500, 650)), ("quota", 10), ("quota", 100)])])
def test_full_disk(how, kilobytes, disk, recipe, prepared, undisturbed, tmp_path):
    "Status 2 and one line; the newest checkpoint is whole; once there is room, it ends as if there had been always"
    if how == "disk" and not disk: pytest.skip("neither root nor a user namespace here: no small disk can be mounted")
    run, output = tmp_path / "disk" / "run", tmp_path / "log"
    status = starved(how, 1024 * kilobytes, prepared, run, afresh(run, recipe), partial(go_on, recipe=recipe), output)
    assert status == ["2", "0"], (status, Path(f"{output}.1.err").read_text(), Path(f"{output}.2.err").read_text())
    one_line(Path(f"{output}.1.err"), "No space left" if how == "disk" else "File too large")
    left = Path(f"{output}.left")
    assert not any("unfinished" in p.name for p in left.rglob("*"))
    for folder in saved(left): whole(folder, undisturbed)
    same(Path(f"{output}.end"), undisturbed)


def whole(folder, undisturbed):
    "Every file of a checkpoint loads"
    for name in "model.safetensors", "optimiser.safetensors":
        assert load_file(folder / name).keys() == load_file(saved(undisturbed)[-1] / name).keys()
    assert json.loads((folder / "state.json").read_text())["step"] == int(folder.name)




@pytest.mark.parametrize("how, kilobytes", [("disk", 0), ("disk", 28), ("quota", 4), *(
    pytest.param(*case, marks=pytest.mark.long) for case in [("disk", kb) for kb in range(4, 100, 16)])])
def test_full_disk_while_preparing(how, kilobytes, disk, recipe, prepared, contents, tmp_path):
    if how == "disk" and not disk: pytest.skip("neither root nor a user namespace here: no small disk can be mounted")
    run, output = tmp_path / "disk" / "run", tmp_path / "log"
    prepare = partial(preparing, recipe=recipe)
    status = starved(how, 1024 * kilobytes, None, run, prepare(run), prepare, output)
    assert status == ["2", "0"], (status, Path(f"{output}.1.err").read_text(), Path(f"{output}.2.err").read_text())
    one_line(Path(f"{output}.1.err"), "No space left" if how == "disk" else "File too large")
    assert contents(Path(f"{output}.end")) == contents(prepared)


def test_preparing_is_killed(recipe, prepared, contents, tmp_path):
    "At six moments of one preparation"
    random.seed(seed := time.time_ns() % 2 ** 32)
    print(f"seed {seed}")
    run, log = tmp_path / "run", tmp_path / "log"
    for _ in range(6):
        wait(start(command, preparing(run, recipe), partial(at_operation, run, kill, random.randrange(25)), output=log))
    assert wait(start(command, preparing(run, recipe), output=log)) == 0, (tmp_path / "log.err").read_text()
    assert contents(run) == contents(prepared)


# ---- SIGTERM and SIGINT ----

def stopped(run, recipe, output, *faults):
    "Train until a signal comes: exit status 2, a line that says so, and a checkpoint; or it was done in that moment"
    status = wait(start(command, go_on(run, recipe), *faults, output=output))
    if status == 0: return
    assert status == 2, Path(f"{output}.err").read_text()
    last = saved(run)[-1]
    one_line(Path(f"{output}.err"), f"at step {int(last.name)}", str(last), "--resume")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_stopped_at_any_moment(name, recipe, prepared, undisturbed, tmp_path):
    "While it validates, twice; then at file operations, most of which are those of checkpoints"
    random.seed(seed := time.time_ns() % 2 ** 32)
    print(f"seed {seed}")
    run, stop = shutil.copytree(prepared, tmp_path / "run"), partial(send, getattr(signal, name))
    stopped(run, recipe, tmp_path / "log",
            partial(at_call, "flash_transformer.training.trainer.validation_loss", stop, random.randrange(3)))
    for _ in range(4):
        stopped(run, recipe, tmp_path / "log",
                partial(at_operation, run, stop, random.randrange(15), since="metrics.jsonl"))
    assert wait(start(command, go_on(run, recipe), output=tmp_path / "log")) == 0
    same(run, undisturbed)


# ---- on the disk, not only on its way there ----

def test_nothing_takes_its_name_before_it_is_on_the_disk(recipe, prepared, tmp_path):
    run, log = shutil.copytree(prepared, tmp_path / "run"), tmp_path / "renamed"
    flushing = partial(children.note_unflushed, run, log)
    for _ in range(2):
        assert wait(start(command, [*go_on(run, recipe), "--train.max_steps", "9"], flushing,
                          output=tmp_path / "log")) == 0
        shutil.rmtree(saved(run)[-1])                        # so that the second time metrics are cut
    lines = [line.split() for line in log.read_text().splitlines()]
    assert {"metrics.jsonl", "model.safetensors", "00000003"} <= {words[2] for words in lines if words[0] == "rename"}
    assert all(words[0] == "rename" and len(words) == 3 for words in lines), lines


# ---- what looks like a file of a run and is code ----

class Evil:
    "When unpickled, makes a folder"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def as_pickle(path, mark): path.write_bytes(pickle.dumps(Evil(mark)))
def as_torch(path, mark): torch.save(Evil(mark), path)
def as_array(path, mark):
    with open(path, "wb") as file: np.save(file, np.array([Evil(mark)], dtype=object), allow_pickle=True)
def as_yaml(path, mark): path.write_text(f"model: !!python/object/apply:os.mkdir ['{mark}']\n")


@pytest.fixture(name="here")
def command_here(command): return command


COMMANDS = {"train": ["train", "--resume", "--run"], "translate": ["translate"],
            "evaluate": ["evaluate"], "plot": ["plot"]}
REFUSED = {
    "train": ["config.yaml", "tokenizer.json", "data/tokenizer.json", *(f"data/{split}/{name}" for split in
              ("train", "validation") for name in ("source.npy", "target_offsets.npy", "pairs.json")),
              *(f"checkpoints/00000017/{n}" for n in ("model.safetensors", "optimiser.safetensors", "state.json")),
              "checkpoints/00000015/model.safetensors"],
    **{name: ["config.yaml", "tokenizer.json", "model.safetensors"] for name in ("translate", "evaluate", "plot")}}


@pytest.mark.parametrize("name, file", [(name, file) for name, files in REFUSED.items() for file in files])
def test_code_is_refused(name, file, undisturbed, here, tmp_path):
    run, mark = shutil.copytree(undisturbed, tmp_path / "run"), tmp_path / "executed"
    assert (run / file).exists()
    kinds = {".yaml": [as_yaml], ".npy": [as_array, as_torch], ".json": [as_pickle], ".safetensors": [as_torch]}
    for plant in kinds[Path(file).suffix]:
        plant(run / file, mark)
        status, _, error = here(*COMMANDS[name], run, stdin=b"The dog sleeps.\n")
        assert status == 2 and len(error) == 1 and error[0].startswith("flash-transformer: "), (status, error)
        assert not mark.exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_code_that_nobody_asks_for(name, undisturbed, here, tmp_path):
    "Every other file, and those that other programs would load"
    run, mark = shutil.copytree(undisturbed, tmp_path / "run"), tmp_path / "executed"
    others = [run / other for other in ("pytorch_model.bin", "model.pt", "data/train.pkl", "conftest.py")]
    for path in [*(p for p in run.rglob("*") if p.is_file() and str(p.relative_to(run)) not in REFUSED[name]), *others]:
        as_torch(path, mark)
    status, _, error = here(*COMMANDS[name], run, stdin=b"The dog sleeps.\n")
    print(status, error)
    assert not mark.exists() and status in (0, 2)
