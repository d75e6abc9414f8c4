"Tiled attention: nothing of size q_len × k_len, tiles skipped, gradients, dropout, NaN and infinities."
import weakref
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flash_transformer.attention import AttentionMask, MultiHeadAttention, attention
from flash_transformer.attention.tiled import tiled_attention

N, BLOCK, HEADS, D = 1024, 128, 2, 16
LARGEST = 2 * HEADS * max(N * D, BLOCK * BLOCK)  # numbers; a head's scores alone are 16 times as many
MASKS = {
    "none": None,
    "causal": AttentionMask(causal=True),
    "lengths": AttentionMask(key_lengths=[700]),
    "window": AttentionMask(window=(100, 50)),
    "alibi": AttentionMask(causal=True, alibi=torch.tensor([0.5, 0.25])),
    "all": AttentionMask(True, [900], (300, -1), torch.tensor([[0.5, 0.25]])),
}


def inputs(*lengths, heads=HEADS, kv_heads=None, d=D, batch=1, dtype=torch.float32, seed=0):
    "q, k, v that want gradients, and a gradient for the output"
    g, (q_len, k_len) = torch.Generator().manual_seed(seed), lengths if len(lengths) == 2 else lengths * 2
    kv_heads = kv_heads or heads
    shapes = (heads, q_len), (kv_heads, k_len), (kv_heads, k_len), (heads, q_len)
    *qkv, d_out = (torch.randn(batch, h, n, d, generator=g, dtype=torch.float64).to(dtype) for h, n in shapes)
    return *(x.requires_grad_() for x in qkv), d_out


def both_ways(f, q, k, v, d_out):
    "Output and the three gradients"
    out = f(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)]


def tiled(mask=None, dropout=0., block=BLOCK):
    return lambda q, k, v: tiled_attention(q, k, v, mask, dropout, block_q=block, block_k=block)


def naive(mask=None): return lambda q, k, v: attention(q, k, v, mask, backend="naive")


# ---- memory ----

class Watch(TorchDispatchMode):
    "Sees every tensor that an operation gives back: the largest, the memory alive at once, and the products"
    def __init__(self):
        super().__init__()
        self.largest = self.alive = self.peak = self.products = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        self.products += func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default, torch.ops.aten.baddbmm.default)
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor): continue
            storage = x.untyped_storage()
            self.largest = max(self.largest, x.numel(), storage.nbytes() // x.element_size())  # views too
            if storage._cdata in before or storage._cdata in self.known: continue
            self.known.add(storage._cdata)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, key, nbytes):
        self.known.discard(key)
        self.alive -= nbytes


def watched(f, *tensors):
    with Watch() as watch: both_ways(f, *tensors)
    return watch


@pytest.mark.parametrize("dropout", [0., 0.2])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_no_large_tensor(mask, dropout):
    watch = watched(tiled(mask, dropout), *inputs(N))
    assert N * D * HEADS <= watch.largest <= LARGEST
    assert 0 < watch.peak < N * N * 4


def test_no_large_tensor_with_grouped_heads_and_other_layouts():
    q, k, v, d_out = inputs(N, heads=4, kv_heads=2)
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    assert watched(tiled(MASKS["causal"]), q, k, v, d_out).largest <= 2 * LARGEST


@pytest.mark.parametrize("mask", [MASKS["none"], MASKS["causal"]])
def test_the_watch_sees_large_tensors(mask):
    "The test above can fail: attention that makes the matrix is found out, forward and in the backward pass alone"
    q, k, v, d_out = inputs(N)
    watch = watched(naive(mask), q, k, v, d_out)
    assert watch.largest >= HEADS * N * N and watch.peak >= HEADS * N * N * 4
    out = naive(mask)(q, k, v)
    with Watch() as watch: out.backward(d_out)
    assert watch.largest >= HEADS * N * N


def allocated(f, *tensors):
    "Bytes the allocator itself had given out at most, from the profiler's record"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        both_ways(f, *tensors)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_allocator():
    "What PyTorch's allocator gives out grows with N; with its square for naive"
    peaks = {n: (allocated(tiled(), *inputs(n)), allocated(naive(), *inputs(n))) for n in (512, 1024, 2048)}
    for n, (ours, theirs) in peaks.items():
        vectors, tiles = HEADS * n * D * 4, HEADS * BLOCK * BLOCK * 4
        assert 4 * vectors <= ours <= 8 * vectors + 8 * tiles, (n, ours)
        assert theirs >= 2 * HEADS * n * n * 4, (n, theirs)
    assert peaks[2048][0] <= 2 * peaks[1024][0] and peaks[2048][1] >= 3.5 * peaks[1024][1]


# ---- work ----

@pytest.mark.parametrize("mask, tiles", [
    (None, 64), (AttentionMask(causal=True), 36),                       # of 8 × 8: half, and the diagonal
    (AttentionMask(causal=True, window=(128, -1)), 15),                 # own tile and the one before
    (AttentionMask(causal=True, window=(129, -1)), 21),                 # one key of the tile before that
    (AttentionMask(window=(0, 0)), 8), (AttentionMask(window=(1, 1)), 22),
    (AttentionMask(key_lengths=[128]), 8), (AttentionMask(key_lengths=[129]), 16), (AttentionMask(key_lengths=[0]), 0),
    (AttentionMask(causal=True, key_lengths=[512]), 10 + 16),
])
def test_tiles_are_skipped(mask, tiles):
    "Two products a tile forward, five backward; none for a tile where nobody sees anybody"
    q, k, v, d_out = inputs(N)
    with Watch() as watch:
        out = tiled(mask)(q, k, v)
        assert watch.products == 2 * tiles
        out.backward(d_out)
        assert watch.products == 7 * tiles


def test_tiles_are_skipped_with_unequal_lengths():
    q, k, v, _ = inputs(256, 1024)
    with Watch() as watch: tiled(AttentionMask(causal=True))(q, k, v)   # aligned at the end: 7 + 8 tiles
    assert watch.products == 2 * 15
    q, k, v, _ = inputs(1024, 256)
    with Watch() as watch: tiled(AttentionMask(causal=True))(q, k, v)   # 6 rows of tiles see nothing
    assert watch.products == 2 * 3


# ---- gradients ----

@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("dropout", [0., 0.4])
@pytest.mark.parametrize("mask", [
    None, AttentionMask(True), AttentionMask(key_lengths=[5, 0]), AttentionMask(window=(2, 1)),
    AttentionMask(alibi=torch.tensor([0.5, 0.1])), AttentionMask(True, [4, 6], (3, -1), torch.rand(2, 2).double()),
], ids=["none", "causal", "lengths", "window", "alibi", "all"])
def test_gradcheck(mask, dropout, kv_heads):
    def f(q, k, v):
        torch.manual_seed(1)  # the same dropout each time
        return tiled_attention(q, k, v, mask, dropout, block_q=3, block_k=2)
    assert torch.autograd.gradcheck(f, inputs(5, 7, kv_heads=kv_heads, d=3, batch=2, dtype=torch.float64)[:3])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 33), st.integers(1, 33), st.integers(1, 40), st.integers(1, 40), st.sampled_from(list(MASKS)),
       st.integers(0, 99))
def test_blocks_need_not_divide(q_len, k_len, block_q, block_k, kind, seed):
    mask = MASKS[kind]
    if mask is not None and mask.key_lengths is not None:
        mask = AttentionMask(mask.causal, [seed % (k_len + 1)], mask.window and (5, -1), mask.alibi)
    tensors = inputs(q_len, k_len, d=4, dtype=torch.float64, seed=seed)
    found = both_ways(lambda q, k, v: tiled_attention(q, k, v, mask, block_q=block_q, block_k=block_k), *tensors)
    for ours, right in zip(found, both_ways(naive(mask), *tensors)):
        torch.testing.assert_close(ours, right, atol=1e-12, rtol=0)


@pytest.mark.parametrize("blocks", [(0, 4), (4, 0), (-1, 4)])
def test_blocks_of_nothing(blocks):
    with pytest.raises(ValueError, match="needs at least 1"):
        tiled_attention(*inputs(4)[:3], block_q=blocks[0], block_k=blocks[1])


def test_second_derivatives_are_refused():
    q, k, v, _ = inputs(8, dtype=torch.float64)
    for loss in (tiled_attention(q, k, v).pow(2).sum(), tiled_attention(q, k, v).sum()):
        with pytest.raises(RuntimeError, match="no second derivatives"): torch.autograd.grad(loss, q, create_graph=True)


@pytest.mark.parametrize("batch, q_len, k_len", [(0, 5, 5), (1, 0, 5), (1, 5, 0), (1, 0, 0)])
@pytest.mark.parametrize("mask", [None, AttentionMask(True), AttentionMask(window=(1, 1))])
def test_zero_lengths(batch, q_len, k_len, mask):
    found = both_ways(tiled(mask, block=2), *inputs(q_len, k_len, batch=batch))
    assert found[0].shape == (batch, HEADS, q_len, D)
    assert all((x == 0).all() for x in found) if not k_len else all((x == 0).all() for x in found[1:] if not q_len)


# ---- dropout ----

@pytest.mark.parametrize("mask", [None, AttentionMask(True), AttentionMask(True, [30], (20, -1))])
def test_dropout_is_replayed(mask):
    "With the identity as values the output is the weights that were kept; all gradients are those of that very mask"
    n, p = 40, 0.3
    q, k, v, d_out = inputs(n, d=n, dtype=torch.float64)
    eye = torch.eye(n, dtype=torch.float64).expand_as(v)

    def f(v):
        torch.manual_seed(5)
        return tiled(mask, p, block=16)(q, k, v)
    see = torch.ones(n, n, dtype=torch.bool) if mask is None else mask.dense(n, n)
    seen = see.any(-1, keepdim=True)
    weights = (q @ k.mT / n ** 0.5).masked_fill(~see & seen, -torch.inf).softmax(-1) * seen
    kept = (f(eye) / weights).detach().nan_to_num()
    assert all(x in (0., round(1 / (1 - p), 9)) for x in kept.round(decimals=9).unique().tolist())
    share = (kept > 0).double()[(see & seen).expand_as(kept)].mean()
    assert abs(share - (1 - p)) < 0.06                                  # five standard deviations of ≥ 1,400 throws
    right = (weights * kept) @ v
    found, expected = ([x, *torch.autograd.grad(x, (q, k, v), d_out, retain_graph=True)] for x in (f(v), right))
    for ours, theirs in zip(found, expected): torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    again = torch.autograd.grad(found[0], (q, k, v), d_out)
    assert all(torch.equal(a, b) for a, b in zip(again, found[1:]))     # a second replay of the same mask


def test_dropout_follows_the_seed_and_differs_between_heads_sentences_tiles():
    q, v = torch.zeros(2, 2, 32, 32), torch.eye(32).expand(2, 2, 32, 32)

    def kept(seed, block):
        torch.manual_seed(seed)
        return tiled_attention(q, q, v, dropout=0.5, block_q=block, block_k=block) > 0
    assert torch.equal(kept(0, 16), kept(0, 16)) and not torch.equal(kept(0, 16), kept(1, 16))
    parts = [part for head in kept(0, 16).flatten(0, 1) for row in head.split(16) for part in row.split(16, dim=1)]
    assert all(not torch.equal(parts[i], parts[j]) for i in range(len(parts)) for j in range(i))


# ---- NaN and infinities ----

QUERY, KEY, LENGTH = 3, 4, 7
HURT = {
    "none": None, "causal": AttentionMask(True), "lengths": AttentionMask(key_lengths=[4]),
    "window": AttentionMask(window=(1, 1)), "all": AttentionMask(True, [6], (2, -1), torch.tensor([0.5, 0.25])),
}


def pytorchs(q, k, v): # its kernel gives zeros, not NaN, where all scores of a row are NaN that is shorter than a
    return F.scaled_dot_product_attention(q, k, v)  # vector register


def row_by_row(mask):
    "Each row with nothing but the keys it may see, in plain PyTorch: what it does not see cannot touch it"
    see = torch.ones(LENGTH, LENGTH).bool() if mask is None else mask.dense(LENGTH, LENGTH)[0, 0].expand(LENGTH, -1)
    bias = torch.zeros(1, 1, 1, 1) if mask is None or mask.alibi is None else mask.bias(LENGTH, LENGTH)

    def f(q, k, v):
        rows, bias_of = [], bias.expand(1, HEADS, LENGTH, LENGTH)
        for i in range(LENGTH):
            keys = see[i].nonzero().flatten()
            scores = q[:, :, i:i + 1] @ k[:, :, keys].mT / q.shape[-1] ** 0.5 + bias_of[:, :, i:i + 1, keys]
            rows.append(scores.softmax(-1) @ v[:, :, keys] if len(keys) else 0 * q[:, :, i:i + 1].detach())
        return torch.cat(rows, dim=2)
    return f, see


@pytest.mark.parametrize("kind", HURT)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", "qkv")
@pytest.mark.parametrize("backend", ["naive", "sdpa", "tiled", "auto"])
def test_not_finite(backend, where, value, kind):
    "It reaches those who see it, as in plain PyTorch, and leaves no trace in the others"
    mask, (plain, see) = HURT[kind], row_by_row(HURT[kind])
    if where == "q" and value != value and backend in ("sdpa", "auto") and kind == "none": plain = pytorchs

    def run(hurt, backend):
        *qkv, d_out = inputs(LENGTH, d=4)
        x, place = (qkv["qkv".index(where)], QUERY if where == "q" else KEY)
        if hurt:
            with torch.no_grad(): x[:, :, place, 1] = value
        return both_ways(plain if backend is None else lambda *x: attention(*x, mask, backend=backend), *qkv, d_out)
    found, right = run(True, backend), run(True, None)
    for what, ours, theirs in zip(("output", "dq", "dk", "dv"), found, right):
        torch.testing.assert_close(ours, theirs, equal_nan=True, msg=lambda m, what=what: f"{what}: {m}")

    touched = see[:, KEY] if where != "q" else torch.arange(LENGTH) == QUERY    # rows
    keys = see[touched].any(0)                                                  # gradients come back from there
    if where != "q": keys = keys | (torch.arange(LENGTH) == KEY)
    clean = [~touched, ~touched, ~keys, ~keys]
    same = [all(torch.equal(ours[:, :, rows], before[:, :, rows]) for ours, before, rows
                in zip(found, run(False, name), clean)) for name in {backend, "tiled"}]
    assert any(same)  # to the bit, as `backend` or, where what came out was not finite, as `tiled` has it
    if kind == "lengths" and where != "q": assert all(x.isfinite().all() for x in found)  # nobody sees it


def test_not_finite_in_long_rows():
    "Over many tiles, in one of which the NaN stands"
    q, k, v, d_out = inputs(200)
    mask = AttentionMask(True, window=(50, -1))
    before = both_ways(tiled(mask, block=32), q, k, v, d_out)
    with torch.no_grad(): k[:, :, 100, 3], v[:, :, 100, 3] = torch.nan, torch.nan
    found = both_ways(tiled(mask, block=32), q, k, v, d_out)
    rows, keys = torch.arange(100, 151), torch.arange(50, 151)
    for ours, old, touched in zip(found, before, (rows, rows, keys, keys)):
        clean = torch.ones(200).bool().index_fill(0, touched, False)
        assert torch.equal(ours[:, :, clean], old[:, :, clean])
    assert found[0][:, :, rows].isnan().all() and found[1][:, :, rows].isnan().all()


# ---- dtypes and layouts ----

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    "At most twice the error of plain PyTorch in the same dtype; what comes out has the dtype of what went in"
    *qkv, d_out = inputs(150, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in qkv]

    def plain(q, k, v): return (q @ k.mT / D ** 0.5).softmax(-1) @ v
    for ours, usual, right in zip(both_ways(tiled(block=64), *qkv, d_out), both_ways(plain, *qkv, d_out),
                                  both_ways(plain, *exact, d_out.double())):
        assert ours.dtype == dtype
        assert (ours - right).abs().max() <= 2 * (usual - right).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    tensors = inputs(70, dtype=dtype)
    right = both_ways(tiled(block=32), *tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(both_ways(tiled(block=32), *tensors), right))
        module, x = MultiHeadAttention(32, 4, backend="tiled"), torch.randn(2, 9, 32)
        out = module(x, mask=AttentionMask(causal=True))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and module.in_proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("mask", [None, AttentionMask(True)])
def test_layouts(mask):
    "Transposed, expanded, strided inputs and gradients give what contiguous ones give"
    *qkv, d_out = (x.detach() for x in inputs(50, heads=4, kv_heads=2))
    right = both_ways(tiled(mask, block=16), *(x.clone().requires_grad_() for x in qkv), d_out)
    for turn in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT,
                 lambda x: torch.stack([x, x], dim=-1)[..., 0]):
        odd = [turn(x) for x in (*qkv, d_out)]
        assert not odd[0].is_contiguous()
        found = both_ways(tiled(mask, block=16), *(x.requires_grad_() for x in odd[:3]), odd[3])
        for ours, theirs in zip(found, right): torch.testing.assert_close(ours, theirs)
    one = torch.ones(()).expand(1, 4, 50, D)                            # as out.sum().backward() gives it
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    for ours, theirs in zip(both_ways(tiled(mask, block=16), q, k, v, one),
                            both_ways(tiled(mask, block=16), q, k, v, one.contiguous())):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3))[1:])
def test_only_some_gradients(wanted):
    q, k, v, d_out = inputs(20)
    right = both_ways(tiled(block=8), q, k, v, d_out)[1:]
    q, k, v = (x.detach().requires_grad_(w) for x, w in zip((q, k, v), wanted))
    tiled(block=8)(q, k, v).backward(d_out)
    for x, g, w in zip((q, k, v), right, wanted): assert torch.equal(x.grad, g) if w else x.grad is None
