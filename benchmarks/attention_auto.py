"""Which backend is faster on this machine's CPU, `naive` or `sdpa`? The measurements behind the rule of `auto`.

    python benchmarks/attention_auto.py            about two minutes; prints a Markdown table
    python benchmarks/attention_auto.py --rounds 5 quicker and rougher

Each line is one shape. The backends are called in turn, round after round, and the median is kept, so that a
busy moment of the machine meets all alike. Queries, keys and values come as in `MultiHeadAttention`, cut from one
projection; the time includes putting the heads together again and, under "train", the backward pass.
"""
import argparse
import statistics
import time

import torch

from flash_transformer.attention import AttentionMask, attention

SHAPES = [  # batch, heads, q_len, k_len, head_dim
    (256, 8, 16, 16, 32), (160, 8, 24, 24, 64), (128, 4, 32, 32, 64), (32, 8, 64, 64, 64), (16, 8, 128, 128, 64),
    (8, 8, 256, 256, 64), (4, 8, 512, 512, 64), (2, 8, 1024, 1024, 64), (1, 8, 2048, 2048, 64),
]
DECODING = [(64, 8, 1, 8, 32), (64, 8, 1, 32, 64), (1, 8, 1, 32, 64), (64, 8, 5, 24, 64), (16, 8, 1, 512, 64)]


def milliseconds(backend, inputs, mask, dropout, train):
    "One call, forward and, if train, backward"
    q, k, v = (x.transpose(1, 2) for x in inputs)
    start = time.perf_counter()
    with torch.set_grad_enabled(train):
        out = attention(q, k, v, mask, dropout, backend=backend).transpose(1, 2).flatten(2)
        if train: out.backward(out.detach())
    return 1000 * (time.perf_counter() - start)


def measure(shape, dtype, train, dropout, masked, rounds):
    "Median milliseconds of each backend"
    b, h, q_len, k_len, d = shape
    inputs = [torch.randn(b, n, h, d, dtype=dtype, requires_grad=train) for n in (q_len, k_len, k_len)]
    mask = AttentionMask(key_lengths=torch.randint(k_len // 2 + 1, k_len + 1, (b,))) if masked else None
    times = {"naive": [], "sdpa": []}
    for _ in range(rounds + 1):
        for backend in times: times[backend].append(milliseconds(backend, inputs, mask, dropout, train))
    return {backend: statistics.median(t[1:]) for backend, t in times.items()}  # the first call warms up


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="calls of each backend, of which the median is kept")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads, PyTorch's choice if not given")
    args = parser.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = torch.backends.cpu.get_cpu_capability()
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {machine}\n")
    print("| what | dtype | batch × heads × q_len × k_len × head_dim | naive, ms | sdpa, ms | naive ÷ sdpa |")
    print("|---|---|---|--:|--:|--:|")
    for what, shapes, train, dropout in (("train", SHAPES, True, 0.), ("train, dropout 0.1", SHAPES[:7], True, 0.1),
                                         ("no gradient", SHAPES, False, 0.), ("decoding", DECODING, False, 0.)):
        for dtype in (torch.float32, torch.bfloat16):
            for shape in shapes:
                t = measure(shape, dtype, train, dropout, True, args.rounds)
                print(f"| {what} | {str(dtype)[6:]} | {' × '.join(map(str, shape))} "
                      f"| {t['naive']:.2f} | {t['sdpa']:.2f} | {t['naive'] / t['sdpa']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
