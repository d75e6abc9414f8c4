"Every attention backend that runs on CUDA, outputs and gradients; `pytest -m gpu` on a machine with a GPU runs these."
import pytest
import torch
from conformance import Packed, Problem, with_gradients

from flash_transformer.attention import AttentionMask, attention, attention_varlen
from flash_transformer.attention.functional import BACKENDS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")]

# batch, heads, kv_heads, q_len, k_len, head_dim, and the mask
CASES = {
    "one number": (1, 1, 1, 1, 1, 8, {}),
    "one query": (2, 8, 2, 1, 300, 64, {"causal": True}),
    "one query, key_lengths": (3, 8, 2, 1, 170, 64, {"lengths": [170, 0, 33]}),
    "heads": (2, 4, 4, 128, 128, 64, {}),
    "grouped heads": (2, 8, 2, 113, 203, 64, {}),
    "head_dim 20": (1, 2, 1, 130, 141, 20, {}),
    "head_dim 128": (1, 4, 2, 256, 256, 128, {"causal": True}),
    "head_dim 256": (1, 2, 1, 100, 135, 256, {"causal": True}),
    "negative scale": (1, 2, 1, 133, 150, 64, {"scale": -0.5, "causal": True}),
    "scale 0": (1, 2, 1, 133, 150, 64, {"scale": 0., "causal": True}),
    "sharp": (1, 2, 1, 133, 250, 64, {"scores": "wide"}),
    "causal": (2, 2, 2, 257, 257, 64, {"causal": True}),
    "causal, fewer queries": (2, 2, 1, 40, 270, 32, {"causal": True}),
    "causal, more queries": (2, 2, 1, 270, 40, 32, {"causal": True}),
    "key_lengths": (4, 4, 2, 140, 170, 64, {"lengths": [170, 1, 33, 0]}),
    "key_lengths, causal": (3, 4, 2, 170, 170, 64, {"lengths": [170, 1, 33], "causal": True}),
    "window": (2, 4, 2, 200, 300, 64, {"window": (20, 5)}),
    "window to the left, causal": (2, 4, 2, 200, 300, 64, {"window": (64, -1), "causal": True}),
    "window open to the right, more queries": (1, 2, 1, 300, 90, 64, {"window": (5, -1)}),
    "window as wide as the keys, more queries": (1, 2, 1, 300, 90, 64, {"window": (3, 90)}),
    "alibi": (2, 4, 2, 140, 270, 64, {"alibi": "per head"}),
    "all of it": (3, 4, 2, 150, 170, 64, {"lengths": [170, 1, 33], "causal": True, "window": (40, 0),
                                          "alibi": "per sentence"}),
}
SIZES = ("batch", "heads", "kv_heads", "q_len", "k_len", "head_dim")
PLAIN = dict(scores="ordinary", scale=None, seed=0, causal=False, lengths=None, window=None, alibi=None)
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def can(backend, *qkv, mask=None, dropout=0.):
    if reason := backend.against(*qkv, mask, dropout): pytest.skip(reason)


def on_gpu(attend, *qkv, **options): return attend(*(x.cuda() for x in qkv), **options).cpu()


@each_backend
@each_dtype
@pytest.mark.parametrize("case", CASES)
def test_exact(case, dtype, backend):
    *sizes, rules = CASES[case]
    problem = Problem(PLAIN | dict(zip(SIZES, sizes)) | rules | {"dtype": dtype, "turned": len(case) % 2 == 0})
    can(backend, *(x.cuda() for x in problem.inputs), mask=problem.mask)
    problem.check(problem.solve(lambda q, k, v, mask, scale: on_gpu(
        attention, q, k, v, mask=mask, scale=scale, backend=backend.name)), backend.name)


@each_backend
@each_dtype
@pytest.mark.parametrize("lengths", [[(5, 9), (130, 4), (0, 3), (17, 0), (0, 0), (140, 133), (1, 300)],
                                     [(1, 9), (0, 4), (1, 30)]], ids=["many queries", "at most one"])
@pytest.mark.parametrize("rules", [{}, {"causal": True}, {"window": (7, 2)}, {"window": (4, -1)},
                                   {"alibi": "per sentence", "causal": True}], ids=str)
def test_packed(rules, lengths, dtype, backend):
    sizes = zip(SIZES, (len(lengths), 4, 2, *map(sum, zip(*lengths)), 64))
    problem = Packed(PLAIN | dict(sizes) | rules | {"each": lengths, "dtype": dtype})
    can(backend, *(x.cuda() for x in problem.inputs), mask=problem.mask)
    problem.check(problem.solve(lambda q, k, v, cu_q, cu_k, mask, scale: on_gpu(
        attention_varlen, q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, mask=mask, scale=scale,
        backend=backend.name)), backend.name)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_dropout(dtype, backend):
    "With the identity as values the output shows the weights: how many are dropped, and that dv drops the same ones"
    torch.manual_seed(0)
    q, k, direction = (torch.randn(4, 8, 64, 64).to(dtype) for _ in range(3))
    v, dropout, mask = torch.eye(64).to(dtype).expand(4, 8, 64, 64), 0.25, AttentionMask(causal=True)
    can(backend, *(x.cuda() for x in (q, k, v)), mask=mask, dropout=dropout)
    weights, _, _, dv = with_gradients(lambda *qkv: on_gpu(
        attention, *qkv, mask=mask, dropout=dropout, backend=backend.name), (q, k, v), direction)
    full = attention(q.double(), k.double(), v.double(), mask)
    visible = full > 1e-3                                               # large enough not to be rounded to 0
    kept = weights[visible] > 0
    n = kept.numel()
    assert abs(kept.double().mean() - (1 - dropout)) < 4 * (dropout * (1 - dropout) / n) ** 0.5 + 1 / 256
    scaled = weights[visible][kept] / full[visible][kept]
    assert (scaled - 1 / (1 - dropout)).abs().max() < 0.02
    assert (dv - weights.double().mT @ direction.double()).abs().max() < 0.02       # other weights would make it 1


@each_backend
def test_padding_does_not_leak(backend):
    "What stands in the padding changes nothing"
    q, k, v = (torch.randn(2, 4, n, 64).half().cuda() for n in (40, 70, 70))
    mask = AttentionMask(key_lengths=torch.tensor([70, 30]))
    can(backend, q, k, v, mask=mask)
    k[1, :, 30:], v[1, :, 30:] = 0, 0
    clean = attention(q, k, v, mask, backend=backend.name)
    k[1, :, 30:], v[1, :, 30:] = 100, -100
    assert torch.equal(attention(q, k, v, mask, backend=backend.name), clean)
