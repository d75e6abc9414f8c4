"""Is the backend that `auto` takes on this machine's CPU ever slower than `sdpa`? The measurements behind its rules.

    python benchmarks/attention_auto.py              some minutes; prints a Markdown table
    python benchmarks/attention_auto.py --only window  the lines that have this word
    python benchmarks/attention_auto.py --rounds 3   quicker and rougher

Each line is one shape with one mask. The backends are called in turn, round after round, and the median is kept, so
that a busy moment of the machine meets all alike. Queries, keys and values come as in `MultiHeadAttention`, cut from
one projection; the time includes putting the heads together again and, under "train", the backward pass. In "packed"
the sentences, of half to all of the length, lie end to end. The last column should not be above 1 but for noise.
"""
import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F

from flash_transformer.attention import AttentionMask, attention, attention_varlen, explain

SHORT = [  # batch, heads, q_len, k_len, head_dim
    (256, 8, 16, 16, 32), (160, 8, 24, 24, 64), (128, 4, 32, 32, 64), (32, 8, 64, 64, 64), (16, 8, 128, 128, 64),
    (8, 8, 256, 256, 64)]
MIDDLE = [(4, 8, 512, 512, 64), (2, 8, 1024, 1024, 64), (1, 8, 2048, 2048, 64)]
LONG = [(1, 4, 2048, 2048, 64), (1, 4, 4096, 4096, 32), (1, 2, 4096, 4096, 64), (1, 1, 8192, 8192, 64)]
UNEQUAL = [(32, 8, 20, 60, 64), (4, 8, 300, 500, 64), (4, 8, 500, 300, 64), (1, 2, 1000, 4096, 64)]
DECODING = [(64, 8, 1, 8, 32), (64, 8, 1, 32, 64), (1, 8, 1, 32, 64), (64, 8, 5, 24, 64), (16, 8, 1, 512, 64)]
MASKS = {
    "key lengths": lambda b, h, k_len: AttentionMask(key_lengths=torch.randint(k_len // 2 + 1, k_len + 1, (b,))),
    "causal": lambda b, h, k_len: AttentionMask(causal=True),
    "ALiBi, causal": lambda b, h, k_len: AttentionMask(causal=True, alibi=2.**-torch.arange(1, h + 1)),
    "window 32": lambda b, h, k_len: AttentionMask(window=(32, 0)),
    "window 128 to both sides": lambda b, h, k_len: AttentionMask(window=(128, 128)),
    "window 512, key lengths": lambda b, h, k_len: AttentionMask(
        window=(512, 0), key_lengths=torch.randint(k_len // 2 + 1, k_len + 1, (b,))),
    "none": lambda b, h, k_len: None,
}


class Case(NamedTuple):
    what:str
    shape:tuple
    mask:str
    train:bool=True
    dropout:float=0.
    packed:bool=False


def cases():
    for shape, train in product(SHORT + MIDDLE, (True, False)):
        yield Case("train" if train else "no gradient", shape, "key lengths", train)
    for shape, mask in product((SHORT + MIDDLE)[1::3], ("none", "causal", "ALiBi, causal")):
        yield Case("train", shape, mask)
    for shape, mask, train in product(LONG, list(MASKS)[3:6], (True, False)):
        yield Case("train" if train else "no gradient", shape, mask, train)
    for shape in SHORT + MIDDLE[:1]: yield Case("train, dropout 0.1", shape, "key lengths", dropout=0.1)
    for shape in LONG[:2]: yield Case("train, dropout 0.1", shape, "window 32", dropout=0.1)
    for shape, mask in product(UNEQUAL, ("causal", "window 32")): yield Case("train, unequal lengths", shape, mask)
    for shape, mask in product(DECODING, ("key lengths", "causal")): yield Case("decoding", shape, mask, train=False)
    for shape in SHORT[2::2] + MIDDLE[:2]: yield Case("train, packed", shape, "causal", packed=True)


def call(case, dtype) -> Callable: # → backend → milliseconds of one call
    b, h, q_len, k_len, d = case.shape
    mask, lengths = MASKS[case.mask](b, h, k_len), torch.randint(k_len // 2 + 1, k_len + 1, (b,))
    bounds = F.pad(lengths.cumsum(0), (1, 0)).int()
    sizes = [(int(bounds[-1]), h, d)] * 3 if case.packed else [(b, n, h, d) for n in (q_len, k_len, k_len)]
    inputs = [torch.randn(*size, dtype=dtype, requires_grad=case.train) for size in sizes]

    def milliseconds(backend):
        start = time.perf_counter()
        with torch.set_grad_enabled(case.train):
            if case.packed: out = attention_varlen(*inputs, bounds, bounds, mask, case.dropout, backend=backend)
            else: out = attention(*(x.transpose(1, 2) for x in inputs), mask, case.dropout, backend=backend)
            out = (out if case.packed else out.transpose(1, 2)).flatten(-2)
            if case.train: out.backward(out.detach())
        return 1000 * (time.perf_counter() - start)

    with torch.set_grad_enabled(case.train):                        # a pack is computed sentence by sentence
        x = [x[:lengths[0]].transpose(0, 1)[None] if case.packed else x.transpose(1, 2) for x in inputs]
        taken = explain(*x, mask, case.dropout).taken
    return milliseconds, taken


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="calls of each backend, of which the median is kept")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads, PyTorch's choice if not given")
    parser.add_argument("--only", default="", help="measure only lines that have this word")
    args = parser.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = torch.backends.cpu.get_cpu_capability()
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {machine}\n")
    print("| what | mask | dtype | batch × heads × q_len × k_len × head_dim | sdpa, ms | naive | tiled | auto takes "
          "| auto ÷ sdpa |\n|---|---|---|---|--:|--:|--:|---|--:|")
    worst = 0.
    for case, dtype in product(cases(), (torch.float32, torch.bfloat16)):
        line = f"| {case.what} | {case.mask} | {str(dtype)[6:]} | {' × '.join(map(str, case.shape))} |"
        if args.only not in line: continue
        milliseconds, taken = call(case, dtype)
        names = ("sdpa", "naive", "tiled") if case.shape[3] <= 2048 else ("sdpa", "tiled")  # naive would take too long
        rounds = [{b: milliseconds(b) for b in names} for _ in range(args.rounds + 1)][1:]  # the first warms up
        t = {"naive": float("nan")} | {b: statistics.median(r[b] for r in rounds) for b in names}
        worst = max(worst, t[taken] / t["sdpa"])
        print(line, f"{t['sdpa']:.2f} | {t['naive']:.2f} | {t['tiled']:.2f} | {taken} | {t[taken] / t['sdpa']:.2f} |",
              flush=True)
    print(f"\nAt the worst, auto took {worst:.2f} of the time of sdpa")


if __name__ == "__main__":
    main()
