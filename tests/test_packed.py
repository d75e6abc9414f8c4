"attention_varlen, pack and unpack: random packs against float64, one sequence at a time; bounds; what is kept."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flash_transformer.attention import AttentionMask, attention, attention_varlen
from flash_transformer.attention import functional as doors
from flash_transformer.attention.packed import pack, unpack

BACKENDS = ["auto", "naive", "sdpa", "tiled"]


# ---- random packs ----

def one_by_one(q, k, v, q_lens, k_lens, causal, window, slopes, scale):
    "Each sequence cut out by plain arithmetic, its weights written down from the definition; no AttentionMask"
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    outs, at, keys_at = [q[:0]], 0, 0
    for n, (q_len, k_len) in enumerate(zip(q_lens, k_lens)):
        q_n, k_n, v_n = q[at:at + q_len], k[keys_at:keys_at + k_len], v[keys_at:keys_at + k_len]
        at, keys_at = at + q_len, keys_at + k_len
        ahead = torch.arange(k_len) - (torch.arange(q_len)[:, None] + k_len - q_len)             # q k
        see = torch.ones_like(ahead, dtype=torch.bool)
        if causal: see &= ahead <= 0
        if window and window[0] >= 0: see &= ahead >= -window[0]
        if window and window[1] >= 0: see &= ahead <= window[1]
        scores = torch.einsum("qhd,khd->hqk", q_n, k_n) * scale
        if slopes is not None: scores = scores - slopes.expand(len(q_lens), -1)[n, :, None, None] * ahead.abs()
        rows = see.any(-1, keepdim=True)
        weights = scores.masked_fill(~see & rows, -torch.inf).softmax(-1)
        outs.append(torch.where(rows, torch.einsum("hqk,khd->hqd", weights, v_n), 0).transpose(0, 1))
    return torch.cat(outs)


def with_gradients(f, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = f(*inputs)
    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, inputs, direction, materialize_grads=True)]


def bounds(lengths): return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0)], dtype=torch.int32)


@st.composite
def packs(draw):
    lengths = st.integers(0, 24) | st.just(0)
    sizes = draw(st.lists(st.tuples(lengths, lengths), max_size=5))
    if draw(st.booleans()): sizes = [(n, n) for n, _ in sizes]
    side = st.integers(-1, 9)
    return dict(sizes=sizes, heads=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
                head_dim=draw(st.sampled_from([1, 3, 8])), causal=draw(st.booleans()),
                window=draw(st.none() | st.tuples(side, side)),
                alibi=draw(st.sampled_from([None, "heads", "sequences"])),
                scale=draw(st.sampled_from([None, 0.3])), seed=draw(st.integers(0, 2**16)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=packs())
@example(case=dict(sizes=[], heads=(1, 1), head_dim=3, causal=True, window=None, alibi=None, scale=None, seed=0))
@example(case=dict(sizes=[(0, 0), (0, 4), (5, 0), (3, 7), (7, 3), (0, 0)], heads=(2, 2), head_dim=8, causal=True,
                   window=(2, -1), alibi="sequences", scale=None, seed=0))
def test_random_packs(case):
    torch.manual_seed(case["seed"])
    q_lens, k_lens = [n for n, _ in case["sizes"]], [n for _, n in case["sizes"]]
    (kv_heads, group), d = case["heads"], case["head_dim"]
    qkv = [torch.randn(total, heads, d, dtype=torch.float64) for total, heads in
           ((sum(q_lens), kv_heads * group), (sum(k_lens), kv_heads), (sum(k_lens), kv_heads))]
    shape = {"heads": (kv_heads * group,), "sequences": (len(q_lens), kv_heads * group)}.get(case["alibi"])
    slopes = None if shape is None else torch.rand(shape, dtype=torch.float64)
    rules = case["causal"], case["window"], slopes
    scale = d ** -0.5 if case["scale"] is None else case["scale"]
    expected = with_gradients(lambda *x: one_by_one(*x, q_lens, k_lens, *rules, scale), *qkv)
    mask = AttentionMask(case["causal"], window=case["window"], alibi=slopes)
    for backend in BACKENDS:
        ours = with_gradients(lambda *x, backend=backend: attention_varlen(
            *x, bounds(q_lens), bounds(k_lens), mask, scale=case["scale"], backend=backend), *qkv)
        for name, a, b in zip(("output", "dq", "dk", "dv"), ours, expected):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12, msg=lambda m, n=name, by=backend: f"{by} {n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_strikes_each_sequence_anew(backend):
    torch.manual_seed(0)
    cu, zeros = bounds([20] * 30), torch.zeros(600, 2, 20)
    unit = torch.eye(20).repeat(30, 1)[:, None].expand(-1, 2, -1)
    out = attention_varlen(zeros, zeros, unit, cu, cu, dropout=0.25, backend=backend)      # shows the weights
    assert set((out * 20 * 0.75).round(decimals=4).unique().tolist()) == {0., 1.}
    assert abs((out > 0).float().mean().item() - 0.75) < 5 * (0.25 * 0.75 / out.numel()) ** 0.5
    kept = (out > 0).view(30, 20, 2, 20)
    assert not any(torch.equal(kept[0], other) for other in kept[1:])


def test_nan_stays_in_its_sequence():
    cu, x = bounds([3, 4, 2]), torch.randn(9, 2, 8)
    poisoned = x.clone()
    poisoned[5] = torch.nan
    for backend in BACKENDS:
        clean, out = (attention_varlen(x, k, k, cu, cu, AttentionMask(causal=True), backend=backend)
                      for k in (x, poisoned))
        assert torch.equal(out.isnan().flatten(1).any(1).nonzero().flatten(), torch.tensor([5, 6]))
        torch.testing.assert_close(out[[0, 1, 2, 3, 4, 7, 8]], clean[[0, 1, 2, 3, 4, 7, 8]])


# ---- the door ----

@pytest.fixture
def listed():
    "The one list of backends, put back afterwards"
    kept = list(doors.BACKENDS)
    yield doors.BACKENDS
    doors.BACKENDS[:] = kept


def never(*_): raise AssertionError("this should not be called")


def test_a_packed_kernel_is_called_once_with_bounds_and_longest(listed):
    calls = []

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, mask, dropout, scale):
        calls.append((cu_q.tolist(), cu_k.tolist(), cu_q.dtype, cu_k.dtype, max_q, max_k, mask, dropout, scale))
        return q * 2

    listed.insert(0, doors.Backend("fast", "for this test", never, packed=kernel))
    q, kv, mask = torch.randn(5, 2, 4), torch.randn(7, 2, 4), AttentionMask(causal=True)
    for backend in ("auto", "fast"):
        out = attention_varlen(q, kv, kv, torch.tensor([0, 3, 5]), torch.tensor([0, 1, 7]), mask, 0.1, None, backend)
        assert torch.equal(out, q * 2)
    expected = ([0, 3, 5], [0, 1, 7], torch.int32, torch.int32, 3, 6, mask, 0.1, 0.5)
    assert calls == [expected] * 2
    attention_varlen(q, kv, kv, bounds([3, 2]), bounds([1, 6]), max_seqlen_q=3, max_seqlen_k=6)
    assert calls[2][4:6] == (3, 6)


def test_auto_passes_by_kernels_that_cannot_or_should_not_serve(listed):
    listed[:0] = [doors.Backend("gone", "", never, missing=lambda: "it is not here", packed=never),
                  doors.Backend("choosy", "", never, cannot=lambda *_: "these it does not take", packed=never),
                  doors.Backend("lazy", "", never, slow=lambda *_: "it would take all day", packed=never)]
    x, cu = torch.randn(5, 2, 4), bounds([3, 2])
    torch.testing.assert_close(attention_varlen(x, x, x, cu, cu), attention_varlen(x, x, x, cu, cu, backend="naive"))
    for name, reason in (("gone", "not here"), ("choosy", "does not take")):
        with pytest.raises(ValueError, match=f"{name}.*{reason}"): attention_varlen(x, x, x, cu, cu, backend=name)


def test_the_longest_may_be_told_but_not_too_short():
    x, cu = torch.randn(5, 2, 4), bounds([3, 2])
    attention_varlen(x, x, x, cu, cu, max_seqlen_q=3, max_seqlen_k=8)
    for side in "qk":
        with pytest.raises(ValueError, match=f"max_seqlen_{side} is 2, but sequence 0 has 3"):
            attention_varlen(x, x, x, cu, cu, **{f"max_seqlen_{side}": 2})


class OnGPU(torch.Tensor):
    "Bounds that claim to lie on a GPU, and count how often somebody looks into them"
    looks = 0

    @property
    def device(self): return torch.device("cuda")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        looks = (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__bool__)
        cls.looks += function in looks
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_gpu_is_not_waited_for_where_the_longest_is_told(listed):
    calls = []
    listed.insert(0, doors.Backend("fast", "", never, packed=lambda *args: calls.append(args[5:7])))
    x, (cu, wrong) = torch.randn(5, 2, 4), (bounds(n).as_subclass(OnGPU) for n in ([3, 2], [3, 3]))
    attention_varlen(x, x, x, cu, wrong, max_seqlen_q=3, max_seqlen_k=4)
    assert calls == [(3, 4)] and OnGPU.looks == 0
    attention_varlen(x, x, x, cu, cu)
    assert calls[1] == (3, 3) and OnGPU.looks == 2          # once a side
    with pytest.raises(ValueError, match="cu_seqlens_k ends at 6, but there are 5 tokens"):
        attention_varlen(x, x, x, cu, wrong)


def test_the_mask_does_not_pile_up_what_was_written_out():
    mask = AttentionMask(window=(2, 2), alibi=torch.rand(2))
    x, cu = torch.randn(21, 2, 4), bounds([1, 2, 3, 4, 5, 6])
    attention_varlen(x, x, x, cu, cu, mask)
    assert not mask._made


# ---- there and back ----

@settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 9), max_size=6), spare=st.integers(0, 3), heads=st.integers(1, 3))
def test_pack_and_unpack(lengths, spare, heads):
    x = torch.randn(len(lengths), heads, max(lengths, default=0) + spare, 5, dtype=torch.float64)
    packed, cu = pack(x, torch.tensor(lengths, dtype=torch.int64))
    assert torch.equal(cu, bounds(lengths)) and cu.dtype == torch.int32
    rows = [row[:, :n].transpose(0, 1) for row, n in zip(x, lengths)]
    assert torch.equal(packed, torch.cat([x.new_zeros(0, heads, 5), *rows]))
    back = unpack(packed, cu)
    real = torch.arange(x.shape[2]) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    assert torch.equal(F.pad(back, (0, 0, 0, x.shape[2] - back.shape[2])), x * real[:, None, :, None])


def test_pack_has_gradients():
    x = torch.randn(3, 2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpack(*pack(x, torch.tensor([2, 0, 4]))), x)


@pytest.mark.parametrize("lengths", [[2, 5], [-1, 2], [2], [[1], [2]], [1.5, 2.]])
def test_pack_refuses_lengths_that_do_not_fit(lengths):
    with pytest.raises(ValueError, match=r"lengths .* do not fit x \(2, 1, 4, 3\)"):
        pack(torch.zeros(2, 1, 4, 3), torch.tensor(lengths))


def test_unpack_refuses_bounds_that_do_not_end_at_the_total():
    with pytest.raises(ValueError, match="cu_seqlens ends at 4, x has 5 tokens"):
        unpack(torch.zeros(5, 1, 3), bounds([3, 1]))


def test_equal_to_padded_with_key_lengths():
    torch.manual_seed(0)
    lengths = torch.tensor([7, 2, 0, 5])
    q, k, v = (torch.randn(4, heads, 7, 8, dtype=torch.float64) for heads in (4, 2, 2))
    (a, cu), (b, _), (c, _) = (pack(x, lengths) for x in (q, k, v))
    for backend in BACKENDS:
        padded = attention(q, k, v, AttentionMask(causal=True, key_lengths=lengths), backend=backend)
        ours = attention_varlen(a, b, c, cu, cu, AttentionMask(causal=True), backend=backend)
        torch.testing.assert_close(ours, pack(padded, lengths)[0], atol=1e-12, rtol=1e-12)
