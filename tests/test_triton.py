"Triton's kernels in its interpreter: outputs and gradients, every rule of the mask, dropout, packed sequences, bad numbers"
import itertools
import math
import os

import torch

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import pytest

from flash_transformer.attention import AttentionMask, attention
from flash_transformer.attention import triton_kernels as backend
from flash_transformer.attention.triton_kernels import triton_attention, triton_attention_varlen

pytestmark = [pytest.mark.skipif(bool(backend.missing()), reason=backend.missing()),
              pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")]   # NaN in NumPy
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(batch, heads, kv_heads, q_len, k_len, d, dtype=torch.float16, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(batch, h, n, d).to(DEVICE, dtype)
            for h, n in ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len), (heads, q_len))]


def run(f, q, k, v, g): # → output and gradients
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = f(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), g.to(out.dtype))]


def naive(mask, scale): return lambda q, k, v: attention(q, k, v, mask, 0., scale, backend="naive")


def check(qkvg, mask=None, scale=None):
    "flash-attention's criterion: at most twice the error of plain attention in the same dtype, and a rounding"
    scale = scale or qkvg[0].shape[-1]**-.5
    ours = run(lambda q, k, v: triton_attention(q, k, v, mask, 0., scale), *qkvg)
    exact, plain = run(naive(mask, scale), *(x.double() for x in qkvg)), run(naive(mask, scale), *qkvg)
    for name, a, e, p in zip(("output", "dq", "dk", "dv"), ours, exact, plain, strict=True):
        error, allowed = (a.double() - e).abs().max().item(), (p.double() - e).abs().max().item()
        rounding = torch.finfo(a.dtype).eps * e.abs().max().item()
        assert error <= 2 * allowed + rounding / 2, f"{name}: {error:.1e} against {allowed:.1e}"
    return ours


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 3, 16, 17, 40, 64, 80, 128, 256])
def test_head_sizes(d, dtype):
    check(tensors(1, 1, 1, 35, 45, d, dtype), AttentionMask(causal=True))


@pytest.mark.parametrize("q_len, k_len", [(1, 1), (1, 70), (70, 1), (32, 32), (33, 31), (96, 64)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(q_len, k_len, causal):
    check(tensors(1, 2, 2, q_len, k_len, 16), AttentionMask(causal=causal))


MASKS = [dict(window=(9, 20)), dict(window=(0, -1)), dict(window=(-1, 3)), dict(window=(0, 0), causal=True),
         dict(window=(10**12, 10**12)), dict(alibi=torch.tensor([.5, .1, 2., .02])),
         dict(alibi=torch.rand(3, 4, generator=torch.Generator().manual_seed(0)), causal=True),
         dict(key_lengths=torch.tensor([0, 17, 60])), dict(key_lengths=torch.tensor([60, 1, 32]), causal=True),
         dict(key_lengths=torch.tensor([5, 40, 33]), causal=True, window=(20, 7), alibi=torch.tensor([.5, .1, 2., .02]))]


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: "-".join(m))
def test_masks_with_grouped_heads(mask):
    mask = AttentionMask(**mask)
    qkvg = tensors(3, 4, 2, 50, 60, 16)
    ours = check(qkvg, mask)
    nothing = ~mask.dense(50, 60).any(-1).expand(3, 4, 50)
    assert not ours[0][nothing].any() and not ours[1][nothing].any()       # zeros, with zero gradients


def test_blocks(monkeypatch):
    "Any size of blocks, on tiles with one edge, two edges and none"
    for q, k in ((16, 16), (16, 64), (64, 16)):
        for kernel in (backend._forward, backend._backward_dq, backend._backward_dkdv):
            monkeypatch.setattr(kernel, "configs", [backend.triton.Config({"BLOCK_Q": q, "BLOCK_K": k})])
        for mask in (None, AttentionMask(causal=True), AttentionMask(window=(30, 10), key_lengths=torch.tensor([100]))):
            check(tensors(1, 1, 1, 80, 110, 16), mask)


@pytest.mark.parametrize("scale", [-.5, 0., 40.])
def test_scales(scale): check(tensors(1, 1, 1, 40, 50, 16), AttentionMask(causal=True), scale or 1e-30)


def test_extreme_scores():
    q, k, v, g = tensors(1, 1, 1, 40, 50, 16)
    check((q * 50, k * 50, v, g), scale=1.)                                # to ±1e4
    check((q * 50, k * 50, v, g), AttentionMask(causal=True), 1.)


def test_empty():
    for q_len, k_len in ((0, 5), (5, 0), (0, 0)):
        out, *grads = run(lambda q, k, v: triton_attention(q, k, v, None, 0., 1.), *tensors(2, 2, 1, q_len, k_len, 16))
        assert out.shape == (2, 2, q_len, 16) and not any(x.any() for x in (out, *grads))
    assert triton_attention(*tensors(0, 2, 2, 5, 5, 16)[:3], None, 0., 1.).shape == (0, 2, 5, 16)


def test_strides():
    "Slices of one fused projection, transposed, expanded, and gradients that are expanded"
    torch.manual_seed(0)
    qkv = torch.randn(2, 40, 3, 2, 32).half().to(DEVICE)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))                   # b h n d, far apart
    g = torch.ones((), dtype=torch.half, device=DEVICE).expand(2, 2, 40, 32)
    strange = [(q, k, v, g), (q.mT, k.mT, v.mT, g.mT),
               (q, k[:, :1].expand_as(k), v[:1].expand_as(v), g), (q[..., 1:18], k[..., 1:18], v[..., 1:18], g[..., :17])]
    for qkvg in strange:
        f = lambda q, k, v: triton_attention(q, k, v, AttentionMask(causal=True), 0., .2)
        same = run(f, *(x.contiguous() for x in qkvg))
        assert all(map(torch.equal, run(f, *qkvg), same))


def test_deterministic():
    qkvg = tensors(1, 4, 1, 60, 60, 16)
    f = lambda q, k, v: triton_attention(q, k, v, AttentionMask(causal=True), 0., .25)
    assert all(map(torch.equal, run(f, *qkvg), run(f, *qkvg)))


# packed

def pack(lengths, heads, d=16): return torch.randn(sum(lengths), heads, d).half().to(DEVICE)


@pytest.mark.parametrize("mask", [dict(), dict(causal=True), dict(window=(7, 3), alibi=torch.tensor([.5, .1, 2., .02])),
                                  dict(causal=True, alibi=torch.rand(5, 4))], ids=lambda m: "-".join(m) or "none")
@pytest.mark.parametrize("dropout", [0., .3])
def test_packed_equals_one_by_one(mask, dropout):
    torch.manual_seed(0)
    q_lens, k_lens = [40, 0, 5, 33, 7], [9, 4, 0, 33, 50]
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=DEVICE) for n in (q_lens, k_lens))
    qkvg = pack(q_lens, 4), pack(k_lens, 2), pack(k_lens, 2), pack(q_lens, 4)
    torch.manual_seed(3)
    packed = run(lambda q, k, v: triton_attention_varlen(q, k, v, cu_q, cu_k, 40, 50, AttentionMask(**mask), dropout,
                                                         .25), *qkvg)
    parts = [x.split(n) for x, n in zip(qkvg, (q_lens, k_lens, k_lens, q_lens), strict=True)]
    for b, one in enumerate(zip(*parts, strict=True)):
        if dropout and b: break                    # drops by sequence number: the first is the same when alone
        slopes = mask.get("alibi")
        alone = AttentionMask(**{**mask, "alibi": slopes[b:b + 1] if slopes is not None and slopes.dim() == 2 else slopes})
        torch.manual_seed(3)
        alone = run(lambda q, k, v: triton_attention(q, k, v, alone, dropout, .25), *(x[None].transpose(1, 2) for x in one))
        for x, y, lens in zip(packed, alone, (q_lens, q_lens, k_lens, k_lens), strict=True):
            assert torch.equal(x.split(lens)[b], y[0].transpose(0, 1))


# dropout

@pytest.mark.parametrize("mask", [dict(), dict(causal=True, key_lengths=torch.tensor([60, 30]))], ids=["none", "mask"])
def test_dropout_is_replayed(mask):
    "The dropped weights are recovered with v = 1, and a plain computation with them has the same gradients"
    p, mask = .3, AttentionMask(**mask)
    q, k, v, g = tensors(2, 2, 1, 50, 60, 64)
    eye = torch.eye(64, device=DEVICE)[:60].half().expand(2, 1, 60, 64)
    def ours(q, k, v):
        torch.manual_seed(5)
        return triton_attention(q, k, v, mask, p, .125)
    weights, full = ours(q, k, eye)[..., :60], naive(mask, .125)(q, k, eye)[..., :60]
    keep = weights != 0
    assert (weights - full / (1 - p))[keep].abs().max() < 2e-3
    share, count = keep[full > 0].double().mean().item(), int((full > 0).sum())
    assert abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / count)
    def plain(q, k, v):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        s = (q @ k.mT * .125).masked_fill(~mask.dense(50, 60, DEVICE), -torch.inf)
        return s.softmax(-1).nan_to_num(0) * keep / (1 - p) @ v
    for a, e in zip(run(ours, q, k, v, g), run(plain, *(x.double() for x in (q, k, v, g))), strict=True):
        assert (a - e).abs().max() < 4e-3


def test_dropout_follows_the_seed():
    q, k, v, _ = tensors(2, 2, 2, 64, 64, 64)
    v = torch.eye(64).half().expand_as(v).to(DEVICE)
    def keep(seed, p):
        torch.manual_seed(seed)
        return triton_attention(q, k, v, None, p, .1) != 0
    first = keep(1, .5)
    assert torch.equal(first, keep(1, .5)) and not torch.equal(first, keep(2, .5))
    first = first.double() - .5                                            # batches, heads, rows, columns: no copies
    for x, y in ((first[0], first[1]), (first[:, 0], first[:, 1]), (first[..., 1:, :], first[..., :-1, :]),
                 (first[..., 1:], first[..., :-1])):
        assert abs((x * y).mean().item()) < 4 * .25 / math.sqrt(x.numel())
    assert keep(1, 1 - 2**-20).double().mean() < 1e-3 and keep(1, 2**-20).double().mean() > .99


# numbers that are none

@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_and_inf_stay_in_the_rows_that_see_them(which, bad):
    qkvg = tensors(1, 2, 2, 40, 40, 16)
    qkvg[which][0, 0, 20, 3] = bad
    mask = AttentionMask(causal=True)
    out = triton_attention(*qkvg[:3], mask, 0., .25)
    plain = naive(mask, .25)(*qkvg[:3])
    assert torch.equal(out.isnan(), plain.isnan()) and torch.equal(out.isinf(), plain.isinf())
    assert not out[0, 1].isnan().any() and not out[0, 0, :20].isnan().any()


def test_garbage_in_the_padding_does_not_matter():
    q, k, v, g = tensors(2, 2, 2, 40, 40, 16)
    f = lambda q, k, v: triton_attention(q, k, v, AttentionMask(key_lengths=torch.tensor([25, 40])), 0., .25)
    clean = run(f, q, k, v, g)
    for x in (k, v): x[0, :, 25:] = math.nan
    assert all(map(torch.equal, run(f, q, k, v, g), clean))


# who is served

def test_reasons(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        q = torch.empty(2, 4, 8, 64, dtype=torch.float16, device="cuda")
    refused = lambda q, mask=None: backend.cannot(q, q, q, mask, 0.)
    slow = lambda q, mask=None, k=None: backend.slow(q, q if k is None else k, q, mask, 0.)
    causal = AttentionMask(causal=True)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "Some GPU")
    def device(capability, cuda=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability)
    device((8, 0))
    assert not backend.missing() and not refused(q) and not slow(q, AttentionMask(window=(3, 3)))
    assert not slow(q, causal, q[:, :, :5]) and not slow(q[0]) and not refused(q[0].bfloat16())
    assert "PyTorch's own fused" in slow(q) and "PyTorch's own fused" in slow(q, causal)
    assert "not float32" in refused(q.float()) and "not 288" in refused(torch.empty(1, 1, 1, 288).half())
    assert "cpu" in refused(torch.empty(1, 1, 1, 64).half())
    device((7, 5))
    assert "tensor cores" in slow(q, causal) and not refused(q) and "take float16" in refused(q.bfloat16())
    device((7, 0))
    assert "7.5 and up, and Some GPU has 7.0" in refused(q)
    device(None, cuda=False)
    assert "TRITON_INTERPRET=1" in backend.missing()
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in backend.missing()
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert "not installed" in backend.missing() and "interpreter" in slow(torch.empty(1, 1, 1, 64))
