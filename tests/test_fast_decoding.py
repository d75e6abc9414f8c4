"The fast search against the readable one; its parts against plain computations; the Translator's copy of the weights"
import copy
import random

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from untrained import Leaning, sources, wild

from flash_transformer.data import BOS, EOS
from flash_transformer.translation import (
    FastTransformer,
    Translator,
    beam_search,
    decoding_precision,
    fast_beam_search,
    fast_greedy_search,
    greedy_search,
)
from flash_transformer.translation import fast_decoding as module
from flash_transformer.translation.fast_decoding import _best_words, _Linear


def check(model, source, lengths, beam, alpha, extra, fast=None, tolerance=1e-9):
    "Both searches of both kinds find the same; returns the lengths of the greedy translations"
    fast = fast or FastTransformer(model, next(model.parameters()).dtype)
    greedy = greedy_search(model, source, lengths, extra)
    assert fast_greedy_search(fast, source, lengths, extra) == greedy
    right, found = beam_search(model, source, lengths, beam, alpha, extra), \
        fast_beam_search(fast, source, lengths, beam, alpha, extra)
    for f, r in zip(found, right, strict=True):
        assert [h.ids for h in f] == [h.ids for h in r]
        for name in "log_prob", "score":
            assert_close([getattr(h, name) for h in f], [getattr(h, name) for h in r], rtol=tolerance, atol=tolerance)
    return [len(ids) for ids in greedy]


@pytest.mark.parametrize("changes", [{}, dict(norm="post"), dict(heads=4, decoder_layers=1), dict(tie_embeddings="all"),
                                     dict(tie_embeddings="target", encoder_layers=2, norm="post")],
                         ids=lambda c: " ".join(map(str, c.values())) or "plain")
@pytest.mark.parametrize("beam, alpha", [(1, 0.0), (2, 0.6), (4, 1.0), (7, 2.0)])
def test_the_words_of_the_readable_search(changes, beam, alpha):
    "Sentences of very different lengths, which end at very different times"
    ended = set()
    for seed, size in (1, 5), (2, 40), (3, 333):
        model = wild(seed, size, lean=(1, 0.5, 2)[seed - 1], **changes)
        ended |= set(check(model, *sources(seed, [3, 40, 1, 9, 2, 17, 16, 5, 1, 25, 33, 8], size), beam, alpha, 20))
    assert len(ended) > 5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("std", [0.05, 1.5])
def test_flat_and_sharp_models(dtype, tolerance, std):
    "The logits of the sharp one are in the hundreds"
    for seed in range(3):
        model = wild(seed, 60, dtype, std)
        check(model, *sources(seed, [5, 2, 11, 7], 60), 3, 0.6, 12, tolerance=tolerance)


@pytest.mark.parametrize("batch", [1, 3, 64, 200])
def test_batches(batch):
    "One larger than the encoder reads at once, made smaller again and again while sentences end; as if each were alone"
    model, rng = wild(4, 50, lean=1.5), random.Random(batch)
    source, lengths = sources(5, [rng.randint(1, 30) for _ in range(batch)], 50)
    check(model, source, lengths, 3, 1.0, 15)
    fast, n = FastTransformer(model, torch.float64), int(lengths[0])
    together = fast_beam_search(fast, source, lengths, 3, 1.0, 15)
    [alone] = fast_beam_search(fast, source[:1, :n], lengths[:1], 3, 1.0, 15)
    assert [h.ids for h in alone] == [h.ids for h in together[0]]


def test_sentences_leave(monkeypatch):
    "Without the smaller batches the same words; with them fewer rows are computed"
    model, (source, lengths) = wild(4, 50, lean=1.5), sources(5, [9, 3, 30, 1, 7, 22, 14, 2, 8, 28, 4, 17], 50)
    fast, rows = FastTransformer(model, torch.float64), []
    write = FastTransformer.write
    monkeypatch.setattr(FastTransformer, "write", lambda *args: (rows.append(len(args[1])), write(*args))[1])
    smaller, least = fast_beam_search(fast, source, lengths, 2, 1.0, 30), sum(rows)
    rows.clear()
    monkeypatch.setattr(module, "_still", lambda done: (int((~done).sum()), None))
    assert fast_beam_search(fast, source, lengths, 2, 1.0, 30) == smaller and sum(rows) > least


@pytest.mark.parametrize("size", [12, 300])
def test_a_wide_beam(size):
    "More continuations are wanted than blocks that one beginning has"
    model, width = wild(6, size, lean=1.5), 70
    fast = FastTransformer(model, torch.float64)
    assert 2 * width > fast.blocks
    check(model, *sources(6, [4, 9, 2], size), width, 0.6, 6, fast)


@pytest.mark.parametrize("extra", [1, 4])
def test_limits(extra):
    "A model that never ends is cut off at its sentence's own limit; one that ends at once says nothing"
    (source, lengths), model = sources(0, [3, 1, 5]), wild(0)
    fast = FastTransformer(model, torch.float64)
    for lean, expected in ((-1e9, (lengths + extra).tolist()), (1e9, [0, 0, 0])):
        fast.output, plain = Leaning(fast.output, lean), fast.output
        assert [len(ids) for ids in fast_greedy_search(fast, source, lengths, extra)] == expected
        for beam in 1, 3:
            found = fast_beam_search(fast, source, lengths, beam, 0.6, extra)
            assert [len(hypotheses[0].ids) for hypotheses in found] == expected
        fast.output = plain


def test_nothing_to_do_and_what_cannot_be():
    fast, nothing = FastTransformer(wild(0)), (torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    assert fast_greedy_search(fast, *nothing) == [] and fast_beam_search(fast, *nothing) == []
    with pytest.raises(ValueError, match="at least 1 beginning, not 0"):
        fast_beam_search(fast, *sources(0, [2]), beam=0)
    for search in fast_greedy_search, fast_beam_search:
        with pytest.raises(ValueError, match="sentence 1 has no words"):
            search(fast, torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 0]))


def test_a_long_text():
    "Longer than the positions that are kept at first, and than any room"
    check(wild(2, 30, lean=0), *sources(2, [150, 3], 30), 2, 0.6, 40)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.01, 3, 500])
def test_best_words_against_topk(dtype, spread):
    "Values exactly those of topk, many of them equal; and each word has the value it is said to have"
    torch.manual_seed(0)
    for batch, beam, size, k in (5, 4, 1280, 8), (3, 1, 256, 2), (2, 3, 128, 100):
        logits = (torch.randn(batch * beam, size) * spread).round(decimals=1).to(dtype)
        logits[:, -20:] = -torch.inf
        alive = torch.randn(batch, beam, dtype=torch.promote_types(dtype, torch.float32)) * 10
        if beam > 1: alive[0, 1:] = -torch.inf
        before, log_p = logits.clone(), logits.to(alive.dtype).log_softmax(-1).view(batch, beam, size)
        every = (alive[:, :, None] + log_p).flatten(1)
        total, beginning, word = _best_words(logits, alive, 128, k)
        assert torch.equal(logits, before)
        tolerance = dict(rtol=1e-5, atol=1e-4) if alive.dtype == torch.float32 else dict(rtol=1e-12, atol=1e-11)
        assert_close(total, every.topk(k).values, **tolerance)
        assert_close(total, every.gather(1, beginning * size + word), **tolerance)
        pairs = beginning * size + word
        assert all(len(set(row.tolist())) == k for row in pairs)


@pytest.mark.parametrize("rows", [1, 4, 5, 300])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, int8, bound", [(torch.float64, False, 1e-14), (torch.float32, False, 1e-6),
                                                (torch.bfloat16, False, 0.006), (torch.bfloat16, True, 0.015),
                                                (torch.float32, True, 0.013)])
def test_products(rows, bias, dtype, int8, bound):
    torch.manual_seed(rows)
    plain, x = nn.Linear(96, 130, bias=bias).double(), torch.randn(rows, 96, dtype=torch.float64)
    linear = _Linear(plain.weight, plain.bias, dtype, int8)
    x = x.to(dtype)
    with torch.inference_mode():
        for then, exact in (("none", plain(x.double())), ("relu", plain(x.double()).relu())):
            found = linear(x, then)
            assert found.dtype == dtype and ((found.double() - exact).norm() / exact.norm()) < bound


def test_without_packing(monkeypatch):
    "Another build of PyTorch, where the operators are missing"
    def missing(*args): raise AttributeError("no such operator")
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", missing)
    torch.manual_seed(0)
    plain, x = nn.Linear(32, 8), torch.randn(9, 32)
    linear = _Linear(plain.weight, plain.bias, torch.bfloat16, False)
    assert not linear.packed
    assert_close(linear(x.bfloat16(), "relu").float(), plain(x).relu(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype, int8, bound", [(torch.float32, False, 1e-5), (torch.bfloat16, False, 0.03),
                                                (torch.bfloat16, True, 0.05)])
def test_logits_in_every_precision(dtype, int8, bound):
    "Word for word, with beams that change places, against the whole sequence read at once in float64"
    model, (source, lengths) = wild(3, 300, std=0.15), sources(3, [9, 16, 4], 300)
    fast, beam = FastTransformer(model.float(), dtype, int8), 2
    model.double()
    with torch.inference_mode():
        notes, words = fast.read(source, lengths, beam), torch.full((6, 1), BOS)
        g = torch.Generator().manual_seed(0)
        for _ in range(20):
            found = fast.write(words[:, -1], notes)[:, :300].double()
            right = model(source.repeat_interleave(beam, 0), lengths.repeat_interleave(beam), words)[:, -1]
            assert (found - right).std() / right.std() < bound
            parent = torch.randint(beam, (3, beam), generator=g)
            notes.follow(parent)
            rows = (parent + torch.arange(3)[:, None] * beam).flatten()
            words = torch.cat([words[rows], torch.randint(4, 300, (6, 1), generator=g)], dim=1)
        assert notes.words.shape[3] < 20 * beam + 16                     # what nobody has was thrown out


def test_precision_to_use(monkeypatch):
    model = wild(0, dtype=torch.float32)
    for amx, expected in (True, torch.bfloat16), (False, torch.float32):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        assert decoding_precision("auto", model) == (expected, False)
        assert decoding_precision("int8", model) == (expected, True)
        assert decoding_precision("float32", model) == (torch.float32, False)
        assert decoding_precision("fp16", model) == (torch.float16, False)
        assert decoding_precision("auto", wild(0)) == (torch.float64, False)


# ---- the Translator's copy ----

@pytest.fixture(scope="module")
def translator(finished):
    translator = Translator.from_run(finished)
    torch.manual_seed(0)
    for p in translator.model.parameters(): nn.init.normal_(p, std=0.3)
    return translator


TEXTS = ["The dog sleeps.", "My old neighbour wants to buy a red house in the city today.", "Yes."]


def test_translator_follows_the_model(translator):
    "Weights that change between two calls, as in training; the model itself stays as it was"
    model = translator.model
    before, dtypes = copy.deepcopy(model.state_dict()), {p.dtype for p in model.parameters()}
    first = {p: translator.translate(TEXTS, precision=p) for p in ("float32", "auto", "bf16", "int8")}
    copies = dict(translator._fast)
    assert translator.translate(TEXTS, precision="float32") == first["float32"]
    assert all(translator._fast[how] is kept for how, kept in copies.items())            # not made again
    for name, value in model.state_dict().items(): assert torch.equal(value, before[name])
    assert {p.dtype for p in model.parameters()} == dtypes and all(p.requires_grad for p in model.parameters())
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    for p in model.parameters(): p.grad = torch.randn_like(p)
    optimiser.step()
    changed = translator.translate(TEXTS, precision="float32")
    assert changed != first["float32"]
    assert changed == Translator(copy.deepcopy(model), translator.tokenizers, translator.config).translate(
        TEXTS, precision="float32")
    model.load_state_dict(before)
    assert translator.translate(TEXTS, precision="float32") == first["float32"]


def test_attention_maps_are_of_the_model_itself(translator):
    read, written, weights = translator.attention(TEXTS[0], "Der Hund schläft.")
    assert weights.dtype == torch.float32 and weights.shape[-2:] == (len(written), len(read))
    assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_gradients_are_left_alone(translator):
    "Translating between a forward and a backward pass"
    model = translator.model
    loss = model(torch.tensor([[5, EOS]]), torch.tensor([2]), torch.tensor([[BOS, 6]])).sum()
    translator.translate(TEXTS)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
