"The three ways to several heads: one function, cut from one another, also inside a model that learns."
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from flash_transformer.attention import AttentionMask, MultiHeadAttention
from flash_transformer.attention.multihead import (
    SemiParallelMultiHeadAttention,
    SequentialMultiHeadAttention,
    take_apart,
)

FORMS = [SequentialMultiHeadAttention, SemiParallelMultiHeadAttention]
D, HEADS, HEAD = 24, 4, 6
MASKS = {"none": None, "causal": AttentionMask(causal=True), "padding": AttentionMask(key_lengths=torch.tensor([7, 3])),
         "both, a window": AttentionMask(causal=True, key_lengths=torch.tensor([5, 7]), window=(2, -1))}


def random(*args, **kwargs):
    "A MultiHeadAttention with no zeros for biases"
    torch.manual_seed(0)
    multi = MultiHeadAttention(*args, **kwargs).double()
    for name, p in multi.named_parameters():
        if name.endswith("bias"): torch.nn.init.normal_(p)
    return multi


def results(module, mask, *inputs):
    "Output, and gradients of the inputs"
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = module(*inputs, mask=mask)
    (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)).sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


def by_head(linear, heads): # rows of q or k or v, gradients of weight and bias in one → (heads, head_dim, D + 1)
    return torch.cat([linear[0], linear[1][:, None]], dim=1).unflatten(0, (heads, -1))


def projections(module):
    "Gradients of what makes q, k and v, each (heads, head_dim, D + 1), said apart for each form"
    if isinstance(module, MultiHeadAttention):
        grads = [p.grad.split(module.sizes) for p in module.in_proj.parameters()]
        return [by_head(part, n // module.head_dim) for part, n in zip(zip(*grads), module.sizes)]
    parts = [module.q_proj, module.k_proj, module.v_proj]
    if isinstance(module, SemiParallelMultiHeadAttention):
        return [by_head((part.weight.grad, part.bias.grad), HEADS) for part in parts]
    return [torch.cat([by_head((head.weight.grad, head.bias.grad), 1) for head in part]) for part in parts]


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_taken_apart_it_is_the_same(form, mask, cross):
    multi = random(D, HEADS)
    apart = take_apart(multi, form)
    inputs = [torch.randn(2, 7, D, dtype=torch.float64) for _ in range(1 + cross)]
    for ours, theirs in zip(results(apart, MASKS[mask], *inputs), results(multi, MASKS[mask], *inputs)):
        assert_close(ours, theirs, atol=1e-12, rtol=0)
    for ours, theirs in zip(projections(apart), projections(multi)): assert_close(ours, theirs, atol=1e-11, rtol=0)
    for ours, theirs in zip(apart.out_proj.parameters(), multi.out_proj.parameters()):
        assert_close(ours.grad, theirs.grad, atol=1e-11, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_grouped_keys_are_shared_heads(form):
    "With fewer key heads: full attention with copies of them; the gradient of a shared head is the sum of its copies'"
    grouped, full = random(D, HEADS, kv_heads=2), random(D, HEADS)
    with torch.no_grad():
        for few, many in zip(grouped.in_proj.parameters(), full.in_proj.parameters()):
            q, k, v = few.split(grouped.sizes)
            k, v = (part.unflatten(0, (2, HEAD)).repeat_interleave(2, dim=0).flatten(0, 1) for part in (k, v))
            many.copy_(torch.cat([q, k, v]))
        full.out_proj.load_state_dict(grouped.out_proj.state_dict())
    apart, x = take_apart(full, form), torch.randn(2, 7, D, dtype=torch.float64)
    for ours, theirs in zip(results(apart, MASKS["causal"], x), results(grouped, MASKS["causal"], x)):
        assert_close(ours, theirs, atol=1e-12, rtol=0)
    q, k, v = projections(apart)
    shared = [q, *(part.unflatten(0, (2, 2)).sum(1) for part in (k, v))]
    for ours, theirs in zip(shared, projections(grouped)): assert_close(ours, theirs, atol=1e-11, rtol=0)


def test_copies_are_copies():
    multi = random(D, HEADS).float()
    apart = take_apart(multi, SequentialMultiHeadAttention)
    assert {p.dtype for p in apart.parameters()} == {torch.float32}
    assert all(p.requires_grad and p.is_leaf for p in apart.parameters())
    before, x = multi.in_proj.weight.clone(), torch.randn(1, 3, D)
    torch.optim.SGD(apart.parameters(), lr=1).zero_grad()
    apart(x).sum().backward()
    torch.optim.SGD(apart.parameters(), lr=1).step()
    assert torch.equal(multi.in_proj.weight, before) and not torch.equal(apart.v_proj[0].weight, before[2 * D:][:HEAD])


@pytest.mark.parametrize("more", [dict(kv_heads=2), dict(head_dim=8), dict(scale=1.0), dict(bias=False),
                                  dict(dropout=0.1), dict(rotary=lambda x, start: x)])
def test_what_cannot_be_taken_apart(more):
    with pytest.raises(ValueError, match="only a plain MultiHeadAttention"):
        take_apart(MultiHeadAttention(D, HEADS, **more), SequentialMultiHeadAttention)


# ---- benchmarks/multi_head.py ----

@pytest.fixture
def script(monkeypatch):
    "The module, with a model that is small"
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import multi_head
    monkeypatch.setattr(multi_head, "SIZE", multi_head.SIZE | dict(d_model=16, d_ff=32, decoder_layers=2))
    monkeypatch.setattr(multi_head, "WINDOW", 16)
    monkeypatch.setattr(multi_head, "SETTINGS", [(4, 3), (2, 1)])
    monkeypatch.setattr(multi_head, "_keep_memory", lambda: None)          # it would be kept for all tests
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    return multi_head


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["multi_head.py", *map(str, arguments)])
    script.main()


@pytest.fixture
def verse(tmp_path):
    path = tmp_path / "verse.txt"
    path.write_text("Tyger Tyger, burning bright,\nIn the forests of the night;\n" * 30, encoding="utf-8")
    return path


def test_script(script, verse, monkeypatch, capsys):
    out = verse.with_name("out.json")
    run(script, monkeypatch, verse, "--steps", 4, "--out", out)
    result, said = json.loads(out.read_text()), capsys.readouterr().out
    settings = result["settings"]
    assert [(s["heads"], s["windows"]) for s in settings] == [(4, 3), (2, 1)] and "all at once" in said
    for s in settings:
        sequential, joint, at_once = s["kinds"]
        layers, h = 2, s["heads"]
        # A block's products forward, each with two backward: q, k, v, the output and two of the feed-forward network;
        # and the logits. Each call of attention has one backward.
        expected = {name: 3 * (layers * (n + 3) + 1) for name, n in (("s", 3 * h), ("j", 3), ("a", 1))}
        assert [k["products"] for k in s["kinds"]] == [*expected.values()]
        assert [k["attention_calls"] for k in s["kinds"]] == [2 * layers * n for n in (h, h, 1)]
        assert sequential["operations"] > joint["operations"] > at_once["operations"]
        assert [k["parameter_tensors"] for k in s["kinds"]] == [4 + layers * (10 + n) for n in (6 * h, 6, 2)]
        weights = layers * (4 * 16 * 16 + 2 * 16 * 32) + 16 * result["vocabulary"]
        assert {k["product_flops"] for k in s["kinds"]} == {6 * 16 * s["windows"] * weights}
        assert all(len(k["losses"]) == 4 and k["seconds"] > 0 for k in s["kinds"])
    assert str(verse.parent) not in out.read_text()


def test_script_says_no(script, verse, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="no text file"): run(script, monkeypatch, verse.with_name("none.txt"))
    with pytest.raises(SystemExit): run(script, monkeypatch, verse, "--steps", 2)
    assert "at least 3" in capsys.readouterr().err


def test_script_finds_a_wrong_head(script, verse, monkeypatch):
    "Two heads' queries exchanged in one of the three"
    def wrong(multi, kind):
        module = take_apart(multi, kind)
        if kind is SequentialMultiHeadAttention: module.q_proj[0], module.q_proj[1] = module.q_proj[1], module.q_proj[0]
        return module
    monkeypatch.setattr(script, "take_apart", wrong)
    with pytest.raises(RuntimeError, match="difference_float64 is"):
        run(script, monkeypatch, verse, "--steps", 3, "--out", verse.with_name("out.json"))
    assert not verse.with_name("out.json").exists()


def test_every_one_begins(script):
    "In turns, and another one first each time"
    order = []
    runs = {name: lambda x, name=name: order.append(name) or 0.0 for name in "abc"}
    losses, seconds = script.train(runs, [(0,)] * 4)
    assert "".join(order) == "abcbcacababc" and {len(x) for x in (*losses.values(), *seconds.values())} == {4}


def test_reordered_units_are_the_same_function(script):
    model = script.start(20, 2, torch.float64)["all at once"].model
    other, ids = script.reordered(model), torch.arange(16)[None]
    assert_close(other(ids), model(ids), atol=1e-12, rtol=0)
    up, other_up = (m.decoder.blocks[0].feed_forward[0].weight for m in (model, other))
    assert torch.equal(up.flip(0), other_up) and not torch.equal(up, other_up)


def test_committed_results_hold(script):
    settings = json.loads((Path(script.__file__).parent / "results/multi_head.json").read_text())["settings"]
    for s in settings:
        script.check(s)
        assert s["difference"] == pytest.approx(script.spread({k["name"]: k["losses"] for k in s["kinds"]}), abs=1e-6)
