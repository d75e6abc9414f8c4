"""Our backends against the real flash-attn package, outputs and gradients, on the CPU: `make test-flash-attn`.

The package has a Triton backend besides its CUDA kernels, and Triton has an interpreter, so its public functions run
here. That backend overlooks windows: for these, only the arguments that are handed over are checked here, and on a GPU
the results, in test_gpu.py."""
import importlib.util
import inspect
import os

import pytest
import torch

if importlib.util.find_spec("flash_attn") is None:
    pytest.skip("flash-attn is not installed: make test-flash-attn runs this", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("FLASH_ATTENTION_TRITON_AMD_ENABLE") != "TRUE":
    pytest.skip("flash-attn is to run in Triton's interpreter: make test-flash-attn", allow_module_level=True)

from conformance import Packed, Problem, with_gradients
from flash_attn.flash_attn_triton_amd.utils import MetaData

from flash_transformer.attention import AttentionMask, attention, attention_varlen, flash

pytestmark = pytest.mark.filterwarnings("ignore")    # of Triton's interpreter: overflow, what NumPy will do one day

# it asserts that slopes lie on a GPU, and does nothing else
MetaData.need_alibi = lambda self, slopes, batch, heads: setattr(self, "alibi_slopes", slopes)
PACKAGE, broken = flash._package()
WHO = ["flash-attn itself", "flash_attn", "triton", "tiled", "naive"]


def itself(q, k, v, mask, scale):
    "The package's own function, in its own layout; where keys are padding, each sentence alone with its real keys"
    mask = mask or AttentionMask()

    def call(q, k, v, alibi):
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        out = PACKAGE.flash_attn_func(q, k, v, softmax_scale=scale, causal=mask.causal, alibi_slopes=alibi)
        out.register_hook(torch.Tensor.contiguous)   # the Triton backend takes k's strides for dk's, out's for dout's
        return out.transpose(1, 2)

    if mask.key_lengths is None: return call(q, k, v, None if mask.alibi is None else mask.alibi.expand(len(q), -1))
    return torch.cat([call(q[n:n + 1], k[n:n + 1, :, :length], v[n:n + 1, :, :length], None) if length
                      else torch.zeros_like(q[n:n + 1]) for n, length in enumerate(mask.key_lengths.tolist())])


# batch, heads, kv_heads, q_len, k_len, head_dim, and the mask
CASES = {
    "one number": (1, 1, 1, 1, 1, 8, {}),
    "one key": (2, 2, 2, 5, 1, 16, {}),
    "one query": (2, 4, 2, 1, 70, 32, {"causal": True}),
    "heads": (2, 3, 3, 33, 33, 32, {}),
    "grouped heads": (2, 6, 2, 40, 70, 64, {}),
    "one key head": (1, 4, 1, 17, 65, 16, {}),
    "head_dim 20": (1, 2, 1, 30, 41, 20, {}),
    "head_dim 128": (1, 2, 1, 64, 64, 128, {"causal": True}),
    "head_dim 256": (1, 1, 1, 20, 35, 256, {"causal": True}),
    "long": (1, 2, 1, 130, 300, 32, {}),
    "sharp": (1, 2, 1, 33, 50, 32, {"scores": "wide"}),
    "other scale": (1, 2, 1, 33, 50, 32, {"scale": 0.3}),
    "negative scale": (1, 2, 1, 33, 50, 32, {"scale": -0.5, "causal": True}),
    "causal": (2, 2, 2, 65, 65, 32, {"causal": True}),
    "causal, fewer queries": (2, 2, 1, 40, 70, 32, {"causal": True}),
    "causal, more queries": (2, 2, 1, 70, 40, 32, {"causal": True}),          # the first 30 see nothing
    "causal, long": (1, 1, 1, 200, 260, 16, {"causal": True}),
    "key_lengths": (3, 2, 1, 40, 70, 32, {"lengths": [70, 1, 33]}),
    "key_lengths, one is 0": (3, 4, 2, 9, 12, 16, {"lengths": [0, 12, 5]}),
    "alibi": (2, 4, 2, 40, 70, 32, {"alibi": "per head"}),
    "alibi, more queries": (1, 2, 2, 70, 40, 32, {"alibi": "per head"}),
    "alibi of each sentence, causal": (2, 2, 1, 33, 50, 16, {"alibi": "per sentence", "causal": True}),
}
SIZES = ("batch", "heads", "kv_heads", "q_len", "k_len", "head_dim")
PLAIN = dict(dtype=torch.float16, scores="ordinary", scale=None, seed=0, causal=False, lengths=None, window=None,
             alibi=None)


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("case", CASES)
def test_all_meet(case, who):
    *sizes, rules = CASES[case]
    problem = Problem(PLAIN | dict(zip(SIZES, sizes)) | rules | {"turned": len(case) % 2 == 0})

    def attend(q, k, v, mask, scale):
        return itself(q, k, v, mask, scale) if who == WHO[0] else attention(q, k, v, mask, scale=scale, backend=who)

    problem.check(problem.solve(attend), who)


# (q_len, k_len) of each sequence, and the mask
PACKED = {
    "varlen": ([(5, 9), (30, 4), (17, 33)], {}),
    "varlen, causal": ([(5, 9), (30, 4), (70, 33), (1, 8)], {"causal": True}),
    # not causal: there the package's Triton backend writes past the end of a sequence without keys
    "varlen, empty ones": ([(5, 9), (0, 3), (17, 0), (0, 0)], {}),
    "varlen, alibi": ([(5, 9), (30, 4)], {"alibi": "per head"}),
    "varlen, alibi of each, causal": ([(5, 9), (30, 40)], {"alibi": "per sentence", "causal": True}),
}


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("case", PACKED)
def test_packed(case, who):
    lengths, rules = PACKED[case]
    q_lens, k_lens = zip(*lengths)
    sizes = zip(SIZES, (len(lengths), 4, 2, sum(q_lens), sum(k_lens), 32))
    problem = Packed(PLAIN | dict(sizes) | {"each": lengths} | rules)

    def attend(q, k, v, cu_q, cu_k, mask, scale):
        if who != WHO[0]: return attention_varlen(q, k, v, cu_q, cu_k, mask, scale=scale, backend=who)
        alibi = None if mask is None or mask.alibi is None else mask.alibi.expand(len(lengths), -1)
        q, k, v = (x.contiguous() for x in (q, k, v))
        out = PACKAGE.flash_attn_varlen_func(q, k, v, cu_q, cu_k, max(q_lens), max(k_lens), softmax_scale=scale,
                                             causal=bool(mask and mask.causal), alibi_slopes=alibi)
        out.register_hook(torch.Tensor.contiguous)
        return out

    problem.check(problem.solve(attend), who)


def drawn(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).half() for shape in shapes]


def flash_attn(*qkv, mask=None): return attention(*qkv, mask, backend="flash_attn")


def test_dropout():
    "The package tells which weights it dropped, and here drops the same ones in every call"
    q, k, v, direction = drawn((2, 4, 33, 32), (2, 2, 40, 32), (2, 2, 40, 32), (2, 4, 33, 32))
    dropout, mask = 0.3, AttentionMask(causal=True)
    _, _, signed = PACKAGE.flash_attn_func(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), dropout_p=dropout,
                                           causal=True, return_attn_probs=True)
    kept, visible = signed > 0, mask.dense(33, 40)                                # what is dropped comes back negative
    assert abs(kept[visible.expand_as(kept)].float().mean() - (1 - dropout)) < 0.03

    def formula(q, k, v):
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        weights = (q @ k.mT * 32 ** -0.5).masked_fill(~visible, -torch.inf).softmax(-1)
        return (weights * kept / (1 - dropout)) @ v

    ours = with_gradients(lambda *x: attention(*x, mask, dropout, backend="flash_attn"), (q, k, v), direction)
    plain = with_gradients(formula, (q, k, v), direction)
    exact = with_gradients(formula, [x.double() for x in (q, k, v)], direction)
    for x, same_dtype, right in zip(ours, plain, exact):
        assert (x - right).abs().max() <= 2 * (same_dtype - right).abs().max()


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_do(lengths):
    q, k = torch.ones(2, 4, lengths[0], 16).half(), torch.ones(2, 2, lengths[1], 16).half()
    for x, like in zip(with_gradients(flash_attn, (q, k, k), q), (q, q, k, k)):
        assert x.shape == like.shape and not x.any()


def test_padding_is_never_touched():
    q, k, v, direction = drawn((2, 2, 5, 16), (2, 2, 8, 16), (2, 2, 8, 16), (2, 2, 5, 16))
    mask = AttentionMask(key_lengths=torch.tensor([3, 8]))
    k[0, :, 3:], v[0, :, 3:] = torch.nan, torch.inf
    results = with_gradients(lambda *x: flash_attn(*x, mask=mask), (q, k, v), direction)
    assert all(x.isfinite().all() for x in results)
    assert not results[2][0, :, 3:].any() and not results[3][0, :, 3:].any()


def test_arguments_fit_the_real_signature(monkeypatch):
    "What the Triton backend overlooks is at least handed over as the real functions want it"
    seen = []

    def recorded(function):
        def call(*args, **kwargs):
            bound = inspect.signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            seen.append(bound.arguments)
            return torch.zeros_like(args[0])
        return call

    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        monkeypatch.setattr(PACKAGE, name, recorded(getattr(PACKAGE, name)))
    q, k = torch.zeros(2, 4, 7, 16).half(), torch.zeros(2, 2, 9, 16).half()
    mask = AttentionMask(True, window=(3, 1), alibi=torch.rand(4, dtype=torch.float64))
    assert flash.flash_attention(q, k, k, mask, 0.25, 0.5).shape == q.shape
    flash.flash_attention(k, k, k, AttentionMask(key_lengths=torch.tensor([4, 9])), 0., 1.)
    flash.flash_attention(torch.zeros(2, 4, 12, 16).half(), k, k, AttentionMask(window=(2, 10)), 0., 1.)
    one = torch.ones(2, 4, 1, 16).half()
    flash.flash_attention(one, k, k, AttentionMask(key_lengths=torch.tensor([4, 9])), 0., -0.5)
    flash.flash_attention(one, k, k, AttentionMask(alibi=torch.rand(4, 2).T), 0., 0.)
    dense, padded, window, decoding, unscaled = seen
    assert dense["q"].shape == (2, 7, 4, 16) and dense["k"].shape == dense["v"].shape == (2, 9, 2, 16)
    assert (dense["dropout_p"], dense["softmax_scale"]) == (0.25, 0.5)
    assert (dense["causal"], dense["window_size"]) == (True, (3, 1))
    assert dense["alibi_slopes"].dtype == torch.float32 and dense["alibi_slopes"].shape == (2, 4)
    assert padded["cu_seqlens_k"].tolist() == [0, 4, 9, 18, 18] and padded["cu_seqlens_q"].tolist() == [0, 9, 9, 18, 18]
    assert padded["cu_seqlens_k"].dtype == padded["cu_seqlens_q"].dtype == torch.int32
    assert (padded["max_seqlen_q"], padded["max_seqlen_k"]) == (9, 9)
    assert window["window_size"] == (2, 10) and window["max_seqlen_k"] == 12      # no side of it counts as open
    # the CUDA kernels want a positive scale, dense slopes, and for max_seqlen_q = 1 a query in each sequence
    assert (decoding["max_seqlen_q"], decoding["softmax_scale"]) == (2, 0.5) and (decoding["q"] == -1).all()
    assert unscaled["softmax_scale"] > 0 and not unscaled["q"].any() and unscaled["alibi_slopes"].stride(-1) == 1


def test_it_can_be_loaded_and_says_what_it_refuses():
    assert not broken and flash.missing() == ""
    q, k, v = drawn((1, 2, 5, 16), (1, 2, 5, 16), (1, 2, 5, 16))
    for tensors, mask, reason in (
            ((q.float(), k.float(), v.float()), None, "takes fp16 and bf16, these are float32"),
            ((q.bfloat16(), k.bfloat16(), v.bfloat16()), None, "take fp16"),
            ((q, k, v), AttentionMask(window=(2, 0)), "overlooks windows"),
            ((q, k, v), AttentionMask(True, key_lengths=torch.tensor([3])), "call attention_varlen")):
        with pytest.raises(ValueError, match=reason): flash_attn(*tensors, mask=mask)
