"Our Triton kernels: interpreted, outputs and gradients against float64; and what the compiler makes of them"
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from conformance import Packed, Problem, with_gradients

from flash_transformer.attention import AttentionMask, attention
from flash_transformer.attention import triton_kernels as backend
from flash_transformer.attention.triton_kernels import triton_attention, triton_attention_varlen

triton, tl, _narrow = backend.triton, backend.tl, backend._narrow

WHY_NOT = backend.missing() or ("" if backend.INTERPRETED else "Triton's interpreter is off; see test_gpu.py")
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
              pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")]   # NaN in NumPy


def call(mask=None, dropout=0., scale=.25): return lambda q, k, v: triton_attention(q, k, v, mask, dropout, scale)


def case(q_len=50, k_len=60, d=16, batch=1, heads=2, kv_heads=1, dtype=torch.float16, **other):
    "A case for conformance.py: no mask and ordinary numbers, but for what is said"
    return dict(batch=batch, heads=heads, kv_heads=kv_heads, q_len=q_len, k_len=k_len, head_dim=d, dtype=dtype,
                scores="ordinary", scale=None, seed=0, causal=False, lengths=None, window=None, alibi=None,
                turned=False) | other


def check(**other):
    problem = Problem(case(**other))
    problem.check(problem.solve(lambda q, k, v, mask, scale: triton_attention(
        q, k, v, mask, 0., q.shape[-1]**-.5 if scale is None else scale)), "triton")


def tensors(batch, heads, kv_heads, q_len, k_len, d):
    torch.manual_seed(0)
    return [torch.randn(batch, h, n, d).half() for h, n in ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len),
                                                            (heads, q_len))]


def run(f, *qkvg): return with_gradients(f, qkvg[:3], qkvg[3])


def naive(mask, scale): return lambda q, k, v: attention(q, k, v, mask, 0., scale, backend="naive")


# right: output and gradients against float64

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 3, 16, 17, 40, 64, 80, 128, 256])
def test_head_sizes(d, dtype): check(q_len=35, k_len=45, d=d, heads=1, dtype=dtype, causal=True)


@pytest.mark.parametrize("q_len, k_len", [(1, 1), (1, 70), (70, 1), (64, 64), (65, 31), (96, 128)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(q_len, k_len, causal): check(q_len=q_len, k_len=k_len, causal=causal)


@pytest.mark.parametrize("mask", [
    dict(window=(9, 20)), dict(window=(0, -1)), dict(window=(-1, 3)), dict(window=(0, 0), causal=True),
    dict(window=(10**12, 10**12)), dict(alibi="per head"), dict(alibi="per sentence", causal=True),
    dict(lengths=[0, 17, 60]), dict(lengths=[60, 1, 32], causal=True),
    dict(lengths=[5, 40, 33], causal=True, window=(20, 7), alibi="per sentence")], ids=lambda mask: "-".join(mask))
def test_masks_with_grouped_heads(mask): check(batch=3, heads=4, kv_heads=2, **mask)


@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (64, 16)])
@pytest.mark.parametrize("mask", [dict(), dict(causal=True), dict(window=(30, 10), lengths=[100])],
                         ids=["no edge", "one edge", "two edges"])
def test_blocks(blocks, mask, monkeypatch):
    config = backend.triton.Config(dict(zip(("BLOCK_Q", "BLOCK_K"), blocks, strict=True)))
    for kernel in (backend._forward, backend._backward_dq, backend._backward_dkdv):
        monkeypatch.setattr(kernel, "configs", [config])
    check(q_len=80, k_len=110, heads=1, **mask)


@pytest.mark.parametrize("numbers", [
    dict(scale=-.5), dict(scale=0.), dict(scores="wide"), dict(scores="all near 10000"),
    dict(scores="extreme by q and k"), dict(scores="grid")], ids=lambda numbers: " ".join(map(str, *numbers.items())))
def test_scores(numbers): check(causal=True, dtype=torch.bfloat16, **numbers)


def test_empty():
    for q_len, k_len in ((0, 5), (5, 0), (0, 0)):
        out, *grads = run(lambda q, k, v: triton_attention(q, k, v, None, 0., 1.), *tensors(2, 2, 1, q_len, k_len, 16))
        assert out.shape == (2, 2, q_len, 16) and not any(x.any() for x in (out, *grads))
    assert triton_attention(*tensors(0, 2, 2, 5, 5, 16)[:3], None, 0., 1.).shape == (0, 2, 5, 16)


def test_strides():
    "Slices of one fused projection, transposed, expanded, cut out, and gradients that are expanded"
    torch.manual_seed(0)
    q, k, v = (x.transpose(1, 2) for x in torch.randn(2, 40, 3, 2, 32).half().unbind(2))        # b h n d, far apart
    g = torch.ones((), dtype=torch.half).expand(2, 2, 40, 32)
    cut = slice(1, 18)
    for qkvg in ((q, k, v, g), (q.mT, k.mT, v.mT, g.mT), (q, k[:, :1].expand_as(k), v[:1].expand_as(v), g),
                 (q[..., cut], k[..., cut], v[..., cut], g[..., cut]),
                 [torch.randn(1, 2, 23).half().unfold(2, 16, 1) for _ in range(4)]):           # rows that overlap
        same = run(call(AttentionMask(causal=True)), *(x.contiguous() for x in qkvg))
        assert all(map(torch.equal, run(call(AttentionMask(causal=True)), *qkvg), same))


def test_deterministic():
    qkvg = tensors(1, 4, 1, 60, 60, 16)
    first, again = (run(call(AttentionMask(causal=True)), *qkvg) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_rounding_to_bf16():
    "The interpreter's own would cut off; ours rounds as PyTorch does, to the nearest, and to even between two"
    @triton.jit
    def narrow(x, out, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(out + at, _narrow(tl.load(x + at), tl.load(out + at)))
    torch.manual_seed(0)
    x = torch.cat([torch.randn(1000), torch.tensor([0., -0., math.inf, -math.inf, math.nan, 3e38, 1e-40, 65504.]),
                   1 + torch.arange(16) / 256])                            # the last lie between two of bf16
    out = torch.zeros(1024, dtype=torch.bfloat16)
    narrow[(1,)](x, out, BLOCK=1024)
    assert torch.equal(out.nan_to_num(7), x.bfloat16().nan_to_num(7))


def test_second_derivatives_are_refused():
    q, k, v, _ = tensors(1, 2, 2, 20, 20, 16)
    out = call()(q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError, match="backend='naive'"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_default_dtype_does_not_matter():
    "Models are often built with half precision as the default; sums stay in float32"
    qkvg = tensors(1, 2, 1, 40, 40, 16)
    expected = run(call(), *qkvg)
    torch.set_default_dtype(torch.bfloat16)
    try: assert all(map(torch.equal, run(call(), *qkvg), expected))
    finally: torch.set_default_dtype(torch.float32)


def test_inside_torch_compile():
    "It is left as it is, and what surrounds it compiled"
    def f(q, k, v): return attention(q * 1, k, v, AttentionMask(causal=True), backend="triton") + 1
    qkvg = tensors(1, 2, 2, 20, 20, 16)
    assert all(map(torch.equal, run(torch.compile(f, backend="eager"), *qkvg), run(f, *qkvg)))


# packed

@pytest.mark.parametrize("mask", [dict(), dict(causal=True), dict(window=(7, 3), alibi="per head"),
                                  dict(causal=True, alibi="per sentence")], ids=lambda mask: "-".join(mask) or "none")
def test_packed(mask):
    each = [(40, 9), (0, 4), (5, 0), (33, 33), (7, 70)]
    lengths = dict(zip(("q_len", "k_len"), map(sum, zip(*each, strict=True)), strict=True))
    plain = {k: v for k, v in case(batch=5, heads=4, kv_heads=2, **lengths, **mask).items() if k != "turned"}
    packed = Packed(plain | dict(each=each))
    packed.check(packed.solve(lambda q, k, v, cu_q, cu_k, mask, scale: triton_attention_varlen(
        q, k, v, cu_q, cu_k, 40, 70, mask, 0., .25)), "triton, packed")


def test_packed_equals_one_by_one():
    "To the last bit; and the first sequence, which has number 0 when alone, too, drops the same weights"
    each, cu = (40, 0, 33), torch.tensor([0, 40, 40, 73], dtype=torch.int32)
    torch.manual_seed(0)
    qkvg = [torch.randn(73, heads, 16).half() for heads in (4, 2, 2, 4)]
    for dropout, count in ((0., 3), (.3, 1)):
        torch.manual_seed(3)
        packed = run(lambda q, k, v: triton_attention_varlen(q, k, v, cu, cu, 40, 40, AttentionMask(causal=True),
                                                             dropout, .25), *qkvg)  # noqa: B023
        for b in range(count):
            torch.manual_seed(3)
            one = (x.split(each)[b][None].transpose(1, 2) for x in qkvg)
            alone = run(call(AttentionMask(causal=True), dropout), *one)
            for x, y in zip(packed, alone, strict=True): assert torch.equal(x.split(each)[b], y[0].transpose(0, 1))


# dropout

@pytest.mark.parametrize("mask", [dict(), dict(causal=True, key_lengths=torch.tensor([60, 30]))], ids=["none", "mask"])
def test_dropout_is_replayed(mask):
    "The dropped weights are recovered with v = 1, and a plain computation with them has the same gradients"
    p, mask = .3, AttentionMask(**mask)
    q, k, v, g = tensors(2, 2, 1, 50, 60, 64)
    eye = torch.eye(64)[:60].half().expand(2, 1, 60, 64)
    def ours(q, k, v):
        torch.manual_seed(5)
        return call(mask, p, .125)(q, k, v)
    weights, full = ours(q, k, eye)[..., :60], naive(mask, .125)(q, k, eye)[..., :60]
    keep = weights != 0
    assert (weights - full / (1 - p))[keep].abs().max() < 2e-3
    share, count = keep[full > 0].double().mean().item(), int((full > 0).sum())
    assert abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / count)
    def plain(q, k, v):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        s = (q @ k.mT * .125).masked_fill(~mask.dense(50, 60), -torch.inf)
        return s.softmax(-1).nan_to_num(0) * keep / (1 - p) @ v
    for a, e in zip(run(ours, q, k, v, g), run(plain, *(x.double() for x in (q, k, v, g))), strict=True):
        assert (a - e).abs().max() < 4e-3


def test_dropout_follows_the_seed():
    q, k, v, _ = tensors(2, 2, 2, 64, 64, 64)
    v = torch.eye(64).half().expand_as(v)
    def keep(seed, p):
        torch.manual_seed(seed)
        return call(None, p, .1)(q, k, v) != 0
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
    out = call(mask)(*qkvg[:3])
    plain = naive(mask, .25)(*qkvg[:3])
    assert torch.equal(out.isnan(), plain.isnan()) and torch.equal(out.isinf(), plain.isinf())
    assert not out[0, 1].isnan().any() and not out[0, 0, :20].isnan().any()


def test_garbage_in_the_padding_does_not_matter():
    q, k, v, g = tensors(2, 2, 2, 40, 40, 16)
    f = call(AttentionMask(key_lengths=torch.tensor([25, 40])))
    clean = run(f, q, k, v, g)
    for x in (k, v): x[0, :, 25:] = math.nan
    assert all(map(torch.equal, run(f, q, k, v, g), clean))


# who is served

def test_reasons(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode
    def fake(*shape, dtype=torch.float16):
        with FakeTensorMode(): return torch.empty(*shape, dtype=dtype, device="cuda")
    def refused(q): return backend.cannot(q, q, q, None, 0.)
    def slow(q, mask=None, k=None): return backend.slow(q, q if k is None else k, q, mask, 0.)
    q, shorter, packed = fake(2, 4, 8, 64), fake(2, 4, 5, 64), fake(10, 4, 64)
    bf16, single = fake(2, 4, 8, 64, dtype=torch.bfloat16), fake(2, 4, 8, 64, dtype=torch.float32)
    causal = AttentionMask(causal=True)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "Some GPU")
    def device(capability, cuda=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability)
    device((8, 0))
    assert not backend.missing() and not refused(q) and not slow(q, AttentionMask(window=(3, 3)))
    assert not slow(q, causal, shorter) and not slow(packed) and not refused(packed) and not refused(bf16)
    assert "PyTorch's own fused" in slow(q) and "PyTorch's own fused" in slow(q, causal)
    assert "not float32" in refused(single) and "not 288" in refused(torch.empty(1, 1, 1, 288).half())
    assert "cpu" in refused(torch.empty(1, 1, 1, 64).half())
    device((7, 5))
    assert "tensor cores" in slow(q, causal) and not refused(q) and "take float16" in refused(bf16)
    assert "above 128" in refused(fake(2, 4, 8, 160))
    device((7, 0))
    assert "7.5 and up, and Some GPU has 7.0" in refused(q)
    device(None, cuda=False)
    assert "TRITON_INTERPRET=1" in backend.missing()
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in backend.missing()
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert "not installed" in backend.missing() and "interpreter" in slow(torch.empty(1, 1, 1, 64))


# what the compiler makes of them, for GPUs that need not be here

def test_no_spills_and_tensor_cores():
    "For every choice of blocks that the autotuner is offered on Ampere and Hopper, at head sizes 64 and 128"
    report = backend.compile_report(head_dims=(64, 128), sms=(80, 90), every=True)
    every = itertools.product(backend.KERNELS, (64, 128), (80, 90))
    assert {(c.kernel, c.head_dim, c.sm) for c in report} == set(every)
    for c in report: assert c.spilled == 0 and c.count > 0 and c.sass > 0, c
    assert {c.instruction for c in report if c.sm == 80} == {"mma.sync"}
    first = {(c.kernel, c.head_dim): c.instruction for c in reversed(report) if c.sm == 90}
    assert set(first.values()) == {"wgmma.mma_async"}                      # the small blocks after it have mma.sync


def test_other_gpus():
    "Blackwell has its own instruction; for Turing Triton emits none: should that change, `slow` has to be asked again"
    report = backend.compile_report(head_dims=(64,), sms=(75, 100))
    for c in report[3:]: assert c.spilled == 0 and c.instruction == "tcgen05.mma" and c.sass > 0, c
    for c in report[:3]: assert (c.instruction, c.count, c.sass) == ("", 0, 0), c


def test_everything_compiles():
    "The compiler is stricter than the interpreter: all rules, dropout, packed, a head size that is no power of two"
    report = backend.compile_report(head_dims=(40,), sms=(80, 90), everything=True)
    assert len(report) == 6 and all(c.count > 0 and c.sass > 0 for c in report), report


def test_fast_memory():
    "Where the largest head size is served some blocks fit: into 64 KiB on Turing, 99 on the least Ampere"
    report = backend.compile_report(head_dims=(128,), sms=(75,), everything=True)
    report += backend.compile_report(head_dims=(256,), sms=(86,), every=True, everything=True)
    least = {(c.kernel, c.sm): c.shared for c in sorted(report, key=lambda c: -c.shared)}
    assert len(least) == 6
    for (kernel, sm), shared in least.items(): assert shared <= {75: 64, 86: 99}[sm] * 1024, (kernel, sm, shared)


def test_interpreter_asked_for_too_late():
    "Triton's own functions are compiled then, so its interpreter cannot run ours: `missing` says what to do"
    code = """import triton, os
os.environ['TRITON_INTERPRET'] = '1'
from flash_transformer.attention import triton_kernels
print(triton_kernels.missing())"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "before Python starts" in done.stdout, done.stderr


def test_without_triton():
    "Where there is no Triton, the module can be imported and says so"
    code = """import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == 'triton' else find(name, *more)
sys.modules['triton'] = None
from flash_transformer.attention import triton_kernels
print(triton_kernels.missing())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("Triton is not installed"), done.stderr
