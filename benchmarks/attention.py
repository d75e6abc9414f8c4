"""Attention, forward and backward: time, FLOP/s and peak memory of every backend that runs here, beside the ceilings.

    python benchmarks/attention.py                 everything; about half an hour on two cores
    python benchmarks/attention.py --quick         two minutes, short lengths; writes nothing unless --out is given
    python benchmarks/attention.py --figures       only long sequences, tiled beside naive, and the largest one
    python benchmarks/attention.py --device cuda   on a GPU: flash_attn, triton, flex and sdpa too, in TFLOP/s
    python benchmarks/attention.py --markdown      measures nothing: the tables of what was measured before
    python benchmarks/attention.py --draw          measures nothing: the pictures anew

Time: backends in turns within each round, after a warm-up; the median of up to five rounds, fewer where a call is so
long that the rounds would exceed --budget. FLOPs as papers count them: 4·N²·head_dim for each head and sequence, half
of it when causal, 3.5 times as much with the backward pass, whatever a backend in fact computes. Peak memory: one call
in a fresh process, how far its resident set (getrusage's ru_maxrss) rises above the level before the call, when inputs
and the gradient to start from were there already; what counts are outputs, gradients and everything in between. On a
GPU: torch.cuda.max_memory_allocated, likewise. A backend that asks for more memory than is free, or would exceed
--budget in one call, is skipped, and the table says so. Ceilings: the best of several large matrix products, and of
copying 1 GiB, counted as read and written.
"""
import argparse
import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import torch

from flash_transformer.attention import backends
from flash_transformer.attention.benchmark import (
    Setting,
    copy_ceiling,
    ladder,
    measure,
    peak_memory,
    product_ceiling,
    usable,
)

HERE = Path(__file__).parent
OUT, PICTURES = HERE / "results" / "attention.json", HERE.parent / "nbs" / "images"
LENGTHS, QUICK = [128, 256, 512, 1024, 2048, 4096, 8192, 16384], [128, 512, 1024, 2048]
COLOURS = {"naive": "C3", "sdpa": "C0", "tiled": "C2", "flex": "C4", "triton": "C1", "flash_attn": "C5"}


def machine(device):
    "What others need to know to compare, and nothing that names the machine"
    facts = {"torch": torch.__version__, "device": device}
    if device == "cuda":
        return facts | {"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    return facts | {"cpu": name[1] if name else "unknown", "vectors": torch.backends.cpu.get_cpu_capability(),
                    "threads": torch.get_num_threads()}


def ceilings(dtypes, device, quick):
    return {"copy_bytes_per_second": copy_ceiling(2 ** 25 if quick else 2 ** 28, device),
            "flops_per_second": {dtype: product_ceiling(dtype, device) for dtype in dtypes}}


def as_point(m):
    "One line of the results"
    numbers = {} if m.skipped else {"seconds": m.seconds, "rounds": m.rounds, "flops_per_second": m.rate,
                                    "peak_bytes": m.peak}
    return m.setting._asdict() | {"backend": m.backend, "skipped": m.skipped} | numbers


def unit(device): return ("TFLOP/s", 1e12) if device == "cuda" else ("GFLOP/s", 1e9)


def say(measured): print(measured, flush=True)


def fit(points):
    "Exponent of memory in N, least squares in logarithms over N ≥ 1024, forward and backward, per sequence"
    groups, key = {}, ("backend", "dtype", "head_dim", "causal")
    for p in points:
        if not p["backward"] or p["skipped"] or p["length"] < 1024: continue
        groups.setdefault(tuple(p[k] for k in key), []).append((p["length"], p["peak_bytes"] / p["batch"]))
    def slope(pairs): return float(np.polyfit(*np.log(pairs).T, 1)[0])
    return [dict(zip(key, group)) | {"lengths": [n for n, _ in pairs], "exponent": slope(pairs),
                                     "last_step": slope(pairs[-2:])}
            for group, pairs in groups.items() if len(pairs) > 1]


# -- the figures that were set before anything was measured --------------------------------------------------------

def figures():
    "`tiled` beside `naive` at N = 8,192, and N = 32,768 with 8 heads where `naive` is not given 24 GB"
    setting, large = Setting(8192), Setting(32768, heads=8)
    found = measure(setting, ["naive", "tiled"], budget=300)
    for m in found.values(): say(m)
    refused = peak_memory(large, "naive", more=24 * 10 ** 9)
    whole = peak_memory(large, "tiled", more=24 * 10 ** 9)
    naive, tiled = found["naive"], found["tiled"]
    result = {
        "side_by_side": [as_point(m) for m in found.values()],
        "memory_ratio": naive.peak / tiled.peak, "time_ratio": tiled.seconds / naive.seconds,
        "large": large._asdict(), "allowed_bytes": 24 * 10 ** 9, "one_score_matrix_bytes": 4 * 8 * 32768 ** 2,
        "naive": refused, "tiled": whole | {"flops_per_second": large.flops / whole["seconds"]},
    }
    print(f"N = 8,192: naive takes {result['memory_ratio']:.1f} × the memory of tiled, "
          f"tiled {result['time_ratio']:.2f} × the time of naive")
    print(f"N = 32,768, 8 heads, with 24 GB: {large_in_words(result)}")
    return result


def large_in_words(figures):
    naive, tiled = figures["naive"], figures["tiled"]
    refused = f"is refused, for it asks for {(naive.get('wanted') or 0) / 1e9:.1f} GB at once"
    return (f"naive {'fits' if 'bytes' in naive else refused}; "
            f"tiled takes {tiled['bytes'] / 1e6:.0f} MB and {tiled['seconds']:.0f} s")


# -- what was measured, shown --------------------------------------------------------------------------------------

def pick(points, **wanted): return [p for p in points if all(p[k] == v for k, v in wanted.items())]


def names(points): return list(dict.fromkeys(p["backend"] for p in points))


def amount(x): return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def table(title, points, cell):
    "Lengths and kinds down, backends across; a backend that could serve none of it has a line below instead"
    lengths = sorted({p["length"] for p in points})[::-2][:3]       # the longest, and every second one below it
    served = [b for b in names(points) if not all(p["skipped"] for p in pick(points, backend=b))]
    print(f"**{title}**\n")
    print("| dtype | causal | N | " + " | ".join(served) + " |")
    print("|---|---|--:|" + "--:|" * len(served))
    for dtype, causal, n in dict.fromkeys((p["dtype"], p["causal"], p["length"]) for p in points):
        if n not in lengths: continue
        row = {p["backend"]: f"*{p['skipped']}*" if p["skipped"] else cell(p)
               for p in pick(points, dtype=dtype, causal=causal, length=n)}
        print(f"| {dtype} | {'yes' if causal else 'no'} | {n:,} | " + " | ".join(row[b] for b in served) + " |")
    print()
    for b in names(points):
        if b not in served: print(f"{b}: {pick(points, backend=b)[0]['skipped']}\n")


def markdown(result):
    "Tables at head_dim 64, and what follows from the numbers"
    m, c, (rates, scale) = result["machine"], result["ceilings"], unit(result["machine"]["device"])
    where, products = m.get("gpu") or f"{m['cpu']}, {m['threads']} threads", c["flops_per_second"]
    print(f"{where}, PyTorch {m['torch']}. "
          f"Ceilings: copying {c['copy_bytes_per_second'] / 1e9:.0f} GB/s; matrix products "
          + ", ".join(f"{v / scale:,.0f} {rates} in {dtype}" for dtype, v in products.items()) + ".\n")

    def rate(p): return f"{amount(1000 * p['seconds'])} ms, {amount(p['flops_per_second'] / scale)}"
    points = pick(result["points"], head_dim=64)
    both = pick(points, backward=True)
    table(f"Forward: time, {rates}", pick(points, backward=False), rate)
    table(f"Forward and backward: time, {rates}", both, rate)
    table("Forward and backward: peak memory above the inputs, MB", both, lambda p: amount(p["peak_bytes"] / 1e6))

    longest = max(p["length"] for p in both)
    print(f"**Share of the ceiling of matrix products** at N = {longest:,}, forward and backward, not causal: "
          + "; ".join(f"{p['backend']} {p['flops_per_second'] / products[p['dtype']]:.0%} in {p['dtype']}"
                      for p in pick(both, length=longest, causal=False, skipped="")) + ".\n")
    print("**Memory grows like N to the power of**, fitted from N = 1,024 up (in brackets between the last two): "
          + "; ".join(f"{e['backend']} {e['exponent']:.2f} ({e['last_step']:.2f}) in {e['dtype']}"
                      for e in pick(result["memory_exponents"], head_dim=64, causal=False)) + ".")
    if f := result.get("figures"):
        print(f"\n**Side by side**, N = 8,192, 4 heads, float32, forward and backward: naive takes "
              f"{f['memory_ratio']:.0f} times the memory of tiled, and tiled {f['time_ratio']:.2f} times the time of "
              f"naive. N = 32,768, 8 heads, 24 GB allowed: {large_in_words(f)}.")


def draw_lines(result, path):
    "Time, rate and memory over N; head_dim 64, forward and backward"
    import matplotlib.pyplot as plt
    points = pick(result["points"], backward=True, head_dim=64)
    dtypes, (rates, scale) = list(dict.fromkeys(p["dtype"] for p in points)), unit(result["machine"]["device"])
    fig, axes = plt.subplots(len(dtypes), 3, figsize=(13, 3.6 * len(dtypes) + 1), layout="constrained", squeeze=False)
    for row, dtype in zip(axes, dtypes):
        for name, causal in product(names(points), (False, True)):
            here = [p for p in pick(points, dtype=dtype, causal=causal, backend=name) if not p["skipped"]]
            if not here: continue
            n = [p["length"] for p in here]
            columns = ([1000 * p["seconds"] for p in here], [p["flops_per_second"] / scale for p in here],
                       [p["peak_bytes"] / 1e6 for p in here])
            for ax, y in zip(row, columns):
                ax.plot(n, y, "s--" if causal else "o-", color=COLOURS.get(name), ms=4, lw=1.5,
                        mfc="white" if causal else None, label=name + (", causal" if causal else ""))
        ceiling = result["ceilings"]["flops_per_second"][dtype] / scale
        row[1].axhline(ceiling, color="0.3", ls=":", label="matrix products")
        for ax, title in zip(row, ("milliseconds", rates, "peak memory, MB above the inputs")):
            ax.set(xscale="log", yscale="log", title=f"{dtype}: {title}", xlabel="N")
            ax.set_xticks(sorted({p["length"] for p in points}), sorted({p["length"] for p in points}), rotation=45)
            ax.minorticks_off()
            ax.grid(alpha=.4)
    fig.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    fig.suptitle("Attention, forward and backward, head_dim 64")
    fig.savefig(path, dpi=80)


def draw_roofline(result, path):
    "Rate over FLOPs a byte, as if nothing but inputs and outputs moved, under the measured roof"
    import matplotlib.pyplot as plt
    c, (rates, scale) = result["ceilings"], unit(result["machine"]["device"])
    points = [p for p in pick(result["points"], head_dim=64, causal=False) if not p["skipped"]]
    dtypes = list(dict.fromkeys(p["dtype"] for p in points))
    fig, axes = plt.subplots(1, len(dtypes), figsize=(6.5 * len(dtypes), 5.4), layout="constrained", squeeze=False)
    for ax, dtype in zip(axes[0], dtypes):
        x = np.geomspace(1, 2e4, 300)
        copy, roof = c["copy_bytes_per_second"], c["flops_per_second"][dtype]
        ax.plot(x, np.minimum(x * copy, roof) / scale, color="0.2", lw=2)
        ax.text(x[-1], 1.1 * roof / scale, f"matrix products {roof / scale:,.0f} {rates}", ha="right")
        ax.text(4, 2 * copy / scale, f"copying {copy / 1e9:,.0f} GB/s")
        matrices = 4 * getattr(torch, dtype).itemsize          # bytes a score: it and its weight are written and read
        ax.axhline(min(4 * 64 / matrices * copy, roof) / scale, color=COLOURS["naive"], ls=":",
                   label="roof of naive, forward, without caches")
        for name, backward in product(names(points), (False, True)):
            here = pick(points, dtype=dtype, backend=name, backward=backward)
            if not here: continue
            settings = [Setting(**{k: p[k] for k in Setting._fields}) for p in here]
            ax.plot([s.flops / s.bytes for s in settings], [p["flops_per_second"] / scale for p in here],
                    "o-" if backward else "^--", ms=4, lw=1, color=COLOURS.get(name),
                    label=f"{name}, forward{' and backward' if backward else ''}")
        ax.set(xscale="log", yscale="log", title=dtype, xlabel="FLOPs for each byte of inputs and outputs",
               ylabel=rates, ylim=(None, 2 * roof / scale))
        ax.grid(alpha=.4)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    fig.suptitle("Roofline, head_dim 64, not causal, N from left to right")
    fig.savefig(path, dpi=80)


def draw(result, out):
    folder = PICTURES if out == OUT else out.parent
    draw_lines(result, folder / f"{out.stem}_benchmark.png")
    draw_roofline(result, folder / f"{out.stem}_roofline.png")


# -- the command ---------------------------------------------------------------------------------------------------

def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", help="N, rising; 128 … 16384 if not given")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, help="4 on a CPU; on a GPU as many as make 2048 numbers, as in the papers")
    parser.add_argument("--batch", type=int, help="1 on a CPU; on a GPU as many sequences as make 16,384 tokens")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"],
                        help="float32 and bfloat16 on a CPU, float16 and bfloat16 on a GPU")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backends", nargs="+", choices=[b.name for b in backends()], help="only these")
    parser.add_argument("--budget", type=float, default=30, help="seconds that one backend may take at one point")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads, PyTorch's choice if not given")
    parser.add_argument("--out", type=Path, help=f"the results; benchmarks/results/{OUT.name} if not given")
    for flag in ("quick", "figures", "markdown", "draw"): parser.add_argument(f"--{flag}", action="store_true")
    o = parser.parse_args()
    gpu = o.device == "cuda"
    if gpu and not torch.cuda.is_available(): parser.error("PyTorch sees no CUDA device: leave --device away")
    if (o.markdown or o.draw) and not (o.out or OUT).exists(): parser.error(f"nothing measured yet in {o.out or OUT}")
    o.lengths = sorted(o.lengths or (QUICK if o.quick else LENGTHS))
    o.dtype = o.dtype or (["float16", *["bfloat16"] * torch.cuda.is_bf16_supported(including_emulation=False)] if gpu
                          else ["float32", "bfloat16"])
    o.out = o.out or (None if o.quick else OUT)
    if o.threads: torch.set_num_threads(o.threads)
    return o


def grid(o, result, save):
    "Every combination, length after length"
    result["points"], gpu = [], o.device == "cuda"
    for dtype, d, causal, backward in product(o.dtype, o.head_dim, (False, True), (False, True)):
        heads, settings = o.heads or (2048 // d if gpu else 4), []
        for n in o.lengths:
            batch = o.batch or (max(1, 16384 // n) if gpu else 1)
            settings.append(Setting(n, d, causal, backward, dtype, batch, heads, o.device))
        result["points"] += map(as_point, ladder(settings, o.backends, o.budget, o.rounds, say))
        save()
    again, c = ceilings(o.dtype, o.device, o.quick), result["ceilings"]     # once more: the quieter moment counts
    c["copy_bytes_per_second"] = max(c["copy_bytes_per_second"], again["copy_bytes_per_second"])
    for dtype, rate in again["flops_per_second"].items():
        c["flops_per_second"][dtype] = max(rate, c["flops_per_second"][dtype])


def main():
    o = options()
    read = o.out or OUT
    result = json.loads(read.read_text()) if read.exists() and (o.markdown or o.draw or o.out) else {}
    if o.markdown: return markdown(result)
    if o.draw: return draw(result, read)

    def save():
        if o.out: o.out.write_text(json.dumps(result, indent=1) + "\n")
    torch.manual_seed(0)
    if not (o.figures and result):                                  # else those under which the points were measured
        result |= {"machine": machine(o.device), "ceilings": ceilings(o.dtype, o.device, o.quick)}
    print(json.dumps({k: result[k] for k in ("machine", "ceilings")}))
    print("backends:", ", ".join(o.backends or usable(o.device)))
    if not o.figures: grid(o, result, save)
    if o.device == "cpu" and not o.quick: result["figures"] = figures()
    if "points" in result: result["memory_exponents"] = fit(result["points"])
    save()
    if o.out and "memory_exponents" in result: draw(result, o.out)
    if "points" in result: markdown(result)


if __name__ == "__main__":
    main()
