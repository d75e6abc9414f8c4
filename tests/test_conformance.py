"Every backend as exact as plain PyTorch, over random cases; the criterion itself is in conformance.py."
import os
from collections import Counter

import pytest
import torch
from conformance import FEWER, SIZES, Packed, Problem, allowed, cases, packed_cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_transformer.attention import AttentionMask, attention, attention_varlen, attention_weights, backends, explain
from flash_transformer.attention.functional import BACKENDS
from flash_transformer.attention.tiled import tiled_attention

CASES, ASKED = int(os.environ.get("FLASH_TRANSFORMER_CASES", 2000)), "FLASH_TRANSFORMER_CASES" in os.environ
HALF = (torch.float16, torch.bfloat16)
AVAILABLE = [b for b, status in zip(BACKENDS, backends()) if status.available]
GPU = torch.cuda.is_available()
SLOW = () if GPU else ("triton", "flash_attn")                          # only in an interpreter
DEVICES = {b.name: "cuda" if GPU and b.name in ("triton", "flash_attn", "flex") else "cpu" for b in AVAILABLE}


def many(n): # the same cases each time, unless a number is asked for
    return settings(max_examples=n, deadline=None, database=None, derandomize=not ASKED,
                    suppress_health_check=list(HealthCheck))


def served(backend, problem): # → output and gradients; the output alone where there is no backward pass; or None
    def attend(q, k, v, mask, scale): return attention(q, k, v, mask, 0., scale, backend.name)
    device = DEVICES[backend.name]
    q, k, v = (x.detach().to(device).requires_grad_() for x in problem.inputs)
    for backward in (True, False):
        with torch.set_grad_enabled(backward): reason = backend.against(q, k, v, problem.mask, 0.)
        if not reason: return problem.solve(attend, device, backward)
    with pytest.raises(ValueError, match="cannot serve here"): problem.solve(attend, device, backward)


@pytest.fixture(autouse=True)
def untraced(monkeypatch):
    "On a CPU FlexAttention is traced for each new shape, which takes a second, then run as it stands: only run it"
    module = pytest.importorskip("torch.nn.attention.flex_attention")
    if not GPU: monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)


# ---- the figures ----

def test_each_backend():
    count, fast = Counter(), [b for b in AVAILABLE if b.name not in SLOW]

    @many(CASES)
    @given(cases(), st.sampled_from([(16, 24), (9, 40), (40, 9), (64, 16)]))
    def run(case, blocks):
        problem = Problem(case)
        for backend in fast:
            if (found := served(backend, problem)) is None: continue
            problem.check(found, backend.name)
            count[backend.name, len(found)] += 1
        found = problem.solve(lambda q, k, v, mask, scale: tiled_attention(q, k, v, mask, 0., scale, *blocks))
        problem.check(found, f"tiled in blocks of {blocks}")

    run()
    assert all(count[name, 4] >= CASES for name in ("naive", "sdpa", "tiled")), count
    assert all(count[b.name, 1] + count[b.name, 4] >= CASES / 5 for b in fast), count
    print(dict(count))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")     # NumPy, at the exp of −inf − inf
@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b.name in SLOW], ids=lambda backend: backend.name)
def test_each_interpreted_backend(backend):
    count = Counter()

    @many(CASES // 10)
    @given(cases(dtypes=HALF, sizes=FEWER))
    def run(case):
        problem = Problem(case)
        if (found := served(backend, problem)) is not None: problem.check(found, backend.name)
        count[found is not None] += 1

    run()
    assert count[True] >= CASES / 20, count


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("backends", [[b for b in AVAILABLE if (b.name in SLOW) == slow] for slow in (False, True)],
                         ids=["compiled", "interpreted"])
def test_packed(backends):
    "Sequences end to end, some of them empty, are each what they are alone"
    slow = any(b.name in SLOW for b in backends)

    @many(CASES // 40 if slow else CASES // 5)
    @given(packed_cases(dtypes=HALF, sizes=FEWER) if slow else packed_cases())
    def run(case):
        packed = Packed(case)
        for backend in backends:
            q, k, v = (x.detach().to(DEVICES[backend.name]).requires_grad_() for x in packed.inputs)
            if backend.against(q, k, v, packed.mask, 0.): continue
            packed.check(packed.solve(lambda q, k, v, cu_q, cu_k, mask, scale: attention_varlen(
                q, k, v, cu_q, cu_k, mask, 0., scale, backend.name), DEVICES[backend.name]), backend.name)  # noqa: B023

    run()


@many(CASES // 10)
@given(cases(sizes=SIZES[:1]))
def test_auto_and_weights(case):
    "`auto` is what `explain` tells; the mask is what its rules say; weights are 0 where it hides, and sum to 1"
    problem = Problem(case)
    q, k, v = problem.inputs
    mask, scale = problem.mask, problem.scale
    taken = explain(q, k, v, mask).taken
    assert torch.equal(attention(q, k, v, mask, 0., scale), attention(q, k, v, mask, 0., scale, taken))
    size = len(q), q.shape[2], k.shape[2]
    see, _ = allowed(*size, *(case[rule] for rule in ("causal", "lengths", "window")))
    if mask is not None: assert torch.equal(mask.dense(*size[1:]).expand(size[0], 1, *size[1:]), see)
    weights, see = attention_weights(q, k, mask, scale), see.expand(-1, q.shape[1], -1, -1)
    assert not weights[~see].any()
    torch.testing.assert_close(weights.double().sum(-1), see.any(-1).double(), rtol=0,
                               atol=k.shape[2] * torch.finfo(q.dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("backend", ["naive", "sdpa", "tiled"])
def test_scale_0(backend, dtype):
    "All weights are equal, and q and k get no gradient"
    torch.manual_seed(0)
    q, k, v, direction = (torch.randn(2, 4, 16, 8).to(dtype).requires_grad_() for _ in range(4))
    out = attention(q, k, v, scale=0., backend=backend)
    out.backward(direction.detach())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v), atol=2 * eps, rtol=0)
    torch.testing.assert_close(v.grad, direction.mean(2, keepdim=True).expand_as(v), atol=2 * eps, rtol=0)
    assert not q.grad.any() and not k.grad.any()


# ---- can the tests fail? ----

class Sketch(torch.autograd.Function):
    "FlashAttention, 8 keys at a time, with one fault built in, or none"

    @staticmethod
    def forward(ctx, q, k, v, see, bias, scale, fault):
        ctx.fault, ctx.scale, ctx.group = fault, scale, q.shape[1] // k.shape[1]
        exact = torch.promote_types(q.dtype, torch.float32)
        q_, k_, v_ = q.to(exact), *(x.to(exact).repeat_interleave(ctx.group, dim=1) for x in (k, v))
        if fault == "scale off by 1 %": scale = ctx.scale = scale * 1.01
        if fault == "ALiBi towards the far": bias = -bias
        if fault == "mask one key to the right": see = see.roll(1, -1)
        if fault == "last key forgotten": see = see & (torch.arange(k.shape[2]) < k.shape[2] - 1)
        bias = torch.where(see, bias, -torch.inf).to(exact)
        o = torch.zeros_like(q_)
        m, l = torch.full_like(o[..., :1], -torch.inf), torch.zeros_like(o[..., :1])
        for j in range(0, k.shape[2], 8):
            s = q_ @ k_[:, :, j:j + 8].mT * scale + bias[..., j:j + 8]
            m_old, m = m, torch.maximum(m, s.amax(-1, keepdim=True))
            base = torch.zeros_like(m) if fault == "maximum not subtracted" else m.masked_fill(m == -torch.inf, 0)
            p, factor = (s - base).exp(), (m_old - base).exp()
            if fault == "maximum not subtracted": factor = 1
            if fault == "weights in 6 bits": p = (p * 64).round() / 64
            l = l * (1 if fault == "sum not rescaled" else factor) + p.sum(-1, keepdim=True)
            o = o * (1 if fault == "output not rescaled" else factor) + p @ v_[:, :, j:j + 8]
        o = torch.where(see.any(-1, keepdim=True), o / l, 1. if fault == "hidden rows are 1" else 0.).to(q.dtype)
        ctx.save_for_backward(q_, k_, v_, o, (base + l.log()).masked_fill(~see.any(-1, keepdim=True), torch.inf), bias)
        return o

    @staticmethod
    def backward(ctx, direction):
        (q, k, v, o, lse, bias), do = ctx.saved_tensors, direction.to(ctx.saved_tensors[0].dtype)
        p = (q @ k.mT * ctx.scale + bias - lse).exp()
        delta = (do * o).sum(-1, keepdim=True)
        if ctx.fault == "D left out": delta = 0
        ds = p * (do @ v.mT - delta)
        dq, dk, dv = ds @ k * ctx.scale, ds.mT @ q * ctx.scale, p.mT @ do
        if ctx.fault == "dq not scaled": dq = dq / ctx.scale
        if ctx.fault == "dv without the last query": dv = dv - p[:, :, -1:].mT @ do[:, :, -1:]
        dk, dv = (x.unflatten(1, (-1, ctx.group)) for x in (dk, dv))
        dk = dk[:, :, 0] if ctx.fault == "dk of one head for the group" else dk.sum(2)
        return *(x.to(direction.dtype) for x in (dq, dk, dv.sum(2))), None, None, None, None


FAULTS = ("scale off by 1 %", "ALiBi towards the far", "mask one key to the right", "last key forgotten",
          "maximum not subtracted", "sum not rescaled", "output not rescaled", "weights in 6 bits", "hidden rows are 1",
          "D left out", "dq not scaled", "dk of one head for the group", "dv without the last query")


def test_faults_are_found():
    "A sketch without a fault passes every case; with any of the faults it fails in several of a hundred"
    found = Counter()

    def sketch(fault):
        def attend(q, k, v, mask, scale):
            mask, size = mask or AttentionMask(), (q.shape[2], k.shape[2])
            bias = mask.bias(*size, dtype=torch.float64)
            see = mask.dense(*size).expand(len(q), q.shape[1], *size)
            bias = torch.zeros(see.shape) if bias is None else bias.expand(see.shape)
            return Sketch.apply(q, k, v, see, bias, q.shape[3] ** -0.5 if scale is None else scale, fault)
        return attend

    @settings(many(100), derandomize=True)
    @given(cases(sizes=((60, 2, 2, 2),)))
    def run(case):
        problem = Problem(case)
        problem.check(problem.solve(sketch(None)), "the sketch without a fault")
        for fault in FAULTS:
            try: problem.check(problem.solve(sketch(fault)), fault)
            except AssertionError: found[fault] += 1

    run()
    print({fault: found[fault] for fault in FAULTS})
    assert all(found[fault] >= 5 for fault in FAULTS), found
