"The attention room against PyTorch and float64: fuzzing, bad input, MultiHeadAttention, the cache."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flash_transformer.attention import (
    AttentionMask,
    KeyValueCache,
    MultiHeadAttention,
    attention,
    attention_weights,
    backends,
    explain,
)

BACKENDS = ["sdpa", "tiled", "naive"]  # those that serve any tensors on any machine; each other has its own tests


# ---- fuzzing: each backend against float64, with at most twice the error of plain PyTorch in the same dtype ----

def allowed(batch, q_len, k_len, causal, lengths, window):
    "The definition, element by element in three index grids, without AttentionMask"
    b, i, j = torch.meshgrid(torch.arange(batch), torch.arange(q_len), torch.arange(k_len), indexing="ij")
    ahead = j - i - k_len + q_len
    see = torch.ones(batch, q_len, k_len, dtype=torch.bool)
    if causal: see &= ahead <= 0
    if lengths is not None: see &= j < torch.tensor(lengths)[b]
    if window is not None and window[0] >= 0: see &= ahead >= -window[0]
    if window is not None and window[1] >= 0: see &= ahead <= window[1]
    return see[:, None], ahead.abs()[:, None]  # b 1 q k


def plain(q, k, v, see, distance, slopes, scale):
    "Attention as one writes it in an hour, in the dtype of q; rows that see nothing are left out by hand"
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if slopes is not None: scores = scores - (slopes.double()[..., None, None] * distance).to(q.dtype)
    rows = see.any(-1, keepdim=True)
    weights = scores.masked_fill(~see & rows, -torch.inf).softmax(-1)
    return torch.where(rows, weights @ v, 0)


def with_gradients(f, inputs, direction):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = f(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, direction.to(out.dtype))]


@st.composite
def cases(draw):
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    q_len, k_len = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    side = st.integers(-1, 12)
    return dict(
        sizes=(batch, kv_heads * group, kv_heads, q_len, k_len, draw(st.sampled_from([1, 5, 8, 32]))),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])),
        causal=draw(st.booleans()),
        lengths=draw(st.none() | st.lists(st.integers(0, k_len), min_size=batch, max_size=batch)),
        window=draw(st.none() | st.tuples(side, side)),
        slopes=draw(st.sampled_from([None, "per head", "per sentence"])),
        scale=draw(st.sampled_from([None, 0.3, 1.0])),
        seed=draw(st.integers(0, 2 ** 31)),
    )


@settings(max_examples=250, deadline=None, derandomize=True)
@given(cases())
def test_fuzz(case):
    batch, heads, kv_heads, q_len, k_len, d = case["sizes"]
    g = torch.Generator().manual_seed(case["seed"])
    q, k, v, direction = (torch.randn(batch, h, n, d, generator=g).to(case["dtype"]) for h, n in
                          ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len), (heads, q_len)))
    slopes = None if case["slopes"] is None else torch.rand((batch, heads) if "sent" in case["slopes"] else (heads,),
                                                            generator=g)
    see, distance = allowed(batch, q_len, k_len, case["causal"], case["lengths"], case["window"])
    mask = AttentionMask(case["causal"], case["lengths"], case["window"], slopes)
    assert torch.equal(mask.dense(q_len, k_len).expand(batch, 1, q_len, k_len), see)

    def by_hand(*x): return plain(*x, see, distance, slopes, case["scale"])
    exact = with_gradients(by_hand, [x.double() for x in (q, k, v)], direction)
    usual = with_gradients(by_hand, (q, k, v), direction)
    # On small tensors plain PyTorch is often exact by luck, where sums cancel or have one term: twice its error is
    # then nothing. So allow a last digit of the numbers that are summed, on top (dv = weightsᵀ·direction, and the
    # weights are positive; the scores' gradient is a difference of terms like direction·v, times q or k).
    dv_terms = with_gradients(by_hand, [x.double() for x in (q, k, v)], direction.abs())[3].max()
    ds_terms = (direction.double().abs().flatten(1, 2) @ v.double().abs().flatten(1, 2).mT).max()
    dq_terms = ds_terms * max(q.abs().max(), k.abs().max()) * (case["scale"] or case["sizes"][-1] ** -0.5)
    terms = [v.abs().max(), dq_terms, dq_terms, dv_terms]
    # An error eps·|score| of a score is one of a weight, relative to it. In half precision plain PyTorch makes it too.
    if case["dtype"] == torch.float32:
        largest = (q.abs().flatten(1, 2) @ k.abs().flatten(1, 2).mT).max() * (case["scale"] or q.shape[-1] ** -0.5)
        terms = [t * (1 + largest + (0 if slopes is None else distance.max())) for t in terms]
    for backend in (*BACKENDS, "auto"):
        found = with_gradients(lambda *x: attention(*x, mask, 0., case["scale"], backend), (q, k, v), direction)  # noqa: B023
        for i, (ours, theirs, right) in enumerate(zip(found, usual, exact)):
            assert ours.dtype == case["dtype"] and ours.shape == right.shape
            error, bound = (ours - right).abs().max(), 2 * (theirs - right).abs().max()
            bound += torch.finfo(case["dtype"]).eps * terms[i]
            if case["dtype"] == torch.float64: bound = 1e-12  # plain PyTorch in the same dtype is the judge itself
            what = ("output", "dq", "dk", "dv")[i]
            assert error <= bound, f"{backend}, {what}: {error:.2e} against {bound:.2e}"
        hidden = ~see.any(-1).expand(batch, heads, q_len)
        assert (found[0][hidden] == 0).all() and (found[1][hidden] == 0).all()
    weights = attention_weights(q, k, mask, case["scale"])
    see_all = see.expand(batch, heads, q_len, k_len)
    assert weights.shape == see_all.shape and (weights[~see_all] == 0).all()
    torch.testing.assert_close(weights.double().sum(-1), see.any(-1).double().expand(batch, heads, q_len),
                               atol=k_len * torch.finfo(case["dtype"]).eps, rtol=0)


# ---- masks and edges ----

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_len, k_len", [(4, 4), (1, 4), (3, 7), (7, 3)])
def test_causal_is_aligned_at_the_end(backend, q_len, k_len):
    q, k, v = (torch.randn(2, 4, n, 8, dtype=torch.float64) for n in (q_len, k_len, k_len))
    see, distance = allowed(2, q_len, k_len, True, None, None)
    found = attention(q, k, v, AttentionMask(causal=True), backend=backend)
    torch.testing.assert_close(found, plain(q, k, v, see, distance, None, None), atol=1e-12, rtol=0)


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
    x, long = torch.randn(2, 4, 20, 8), torch.randn(1, 4, 600, 8)
    half, long_half = x.bfloat16().requires_grad_(), long.bfloat16().requires_grad_()
    for args, taken in (((x, x, x), "sdpa"), ((half, half, half), "naive"), ((long_half,) * 3, "sdpa"),
                        ((x, x, x, None, 0.1), "naive")):
        said = explain(*args)
        assert said.taken == taken and list(said.reasons) == [b.name for b in backends()]
        assert str(said).count("→") == 1 and f"→ {taken}: taken" in str(said)
    with torch.no_grad(): assert explain(half, half, half).taken == "sdpa"


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
    "module heads": (lambda: MultiHeadAttention(10, 4), ValueError, "4 heads do not divide"),
    "module kv_heads": (lambda: MultiHeadAttention(16, 4, kv_heads=3), ValueError, "3 key/value heads do not divide"),
    "module kv_heads 0": (lambda: MultiHeadAttention(16, 4, kv_heads=0), ValueError, "0 key/value heads"),
    "module dropout": (lambda: MultiHeadAttention(16, 4, dropout=1), ValueError, "dropout is 1"),
    "module backend": (lambda: MultiHeadAttention(16, 4, backend="flash"), ValueError, "did you mean"),
}


@pytest.mark.parametrize("call, error, words", BAD.values(), ids=BAD)
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
