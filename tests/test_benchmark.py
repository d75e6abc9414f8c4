"The instrument that measures attention: what it counts, how it takes turns, what it skips. No test looks at a time."
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flash_transformer.attention import benchmark
from flash_transformer.attention.benchmark import (
    Measured,
    Setting,
    copy_ceiling,
    in_turns,
    ladder,
    measure,
    peak_memory,
    product_ceiling,
    seconds,
    usable,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")


def test_flops_are_those_of_the_papers():
    n, d, heads, batch = 1000, 64, 4, 3
    for causal, backward in ((False, False), (False, True), (True, False), (True, True)):
        papers = 4 * n * n * d * heads * batch * (3.5 if backward else 1) / (2 if causal else 1)
        found = Setting(n, d, causal, backward, batch=batch, heads=heads).flops
        assert found == pytest.approx(papers * (1 + causal / n), rel=1e-12)     # the diagonal is counted whole


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_bytes(dtype, size):
    one = 4 * 1000 * 64 * size
    assert Setting(1000, backward=False, dtype=dtype).bytes == 4 * one
    assert Setting(1000, dtype=dtype).bytes == 12 * one


@pytest.mark.parametrize("backward", [False, True])
def test_a_job_computes_what_is_asked(backward, monkeypatch):
    seen = []

    def attention(q, k, v, mask, backend):
        seen.append((q, mask, backend))
        return q * k * v
    monkeypatch.setattr(benchmark, "attention", attention)
    job = Setting(10, 8, causal=True, backward=backward, dtype="bfloat16", batch=2, heads=3).job("some")
    job(), job()
    (q, mask, name), (again, _, _) = seen
    assert q is again and q.shape == (2, 3, 10, 8) and q.dtype == torch.bfloat16 and q.requires_grad == backward
    assert mask.causal and name == "some" and q.grad is None


def test_turns():
    order = []
    times = in_turns({name: lambda name=name: order.append(name) for name in "abc"}, {"a": 3, "b": 1, "c": 2})
    rounds = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]   # short calls are repeated
    assert rounds == list("abcaca") and {name: len(t) for name, t in times.items()} == {"a": 3, "b": 1, "c": 2}
    assert in_turns({}, {}) == {}


def test_seconds_repeats_short_calls(monkeypatch):
    calls, clock = [], iter([0, 3, 10, 22])                         # 3 seconds once, then 12 for as many as it takes
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert seconds(lambda: calls.append(1), least=11) == 3 and len(calls) == 1 + 4
    clock = iter([0, 3])
    assert seconds(lambda: calls.append(1), least=3) == 3 and len(calls) == 6      # long enough: once


def test_a_gpu_is_waited_for(monkeypatch):
    "Before each look at the clock, and not after each of many calls"
    said = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
    ticks = iter([0, 0.004, 1, 1.012])
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: said.append("look") or next(ticks)))
    assert seconds(lambda: said.append("job"), "cuda", least=0.01) == pytest.approx(0.004)
    one = ["wait", "look", "job", "wait", "look"]
    assert said == one + one[:2] + ["job"] * 3 + one[3:]


@linux
def test_memory():
    "What naive makes is known to the byte; and what is refused is not taken"
    setting = Setting(1024, backward=False)
    scores, out = 4 * 4 * 1024 ** 2, 4 * 4 * 1024 * 64
    assert abs(peak_memory(setting, "naive")["bytes"] / (2 * scores + out) - 1) < 0.1
    assert peak_memory(setting, "naive")["bytes"] > 3 * peak_memory(setting, "tiled")["bytes"]
    assert peak_memory(Setting(8192), "naive", more=10 ** 8) == {"wanted": 4 * 4 * 8192 ** 2}
    assert "bytes" in peak_memory(setting, "naive")             # it goes on after a refusal
    with pytest.raises(RuntimeError, match="no memory measured for nothing"): peak_memory(setting, "nothing")
    assert "bytes" in peak_memory(setting, "naive")             # and after a failure


def test_measure_skips_with_a_reason(monkeypatch):
    monkeypatch.setattr(benchmark, "peak_memory", lambda setting, name: {"tiled": {"wanted": 3 * 10 ** 9}}[name])
    slow = Measured("naive", Setting(8, 8), seconds=10, rounds=1, peak=1)
    out = Measured("sdpa", Setting(8, 8), skipped="memory: 5.0 GB more at once")
    found = measure(Setting(16, 8), ["sdpa", "tiled", "naive"], budget=39, shorter={"naive": slow, "sdpa": out})
    assert list(found) == ["sdpa", "tiled", "naive"] and all(m.seconds is None for m in found.values())
    assert found["sdpa"].skipped == out.skipped and found["tiled"].skipped == "memory: 3.0 GB more at once"
    assert found["naive"].skipped == "time: about 40 s a call"
    assert "skipped: time" in str(found["naive"])


@pytest.mark.parametrize("one, budget, rounds", [(1, 60, 5), (20, 60, 3), (50, 60, 1), (90, 60, 1)])
def test_rounds_follow_the_budget(one, budget, rounds, monkeypatch):
    monkeypatch.setattr(benchmark, "peak_memory", lambda setting, name: {"bytes": 7, "seconds": one})
    found = measure(Setting(16, 8), ["naive"], budget)["naive"]
    assert found.rounds == rounds and found.peak == 7 and found.seconds > 0 and found.rate > 0


def test_a_shape_that_is_foreseen_takes_no_memory():
    "It is asked about before it is known to fit"
    assert benchmark._foreseen(Setting(10 ** 12), "naive", None, 1) == ""
    assert "backward" in benchmark._foreseen(Setting(10 ** 12), "flex", None, 1)
    assert benchmark._foreseen(Setting(10 ** 12, backward=False), "flex", None, 1) == ""
    with pytest.raises(ValueError, match="did you mean 'sdpa'"): measure(Setting(8), ["spda"])


@linux
def test_ladder():
    said = []
    results = ladder([Setting(n, 8, causal=True) for n in (16, 32)], rounds=2, report=said.append)
    assert said == results and [m.backend for m in results] == 2 * usable()
    served = [m for m in results if not m.skipped]
    assert {"naive", "sdpa", "tiled"} <= {m.backend for m in served} and all(m.seconds > 0 for m in served)
    assert not {"triton", "flash_attn"} & {m.backend for m in results}      # interpreters are not raced


def test_ceilings():
    assert product_ceiling(rounds=1) > 0 and copy_ceiling(2 ** 20, rounds=1) > 0


# ---- the commands ----

@linux
def test_command(command):
    status, out, _ = command("benchmark", "--lengths", 32, 16, "--head_dim", 8, "--dtype", "bfloat16", "--causal")
    lines = [line.split() for line in out.splitlines()]
    assert status == 0 and len(lines) == 2 * len(usable())
    assert all(line[0] == "bfloat16" and "causal" in line for line in lines) and "16" in lines[0] and "32" in lines[-1]


@pytest.mark.parametrize("arguments, words", [
    (("--lengths", 0), "from 1 up"), (("--dtype", "int8"), "'int8'"), (("--device", "cpuu"), "'cpuu'"),
    (("--lengths", "many"), "many"), (("--heads", -1), "from 1 up"),
])
def test_command_says_no(command, arguments, words):
    status, out, err = command("benchmark", *arguments)
    assert status == 2 and not out and len(err) == 1 and words in err[0]


@linux
def test_script(tmp_path):
    "Measures, writes results and pictures, shows them again, and speaks of no machine by name"
    script, out = Path(__file__).parent.parent / "benchmarks" / "attention.py", tmp_path / "small.json"
    arguments = "--quick --lengths 64 1024 1536 --head-dim 64 --dtype float32 --rounds 1 --backends sdpa tiled naive"
    run = subprocess.run([sys.executable, script, *arguments.split(), "--out", out], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert {"machine", "ceilings", "points", "memory_exponents"} <= set(result)
    assert len(result["points"]) == 2 * 2 * 3 * 3
    exponents = {e["backend"]: e["exponent"] for e in result["memory_exponents"] if not e["causal"]}
    assert exponents["naive"] > 1.7 and exponents["tiled"] < 1.2 and exponents["sdpa"] < 1.2
    assert {p.name for p in tmp_path.iterdir()} == {"small.json", "small_benchmark.png", "small_roofline.png"}
    again = subprocess.run([sys.executable, script, "--markdown", "--out", out], capture_output=True, text=True)
    assert again.returncode == 0 and "| float32 | no | 1,536 |" in again.stdout and again.stdout in run.stdout
    import platform
    assert platform.node() not in out.read_text() or len(platform.node()) < 4
    assert str(Path.home()) not in out.read_text() and str(tmp_path) not in out.read_text()


# ---- training beside the peers: our part of it; no peer is installed here ----

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


def test_training_loops_take_turns():
    "Warm-up, turns of so many steps or seconds with two before them that do not count, and the end"
    loop = ("import sys, time; sys.path.insert(0, sys.argv[1])\n"
            "from peers.turns import Turns\n"
            "turns, n = Turns(3, lambda: {'last': n}), 0\n"
            "while True:\n    n += 1; time.sleep(0.01); turns.done(n, 10 * n)")
    done = subprocess.run([sys.executable, "-c", loop, SCRIPTS], input="4\n0.1\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warm, steps, seconds = (json.loads(line)["answer"] for line in done.stdout.splitlines())
    assert (warm["steps"], warm["tokens"], warm["flops"], warm["last"]) == (3, 1 + 2 + 3, 60, 3)
    assert (steps["steps"], steps["tokens"], steps["last"]) == (4, 6 + 7 + 8 + 9, 9)
    assert seconds["seconds"] >= 0.1 and seconds["tokens"] == sum(range(12, seconds["last"] + 1))


def test_where_a_step_goes(tmp_path):
    "The worker of the benchmark of training runs the command itself, and sorts all of its time"
    import yaml
    recipe = {"data": {"corpus": "toy", "vocab_size": 500}, "train": {"max_epochs": 1, "tokens_per_batch": 1000},
              "model": dict(d_model=64, d_ff=128, heads=2, encoder_layers=1, decoder_layers=1, dropout=0.1)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, SCRIPTS / "training.py", "--work", tmp_path / "run", "--warm", "1", "--steps", "2"]
    done = subprocess.run([*command, "--worker", "profile", "--changes", "[]"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["answer"]
    assert abs(sum(found["per_cent"].values()) - 100) < 1, found["per_cent"]
    few = {part for part, share in found["per_cent"].items() if share <= 0}
    assert not few, f"no time at all for {few}: have modules changed their names?"
    changes = '["--train.precision", "float32", "--overwrite"]'
    done = subprocess.run([*command, "--worker", "serve", "--changes", changes], input="3\n", capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    warm, turn = (json.loads(line)["answer"] for line in done.stdout.splitlines() if line.startswith('{"answer"'))
    assert warm["steps"] == 1 and turn["steps"] == 3 and turn["precision"] == "float32"
    assert turn["tokens"] > 0 and turn["flops"] > 6 * turn["tokens"] * 64 * 500
