"The mixture of experts against a loop over tokens, linear attention against its quadratic form, and what both refuse."
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.testing import assert_close

from flash_transformer.model.experts import MixtureOfExperts, balance_loss, linear_attention, linear_attention_steps


def exact(a, b): assert_close(a, b, rtol=1e-10, atol=1e-10)


def mixture(seed=0, d_model=6, d_ff=8, experts=4, **changes):
    torch.manual_seed(seed)
    return MixtureOfExperts(d_model, d_ff, experts, **changes).double()


def draw(*shape, seed=1): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_by_token(layer, x):
    "The formula, and seats given away in the order of the tokens"
    tokens, seats = x.reshape(-1, x.shape[-1]), [math.inf] * len(layer.experts)
    if layer.capacity is not None:
        seats = [math.ceil(layer.capacity * len(tokens) * layer.top_k / len(layer.experts))] * len(layer.experts)
    out = []
    for token in tokens:
        p = (layer.router.weight @ token).softmax(0)
        best = p.argsort(descending=True)[:layer.top_k].tolist()
        y = torch.zeros_like(token)
        for e in best:
            if seats[e] > 0: y = y + (p[e] / p[best].sum() if layer.top_k > 1 else p[e]) * layer.experts[e](token)
            seats[e] -= 1
        out.append(y)
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize("capacity", [None, 0.25, 1, 1.25, 10])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_is_the_formula(top_k, capacity):
    layer, x = mixture(top_k=top_k, capacity=capacity), draw(3, 11, 6).requires_grad_()
    leaves, weights = [x, *layer.parameters()], draw(3, 11, 6, seed=2)
    results = []
    for out in (layer(x), token_by_token(layer, x)):
        gradients = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
        results.append([out, *(torch.zeros_like(p) if g is None else g for g, p in zip(gradients, leaves))])
    for ours, expected in zip(*results): exact(ours, expected)


@pytest.mark.parametrize("changes", [dict(activation="relu", gated=False, bias=True), dict(activation="gelu"),
    dict(experts=1, top_k=1), dict(experts=3, top_k=3)])
def test_other_experts(changes):
    layer, x = mixture(**changes), draw(5, 6)
    exact(layer(x), token_by_token(layer, x))


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6), (2, 0, 6)])
@pytest.mark.parametrize("capacity", [None, 1.])
def test_shapes(shape, capacity):
    layer, x = mixture(capacity=capacity), draw(*shape).requires_grad_()
    out = layer(x)
    (out.sum() + layer.balance).backward()
    assert out.shape == x.grad.shape == x.shape and out.dtype == x.dtype
    assert layer.balance.shape == () and layer.balance.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_of_a_view(): # not contiguous
    layer, x = mixture(), draw(5, 3, 6).transpose(0, 1)
    exact(layer(x), token_by_token(layer, x))


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients(top_k):
    layer, x = mixture(d_model=3, d_ff=2, experts=3, top_k=top_k), draw(4, 3).requires_grad_()
    names, values = zip(*layer.named_parameters())
    def f(x, *values):
        out = functional_call(layer, dict(zip(names, values)), (x,))
        return out, layer.balance
    assert torch.autograd.gradcheck(f, (x, *values))


def test_router_of_one_learns():
    layer = mixture(top_k=1)
    layer(draw(9, 6)).square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-4


def test_balance():
    p = torch.tensor([[.9, .1], [.8, .2], [.7, .3], [.4, .6]], dtype=torch.float64)
    exact(balance_loss(p, p.argmax(-1, keepdim=True)).item(), 1.2)
    exact(balance_loss(p, p.topk(2).indices).item(), 1.)
    exact(balance_loss(torch.tensor([[1., 0, 0]] * 5).double(), torch.zeros(5, 1).long()).item(), 3.)
    layer = mixture()
    assert layer.balance is None
    layer(draw(9, 6))
    gradient, = torch.autograd.grad(layer.balance, layer.router.weight)
    assert gradient.abs().max() > 0


def test_capacity_turns_the_last_away():
    layer, x = mixture(experts=4, top_k=1, capacity=1), draw(8, 6).abs()
    with torch.no_grad(): layer.router.weight.copy_(torch.tensor([[0.], [1], [0], [0]]).expand(4, 6))
    out = layer(x)
    assert (out[:2].norm(dim=-1) > 0).all() and (out[2:] == 0).all()
    layer.capacity = None
    assert (layer(x).norm(dim=-1) > 0).all()


@pytest.mark.parametrize("changes, said", [
    (dict(experts=0), "experts must be at least 1, not 0"),
    (dict(experts=3, top_k=4), "top_k must be from 1 to the 3 experts, not 4"),
    (dict(top_k=0), "top_k must be"),
    (dict(capacity=0), "capacity must be above 0, not 0"),
    (dict(capacity=-1.5), "capacity must be above 0, not -1.5"),
    (dict(capacity=math.nan), "capacity must be above 0, not nan"),
    (dict(activation="tanh"), "there is no activation 'tanh'")])
def test_refuses(changes, said):
    with pytest.raises(ValueError, match=said): mixture(**changes)


def test_half_precision():
    layer, x = mixture().float(), draw(7, 6).float().requires_grad_()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16): out = layer(x)
    (out.sum() + layer.balance).backward()
    assert out.dtype == x.dtype and x.grad.isfinite().all()
    assert_close(out, expected, rtol=0.1, atol=0.02)
    low = layer.bfloat16()(x.detach().bfloat16())
    assert low.dtype == torch.bfloat16 and layer.balance.dtype == torch.float32
    assert_close(low.float(), expected, rtol=0.1, atol=0.02)


def test_can_be_copied_after_a_pass():
    layer, x = mixture(), draw(7, 6)
    out = layer(x)
    twin = copy.deepcopy(layer)
    assert layer.balance is not None and twin.balance is None
    exact(twin(x), out)
    exact(twin.balance, layer.balance)


def written_out(q, k, v, causal):
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    if causal: weights = weights.tril()
    return weights / weights.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n, width", [(1, 8), (2, 1), (64, 8), (65, 8), (130, 5)])
def test_linear_is_the_quadratic_form(n, width, causal):
    leaves = [draw(2, 3, n, w, seed=i).requires_grad_() for i, w in enumerate((8, 8, width))]
    results = [[out, *torch.autograd.grad(out.sin().sum(), leaves)]
        for out in (form(*leaves, causal) for form in (linear_attention, written_out))]
    for ours, expected in zip(*results): exact(ours, expected)


def test_linear_gradients():
    leaves = [draw(1, 2, 3, 2, seed=i).requires_grad_() for i in range(3)]
    state = draw(1, 2, 2, 3, seed=3).abs().requires_grad_()
    assert torch.autograd.gradcheck(linear_attention_steps, (*leaves, state))


def test_linear_other_lengths():
    q, k, v = draw(1, 2, 3, 4), draw(1, 2, 5, 4, seed=2), draw(1, 2, 5, 4, seed=3)
    exact(linear_attention(q, k, v, causal=False), written_out(q, k, v, False))
    with pytest.raises(ValueError, match="there are 3 and 5"): linear_attention(q, k, v)
    nothing = draw(1, 2, 0, 4)
    assert linear_attention(nothing, nothing, nothing).shape == nothing.shape


@pytest.mark.parametrize("pieces", [[1] * 9, [70, 1, 1, 64, 3], [139]])
def test_linear_steps(pieces):
    q, k, v = (draw(2, 2, sum(pieces), 4, seed=i) for i in range(3))
    state, outs = None, []
    for part in zip(*(x.split(pieces, dim=2) for x in (q, k, v))):
        out, state = linear_attention_steps(*part, state)
        outs.append(out)
        assert state.shape == (2, 2, 4, 5)
    exact(torch.cat(outs, dim=2), written_out(q, k, v, True))


@pytest.mark.parametrize("causal", [True, False])
def test_linear_survives_small_features(causal): # elu(−30) + 1 is 0 in float32
    q, k, v = torch.full((1, 1, 3, 4), -30.), torch.full((1, 1, 3, 4), -30.), torch.eye(3)[None, None]
    expected = torch.ones(3, 3).tril() if causal else torch.ones(3, 3)
    assert_close(linear_attention(q, k, v, causal)[0, 0], expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("causal", [True, False])
def test_linear_half_precision(causal): # a sum of ones in bfloat16 would stop at 256
    q = k = torch.zeros(1, 1, 1000, 4, dtype=torch.bfloat16)
    v = torch.ones(1, 1, 1000, 2, dtype=torch.bfloat16)
    out = linear_attention(q, k, v, causal)
    assert out.dtype == torch.bfloat16
    assert_close(out, torch.ones_like(out))
    if causal: assert linear_attention_steps(q, k, v)[1][0, 0, 0, -1] == 1000
