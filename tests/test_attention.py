"The attention room against PyTorch: masks and edges, bad input, MultiHeadAttention, the cache. See test_conformance.py"
import importlib

import pytest
import torch
import torch.nn.functional as F
from conformance import allowed, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flash_transformer.attention import (
    AttentionMask,
    KeyValueCache,
    MultiHeadAttention,
    attention,
    attention_varlen,
    attention_weights,
    backends,
    explain,
)
from flash_transformer.attention.tiled import tiled_attention

BACKENDS = ["sdpa", "tiled", "naive"]  # those that serve any tensors on any machine; each other has its own tests


# ---- masks and edges ----

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_len, k_len", [(4, 4), (1, 4), (3, 7), (7, 3)])
def test_causal_is_aligned_at_the_end(backend, q_len, k_len):
    q, k, v = (torch.randn(2, 4, n, 8, dtype=torch.float64) for n in (q_len, k_len, k_len))
    see, _ = allowed(2, q_len, k_len, True, None, None)
    found = attention(q, k, v, AttentionMask(causal=True), backend=backend)
    torch.testing.assert_close(found, plain(q, k, v, see, None, 8 ** -0.5), atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_hidden(backend):
    q, k, v = (torch.randn(2, 4, 3, 8, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, AttentionMask(key_lengths=[0, 0]), backend=backend)
    out.sum().backward()
    assert (out == 0).all() and all((x.grad == 0).all() for x in (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch, q_len, k_len", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(backend, batch, q_len, k_len):
    q, k = (torch.randn(batch, 4, n, 8, requires_grad=True) for n in (q_len, k_len))
    for mask in (None, AttentionMask(causal=True), AttentionMask(key_lengths=torch.zeros(batch).long())):
        out = attention(q, k, k, mask, backend=backend)
        assert out.shape == (batch, 4, q_len, 8) and (k_len > 0 or (out == 0).all())
        out.sum().backward()
        assert q.grad.isfinite().all() and k.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend):
    "Scores far beyond what exp can take"
    q, k, v = torch.randn(3, 1, 2, 5, 8).mul(100)
    right = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(attention(q, k, v, AttentionMask(causal=True), backend=backend), right.float(),
                               rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_numbers_do_not_matter(backend):
    "Large, but finite, numbers in the padding change nothing, and get no gradient"
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    mask = AttentionMask(key_lengths=[3, 6])
    before = attention(q, k, v, mask, backend=backend)
    k[0, :, 3:], v[0, :, 3:] = 1e4, -1e4
    k.requires_grad_(), v.requires_grad_()
    after = attention(q, k, v, mask, backend=backend)
    after.sum().backward()
    torch.testing.assert_close(after, before)
    assert (k.grad[0, :, 3:] == 0).all() and (v.grad[0, :, 3:] == 0).all()


def test_mask_keeps_its_own_lengths():
    lengths = torch.tensor([2, 3])
    mask = AttentionMask(key_lengths=lengths)
    before = mask.additive(4, 4)[0].clone()
    lengths += 1
    assert mask.key_lengths.tolist() == [2, 3] and torch.equal(mask.additive(4, 4)[0], before)


def test_explain_and_backends():
    assert set(BACKENDS) <= {b.name for b in backends() if b.available and b.reason}
    x, long = torch.randn(16, 4, 20, 8), torch.randn(1, 4, 600, 8)
    half, long_half = x.bfloat16().requires_grad_(), long.bfloat16().requires_grad_()
    for args, taken in (((x, x, x), "sdpa"), ((half, half, half), "naive"), ((long_half,) * 3, "sdpa"),
                        ((x, x, x, None, 0.1), "naive")):
        said = explain(*args)
        assert said.taken == taken and list(said.reasons) == [b.name for b in backends()]
        assert str(said).count("→") == 1 and f"→ {taken}: taken" in str(said)
    with torch.no_grad(): assert explain(half, half, half).taken == "sdpa"
    assert explain(half[:1], half[:1], half[:1]).taken == "sdpa"  # too few to matter


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend):
    "Kept weights are divided by 1 − p, and the gradient goes through the kept ones alone"
    torch.manual_seed(0)
    q, v = torch.zeros(50, 4, 5, 5), torch.eye(5).repeat(50, 4, 1, 1).requires_grad_()
    out = attention(q, q, v, dropout=0.4, backend=backend)
    kept = out > 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 0.2 / 0.6))
    assert abs(kept.float().mean() - 0.6) < 0.035  # five standard deviations of 5000 throws
    out.sum().backward()
    torch.testing.assert_close(v.grad[..., 0], out.sum(-2).detach())


# ---- bad input ----

X = torch.randn(2, 6, 5, 8)
BAD = {
    "rank": (lambda: attention(X[0], X, X), ValueError, r"q has shape \(6, 5, 8\)"),
    "not a tensor": (lambda: attention(X, X.tolist(), X), TypeError, "k must be a tensor"),
    "integers": (lambda: attention(X.long(), X.long(), X.long()), ValueError, "floating point"),
    "heads": (lambda: attention(X, X[:, :4], X[:, :4]), ValueError, "4 key/value heads do not divide 6"),
    "no heads": (lambda: attention(X, X[:, :0], X[:, :0]), ValueError, "at least one|must be a head"),
    "dtype": (lambda: attention(X, X.double(), X), ValueError, "dtype"),
    "device": (lambda: attention(X, X.to("meta"), X), ValueError, "device"),
    "head size of k": (lambda: attention(X, X[..., :4], X[..., :4]), ValueError, "head_dim"),
    "head size of v": (lambda: attention(X, X, X[..., :4]), ValueError, "head_dim"),
    "k and v": (lambda: attention(X, X, X[:, :, :3]), ValueError, "each key has its value"),
    "batch": (lambda: attention(X, X[:1], X[:1]), ValueError, "batch of 2"),
    "mask is a matrix": (lambda: attention(X, X, X, torch.ones(5, 5)), TypeError, "AttentionMask"),
    "dropout 1": (lambda: attention(X, X, X, dropout=1.), ValueError, "dropout is 1.0"),
    "dropout below 0": (lambda: attention(X, X, X, dropout=-0.1), ValueError, "dropout is -0.1"),
    "scale": (lambda: attention(X, X, X, scale=float("nan")), ValueError, "scale"),
    "backend": (lambda: attention(X, X, X, backend="naiv"), ValueError, "did you mean 'naive'"),
    "backend None": (lambda: attention(X, X, X, backend=None), ValueError, "no attention backend"),
    "lengths too long": (lambda: attention(X, X, X, AttentionMask(key_lengths=[5, 6])), ValueError, "0 … 5"),
    "lengths negative": (lambda: attention(X, X, X, AttentionMask(key_lengths=[-1, 5])), ValueError, "0 … 5"),
    "lengths of another batch": (lambda: attention(X, X, X, AttentionMask(key_lengths=[5])), ValueError, "batch of 2"),
    "lengths a matrix": (lambda: AttentionMask(key_lengths=torch.ones(2, 5).long()), ValueError, r"\(batch,\)"),
    "lengths fractional": (lambda: AttentionMask(key_lengths=torch.ones(2)), ValueError, "whole numbers"),
    "lengths for causal": (lambda: AttentionMask(torch.tensor([5, 5])), TypeError, "causal is True or False"),
    "window": (lambda: AttentionMask(window=(1, -2)), ValueError, r"\(left, right\)"),
    "window a number": (lambda: AttentionMask(window=3), ValueError, r"\(left, right\)"),
    "slopes": (lambda: attention(X, X, X, AttentionMask(alibi=torch.ones(4))), ValueError, "6 heads"),
    "slopes whole": (lambda: AttentionMask(alibi=torch.ones(4).long()), ValueError, "floating point"),
    "weights": (lambda: attention_weights(X, X[:, :4]), ValueError, "4 key/value heads do not divide 6"),
    "explain": (lambda: explain(X, X, X[..., :4]), ValueError, "head_dim"),
    "backend of old": (lambda: attention(X, X, X, backend="flash-attn2"), ValueError, "did you mean 'flash_attn'"),
    "blocks of no queries": (lambda: tiled_attention(X, X, X, block_q=0), ValueError, "block_q is 0"),
    "blocks of no keys": (lambda: tiled_attention(X, X, X, block_k=0), ValueError, "block_k 0"),
    "module heads": (lambda: MultiHeadAttention(10, 4), ValueError, "4 heads do not divide"),
    "module kv_heads": (lambda: MultiHeadAttention(16, 4, kv_heads=3), ValueError, "3 key/value heads do not divide"),
    "module kv_heads 0": (lambda: MultiHeadAttention(16, 4, kv_heads=0), ValueError, "0 key/value heads"),
    "module dropout": (lambda: MultiHeadAttention(16, 4, dropout=1), ValueError, "dropout is 1"),
    "module backend": (lambda: MultiHeadAttention(16, 4, backend="flash"), ValueError, "did you mean"),
}


P = torch.randn(7, 6, 8)  # packed: 7 tokens, 6 heads, head_dim 8


def packed(q=P, k=P, v=P, cu_q=(0, 3, 7), cu_k=(0, 3, 7), *args, **options):
    cu_q, cu_k = (torch.tensor(cu) if isinstance(cu, tuple) else cu for cu in (cu_q, cu_k))
    return lambda: attention_varlen(q, k, v, cu_q, cu_k, *args, **options)


BAD_PACKED = {
    "rank": (packed(P[None]), ValueError, r"q has shape \(1, 7, 6, 8\): give \(total, heads, head_dim\)"),
    "not a tensor": (packed(v=P.tolist()), TypeError, "v must be a tensor"),
    "integers": (packed(P.long(), P.long(), P.long()), ValueError, "floating point"),
    "heads": (packed(k=P[:, :4], v=P[:, :4]), ValueError, "4 key/value heads do not divide 6"),
    "no heads": (packed(k=P[:, :0], v=P[:, :0]), ValueError, "must be a head"),
    "dtype": (packed(k=P.double()), ValueError, "dtype"),
    "device": (packed(k=P.to("meta")), ValueError, "device"),
    "head size of k": (packed(k=P[..., :4], v=P[..., :4]), ValueError, "head_dim 8, 4, 4"),
    "head size of v": (packed(v=P[..., :4]), ValueError, "head_dim 8, 8, 4"),
    "k and v": (packed(v=P[:5]), ValueError, "each key has its value"),
    "mask is a matrix": (packed(mask=torch.ones(7, 7)), TypeError, "AttentionMask"),
    "key_lengths": (packed(mask=AttentionMask(key_lengths=[3, 4])), ValueError, "key_lengths .* cu_seqlens_k"),
    "slopes of another batch": (packed(mask=AttentionMask(alibi=torch.ones(3, 6))), ValueError, r"\(2, 6\) slopes"),
    "dropout": (packed(dropout=1.), ValueError, "dropout is 1.0"),
    "scale": (packed(scale=float("inf")), ValueError, "scale is inf"),
    "backend": (packed(backend="tyled"), ValueError, "did you mean 'tiled'"),
    "backend None": (packed(backend=None), ValueError, "no attention backend None"),
    "cu_seqlens a list": (packed(cu_q=[0, 3, 7]), TypeError, "cu_seqlens_q must be a tensor, not list"),
    "cu_seqlens a matrix": (packed(cu_k=torch.tensor([[0, 3, 7]])), ValueError, r"cu_seqlens_k has shape \(1, 3\)"),
    "cu_seqlens of nothing": (packed(cu_q=torch.zeros(0).long()), ValueError, r"cu_seqlens_q has shape \(0,\)"),
    "cu_seqlens float": (packed(cu_k=(0., 3., 7.)), ValueError, "cu_seqlens_k is torch.float32: give whole numbers"),
    "cu_seqlens bool": (packed(cu_q=(False, True)), ValueError, "cu_seqlens_q is torch.bool: give whole numbers"),
    "cu_seqlens fall": (packed(cu_q=(0, 5, 3, 7), cu_k=(0, 1, 2, 7)), ValueError, "falls from 5 to 3 at place 2"),
    "cu_seqlens begin late": (packed(cu_k=(1, 3, 7)), ValueError, "cu_seqlens_k begins with 1"),
    "cu_seqlens begin early": (packed(cu_q=(-1, 3, 7)), ValueError, "cu_seqlens_q begins with -1"),
    "cu_seqlens end early": (packed(cu_q=(0, 3, 6)), ValueError, "cu_seqlens_q ends at 6, but there are 7 tokens"),
    "cu_seqlens end late": (packed(cu_k=(0, 3, 8)), ValueError, "cu_seqlens_k ends at 8, but there are 7 tokens"),
    "cu_seqlens of another number": (packed(cu_k=(0, 7)), ValueError, "cu_seqlens_q has 3 entries, cu_seqlens_k 2"),
    "longest too short": (packed(max_seqlen_k=3), ValueError, "max_seqlen_k is 3, but sequence 1 has 4"),
}


@pytest.mark.parametrize("door", [lambda name: attention(X, X, X, backend=name), lambda name: packed(backend=name)()],
                         ids=["attention", "attention_varlen"])
def test_backend_that_cannot_run_here(door):
    "Each that is not available, or takes no float32 or no gradients, says the reason that backends() gives, or its own"
    for backend in backends():
        if backend.name in BACKENDS: door(backend.name)
        elif not backend.available:
            with pytest.raises(ValueError) as caught: door(backend.name)
            assert repr(backend.name) in str(caught.value) and str(caught.value).endswith(backend.reason)
    if any(b.name == "triton" and b.available for b in backends()):
        with pytest.raises(ValueError, match="'triton' cannot serve here: .*float32"): door("triton")


@pytest.mark.parametrize("call, error, words", [*BAD.values(), *BAD_PACKED.values()],
                         ids=[*BAD, *(f"packed, {name}" for name in BAD_PACKED)])
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words) as caught: call()
    assert "\n" not in str(caught.value)


# ---- MultiHeadAttention ----

@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("cross", [False, True])
def test_multi_head_is_pytorchs(bias, backend, cross):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, bias=bias, batch_first=True, dtype=torch.float64)
    ours = MultiHeadAttention(24, 3, bias=bias, backend=backend).double()
    if bias: nn.init.normal_(theirs.in_proj_bias), nn.init.normal_(theirs.out_proj.bias)
    names = {"in_proj.weight": "in_proj_weight", "in_proj.bias": "in_proj_bias"}
    state = theirs.state_dict()
    ours.load_state_dict({name: state[names.get(name, name)] for name in ours.state_dict()})
    x, memory = torch.randn(2, 4, 24, dtype=torch.float64), torch.randn(2, 6, 24, dtype=torch.float64)
    other, lengths = (memory, [2, 6]) if cross else (x, [3, 4])
    direction = torch.randn_like(x)
    hide = torch.arange(other.shape[1]) >= torch.tensor(lengths)[:, None]
    mask = AttentionMask(key_lengths=lengths)
    results = []
    for module in (ours, theirs):
        a, b = (t.clone().requires_grad_() for t in (x, memory))
        if module is ours: out = ours(a, b if cross else None, mask)
        else:
            seen = b if cross else a
            out, weights = theirs(a, seen, seen, key_padding_mask=hide, average_attn_weights=False)
        out.backward(direction)
        results.append([out.detach(), a.grad, *([b.grad] if cross else []),
                        *(dict(module.named_parameters())[names.get(n, n) if module is theirs else n].grad
                          for n in ours.state_dict())])
    for mine, right in zip(*results): torch.testing.assert_close(mine, right, atol=1e-10, rtol=0)
    torch.testing.assert_close(ours.weights(x, memory if cross else None, mask), weights, atol=1e-10, rtol=0)


def test_multi_head_dropout_only_in_training():
    torch.manual_seed(0)
    module, x = MultiHeadAttention(16, 4, dropout=0.5), torch.randn(2, 5, 16)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_half_precision_by_autocast():
    torch.manual_seed(0)
    module, x = MultiHeadAttention(32, 4), torch.randn(3, 6, 32)
    with torch.autocast("cpu", torch.bfloat16): out = module(x, mask=AttentionMask(key_lengths=[6, 1, 3]))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and module.in_proj.weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), module(x, mask=AttentionMask(key_lengths=[6, 1, 3])), atol=0.03, rtol=0.03)


# ---- the cache ----

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.sampled_from([1, 2, 4]), st.booleans(),
       st.sampled_from([-1, 0, 2]), st.integers(0, 999))
def test_cached_equals_at_once(steps, kv_heads, roomy, left, seed):
    torch.manual_seed(seed)
    module, x = MultiHeadAttention(16, 4, kv_heads).double(), torch.randn(2, sum(steps), 16, dtype=torch.float64)
    mask = AttentionMask(causal=True, window=(left, -1))
    cache = KeyValueCache(sum(steps) + 3 * roomy)
    with torch.no_grad():
        parts = [module(part, mask=mask, cache=cache) for part in x.split(steps, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), module(x, mask=mask), atol=1e-10, rtol=0)
    assert cache.length == sum(steps)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 999), st.data())
def test_beams(batch, beam, seed, data):
    "Random reorderings, the number of rows changing: always as if the rows' own histories were computed afresh"
    torch.manual_seed(seed)
    module, cross_module = (MultiHeadAttention(16, 4, 2).double() for _ in range(2))
    memory = torch.randn(batch, 5, 16, dtype=torch.float64)
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=batch, max_size=batch)))
    cache, cross, rows = KeyValueCache(5), KeyValueCache(), batch
    history = torch.zeros(batch, 0, 16, dtype=torch.float64)
    with torch.no_grad():
        for step in range(5):
            new = torch.randn(rows, 1, 16, dtype=torch.float64)
            history = torch.cat([history, new], dim=1)
            right = module(history, mask=AttentionMask(causal=True))[:, -1:]
            torch.testing.assert_close(module(new, cache=cache), right, atol=1e-10, rtol=0)
            copies = rows // batch
            right = cross_module(new, memory.repeat_interleave(copies, 0),
                                 AttentionMask(key_lengths=lengths.repeat_interleave(copies)))
            given_memory = memory if step == 0 else None
            found = cross_module(new, given_memory, AttentionMask(key_lengths=lengths), cross)
            torch.testing.assert_close(found, right, atol=1e-10, rtol=0)
            index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=batch * beam,
                                                    max_size=batch * beam)))
            cache.reorder(index), cross.reorder(index)
            history, rows = history[index], batch * beam
    assert len(cross.keys) == batch and len(cache.keys) == batch * beam


def test_first_cross_step_with_beams():
    "The memory may come with fewer rows than x from the first step on"
    torch.manual_seed(0)
    module, x, memory = MultiHeadAttention(16, 4), torch.randn(6, 1, 16), torch.randn(2, 5, 16)
    with torch.no_grad():
        found = module(x, memory, cache=KeyValueCache())
        torch.testing.assert_close(found, module(x, memory.repeat_interleave(3, 0)))


@torch.no_grad()
def test_cache_says_no():
    module, x = MultiHeadAttention(16, 4), torch.randn(2, 3, 16)
    with pytest.raises(ValueError, match="room for 4 words, 6 are needed"):
        cache = KeyValueCache(4)
        module(x, cache=cache), module(x, cache=cache)
    with pytest.raises(ValueError, match="max_length"): module(x, cache=KeyValueCache())
    with pytest.raises(ValueError, match="holds 2 rows, x has 1"):
        cache = KeyValueCache(9)
        module(x, cache=cache), module(x[:1], cache=cache)
    with torch.enable_grad(), pytest.raises(ValueError, match="no_grad"): module(x, cache=KeyValueCache(4))
    cross = KeyValueCache()
    module(x, x, cache=cross)
    with pytest.raises(ValueError, match="3 rows and the memory 2"): module(torch.randn(3, 1, 16), cache=cross)
    with pytest.raises(ValueError, match="key_lengths only"):
        module(torch.randn(4, 1, 16), mask=AttentionMask(causal=True), cache=cross)
    with pytest.raises(ValueError, match="batch of 2"): module(x, x[:1])


@pytest.mark.parametrize("module, name", [("tiled", "tiled_attention"), ("triton_kernels", "triton_attention"),
                                          ("flex", "flex_attention"), ("flash", "_options")])
def test_a_kernel_that_cannot_learn_a_bias_says_so(module, name):
    "also when it is called without the door"
    kernel = getattr(importlib.import_module(f"flash_transformer.attention.{module}"), name)
    q, mask = torch.randn(1, 2, 6, 16), AttentionMask(relative=torch.zeros(2, 9))
    with pytest.raises(ValueError, match="learned bias"):
        if name == "_options": kernel(q, mask, 0.0, 1.0, 1)
        else: kernel(q, q, q, mask, 0.0, 1.0)
    assert attention_module_taken(q, mask) == "sdpa"


def attention_module_taken(q, mask): return explain(q, q, q, mask).taken
