"""Long texts in the whole model: time and memory of a training step against the length N.

    python benchmarks/long_text.py            both models, N from 256 to 8,192; some five minutes on two cores
    python benchmarks/long_text.py --quick    short lengths; writes nothing unless --out is given

A step is forward, loss, backward and Adam over one pair of sentences, N tokens on either side, in the precision that
`auto` takes on this machine. Each setting runs in a process of its own, forked off before anything was computed: which
attention backend all layers use, and whether each block's activations are kept or computed again (recompute). Peak
memory: how far the largest resident set (`peak_memory`) rises in the first whole step above what weights, gradients and
Adam's averages take, which a step on a few words has made before. Time: the median of up to five more steps, glibc
keeping freed memory, as `flash-transformer train` has it. A setting that asks for more memory than is free is refused,
one that would exceed --budget seconds a step is skipped, and the table says so. Exponents: least squares in logarithms
over N ≥ 1,024, and from the last length but one to the last.
"""
import argparse
import json
import os
import re
import statistics
import sys
import time
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import numpy as np
import torch

from flash_transformer.attention import AttentionMask, MultiHeadAttention, explain
from flash_transformer.cli import _keep_memory
from flash_transformer.data import Batch
from flash_transformer.model import Transformer, TransformerConfig
from flash_transformer.training import adam, batch_loss, choose_precision, peak_memory
from flash_transformer.training.precision import DTYPES

OUT = Path(__file__).parent / "results" / "long_text.json"
MODELS = {"d 256, 3 + 3": dict(d_model=256, d_ff=1024, heads=4, encoder_layers=3, decoder_layers=3),
          "d 512, 6 + 6": dict(d_model=512, d_ff=2048, heads=8, encoder_layers=6, decoder_layers=6)}
LENGTHS = [256, 512, 1024, 2048, 4096, 8192]
BACKENDS, CPU, VOCABULARY = ["auto", "naive", "tiled"], torch.device("cpu"), 8000


def make_batch(n):
    "One pair, N tokens on either side"
    words = torch.randint(4, VOCABULARY, (2, 1, n), generator=torch.Generator().manual_seed(0))
    lengths = torch.full((1,), n)
    return Batch(words[0], lengths, words[1].roll(1, -1), words[1], lengths)


class Step:
    def __init__(self, model, backend, recompute):
        torch.manual_seed(0)
        self.model = Transformer(TransformerConfig.base(VOCABULARY, norm="pre", dropout=0.1, **MODELS[model]))
        self.model.recompute = recompute
        for module in self.model.modules():
            if isinstance(module, MultiHeadAttention): module.backend = backend
        self.optimiser, self.precision = adam(self.model.parameters(), 1e-4), choose_precision("auto", CPU)

    def __call__(self, batch):
        half = self.precision != "float32"
        with torch.autocast("cpu", DTYPES[self.precision]) if half else nullcontext():
            loss = batch_loss(self.model, batch)[0] / batch.tokens
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()


def taken(model, n):
    "Which backend `auto` takes in the encoder"
    heads = MODELS[model]["heads"]
    x = torch.empty(1, heads, n, MODELS[model]["d_model"] // heads, dtype=DTYPES[choose_precision("auto", CPU)],
                    requires_grad=True)
    return explain(x, x, x, AttentionMask(key_lengths=torch.tensor([n]))).taken


def free_memory():
    return 1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])


def measure_here(model, n, backend, recompute, rounds, budget):
    "In a process that has computed nothing yet"
    import resource
    step, batch = Step(model, backend, recompute), make_batch(n)
    step(make_batch(8))                                               # threads and Adam's averages are there
    for p in step.model.parameters(): p.grad = torch.zeros_like(p)    # held while we look, as in the middle of a step
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + int(0.9 * free_memory()),) * 2)
    before, start = peak_memory(CPU), time.perf_counter()
    try: loss = step(batch)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError): raise
        wanted = re.search(r"tried to allocate (\d+) bytes", str(error))
        return {"skipped": f"memory: {int(wanted[1]) / 1e9:.1f} GB more at once" if wanted else "memory"}
    found = {"peak_bytes": peak_memory(CPU) - before, "loss": loss, "first_seconds": time.perf_counter() - start}
    _keep_memory()
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        step(batch)
        times.append(time.perf_counter() - start)
        if sum(times) > budget: break
    times = times[1:] or times                                        # the first one warms up, if there are more
    return found | {"seconds": statistics.median(times), "rounds": len(times)}


def in_a_process_of_its_own(*args):
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        try:
            os.write(write, json.dumps(measure_here(*args)).encode())
            status = 0
        finally: os._exit(status)
    os.close(write)
    with open(read) as answer: text = answer.read()
    if os.waitpid(child, 0)[1]: return {"skipped": "memory: ended by the system"}
    return json.loads(text)


def exponents(points, what):
    "Per model, backend and recompute: the power of N by which `what` grows"
    groups = {}
    for p in points:
        if "skipped" not in p and p["length"] >= 1024:
            groups.setdefault((p["model"], p["backend"], p["recompute"]), []).append((p["length"], p[what]))
    def slope(pairs): return round(float(np.polyfit(*np.log(pairs).T, 1)[0]), 2)
    return [{"model": m, "backend": b, "recompute": r, "of": what, "lengths": [n for n, _ in pairs],
             "exponent": slope(pairs), "last_step": slope(pairs[-2:])}
            for (m, b, r), pairs in groups.items() if len(pairs) > 1]


def say(p):
    name = f"{p['model']:<13} N {p['length']:<6,} {p['backend']:<6} {'recompute' if p['recompute'] else '':<10}"
    if "skipped" in p: print(f"{name} skipped: {p['skipped']}", flush=True)
    else: print(f"{name} {p['seconds']:8.3f} s {p['peak_bytes'] / 1e6:10,.0f} MB   loss {p['loss']:.4f}", flush=True)


def measure(models, lengths, rounds, budget):
    points = []
    for model, n in product(models, lengths):
        for backend, recompute in product(BACKENDS, (False, True)):
            before = [p for p in points if (p["model"], p["backend"], p["recompute"]) == (model, backend, recompute)]
            found = {}
            if before and "skipped" in before[-1]: found = {"skipped": before[-1]["skipped"]}
            elif before and (expected := 4 * before[-1]["seconds"]) > budget:
                found = {"skipped": f"time: up to {expected:.0f} s a step"}
            point = {"model": model, "length": n, "backend": backend, "recompute": recompute}
            points.append(point | (found or in_a_process_of_its_own(model, n, backend, recompute, rounds, budget / 4)))
            say(points[-1])
    return points


def machine():
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    return {"cpu": name[1] if name else "unknown", "threads": torch.get_num_threads(), "torch": torch.__version__,
            "precision": choose_precision("auto", CPU)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small model, N up to 512")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME",
                        help=f"some of: {'; '.join(MODELS)}")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=12, help="seconds that a step may take")
    parser.add_argument("--out", type=Path, help=f"where the results go; {OUT.name} in results/")
    options = parser.parse_args()
    if not sys.platform.startswith("linux"): parser.error("memory is measured in Linux's /proc")
    models, lengths = (list(MODELS)[:1], [256, 512]) if options.quick else (options.models, sorted(options.lengths))
    start = time.perf_counter()
    points = measure(models, lengths, options.rounds, options.budget)
    result = {"machine": machine(), "models": MODELS, "vocabulary": VOCABULARY, "points": points,
              "auto_takes": {model: {n: taken(model, n) for n in lengths} for model in models},
              "exponents": exponents(points, "peak_bytes") + exponents(points, "seconds")}
    for e in result["exponents"]:
        print(f"{e['model']} {e['backend']:<6} {'recompute' if e['recompute'] else '':<10} {e['of']:<10} "
              f"~ N^{e['exponent']:.2f}, last step N^{e['last_step']:.2f}")
    print(f"auto takes {result['auto_takes']}\n{time.perf_counter() - start:.0f} s")
    if out := options.out or (None if options.quick else OUT): out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__": main()
