"The model against torch.nn.Transformer in float64, its caches, its weight files, and what it refuses."
import copy
import math
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from flash_transformer.model import (
    Embedding,
    Transformer,
    TransformerConfig,
    attention_maps,
    load_weights,
    save_weights,
    sinusoidal_positions,
)
from flash_transformer.model.embeddings import Dropout

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")     # PyTorch about its own fast path
D, V, W = 24, 13, 17   # width, source and target vocabulary
SOURCE, LENGTHS = torch.tensor([[4, 5, 6, 7, 3], [8, 9, 3, 0, 0], [5, 5, 5, 3, 0]]), torch.tensor([5, 3, 4])
TARGET = torch.tensor([[2, 10, 11, 12], [2, 7, 0, 0], [2, 4, 4, 0]])


def exact(a, b): assert_close(a, b, rtol=1e-10, atol=1e-10)


def make(seed=0, **changes):
    "A small model in float64 whose every number is drawn, norms and biases too"
    sizes = dict(source_vocab_size=V, target_vocab_size=V if changes.get("tie_embeddings", "all") == "all" else W)
    model = Transformer(TransformerConfig(**dict(d_model=D, d_ff=40, heads=3, encoder_layers=2, decoder_layers=3,
                                                 dropout=0.0) | sizes | changes)).double()
    torch.manual_seed(seed)
    for p in model.parameters(): nn.init.normal_(p, std=0.3)
    return model


# ---- the whole of it is torch.nn.Transformer's ----

def theirs(ours):
    "PyTorch's stacks with copied weights, and pairs of parameters that are the same thing in both"
    c = ours.config
    them = nn.Transformer(c.d_model, c.heads, c.encoder_layers, c.decoder_layers, c.d_ff, dropout=0.0,
                          norm_first=c.norm == "pre", batch_first=True, dtype=torch.float64)
    if c.norm == "post": them.encoder.norm = them.decoder.norm = None     # PyTorch's has one too many there
    pairs = []
    for our_stack, their_stack in (ours.encoder, them.encoder), (ours.decoder, them.decoder):
        for ours_, theirs_ in zip(our_stack.blocks, their_stack.layers):
            attentions = [("attention", "self_attn")] if our_stack is ours.encoder else [
                ("self_attention", "self_attn"), ("cross_attention", "multihead_attn")]
            for our_name, their_name in attentions:
                a, b = getattr(ours_, our_name), getattr(theirs_, their_name)
                pairs += [(a.in_proj.weight, b.in_proj_weight), (a.in_proj.bias, b.in_proj_bias),
                          (a.out_proj.weight, b.out_proj.weight), (a.out_proj.bias, b.out_proj.bias)]
            modules = [(ours_.feed_forward[0], theirs_.linear1), (ours_.feed_forward[2], theirs_.linear2)]
            modules += [(r.norm, getattr(theirs_, f"norm{i}")) for i, r in enumerate(ours_.residuals, 1)]
            pairs += [(getattr(a, name), getattr(b, name)) for a, b in modules for name in ("weight", "bias")]
        if c.norm == "pre": pairs += [(our_stack.norm.weight, their_stack.norm.weight),
                                      (our_stack.norm.bias, their_stack.norm.bias)]
    with torch.no_grad():
        for a, b in pairs: b.copy_(a)
    return them, pairs


def embed(table, ids):
    "The paper's sections 3.4 and 3.5, a number at a time"
    d = table.shape[1]
    angle = [[pos / 10000 ** ((c - c % 2) / d) for c in range(d)] for pos in range(ids.shape[1])]
    positions = [[math.cos(x) if c % 2 else math.sin(x) for c, x in enumerate(row)] for row in angle]
    return F.embedding(ids, table) * d ** 0.5 + torch.tensor(positions).double()      # kept in float32, as ours


def run_theirs(them, source_table, target_table):
    hidden = torch.arange(SOURCE.shape[1]) >= LENGTHS[:, None]
    causal = torch.ones(TARGET.shape[1], TARGET.shape[1]).triu(1).bool()
    return them(embed(source_table, SOURCE), embed(target_table, TARGET), tgt_mask=causal,
                src_key_padding_mask=hidden, memory_key_padding_mask=hidden)


@pytest.mark.parametrize("tie", ["all", "target", "none"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_outputs_and_gradients_are_pytorchs(norm, tie):
    "Tied tables get the gradients of all their uses: in the reference they are one leaf, used as often"
    ours = make(norm=norm, tie_embeddings=tie)
    them, pairs = theirs(ours)
    tables = [m.weight for m in (ours.encoder.embedding.tokens, ours.decoder.embedding.tokens, ours.output)]
    leaves = {id(t): t.detach().clone().requires_grad_() for t in tables}
    assert len(leaves) == {"all": 1, "target": 2, "none": 3}[tie]
    assert len(pairs) + len(leaves) == len(list(ours.parameters()))
    source_table, target_table, output_table = (leaves[id(t)] for t in tables)

    logits = ours(SOURCE, LENGTHS, TARGET)
    right = run_theirs(them, source_table, target_table) @ output_table.T
    exact(logits, right)
    direction = torch.randn_like(right)
    logits.backward(direction), right.backward(direction)
    for a, b in pairs + [(t, leaves[id(t)]) for t in tables]: exact(a.grad, b.grad)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_attention_maps_are_pytorchs(norm):
    ours = make(norm=norm)
    them, _ = theirs(ours)
    table, calls = ours.output.weight.detach(), {"encoder": [], "decoder": [], "cross": []}
    for kind, stack, name in (("encoder", them.encoder, "self_attn"), ("decoder", them.decoder, "self_attn"),
                              ("cross", them.decoder, "multihead_attn")):
        for layer in stack.layers:
            getattr(layer, name).register_forward_pre_hook(
                lambda module, args, kwargs, kind=kind: calls[kind].append((module, args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        run_theirs(them, table, table)
        maps = attention_maps(ours, SOURCE, LENGTHS, TARGET)
        for kind, seen in calls.items():
            right = [m.forward(*args, **kwargs | {"need_weights": True, "average_attn_weights": False})[1]
                     for m, args, kwargs in seen]
            assert maps[kind].shape[0] == len(right) == (2 if kind == "encoder" else 3)
            exact(maps[kind], torch.stack(right))
    hooks = [m for m in ours.modules() if m._forward_hooks]
    assert not hooks and not any(m.requires_grad for m in maps.values())


@pytest.mark.parametrize("name, count", [("base", (512, 8, 2048)), ("big", (1024, 16, 4096))])
def test_parameter_counts(name, count):
    "As PyTorch counts them, without its two norms at the ends of the stacks; the paper says 65 M and 213 M"
    with torch.device("meta"):
        model = Transformer(getattr(TransformerConfig, name)(37000))
        d, heads, d_ff = count
        them = nn.Transformer(d, heads, 6, 6, d_ff)
    ours = sum(p.numel() for p in model.parameters())
    assert ours == sum(p.numel() for p in them.parameters()) - 2 * 2 * d + 37000 * d
    assert abs(ours / {"base": 65e6, "big": 213e6}[name] - 1) < 0.03
    assert model.config.dropout == {"base": 0.1, "big": 0.3}[name] and model.config.heads == heads


# ---- what must not matter ----

@pytest.mark.parametrize("norm", ["post", "pre"])
def test_padding_changes_nothing(norm):
    model = make(norm=norm)
    together = model(SOURCE, LENGTHS, TARGET)
    junk = SOURCE.masked_fill(torch.arange(5) >= LENGTHS[:, None], 11)      # whatever stands in the padding
    exact(model(junk, LENGTHS, TARGET), together)
    longer = F.pad(SOURCE, (0, 7))
    exact(model(longer, LENGTHS, TARGET), together)
    for i, n in enumerate(LENGTHS):
        exact(model(SOURCE[i:i + 1, :n], n[None], TARGET[i:i + 1]), together[i:i + 1])


def test_no_word_sees_a_later_one():
    model = make()
    before = model(SOURCE, LENGTHS, TARGET)
    for t in range(1, TARGET.shape[1]):
        other = TARGET.clone()
        other[:, t] = 9
        after = model(SOURCE, LENGTHS, other)
        exact(after[:, :t], before[:, :t])
        assert ((after[:, t:] - before[:, t:]).abs().amax(-1) > 1e-7).all()       # and those from t on do


def test_kept_positions():
    model, keep = make(), TARGET != 0
    exact(model(SOURCE, LENGTHS, TARGET, keep=keep), model(SOURCE, LENGTHS, TARGET)[keep])


# ---- caches ----

@pytest.mark.parametrize("pieces", [[1] * 9, [9], [1, 3, 5], [4, 1, 1, 3]])
def test_pieces_with_a_cache_equal_all_at_once(pieces):
    model = make().eval()
    target = torch.randint(4, V, (3, 9))
    with torch.no_grad():
        memory = model.encode(SOURCE, LENGTHS)
        full, cache = model.decode(target, memory, LENGTHS), model.cache(9)
        parts = [model.decode(part, memory, LENGTHS, cache) for part in target.split(pieces, dim=1)]
    exact(torch.cat(parts, dim=1), full)


def test_beams_with_a_cache_equal_all_at_once():
    "Rows of beams go over to other beams of their sentence between steps, and share that sentence's memory"
    model, beams, g = make().eval(), 4, torch.Generator().manual_seed(0)
    words = torch.full((3 * beams, 1), 2)
    with torch.no_grad():
        memory, cache = model.encode(SOURCE, LENGTHS), model.cache(8)
        for _ in range(8):
            step = model.decode(words[:, -1:], memory, LENGTHS, cache)
            full = model.decode(words, memory.repeat_interleave(beams, 0), LENGTHS.repeat_interleave(beams))
            exact(step, full[:, -1:])
            parent = torch.randint(beams, (3, beams), generator=g)
            rows = (parent + torch.arange(3)[:, None] * beams).flatten()
            for own, _ in cache: own.reorder(rows)
            words = torch.cat([words[rows], torch.randint(4, V, (3 * beams, 1), generator=g)], dim=1)
    assert len(cache[0][1].keys) == 3                  # once a sentence, not once a beam


# ---- positions and dropout ----

def test_positions_grow():
    "Beyond the 512 that are there at first; also when translation, without gradients, is what made them grow"
    embedding = Embedding(50, 8)
    ids = torch.randint(50, (1, 1500))
    with torch.inference_mode(): embedding(ids[:, :600])
    out = embedding(ids)
    out.sum().backward()
    assert_close(out - embedding.tokens(ids), sinusoidal_positions(1500, 8)[None], rtol=0, atol=1e-6)
    assert_close(embedding.tokens.weight.grad.sum(), torch.tensor(1500 * 8 * 8 ** 0.5))
    assert_close(embedding(ids[:, 700:], start=700), out[:, 700:])
    assert "positions" not in embedding.state_dict()
    angle = 1499 / 10000 ** (torch.arange(0, 8, 2).double() / 8)
    assert_close(embedding.positions[1499, ::2].double(), angle.sin(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout(p, dtype):
    torch.manual_seed(0)
    layer, n = Dropout(p), 400_003                                   # not a multiple of four
    x = torch.full((n,), 3.0, dtype=dtype, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    kept = out.detach() != 0
    assert out.dtype == dtype and out.shape == x.shape
    scale = torch.tensor(1 / (1 - p), dtype=dtype)
    assert_close(out[kept], (3 * scale).expand(int(kept.sum())), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(x.grad, torch.where(kept, scale, 0))          # what was kept, and the same factor
    def like_throws(share, p, throws): assert abs(share - p) < 5 * (p * (1 - p) / throws) ** 0.5
    kept = kept.double()
    like_throws(kept.mean().item(), 1 - p, n)
    for lane in range(4): like_throws(kept[lane::4].mean().item(), 1 - p, n / 4)     # four share a random number
    for apart in 1, 2, 3, 4: like_throws((kept[apart:] * kept[:-apart]).mean().item(), (1 - p) ** 2, n / 2)
    torch.manual_seed(0)
    assert torch.equal(layer(x), out) and not torch.equal(layer(x), out)


def test_dropout_that_drops_nothing():
    x = torch.randn(3, 5)
    assert Dropout(0.5).eval()(x) is x and Dropout(0.0)(x) is x
    assert Dropout(0.5)(torch.empty(0, 5)).shape == (0, 5)
    strange = torch.ones(6, 4, 5).transpose(0, 2)                    # not contiguous
    assert set(Dropout(0.5)(strange).unique().tolist()) == {0.0, 2.0}


def test_dropout_that_drops_nearly_all():
    torch.manual_seed(0)
    for p in 0.9999, 0.99999, 0.999999, 1 - 1e-9: assert (Dropout(p)(torch.ones(1000)) != 0).sum() < 5


def test_dropout_stands_where_the_paper_has_it(monkeypatch):
    "If it drops everything, the embeddings are gone and no sub-layer adds anything: norms alone remain"
    monkeypatch.setattr(Dropout, "_factors", lambda self, x: torch.zeros_like(x))
    model = make(dropout=0.5, norm="pre").train()
    assert torch.equal(model.encode(SOURCE, LENGTHS), model.encoder.norm.bias.expand(3, 5, D))
    model.eval()
    assert model.encode(SOURCE, LENGTHS).std() > 0.1


# ---- bad input ----

BAD = {
    "zero width": (dict(d_model=0), "d_model must be at least 1, not 0"),
    "no heads": (dict(heads=0), "heads must be at least 1"),
    "negative layers": (dict(decoder_layers=-1), "decoder_layers must be 0 or more, not -1"),
    "inner width": (dict(d_ff=0), "d_ff"),
    "heads do not divide": (dict(d_model=24, heads=5), "5 heads do not divide a width of 24"),
    "odd width": (dict(d_model=15, heads=3), "d_model must be even"),
    "dropout": (dict(dropout=1.0), r"dropout must be in \[0, 1\), not 1.0"),
    "negative dropout": (dict(dropout=-0.1), "dropout"),
    "dropout not a number": (dict(attention_dropout=math.nan), "attention_dropout must be"),
    "norm": (dict(norm="middle"), "norm is .* not 'middle'"),
    "no experts": (dict(experts=0), "experts must be at least 1, not 0"),
    "more experts than there are": (dict(experts=3, experts_per_token=4), "must be at most experts, but 4 .* than 3"),
    "no expert a token": (dict(experts=3, experts_per_token=0), "experts_per_token must be at least 1, not 0"),
    "no capacity": (dict(experts=3, expert_capacity=0), "expert_capacity must be above 0, not 0"),
    "ties": (dict(tie_embeddings="source"), "tie_embeddings is .* not 'source'"),
    "ties of unequal tables": (dict(source_vocab_size=10, target_vocab_size=11), "sizes are 10 and 11: use .*joint"),
}


@pytest.mark.parametrize("fields, words", BAD.values(), ids=BAD)
def test_config_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words) as caught: TransformerConfig(**fields)
    assert "\n" not in str(caught.value)


def test_model_without_vocabulary():
    with pytest.raises(ValueError, match="source_vocab_size and target_vocab_size"): Transformer(TransformerConfig())


# ---- weight files ----

@pytest.mark.parametrize("tie", ["all", "target", "none"])
def test_weights_come_back(tmp_path, tie):
    model, other = make(0, tie_embeddings=tie), make(1, tie_embeddings=tie)
    save_weights(model, tmp_path / "w.safetensors")
    assert len(load_file(tmp_path / "w.safetensors")) == len(list(model.parameters()))      # tied ones once
    load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(other(SOURCE, LENGTHS, TARGET), model(SOURCE, LENGTHS, TARGET))
    same = other.encoder.embedding.tokens.weight is other.output.weight
    assert same == (tie == "all") and (other.decoder.embedding.tokens.weight is other.output.weight) == (tie != "none")


def cut(path): path.write_bytes(path.read_bytes()[:-100])
def cut_header(path): path.write_bytes(path.read_bytes()[:50])
def rewrite(path, change): save_file(change(load_file(path)), path)
def without(name): return lambda w: {k: v for k, v in w.items() if k != name}
def folder(path): path.unlink(), path.mkdir()


NORM = "decoder.norm.weight"
DAMAGE = {
    "cut off": (cut, "not a whole safetensors file"),
    "cut in the header": (cut_header, "not a whole safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "not a whole safetensors file"),
    "text": (lambda p: p.write_text("weights, honestly\n" * 50), "not a whole safetensors file"),
    "zeros": (lambda p: p.write_bytes(bytes(5000)), "not a whole safetensors file"),
    "a folder": (folder, "not a whole safetensors file"),
    "no tensor": (lambda p: save_file({}, p), "another model: decoder.* is missing"),
    "a tensor missing": (lambda p: rewrite(p, without(NORM)), f"another model: {NORM} is missing in the file"),
    "a tensor too many": (lambda p: rewrite(p, lambda w: w | {"extra.bias": torch.ones(3)}),
                          r"extra.bias is \(3,\) in the file, absent in this model"),
    "wrong shape": (lambda p: rewrite(p, lambda w: w | {NORM: torch.ones(D + 1)}), rf"{NORM} is \({D + 1},\) .*\({D},"),
    "transposed": (lambda p: rewrite(p, lambda w: w | {"output.weight": torch.ones(D, V)}), "another model"),
}


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE)
def test_damaged_weights(tmp_path, damage, words):
    path = tmp_path / "model.safetensors"
    save_weights(make(norm="pre"), path)
    damage(path)
    model = make(1, norm="pre")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=words) as caught: load_weights(model, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))      # all or nothing
    path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match="no weights at .*model.safetensors"): load_weights(model, path)


class Evil:
    "When unpickled, makes a folder"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def plain_pickle(x, path): path.write_bytes(pickle.dumps(x))


@pytest.mark.parametrize("dump", [plain_pickle, torch.save])
def test_weights_never_run_code(tmp_path, dump):
    path, trace = tmp_path / "model.safetensors", tmp_path / "executed"
    dump({"output.weight": Evil(trace)}, path)
    with pytest.raises(ValueError, match="not a whole safetensors file"): load_weights(make(), path)
    assert not trace.exists()
    path = path.rename(tmp_path / "weights.pt")
    torch.load(path, weights_only=False) if dump is torch.save else pickle.loads(path.read_bytes())
    assert trace.exists()                              # it would have


# ---- switches ----

SWITCHES = {
    "halves": dict(positions="sinusoidal_halves"),
    "learned": dict(positions="learned", max_length=9),
    "rotary": dict(positions="rotary"), "alibi": dict(positions="alibi"),
    "relative": dict(positions="relative", relative_buckets=6, relative_reach=5), "none": dict(positions="none"),
    "window": dict(window=3), "rotary window": dict(positions="rotary", window=2),
    "rms": dict(normalization="rms", bias=False), "layer norm without bias": dict(bias=False),
    "gated": dict(activation="silu", gated=True), "gelu": dict(activation="gelu_tanh"),
    "grouped": dict(kv_heads=2), "wide heads": dict(head_dim=14, attention_scale=1.0),
    "embedding": dict(scale_embeddings=False, embedding_norm=True, token_types=2),
    "output bias": dict(output_bias=True), "inputs tied": dict(tie_embeddings="inputs"),
    "experts": dict(experts=3), "switch": dict(experts=3, experts_per_token=1, expert_capacity=1.0),
}


def switched(name, **changes):
    "A model in float64 whose every parameter has an effect that shows"
    torch.manual_seed(0)
    c = dict(d_model=24, d_ff=40, heads=4, encoder_layers=2, decoder_layers=2, dropout=0.0, norm="pre",
        source_vocab_size=V, target_vocab_size=V)
    model = Transformer(TransformerConfig(**c | SWITCHES[name] | changes)).double()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.3)
    return model


PAIRS = torch.randint(4, V, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", SWITCHES)
def test_a_row_of_several_sentences(name):
    "Two pairs, packed into one row, give what each gives alone"
    model, source, target = switched(name).eval(), PAIRS[:1], PAIRS[1:]
    alone = [model(source[:, a:b], torch.tensor([b - a]), target[:, c:d])[0]
             for a, b, c, d in ((0, 4, 0, 5), (4, 7, 5, 7))]
    segments = torch.tensor([[1] * 4 + [2] * 3 + [0] * 2]), torch.tensor([[1] * 5 + [2] * 2 + [0] * 2])
    packed = model(source, None, target, segments=segments)[0]
    assert_close(packed[:7], torch.cat(alone), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SWITCHES)
def test_computed_again(name):
    "`recompute` changes no gradient, also in a row of several sentences"
    gradients = []
    segments = torch.tensor([[1] * 4 + [2] * 5]), torch.tensor([[1] * 5 + [2] * 4])
    for recompute, packed in ((False, False), (True, False), (False, True), (True, True)):
        model = switched(name).train()
        model.recompute = recompute
        out = model(PAIRS[:1], torch.tensor([9]), PAIRS[1:], segments=segments if packed else None)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for some, other in (gradients[:2], gradients[2:]): assert_close(some, other, rtol=0, atol=1e-12)
    assert all(g is not None and (g.abs().max() > 0 or ".experts." in n) for n, g in gradients[0].items())  # one idle


@pytest.mark.parametrize("name", SWITCHES)
def test_words_one_by_one(name):
    "With caches, and with beams that change places, as all at once"
    model = switched(name).eval()
    with torch.no_grad():
        lengths = torch.tensor([9, 6])
        memory, cache = model.encode(PAIRS, lengths), model.cache(8)
        rows, words = torch.tensor([0, 0, 1, 1]), PAIRS.flip(1)[[0, 0, 1, 1]]
        words[1, 0], words[3, 0] = 4, 5
        history = words[:, :0]
        for step, new in enumerate(words[:, :8].split([3, 1, 1, 2, 1], dim=1)):
            got = model.decode(new, memory, lengths, cache)
            history = torch.cat([history, new], dim=1)
            full = model.decode(history, memory[rows], lengths[rows])
            assert_close(got, full[:, -new.shape[1]:], rtol=0, atol=1e-9)
            index = torch.tensor([[1, 0, 2, 3], [0, 0, 3, 2]][step % 2])
            for own, _ in cache: own.reorder(index)
            history = history[index]


@pytest.mark.parametrize("name", SWITCHES)
def test_half_precision_stays_near(name):
    model = switched(name).eval().float()
    lengths = torch.tensor([9, 6])
    exact = model(PAIRS, lengths, PAIRS.flip(1))
    with torch.autocast("cpu", torch.bfloat16): rounded = model(PAIRS, lengths, PAIRS.flip(1))
    assert rounded.dtype == torch.bfloat16 and rounded.isfinite().all()
    assert (rounded - exact).abs().mean() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("name", SWITCHES)
def test_copied_and_moved(name):
    model = switched(name).eval()
    lengths = torch.tensor([9, 6])
    expected = model(PAIRS, lengths, PAIRS.flip(1))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(PAIRS, lengths, PAIRS.flip(1)), expected)
    with torch.device("meta"): empty = Transformer(model.config)
    assert [p.shape for p in empty.parameters()] == [p.shape for p in model.parameters()]
