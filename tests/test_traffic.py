"Counting FLOPs and bytes: what its chapter leaves open: random sizes, bad input, and the solutions of its exercises."
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_transformer.attention.traffic import (
    FastMemory,
    attention_bytes,
    attention_flops,
    naive_through,
    naive_traffic,
    tile_sizes,
    tiled_through,
    tiled_traffic,
)

BOTH = [(naive_through, naive_traffic), (tiled_through, tiled_traffic)]


@pytest.mark.parametrize("through, formula", BOTH)
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 1500))
def test_counts_are_as_the_formulas_say(through, formula, q_len, k_len, d, spare):
    memory = max(5 * d + 4, k_len + 1) + spare
    q, k, v = (torch.randn(n, d, dtype=torch.float64) for n in (q_len, k_len, k_len))
    fast = FastMemory(memory)
    out = through(fast, q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q[None], k[None], v[None])[0], atol=1e-12, rtol=0)
    assert (fast.loads, fast.stores, fast.flops) == formula(q_len, k_len, d, memory)
    assert fast.peak <= memory and fast.held == 0


@pytest.mark.parametrize("through, formula", BOTH)
def test_a_memory_too_small_is_named(through, formula):
    x = torch.randn(10, 8)
    for call in (lambda: formula(10, 10, 8, 12), lambda: through(FastMemory(12), x, x, x)):
        with pytest.raises(ValueError, match="a fast memory of 12 numbers is too small"): call()
    with pytest.raises(ValueError, match="at least 101"): naive_traffic(1, 100, 8, 100)


@pytest.mark.parametrize("sizes", [dict(keys=3), dict(queries=2), dict(keys=3, queries=5)])
def test_tiles_of_given_sizes(sizes):
    q, k, v = torch.randn(3, 10, 4, dtype=torch.float64)
    fast = FastMemory(200)
    torch.testing.assert_close(tiled_through(fast, q, k, v, **sizes), F.scaled_dot_product_attention(*(
        x[None] for x in (q, k, v)))[0])
    keys = sizes.get("keys", tile_sizes(200, 4)[0])
    passes = math.ceil(10 / keys)
    assert fast.loads == 2 * 10 * 4 + passes * 10 * (4 + 4 + 2)


def test_the_fast_memory_refuses():
    x = torch.randn(4, 4)
    with pytest.raises(ValueError, match="load it first"), FastMemory(100): x + 1
    with pytest.raises(ValueError, match="load it first"), FastMemory(100): x.mul_(2)
    with pytest.raises(ValueError, match="load it first"), FastMemory(100): x.sum().item()
    with pytest.raises(MemoryError, match="32 numbers do not fit into a fast memory of 31"), FastMemory(31) as fast:
        fast.load(x).exp()


def test_the_fast_memory_lets_go_of_what_nobody_holds():
    x = torch.randn(4, 4)
    with FastMemory(100) as fast:
        a = fast.load(x)
        view = a[:2].T
        assert fast.held == 16                # a view takes no room ...
        del a
        assert fast.held == 16                # ... and keeps its tensor alive
        del view
        assert fast.held == 0
        top, places = fast.load(x).max(-1)    # an operation with two results
        assert fast.held == 8
    assert fast.peak == 24


def test_flops_of_causal_rows_and_backward():
    for q_len in range(1, 9):
        for k_len in range(1, 9):
            pairs = sum(j <= i + k_len - q_len for i in range(q_len) for j in range(k_len))
            assert attention_flops(2, 3, q_len, k_len, 5, causal=True) == 4 * 2 * 3 * pairs * 5
    assert attention_flops(2, 3, 7, 9, 5, backward=True) == 2.5 * attention_flops(2, 3, 7, 9, 5)
    n = 4096 # papers halve
    assert attention_flops(1, 1, n, n, 64, causal=True) == pytest.approx(4 * n * n * 64 / 2, rel=1e-3)


def test_bytes_are_those_of_the_tensors():
    q, k, v = (torch.randn(2, heads, n, 4, dtype=torch.bfloat16, requires_grad=True)
               for heads, n in ((6, 5), (3, 7), (3, 7)))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    sizes = dict(batch=2, heads=6, q_len=5, k_len=7, head_dim=4, kv_heads=3, dtype=torch.bfloat16)
    forward = [q, k, v, out]
    assert attention_bytes(**sizes) == sum(x.nbytes for x in forward)
    backward = [*forward, out, *torch.autograd.grad(out.sum(), (q, k, v))] # the second out: its gradient
    assert attention_bytes(**sizes, backward=True) == sum(x.nbytes for x in backward)


def test_solutions_of_the_exercises():
    n, d, memory = 16384, 64, 98304
    tiles = math.ceil(n / tile_sizes(memory, d)[0])
    swapped = n * d + 2 * n * d * tiles + n * d
    assert swapped / tiled_traffic(n, n, d, memory).moved == pytest.approx(2 / 3, abs=0.04)
    assert next(d for d in range(1, 500)
                if tiled_traffic(n, n, d, memory).moved > naive_traffic(n, n, d, memory).moved) == 203
    for heads in (1, 8): # query heads to one head of keys
        moved = attention_bytes(1, heads, 1, n, d, kv_heads=1, dtype=torch.float16)
        assert attention_flops(1, heads, 1, n, d) / moved == pytest.approx(heads, rel=1e-3)
