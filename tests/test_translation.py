"Decoding against brute force, the Translator and the run folders it refuses, scores against sacreBLEU."
import itertools
import json
import shutil
import threading

import numpy as np
import pytest
import sacrebleu
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from untrained import Leaning, sources, wild

from flash_transformer.data import BOS, EOS, TokenizerPair, load_corpus, plan_batches, toy_corpus
from flash_transformer.model import Transformer, TransformerConfig, save_weights
from flash_transformer.translation import (
    DecodeConfig,
    Evaluation,
    FastTransformer,
    Translator,
    beam_search,
    evaluate,
    greedy_search,
    score,
)
from flash_transformer.translation.translator import _plan

# ---- search ----

def log_prob(model, source, ids, end=(EOS,)):
    "Of these words and the end behind them, all at once and without a cache"
    target = torch.tensor([[BOS, *ids, *end]])
    with torch.no_grad(): log_p = model(source[None], torch.tensor([len(source)]), target[:, :-1]).log_softmax(-1)
    return log_p[0].gather(-1, target[0, 1:, None]).sum().item()


def every_translation(model, source, limit, size):
    "Log-probability of each sequence that ends within `limit` tokens"
    words = [i for i in range(size) if i != EOS]
    return {ids: log_prob(model, source, ids) for n in range(limit) for ids in itertools.product(words, repeat=n)}


@pytest.mark.parametrize("seed, size", [(0, 5), (1, 5), (2, 6), (3, 6), (4, 6)])
def test_beam_search_against_brute_force(seed, size):
    """A beam of all beginnings times all words, in which every ending has its place, finds the best of all; whatever
    any beam finds has the log-probability it says"""
    model, (source, lengths) = wild(seed, size), sources(seed, [2, 1, 2], size)
    limits = (lengths + 2).tolist()
    everything = [every_translation(model, row[:n], limit, size) for row, n, limit in zip(source, lengths, limits)]
    assert len(everything[0]) == sum((size - 1) ** n for n in range(4))
    for alpha in 0.0, 0.6, 1.0, 2.0:
        scores = [{ids: lp / ((5 + len(ids) + 1) / 6) ** alpha for ids, lp in all_.items()} for all_ in everything]
        for beam in 1, 2, 3, size * (size - 1) ** 3:
            for i, found in enumerate(beam_search(model, source, lengths, beam, alpha, extra_length=2)):
                best = max(scores[i].values())
                assert found and [h.score for h in found] == sorted((h.score for h in found), reverse=True)
                assert len({tuple(h.ids) for h in found}) == len(found)
                for h in found:
                    assert EOS not in h.ids and len(h.ids) <= limits[i]
                    if len(h.ids) < limits[i]:
                        assert h.log_prob == pytest.approx(everything[i][tuple(h.ids)], abs=1e-5)
                        assert h.score == pytest.approx(scores[i][tuple(h.ids)], abs=1e-5) and h.score <= best + 1e-5
                    else:                                # cut off, as nothing had ended
                        right = log_prob(model, source[i, :lengths[i]], h.ids, end=())
                        assert h.log_prob == pytest.approx(right, abs=1e-5) and len(found) == 1
                if beam > 3: assert scores[i][tuple(found[0].ids)] == best


@pytest.mark.parametrize("beam", [1, 2, 5])
def test_together_as_one_by_one(beam):
    model, (source, lengths) = wild(7, 9), sources(7, [3, 9, 1, 5, 2, 9], 9)
    together = beam_search(model, source, lengths, beam, 1.0, extra_length=6)
    greedy = greedy_search(model, source, lengths, extra_length=6)
    for i, n in enumerate(lengths):
        [alone] = beam_search(model, source[i:i + 1, :n], lengths[i:i + 1], beam, 1.0, extra_length=6)
        assert [h.ids for h in alone] == [h.ids for h in together[i]]
        assert [h.score for h in alone] == pytest.approx([h.score for h in together[i]], abs=1e-5)
        assert greedy_search(model, source[i:i + 1, :n], lengths[i:i + 1], extra_length=6) == greedy[i:i + 1]
    assert len({len(ids) for ids in greedy}) > 1         # they ended at different times


@pytest.mark.parametrize("seed", range(8))
def test_beam_of_one_is_greedy(seed):
    "And greedy is the likeliest word after word, computed from scratch"
    model, (source, lengths) = wild(seed, 8), sources(seed, [4, 1, 6], 8)
    greedy = greedy_search(model, source, lengths, extra_length=5)
    for alpha in 0.0, 1.0:
        assert [h[0].ids for h in beam_search(model, source, lengths, 1, alpha, extra_length=5)] == greedy
    for row, n, found in zip(source, lengths, greedy):
        ids = []
        while len(ids) < n + 5 and EOS not in ids:
            with torch.no_grad(): logits = model(row[None, :n], n[None], torch.tensor([[BOS, *ids]]))
            ids.append(logits[0, -1].argmax().item())
        assert found == [i for i in ids if i != EOS]


@pytest.mark.parametrize("extra", [1, 4])
def test_limits(extra):
    "A model that never ends is cut off at its sentence's own limit; one that ends at once says nothing"
    model, (source, lengths) = wild(0), sources(0, [3, 1, 5])
    output = model.output
    for lean, expected in ((-1e9, (lengths + extra).tolist()), (1e9, [0, 0, 0])):
        model.output = Leaning(output, lean)
        assert [len(ids) for ids in greedy_search(model, source, lengths, extra)] == expected
        for beam in 1, 3:
            found = beam_search(model, source, lengths, beam, 0.6, extra)
            assert [len(hypotheses[0].ids) for hypotheses in found] == expected


def test_beam_that_cannot_be():
    with pytest.raises(ValueError, match="at least 1 beginning, not 0"): beam_search(wild(0), *sources(0, [2]), beam=0)


@pytest.mark.parametrize("fields, words", [
    (dict(beam=0), "decode.beam must be at least 1, not 0"), (dict(extra_length=0), "decode.extra_length"),
    (dict(tokens_per_batch=-1), "decode.tokens_per_batch"), (dict(length_penalty=-0.1), "decode.length_penalty"),
    (dict(length_penalty=float("nan")), "decode.length_penalty"), (dict(precision="int3"), "decode.precision")])
def test_config_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words): DecodeConfig(**fields)


# ---- the Translator ----

@pytest.fixture(scope="module")
def translator(finished):
    "Of the tiny run, with weights that have more to say, in float64: no result hangs on the last bit"
    translator = Translator.from_run(finished)
    torch.manual_seed(0)
    for p in translator.model.parameters(): nn.init.normal_(p, std=0.3)
    translator.model.double()
    return translator


@pytest.fixture(scope="module")
def sentences(text): return load_corpus(test=text / "test")["test"]["source"][:8]


def test_one_and_many_and_none(translator, sentences):
    one = translator.translate(sentences[0])
    assert isinstance(one, str) and one and translator.translate(sentences[:1]) == [one]
    assert translator.translate([]) == [] and translator.translate("") == "" and translator.translate(" \t\n") == ""
    assert translator.translate(["", "  "]) == ["", ""]
    assert translator.translate(tuple(sentences[:2]))[0] == one


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 300), st.integers(1, 4))
def test_batches_are_as_many_for_each_worker_and_even(lengths, tokens, workers):
    plan, lengths = _plan(np.array(lengths), tokens, workers), np.array(lengths)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(lengths)))
    most, largest = max(tokens, lengths.max()), max(len(batch) * lengths[batch].max() for batch in plan)
    def count(budget): return len(plan_batches(lengths, lengths, int(budget), shuffle=False))
    allowed = -(-count(most) // workers) * workers
    assert largest <= most and len(plan) <= allowed
    assert all(count(smaller) > allowed for smaller in range(lengths.max(), largest))   # as many, but smaller: no


@pytest.mark.parametrize("beam", [1, 3])
def test_order_is_kept_whatever_the_batches(translator, sentences, beam):
    texts = [sentences[3], "", *sentences, "  ", sentences[0] * 3, "a"]
    alone = [translator.translate(text, beam=beam) for text in texts]
    assert len(set(alone)) > 3 and alone[1] == alone[10] == ""
    for budget in 1, 60, 10**6: assert translator.translate(texts, beam=beam, tokens_per_batch=budget) == alone


def test_threads_after_an_error(translator, sentences, monkeypatch):
    "One worker of two threads, two of one; what fails between the batches leaves the caller three, and no worker"
    monkeypatch.setattr(type(translator.tokenizers), "decode_target", lambda *_: 1 / 0)
    threads, before = torch.get_num_threads(), set(threading.enumerate())
    torch.set_num_threads(3)
    try:
        for texts in sentences[:1], [sentences[0]] * 130:
            with pytest.raises(ZeroDivisionError) as kept: translator.translate(texts, beam=1, tokens_per_batch=1)
            assert kept.tb and torch.get_num_threads() == 3
            assert set(threading.enumerate()) <= before
    finally: torch.set_num_threads(threads)


def test_changes_are_for_once(translator, sentences):
    before = vars(translator.config).copy()
    translator.translate(sentences[0], beam=1, extra_length=1)
    assert vars(translator.config) == before == dict(beam=2, length_penalty=0.6, extra_length=5, tokens_per_batch=32768,
                                                      precision="auto")
    with pytest.raises(ValueError, match="decode.beam"): translator.translate("a", beam=0)
    with pytest.raises(TypeError, match="beem"): translator.translate("a", beem=3)


def test_text_never_seen(translator, sentences):
    odd = ["你好,世界", "🙂👩\u200d🔬", "e\u0301\u0301\u0301", "a\u2028b\x85c", "\0", "</s> <pad> <s>", "ﷺ" * 30,
           "\ufeffa", "\U0010ffff"]
    found = translator.translate([*odd, sentences[0]])
    assert all(isinstance(text, str) for text in found) and found[-1] == translator.translate(sentences[0])
    with pytest.raises(ValueError, match="lone surrogate"): translator.translate(["a", "\ud800"])
    with pytest.raises(TypeError): translator.translate(["a", None])
    with pytest.raises(TypeError): translator.translate(None)


def test_a_very_long_line(translator, sentences):
    "Longer than the positions that are kept ready, and than a batch may be"
    long = " ".join(sentences * 12)
    assert len(translator.tokenizers.encode_source([long])[0]) > 600
    found = translator.translate([sentences[0], long], beam=1, tokens_per_batch=100)
    assert found[0] == translator.translate(sentences[0], beam=1) and isinstance(found[1], str)
    with pytest.raises(ValueError, match=r"more than 4,096: split it .* begins 'xy xy xy"):
        translator.translate([sentences[0], "xy " * 33_334])


# ---- run folders ----

def test_a_copy_elsewhere_translates_equally(finished, tmp_path, sentences):
    here = Translator.from_run(finished).translate(sentences)
    for name in "config.yaml", "tokenizer.json", "model.safetensors": shutil.copy(finished / name, tmp_path / name)
    assert Translator.from_run(str(tmp_path)).translate(sentences) == here        # no more is needed


def test_weights_of_a_checkpoint(finished):
    weights = finished / "checkpoints" / "00000010" / "model.safetensors"
    older, newer = Translator.from_run(finished, weights=weights), Translator.from_run(finished)
    assert not torch.equal(older.model.output.weight, newer.model.output.weight)
    assert torch.equal(older.model.output.weight, load_file(weights)["encoder.embedding.tokens.weight"])
    with pytest.raises(FileNotFoundError, match="no weights at nowhere"):
        Translator.from_run(finished, weights="nowhere")


def write(name, content):
    def change(run): (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def remove(name): return lambda run: (run / name).unlink()
def edit(before, after):
    def change(run):
        config = (run / "config.yaml").read_text()
        assert before in config
        (run / "config.yaml").write_text(config.replace(before, after))
    return change


def other_weights(run):
    sizes = dict(source_vocab_size=400, target_vocab_size=400)
    save_weights(Transformer(TransformerConfig(16, 48, 2, 1, 1, norm="pre", **sizes)), run / "model.safetensors")


def other_tokenizer(run): TokenizerPair.train(toy_corpus(50, 0, 0)["train"], "bpe", 300).save(run)


def cut_weights(run):
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


BAD = {
    "no folder": (shutil.rmtree, "run is no run folder"),
    "no config": (remove("config.yaml"), "run is no run folder: it has no config.yaml"),
    "broken YAML": (write("config.yaml", "model: {d_model: 16"), "config.yaml"),
    "not UTF-8": (write("config.yaml", b"model: \xff"), "config.yaml"),
    "NUL": (write("config.yaml", b"model: \0"), "config.yaml"),
    "empty config": (write("config.yaml", ""), "config.yaml describes no model"),
    "a list": (write("config.yaml", "[1, 2]"), "config.yaml describes no model"),
    "no model in it": (write("config.yaml", "data: {corpus: toy}"), "config.yaml describes no model"),
    "model is a word": (write("config.yaml", "model: large"), "config.yaml"),
    "model is nothing": (write("config.yaml", "model:"), "config.yaml"),
    "unknown field": (edit("d_model: 16", "d_model: 16\n  width: 3"), "config.yaml.*width"),
    "wrong type": (edit("d_model: 16", "d_model: wide"), "config.yaml.*d_model"),
    "heads that do not divide": (edit("heads: 2", "heads: 3"), "config.yaml.*3 heads do not divide"),
    "unknown field of decode": (edit("beam: 2", "beem: 2"), "config.yaml.*beem"),
    "beam": (edit("beam: 2", "beam: 0"), "config.yaml.*decode.beam"),
    "decode is a list": (edit("decode:", "decode: [1]\nx:"), "config.yaml.*decode"),
    "no tokenizer": (remove("tokenizer.json"), "run has no tokenizer.json"),
    "damaged tokenizer": (write("tokenizer.json", '{"version": "1.0", '), "tokenizer.json is not a tokenizer's file"),
    "another tokenizer": (other_tokenizer, "model.safetensors holds weights of another model"),
    "no weights": (remove("model.safetensors"), "no weights at .*model.safetensors"),
    "weights cut off": (cut_weights, "model.safetensors is not a whole safetensors file"),
    "another model's weights": (other_weights, "model.safetensors holds weights of another model: .*feed_forward"),
}


@pytest.mark.parametrize("damage, words", BAD.values(), ids=BAD)
def test_run_folder_that_does_not_serve(run, damage, words):
    damage(run)
    with pytest.raises((ValueError, TypeError, OSError), match=f"(?s){words}") as caught: Translator.from_run(run)
    assert str(run) in str(caught.value)


# ---- scores ----

REFERENCES = ["Der alte Mann liest ein Buch.", "Sie schläft.", "Wo ist der Hund?", "Ja."]
TRANSLATIONS = ["Der alte Mann liest das Buch.", "Sie schläft.", "", "nein, gar nicht"]


def test_scores_are_sacrebleus():
    found = score(["a", "b", "c", "d"], TRANSLATIONS, REFERENCES)
    assert found.bleu == sacrebleu.corpus_bleu(TRANSLATIONS, [REFERENCES]).score
    assert found.chrf == sacrebleu.corpus_chrf(TRANSLATIONS, [REFERENCES]).score
    assert found.bleu_signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.")
    assert found.chrf_signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.")
    for row, source, translation, reference in zip(found.sentences, "abcd", TRANSLATIONS, REFERENCES):
        assert row == {"source": source, "translation": translation, "reference": reference,
                       "bleu": sacrebleu.sentence_bleu(translation, [reference]).score,
                       "chrf": sacrebleu.sentence_chrf(translation, [reference]).score}
    assert [row["source"] for row in found.best(2)] == ["b", "a"] and found.worst(1)[0]["source"] == "c"
    perfect = score(REFERENCES, REFERENCES, REFERENCES)
    assert perfect.bleu == pytest.approx(100) and perfect.chrf == pytest.approx(100)


@pytest.mark.parametrize("texts", [([], [], []), (["a"], ["b"], ["c", "d"]), (["a", "b"], ["c"], ["d"])])
def test_scores_of_unequal_numbers(texts):
    with pytest.raises(ValueError, match=", ".join(str(len(t)) for t in texts)): score(*texts)


def test_evaluation_comes_back_from_its_file(finished, text, tmp_path):
    translator, pairs = Translator.from_run(finished), load_corpus(test=text / "test")["test"].select(range(5))
    found = evaluate(translator, pairs, beam=1)
    sources, references = pairs["source"][:], pairs["target"][:]
    assert found == score(sources, translator.translate(sources, beam=1), references)
    found.save(tmp_path / "evaluation.json")
    assert Evaluation(**json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))) == found
    score(["ß"], ["Ä"], ["Ö"]).save(tmp_path / "evaluation.json")
    assert "Ä" in (tmp_path / "evaluation.json").read_text(encoding="utf-8")      # for people to read


def test_evaluate_takes_a_dataset(translator):
    pairs = Dataset.from_dict({"source": ["", "The dog sleeps."], "target": ["x", "Der Hund schläft."]})
    found = evaluate(translator, pairs)
    assert found.sentences[0]["translation"] == "" and found.sentences[0]["bleu"] == 0


# ---- models with other switches ----

@pytest.mark.parametrize("changes", [dict(positions="rotary"), dict(positions="relative", attention_scale=1.0),
    dict(normalization="rms", bias=False), dict(activation="silu", gated=True), dict(window=4), dict(output_bias=True),
    dict(experts=3, expert_capacity=0.5)])
def test_a_model_that_fast_decoding_does_not_know(changes, translator):
    "is searched by the plain functions, in its own precision; others are refused with the switch's name"
    tokenizers, name = translator.tokenizers, next(iter(changes))
    model = wild(3, tokenizers.source_size, torch.float32, std=0.2, lean=3.0, tie_embeddings="none", **changes)
    other = Translator(model, tokenizers, DecodeConfig(extra_length=5))
    texts = ["The dog barks.", "She sees the old man and the cat.", "Maria sleeps."] * 50
    found = other.translate(texts)
    ids = tokenizers.encode_source(texts[:3])
    source = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    best = beam_search(model, source, torch.tensor([len(row) for row in ids]), 4, 0.6, 5)
    assert found == tokenizers.decode_target([h[0].ids for h in best]) * 50
    assert other.translate(texts[0], beam=1) is not None
    for precision in "bf16", "int8":
        with pytest.raises(ValueError, match=name): other.translate(texts[0], precision=precision)
    with pytest.raises(ValueError, match=name): FastTransformer(model)


def test_a_banned_word_is_never_written():
    model, (source, lengths) = wild(0, 9), sources(0, [3, 5, 2], 9)
    plain = greedy_search(model, source, lengths, 6)
    most = max((i for row in plain for i in row), key=[i for row in plain for i in row].count)
    model.config.banned_id = most
    assert not any(most in row for row in greedy_search(model, source, lengths, 6))
    for found in beam_search(model, source, lengths, 4, 0.6, 6): assert not any(most in h.ids for h in found)
