"The same recipe on one process and on several, DDP and FSDP: the same training; and what is left when one dies."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import children
import psutil
import pytest
import torch
from children import afresh, at_call, at_operation, command, go_on, kill, one_line, processes, same, saved, send, wait
from safetensors.torch import load_file

from flash_transformer.data import Prepared
from flash_transformer.training import plan_for

SHAPE = {"d_model": 16, "d_ff": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "norm": "pre",
         "dropout": 0.2, "attention_dropout": 0.2}
TRAIN = {"max_steps": 50, "tokens_per_batch": 190, "packing": False, "learning_rate": 3e-3, "warmup_steps": 10,
         "precision": "float32", "log_every": 1, "checkpoint_every": 10, "keep_checkpoints": 9, "clip_norm": 0.5,
         "seed": 3}


@pytest.fixture(scope="module")
def recipe(prepared): return prepared.parent / "recipe.yaml"


# ---- the same training ----

@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    "A run of 50 steps, made once for all who ask for the same"
    runs = {}

    def trained(world, accumulate, parallel="ddp", dtype="float64"):
        key = (world, accumulate, parallel, dtype) if world > 1 else (1, accumulate, dtype)
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("trained") / "run"
            fit(prepared, runs[key], world, accumulate, parallel, dtype)
        return runs[key]
    return trained


def fit(prepared, run, world, accumulate, parallel, dtype="float64", resume=False, shape=SHAPE, **changes):
    train = TRAIN | {"accumulate": accumulate, "parallel": parallel} | changes
    ranks = processes(world, children.fit, prepared / "data", run, resume, dtype, shape, train,
                      output=run.parent / "log")
    for rank, child in enumerate(ranks):
        assert wait(child) == 0, (run.parent / f"log.{rank}.err").read_text()


def weights(run, step): return load_file(run / "checkpoints" / f"{step:08d}" / "model.safetensors")


def difference(run, other, step=50):
    a, b = weights(run, step), weights(other, step)
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def logged(metrics, run, name): return torch.tensor([x[name] for x in metrics(run) if name in x], dtype=torch.float64)


def as_one(several, one, metrics, step=50):
    """Both in float64. What is logged agrees to its rounding. A weight may differ by more: biases of keys have no
    gradient but rounding noise (softmax does not see them), at most 1e-17 here, which Adam divides by its ε of 1e-9
    before it takes a learning rate of 3e-3 of it, 50 times."""
    assert difference(several, one, step) < 50 * 3e-3 * 1e-17 / 1e-9
    found, right = metrics(several), metrics(one)
    for name in "step", "epoch", "tokens", "learning_rate":           # one line each, so one process writes
        assert [line.get(name) for line in found] == [line.get(name) for line in right]
    for name in "loss", "plain_loss", "gradient_norm", "validation_loss":
        torch.testing.assert_close(logged(metrics, several, name), logged(metrics, one, name), rtol=1e-13, atol=0)


def test_the_corpus_is_an_awkward_one(prepared):
    "The last step of an epoch has one batch alone, whatever the number of processes"
    train = Prepared.load(prepared / "data").train
    for epoch in 0, 1, 2:
        plan, _ = plan_for(train, TRAIN["tokens_per_batch"], False, TRAIN["seed"], epoch)
        assert len(plan) % 8 == 1 and len(plan) < 50


CASES = [(2, 2, "ddp"), (2, 4, "fsdp"), (4, 4, "ddp"), (4, 4, "fsdp")]


@pytest.mark.parametrize("world, accumulate, parallel", CASES + [
    pytest.param(*case, marks=pytest.mark.long) for case in [
        (2, 2, "fsdp"), (2, 4, "ddp"), (4, 8, "ddp"), (4, 8, "fsdp"), (3, 4, "ddp"), (3, 4, "fsdp"), (3, 8, "fsdp")]])
def test_as_one_process(trained, metrics, world, accumulate, parallel):
    as_one(trained(world, accumulate, parallel), trained(1, accumulate), metrics)


@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("ddp", marks=pytest.mark.long)])
def test_experts_as_one_process(prepared, metrics, tmp_path, parallel):
    "Their second loss is a mean over a batch, whoever has it: it weighs as much as the batch has words"
    for run, world in (("one", 1), ("two", 2)):
        fit(prepared, tmp_path / run, world, 3, parallel, shape=SHAPE | {"experts": 4}, max_steps=20, balance=0.3)
    as_one(tmp_path / "two", tmp_path / "one", metrics, step=20)
    found, right = (logged(metrics, tmp_path / run, "balance") for run in ("two", "one"))
    torch.testing.assert_close(found, right, rtol=1e-13, atol=0)
    assert len(right) == 20 and right.min() > 0.9


@pytest.mark.parametrize("world, parallel", [(2, "fsdp"), pytest.param(4, "ddp", marks=pytest.mark.long)])
def test_as_one_process_in_float32(trained, metrics, world, parallel):
    """Not further from one process in float64 than one process in float32 is, but for chance: at most twice as far. A
    logged number is few sums in float32, and one process may be lucky in them: it counts as no nearer than one rounding
    brings it, a step of float32 over √12"""
    exact, one, several = trained(1, 4), trained(1, 4, dtype="float32"), trained(world, 4, parallel, "float32")
    for name in "loss", "validation_loss", "gradient_norm":
        right = logged(metrics, exact, name)
        error, bound = (rms(logged(metrics, run, name) - right) for run in (several, one))
        rounding = rms(right) * torch.finfo(torch.float32).eps / 12 ** 0.5
        assert 0 < error <= 2 * max(bound, rounding), name

    def errors(run):
        for name, right in weights(exact, 50).items():
            error = weights(run, 50)[name] - right
            if name.endswith("in_proj.bias"): error[16:32] = 0        # the keys', see above
            yield error.flatten()
    error, bound = (rms(torch.cat(list(errors(run)))) for run in (several, one))
    assert 0 < error <= 2 * bound


def rms(x): return x.square().mean().sqrt()


STAGES = [[(1, "ddp"), (2, "ddp"), (4, "fsdp"), (1, "ddp")],
          [(4, "ddp"), (2, "fsdp"), (3, "fsdp"), (1, "fsdp"), (2, "ddp")]]


@pytest.mark.parametrize("stages", [STAGES[0], pytest.param(STAGES[1], marks=pytest.mark.long)], ids=str)
def test_the_number_of_processes_changes(prepared, trained, metrics, stages, tmp_path):
    "Resumed by more, by fewer, by the other way to share: at the same place of the corpus, and to the same end"
    run, one = tmp_path / "run", trained(1, 4)
    for number, (world, parallel) in enumerate(stages):
        step = 50 if number == len(stages) - 1 else 10 * (number + 1)
        fit(prepared, run, world, 4, parallel, resume=number > 0, max_steps=step)
        state, right = (json.loads((folder / "checkpoints" / f"{step:08d}" / "state.json").read_text())
                        for folder in (run, one))
        for name in "step", "epoch", "batch", "best_step", "since_best": assert state[name] == right[name]
        assert step == 50 or state["batch"] > 0               # in the middle of an epoch
    as_one(run, one, metrics)


# ---- what befalls one of two ----

def two(arguments, output, **faults):
    "The command in two processes; what befalls them is told as rank0=fault, rank1=fault. Their exit statuses"
    named = [faults.get(f"rank{rank}") for rank in range(2)]
    return [wait(child) for child in processes(2, children.command_of_rank, arguments, named, output=output)]


@pytest.fixture(scope="module")
def parallel(request): return request.param


def with_(now, later=()):
    "A test with this way to share the work; at length with that one too"
    return pytest.mark.parametrize("parallel", [*now, *(pytest.param(p, marks=pytest.mark.long) for p in later)],
                                   indirect=True, scope="module")


@pytest.fixture(scope="module")
def undisturbed(prepared, recipe, parallel, tmp_path_factory):
    "A run of two processes that nothing befell"
    folder = tmp_path_factory.mktemp("undisturbed")
    run = shutil.copytree(prepared, folder / "run")
    assert two(with_two(run, recipe, parallel), folder / "log") == [0, 0], (folder / "log.0.err").read_text()
    return run


def with_two(run, recipe, parallel):
    return [*afresh(run, recipe), "--train.parallel", parallel]


def next_with_two(run, recipe, parallel):
    return go_on(run, recipe) if saved(run) else [*with_two(run, recipe, parallel), "--overwrite"]


LOSS = "flash_transformer.training.trainer.batch_loss"      # called for each batch, and in validations


@with_(["ddp", "fsdp"])
def test_a_process_is_killed(prepared, recipe, parallel, undisturbed, tmp_path):
    """One of two, at any moment; the other one ends by itself, says why and what is left. Then resumed by two, in the
    end bit for bit what two would have had."""
    random.seed(seed := time.time_ns() % 2 ** 32)
    print(f"seed {seed}")
    run, log = shutil.copytree(prepared, tmp_path / "run"), tmp_path / "log"
    for rank, fault in [(0, partial(at_operation, run, kill, random.randrange(20), since="metrics.jsonl")),
                        (1, partial(at_call, LOSS, kill, random.randrange(10)))]:
        status = two(next_with_two(run, recipe, parallel), log, **{f"rank{rank}": fault})
        other = 1 - rank
        assert status[rank] == -signal.SIGKILL and status[other] == 2, status
        left = [str(saved(run)[-1]), "--resume"] if saved(run) else ["no checkpoint yet"]
        one_line(f"{log}.{other}.err", f"(process {other})", "another process of this run has died", *left)
    assert two(next_with_two(run, recipe, parallel), log) == [0, 0]
    same(run, undisturbed)


@with_(["fsdp"], ["ddp"])
def test_one_process_is_told_to_stop(prepared, recipe, parallel, undisturbed, tmp_path):
    "All stop after the same step"
    run, log = shutil.copytree(prepared, tmp_path / "run"), tmp_path / "log"
    for rank in 1, 0:
        fault = partial(at_call, LOSS, partial(send, signal.SIGTERM), random.randrange(2, 8))
        assert two(next_with_two(run, recipe, parallel), log, **{f"rank{rank}": fault}) == [2, 2]
        last = saved(run)[-1]
        for rank in 0, 1:
            words = f"(process {rank})", f"stopped by SIGTERM at step {int(last.name)}", str(last), "--resume"
            one_line(f"{log}.{rank}.err", *words)
    assert two(next_with_two(run, recipe, parallel), log) == [0, 0]
    same(run, undisturbed)


@with_(["ddp"], ["fsdp"])
def test_a_loss_that_is_none(prepared, recipe, undisturbed, parallel, tmp_path):
    "In one process: all end with the same word"
    run, log = shutil.copytree(prepared, tmp_path / "run"), tmp_path / "log"
    assert two(with_two(run, recipe, parallel), log, rank1=partial(children.poison, LOSS, 4)) == [2, 2]
    for rank in 0, 1: one_line(f"{log}.{rank}.err", f"(process {rank})", "the loss is nan at step")
    assert two(next_with_two(run, recipe, parallel), log) == [0, 0]
    same(run, undisturbed)


@with_(["fsdp"], ["ddp"])
def test_an_error_in_one_process(prepared, recipe, undisturbed, parallel, tmp_path):
    "It says what; the other one that it is alone"
    run, log = shutil.copytree(prepared, tmp_path / "run"), tmp_path / "log"
    assert two(with_two(run, recipe, parallel), log, rank1=partial(at_call, LOSS, children.fail, 9)) == [2, 2]
    one_line(f"{log}.1.err", "(process 1)", "the disk is on fire")
    one_line(f"{log}.0.err", "(process 0)", "another process of this run has died", "--resume")
    assert two(next_with_two(run, recipe, parallel), log) == [0, 0]
    same(run, undisturbed)


@with_(["ddp"], ["fsdp"])
def test_a_full_disk_where_two_train(prepared, recipe, undisturbed, parallel, tmp_path):
    run, log = shutil.copytree(prepared, tmp_path / "run"), tmp_path / "log"
    assert two(with_two(run, recipe, parallel), log, rank0=partial(children.quota, 60 * 1024)) == [2, 2]
    one_line(f"{log}.0.err", "(process 0)", "File too large", "free some space")
    one_line(f"{log}.1.err", "(process 1)", "could not be written")
    assert two(next_with_two(run, recipe, parallel), log) == [0, 0]
    same(run, undisturbed)


@with_(["ddp"], ["fsdp"])
def test_two_replace_a_run(recipe, undisturbed, parallel, tmp_path):
    "However slow the one is that clears the folder"
    run = shutil.copytree(undisturbed, tmp_path / "run")
    slow = partial(at_call, "flash_transformer.cli._clear", partial(time.sleep, 1), 0)
    status = two([*with_two(run, recipe, parallel), "--overwrite"], tmp_path / "log", rank0=slow)
    assert status == [0, 0], [(tmp_path / f"log.{rank}.err").read_text() for rank in (0, 1)]
    same(run, undisturbed)


@with_([], ["ddp", "fsdp"])
def test_two_processes_killed_at_any_moment(prepared, recipe, parallel, undisturbed, tmp_path):
    random.seed(seed := time.time_ns() % 2 ** 32)
    print(f"seed {seed}")
    kills, log = 0, tmp_path / "log"
    while kills < 30:
        run, done = shutil.copytree(prepared, tmp_path / f"run{kills}"), False
        while not done:
            pair = processes(2, command, next_with_two(run, recipe, parallel), output=log)
            pair[0].join(random.uniform(0, 3))
            for child in random.sample(pair, random.choice([1, 2])): child.kill()
            status = [wait(child) for child in pair]
            assert set(status) <= {0, 2, -signal.SIGKILL}, status
            done, kills = status == [0, 0], kills + (status != [0, 0])
        same(run, undisturbed)


# ---- torchrun ----

@pytest.fixture
def torchrun(tmp_path):
    "The real launcher and the real command, two processes"
    program = tmp_path / "flash-transformer"
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom flash_transformer.cli import main\nsys.exit(main())\n")
    program.chmod(0o755)
    started = []

    def torchrun(*arguments):
        started.append(subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--no-python", "--", program,
             *map(str, arguments)], env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]
    yield torchrun
    for launcher in (launcher for launcher in started if launcher.poll() is None):
        for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]: process.kill()


def until_saved(launcher, run):
    "Return when there is a checkpoint"
    while launcher.poll() is None and not saved(run): time.sleep(0.05)
    assert launcher.poll() is None, launcher.communicate()


def rank(launcher, number):
    return next(p for p in psutil.Process(launcher.pid).children() if p.environ().get("RANK") == str(number))


def test_a_process_of_torchrun_dies(torchrun, prepared, recipe, tmp_path):
    "The whole job ends within a minute, says why, and has left what one process can go on from"
    run = shutil.copytree(prepared, tmp_path / "run")
    job = torchrun(*afresh(run, recipe), "--train.max_steps", 10 ** 6)
    until_saved(job, run)
    rank(job, 1).kill()
    _, said = job.communicate(timeout=60)
    assert job.returncode != 0 and "flash-transformer (process 0): another process of this run has died" in said, said
    last = int(saved(run)[-1].name)
    arguments = [*go_on(run, recipe), "--train.max_steps", last + 2]
    assert wait(children.start(command, arguments, output=tmp_path / "log")) == 0, (tmp_path / "log.err").read_text()
    assert int(saved(run)[-1].name) == last + 2


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_torchrun_is_told_to_stop(torchrun, prepared, recipe, tmp_path, name):
    run = shutil.copytree(prepared, tmp_path / "run")
    job = torchrun(*afresh(run, recipe), "--train.max_steps", 10 ** 6)
    until_saved(job, run)
    job.send_signal(getattr(signal, name))
    _, said = job.communicate(timeout=60)
    step = int(saved(run)[-1].name)
    for number in 0, 1: assert f"flash-transformer (process {number}): stopped by {name} at step {step}" in said, said
    assert "is lost" not in said and job.returncode != 0
