"""The mixture of experts against a loop over tokens, models with it against dense ones and Mixtral; linear attention
against its quadratic form; and what both refuse."""
import copy
import math
import os
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launch import launch
from torch.func import functional_call
from torch.testing import assert_close

from flash_transformer.data import PAD, EncodedPairs, TokenizerPair, toy_corpus
from flash_transformer.model import (
    CausalLM,
    Transformer,
    TransformerConfig,
    build,
    configuration,
    mean_balance,
    save_pretrained,
)
from flash_transformer.model.experts import MixtureOfExperts, balance_loss, linear_attention, linear_attention_steps
from flash_transformer.training import (
    TrainConfig,
    Trainer,
    adam,
    compile_blocks,
    distribute,
    full_tensor,
    start_accelerator,
    synchronise,
)


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


def test_capacity_is_for_training():
    layer, x = mixture(capacity=0.3), draw(9, 6)
    narrow = layer(x)
    wide = layer.eval()(x)
    layer.capacity = None
    exact(wide, layer.train()(x))
    assert (wide - narrow).abs().max() > 0.01


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


# ---- a switch of every model ----

SMALL = dict(d_model=12, d_ff=20, heads=2, norm="pre", dropout=0.0, positions="rotary")
MODELS = {
    "Transformer": dict(encoder_layers=2, decoder_layers=2, source_vocab_size=30, target_vocab_size=30),
    "CausalLM": dict(encoder_layers=0, decoder_layers=2, target_vocab_size=30),
    "MaskedLM": dict(encoder_layers=2, decoder_layers=0, source_vocab_size=30)}


def model_of(kind, seed=0, **changes):
    torch.manual_seed(seed)
    model = build(TransformerConfig(**SMALL | MODELS[kind] | changes)).double()
    assert type(model).__name__ == kind
    return model


def read(model, seed=1, rows=3):
    "Logits, of something to read"
    ids = torch.randint(4, 30, (rows, 9), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([9, 4, 7, 8])[:rows]
    if isinstance(model, Transformer): return model(ids, lengths, ids.flip(1))
    return model(ids) if isinstance(model, CausalLM) else model(ids, lengths)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_one_expert_is_none(kind, gated):
    "Its probability is 1, so there is nothing that the router could learn"
    changes = dict(activation="silu", gated=gated, bias=not gated)
    dense, model = model_of(kind, **changes), model_of(kind, 1, experts=1, experts_per_token=1, **changes)
    def ours(name): return name.replace("feed_forward.", "feed_forward.experts.0.")
    missing = model.load_state_dict({ours(name): p for name, p in dense.state_dict().items()}, strict=False)
    assert not missing.unexpected_keys and all(name.endswith("router.weight") for name in missing.missing_keys)
    out, right = read(model), read(dense)
    exact(out, right)
    for x in (out, right): x.sin().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, p in dense.named_parameters(): exact(gradients.pop(ours(name)), p.grad)
    assert gradients.keys() == {*missing.missing_keys} and all((g == 0).all() for g in gradients.values())
    exact(mean_balance(model).item(), 1.)
    assert mean_balance(dense) == 0


@pytest.mark.parametrize("kind", MODELS)
def test_first_weights(kind):
    "Each expert is drawn as a lone network is, and none like another; the router small"
    changes = dict(d_model=64, d_ff=96, gated=True)
    weights = dict(model_of(kind, experts=4, **changes).named_parameters())
    stack = next(name.partition(".")[0] for name in weights)
    lone = dict(model_of(kind, **changes).named_parameters())
    assert 0.018 < weights[f"{stack}.blocks.0.feed_forward.router.weight"].std() < 0.022
    for layer in ("0.weight", "0.bias", "2.weight", "2.bias"):
        right = lone[f"{stack}.blocks.0.feed_forward.{layer}"]
        parts = [weights[f"{stack}.blocks.0.feed_forward.experts.{e}.{layer}"] for e in range(4)]
        for part in parts: assert_close(part.std(), right.std(), rtol=0.04, atol=0)
        assert layer.endswith("bias") or not torch.equal(parts[0], parts[1])
        for part in parts: assert_close(part.abs().max(), right.abs().max(), rtol=0.3, atol=0)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("experts", [dict(), dict(experts_per_token=1, expert_capacity=0.7)])
def test_computed_again(kind, experts):
    "`recompute` changes no gradient of logits or balance, and leaves the balance of the forward pass"
    found = []
    for recompute in (False, True):
        model = model_of(kind, experts=3, dropout=0.3, **experts)
        model.recompute = recompute
        torch.manual_seed(5)
        out, balance = read(model).sin().sum(), mean_balance(model)
        layers = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
        before = [layer.balance for layer in layers]
        (out + balance).backward()
        assert all(layer.balance is b for layer, b in zip(layers, before))
        found.append([out, balance, *(p.grad for p in model.parameters())])
    exact(found[1], found[0])


@pytest.mark.long
def test_compiled():
    "An expert with no token, with one, with many: a graph each, and gradients as without"
    models = [model_of("CausalLM", experts=6, positions="none") for _ in range(2)]
    compile_blocks(models[1])
    torch._dynamo.reset()
    for rows in (3, 1, 2, 3):
        found = []
        for model in models:
            model.zero_grad()
            out = read(model, seed=rows, rows=rows).sin().sum() + mean_balance(model)
            out.backward()
            found.append([out, *(p.grad for p in model.parameters())])
        exact(found[1], found[0])
    assert not torch._dynamo.utils.counters["graph_break"]


def test_is_no_published_model(tmp_path):
    model = CausalLM(configuration("modern", d_model=24, heads=2, kv_heads=1, decoder_layers=1, experts=4))
    with pytest.raises(ValueError, match="this is no llama: it has experts 4"):
        save_pretrained(model, tmp_path / "new", "llama")
    assert not (tmp_path / "new").exists()


# ---- Mixtral ----

@pytest.fixture
def mixtral(monkeypatch):
    "Theirs, random, in float64; norms, angles and the router's softmax are float32 there, and here are not"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    torch.manual_seed(0)
    model = mixtral.MixtralForCausalLM(mixtral.MixtralConfig(vocab_size=61, hidden_size=24, intermediate_size=40,
        num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, num_local_experts=5, rms_norm_eps=1e-5,
        num_experts_per_tok=2, attn_implementation="sdpa",                      # eager: its softmax is in float32
        experts_implementation="eager")).double().eval()
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, 0.3)

    def norm(self, x): return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))
    def angles(self, x, position_ids):
        base = self.config.rope_parameters["rope_theta"]
        angle = (position_ids[..., None] * base ** -(torch.arange(0, 4, 2, dtype=torch.float64) / 4)).repeat(1, 1, 2)
        return angle.cos(), angle.sin()
    monkeypatch.setattr(mixtral.MixtralRMSNorm, "forward", norm)
    monkeypatch.setattr(mixtral.MixtralRotaryEmbedding, "forward", angles)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    return model


def counterparts(ours, theirs):
    "Parameters of ours and of theirs that hold the same numbers in the same order"
    yield [ours.decoder.embedding.tokens.weight], [theirs.model.embed_tokens.weight]
    yield [ours.decoder.norm.weight, ours.output.weight], [theirs.model.norm.weight, theirs.lm_head.weight]
    for block, layer in zip(ours.decoder.blocks, theirs.model.layers):
        yield [block.self_attention.in_proj.weight], [getattr(layer.self_attn, f"{x}_proj").weight for x in "qkv"]
        yield [block.self_attention.out_proj.weight], [layer.self_attn.o_proj.weight]
        yield ([residual.norm.weight for residual in block.residuals],
               [layer.input_layernorm.weight, layer.post_attention_layernorm.weight])
        mixture, mlp = block.feed_forward, layer.mlp
        yield [mixture.router.weight], [mlp.gate.weight]
        yield [expert[0].weight for expert in mixture.experts], [mlp.experts.gate_up_proj]
        yield [expert[2].weight for expert in mixture.experts], [mlp.experts.down_proj]


def flat(tensors): return torch.cat([t.flatten() for t in tensors])


def test_is_mixtral(mixtral):
    "The whole model: logits and every gradient; and what it writes, which it does with a cache"
    model = CausalLM(configuration("modern", d_model=24, d_ff=40, heads=6, kv_heads=2, decoder_layers=2, experts=5,
        norm_epsilon=1e-5, rotary_base=1e6, tie_embeddings="none", target_vocab_size=61)).double().eval()
    pairs = [*counterparts(model, mixtral)]
    for side, whole in enumerate((model, mixtral)):
        assert {p for pair in pairs for p in pair[side]} == {*whole.parameters()}
    with torch.no_grad():
        for ours, theirs in pairs:
            for p, values in zip(ours, flat(theirs).split([p.numel() for p in ours])): p.copy_(values.view_as(p))
    ids = torch.randint(61, (3, 17), generator=torch.Generator().manual_seed(1))
    logits, right = model(ids), mixtral(ids).logits
    assert right.std() > 0.1
    exact(logits, right)
    for x in (logits, right): (x * draw(*x.shape)).sum().backward()
    for ours, theirs in pairs: exact(flat(p.grad for p in ours), flat(p.grad for p in theirs))
    with torch.no_grad():
        cache = model.cache(17)
        exact(torch.cat([model(part, cache) for part in ids.split([9, 1, 1, 4, 2], dim=1)], dim=1), right)


# ---- in training ----

@pytest.fixture(scope="module")
def corpus():
    texts = toy_corpus(60, 0, 0)["train"]
    tokenizers = TokenizerPair.train(texts, "bpe", 300)
    return EncodedPairs.encode(texts, tokenizers), tokenizers.source_size


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("strength", [0., 0.01, 2.])
def test_a_step_has_the_second_loss(corpus, tmp_path, strength, recompute):
    "As much of it as a batch has of the words; what is logged as the loss is without it"
    pairs, size = corpus
    model = model_of("Transformer", experts=4, source_vocab_size=size, target_vocab_size=size)
    config = TrainConfig(max_steps=1, balance=strength, precision="float32", learning_rate=1e-3, packing=False,
        activation_checkpointing=recompute)
    parts = [np.arange(0, 2), np.arange(2, 30), np.arange(30, 37)]
    twin, words = copy.deepcopy(model), sum(int(pairs.target_lengths[part].sum()) for part in parts)
    trainer = Trainer(model, pairs, pairs, config, tmp_path)
    trainer.course.open()
    trainer._gradient(parts)
    loss, balance = 0., 0.
    for part in parts:
        batch = pairs.batch(part)
        logits = twin(batch.source, batch.source_lengths, batch.target).flatten(0, 1)
        loss = loss + F.cross_entropy(logits, batch.labels.flatten(), ignore_index=PAD, label_smoothing=0.1,
            reduction="sum") / words
        layers = [*twin.encoder.blocks, *twin.decoder.blocks]
        balance = balance + batch.tokens / words * sum(block.feed_forward.balance for block in layers) / 4
    (loss + strength * balance).backward()
    for p, q in zip(model.parameters(), twin.parameters()): assert_close(p.grad, q.grad, rtol=0, atol=1e-12)
    line = trainer.meter.read(1.)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert line["balance"] == pytest.approx(balance.item(), rel=1e-12)


def test_trains(corpus, tmp_path):
    "Evenly, with a strong second loss, where the first weights are not even; and less so without one"
    pairs, size = corpus
    found = []
    for strength in (0., 1.):
        model = model_of("Transformer", experts=4, experts_per_token=1, source_vocab_size=size, target_vocab_size=size)
        with torch.no_grad():
            for m in model.modules():
                if isinstance(m, MixtureOfExperts): m.router.weight[0] += 0.1
        config = TrainConfig(max_steps=15, balance=strength, precision="float32", learning_rate=1e-2, warmup_steps=5,
            tokens_per_batch=1000, log_every=1)
        Trainer(model.float(), pairs, pairs, config, tmp_path / f"{strength}").fit()
        found.append(mean_balance(model.eval()).item())
    assert found[1] < 1.1 < found[0]


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf])
def test_no_such_weight(wrong):
    with pytest.raises(ValueError, match="balance must be 0 or more, not"): TrainConfig(max_steps=1, balance=wrong)


def lonely(parallel): # each of two processes has texts of one word, and not all experts read it
    accelerator = start_accelerator("float32")
    model = model_of("CausalLM", experts=5, positions="none")
    wrapped, _ = distribute(model, lambda p: adam(p, 1e-3), parallel, accelerator)
    world, rank, read = accelerator.num_processes, accelerator.process_index, [0] * 5
    def count(e): return lambda module, args, out: read.__setitem__(e, read[e] + len(args[0]))
    for e, expert in enumerate(model.decoder.blocks[0].feed_forward.experts): expert.register_forward_hook(count(e))
    mine = torch.tensor([[5] * 6, [6] * 6, [7] * 6, [8] * 6])[rank::world]
    for i, row in enumerate(mine, 1):
        with synchronise(wrapped, i == len(mine)): (wrapped(row[None]).sin().sum() + mean_balance(model)).backward()
    return {name: full_tensor(p.grad) * world for name, p in model.named_parameters()}, read


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_expert_without_work_in_a_process(parallel):
    "Nobody waits for its gradient, and it is the others'"
    right, read = lonely(parallel)
    assert sum(read) == 2 * 24
    for found, read in launch(2, partial(lonely, parallel)):
        assert sum(read) == 2 * 12 and 0 in read
        exact(found, right)


# ---- attention without a softmax ----

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
