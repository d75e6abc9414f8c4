"The online softmax: what its chapter leaves open: odd shapes and dtypes, NaN, and the solution of its first exercise."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_transformer.attention.online_softmax import attend_block, finish, merge, running_attention, running_softmax


def pieces(draw, n):
    cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=8))) if n > 1 else []
    return [b - a for a, b in zip([0, *cuts], [*cuts, n])]


@st.composite
def tiles(draw):
    shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 4)), draw(st.integers(1, 40)))
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9999))),
                         dtype=torch.float64) * draw(st.sampled_from([0., 1., 1e2, 1e4]))
    hidden = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < draw(st.sampled_from([0., 0.5, 0.95, 1.]))
    return scores.masked_fill(hidden, -torch.inf), pieces(draw, shape[-1])


@settings(max_examples=100, deadline=None)
@given(tiles(), st.integers(1, 5), st.randoms(use_true_random=False))
def test_any_pieces_any_order_with_gradients(tile, head_dim, random):
    scores, lengths = tile
    values = torch.randn(*scores.shape[:-2], scores.shape[-1], head_dim, dtype=torch.float64)
    ours, theirs = ([x.clone().requires_grad_() for x in (scores, values)] for _ in range(2))
    blocks = list(zip(ours[0].split(lengths, dim=-1), ours[1].split(lengths, dim=-2)))
    random.shuffle(blocks)
    out, lse = running_attention(blocks)
    sees = (scores > -torch.inf).any(-1, keepdim=True)
    weights = torch.where(sees, theirs[0], 0).softmax(-1).where(sees, 0)
    expected = weights @ theirs[1]
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1, keepdim=True), atol=1e-12, rtol=1e-14)
    direction = torch.randn_like(out)
    for mine, other in zip(torch.autograd.grad(out, ours, direction), torch.autograd.grad(expected, theirs, direction)):
        torch.testing.assert_close(mine, other, atol=1e-11, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    x = torch.randn(3, 10, dtype=dtype)
    assert {t.dtype for t in running_softmax(x.split(4, dim=-1))} == {dtype}
    assert {t.dtype for t in running_attention([(x, torch.randn(10, 2, dtype=dtype))])} == {dtype}


def test_identity_and_no_blocks():
    nothing = running_softmax([])
    assert nothing[0] == -torch.inf and nothing[1] == 0
    pair = running_softmax([torch.randn(2, 5)])
    for both in (merge(pair, nothing), merge(nothing, pair)):
        assert all(torch.equal(a, b) for a, b in zip(both, pair))


def test_attention_to_no_blocks_is_refused():
    with pytest.raises(ValueError, match="give at least one"): running_attention([])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers_stay_in_their_row(bad):
    scores, values = torch.randn(2, 6), torch.randn(6, 3)
    scores[0, 1] = bad
    out, _ = running_attention(zip(scores.split(2, dim=-1), values.split(2)))
    expected = scores.softmax(-1) @ values
    assert out[0].isnan().all() and expected[0].isnan().all()
    torch.testing.assert_close(out[1], expected[1])


def test_two_halves_by_their_log_sum_exp():
    q, k, v = torch.randn(5, 8), torch.randn(20, 8), torch.randn(20, 8)
    halves = [finish(*attend_block(q @ k[part].T / 8 ** 0.5, v[part])) for part in (slice(0, 12), slice(12, 20))]
    (out_a, lse_a), (out_b, lse_b) = halves
    expected = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    merged = finish(*merge((lse_a, torch.ones_like(lse_a), out_a), (lse_b, torch.ones_like(lse_b), out_b)))[0]
    torch.testing.assert_close(merged, expected)
    p = torch.sigmoid(lse_a - lse_b)
    torch.testing.assert_close(p * out_a + (1 - p) * out_b, expected)
