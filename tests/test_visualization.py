"""Pictures: drawn without a display from a tiny untrained model, words from pieces, damaged and unfitting input."""
import json

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from flash_transformer.data import TokenizerPair, toy_corpus
from flash_transformer.model import Transformer, TransformerConfig, save_weights
from flash_transformer.translation import DecodeConfig, Translator
from flash_transformer.visualization import (
    alignment_agreement,
    choose_view,
    plot_attention,
    plot_embeddings,
    plot_heads,
    plot_learning_curves,
    plot_run,
    principal_components,
    read_metrics,
    toy_words,
    word_attention,
    words_of,
)

SHAPE = dict(d_model=16, d_ff=32, heads=2, encoder_layers=1, decoder_layers=3, tie_embeddings="none")
KINDS = "bpe", "word", "char"


@pytest.fixture(scope="module")
def corpus(): return toy_corpus(300, 10, 20)


def make(corpus, kind, joint=False):
    tokenizers = TokenizerPair.train(corpus["train"], kind, 400, joint)
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SHAPE, source_vocab_size=tokenizers.source_size,
                                          target_vocab_size=tokenizers.target_size))
    return Translator(model, tokenizers, DecodeConfig(beam=1, extra_length=5))


@pytest.fixture(scope="module")
def translators(corpus): return {kind: make(corpus, kind) for kind in KINDS}


@pytest.fixture
def run(tmp_path, translators):
    "A run folder as training leaves it, of a corpus that is not there"
    translator = translators["bpe"]
    translator.tokenizers.save(tmp_path)
    save_weights(translator.model, tmp_path / "model.safetensors")
    recipe = {"data": {"corpus": "files", "train": "gone"}, "model": SHAPE, "decode": {"beam": 1, "extra_length": 5}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 4):
            file.write(json.dumps(dict(step=step, loss=3 / step, plain_loss=2 / step, learning_rate=step * 1e-3,
                                       tokens_per_second=1000 + step)) + "\n")
        file.write(json.dumps(dict(step=3, validation_loss=0.5, samples=["Ja."])) + "\n")
    return tmp_path


# ---- curves ----

def test_the_curves_are_the_numbers_in_the_file(run):
    left, middle, right = plot_learning_curves(run).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert drawn["training, smoothed labels"] == [[1, 3], [2, 1.5], [3, 1]]
    assert drawn["training"] == [[1, 2], [2, 1], [3, 2 / 3]]
    assert drawn["validation"] == drawn["lowest: 0.500"] == [[3, 0.5]]
    assert middle.lines[0].get_ydata().tolist() == [1e-3, 2e-3, 3e-3]
    assert right.lines[0].get_ydata().tolist() == [1001, 1002, 1003]
    assert read_metrics(run / "metrics.jsonl") == read_metrics(run)


def test_a_run_without_validation_has_curves(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    plot_learning_curves(tmp_path / "m.jsonl").savefig(tmp_path / "m.png")


@pytest.mark.parametrize("content, culprit", [
    (b'{"step": 1, "loss": 3.0}\n{"step": 2, "lo', "line 2"), (b"\xff\xfe\n", "line 1"), (b"\0" * 10, "line 1"),
    (b'{"loss": 1.0}\n', "line 1"), (b"[1, 2]\n", "line 1"), (b"7\n", "line 1"), (b'{"step": 1}\n\n', "line 2"),
    (b'{"step": 1, "loss": "low"}\n', "line 1"), (b'{"step": null}\n', "line 1"), (b"", "empty")])
def test_damaged_metrics_are_named(tmp_path, content, culprit):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=culprit) as error: plot_learning_curves(tmp_path)
    assert "metrics.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_missing_metrics(tmp_path):
    for path in tmp_path, tmp_path / "metrics.jsonl":
        with pytest.raises(FileNotFoundError, match="there are no metrics"): plot_learning_curves(path)


# ---- words ----

texts = st.one_of(st.text(st.characters(exclude_categories=["Cs", "Cn", "Cc"]), max_size=60),
                  st.text(st.sampled_from(" \t\nabß,.\u00a0\u0301Äé</s>👩\u200d"), max_size=40))


@pytest.mark.parametrize("kind", KINDS)
def test_every_piece_is_of_a_word_and_every_word_has_one(translators, kind):
    tokenizers = translators[kind].tokenizers

    @settings(max_examples=300, deadline=None)
    @given(texts)
    def check(text):
        words, owner = words_of(tokenizers.source, text)
        assert words == [*text.split(), "</s>"]
        assert len(owner) == len(tokenizers.encode_source([text])[0])
        assert owner == sorted(owner) and owner[-1] == len(words) - 1 and set(owner) == set(range(len(words)))
    check()


def test_pieces_spell_their_word(translators, corpus):
    tokenizer = translators["bpe"].tokenizers.target
    for text in corpus["test"]["target"]:
        words, owner = words_of(tokenizer, text)
        ids = tokenizer.encode(text).ids
        for i, word in enumerate(words[:-1]): assert tokenizer.decode([t for t, k in zip(ids, owner) if k == i]) == word


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_words_sum_to_one(translators, corpus, kind):
    for pair in corpus["test"].select(range(5)):
        for target in pair["target"], None, "":
            read, written, w = word_attention(translators[kind], pair["source"], target)
            assert w.shape == (3, 2, len(written), len(read))
            torch.testing.assert_close(w.sum(-1), torch.ones(w.shape[:3]))
    for source in "", "  ", " two  spaces ", "🙂 ünknown\twörds":
        w = word_attention(translators[kind], source, " x ")[2]
        torch.testing.assert_close(w.sum(-1), torch.ones(w.shape[:3]))


def test_words_that_are_tokens_keep_their_weights(translators):
    source, target = "the old man sees the dog", "der alte Mann sieht den Hund"
    tokens = translators["word"].attention(source, target)[2]
    assert torch.equal(word_attention(translators["word"], source, target)[2], tokens)


def test_too_long_to_draw(translators):
    with pytest.raises(ValueError, match="at most 300"): word_attention(translators["word"], "dog " * 400, "Hund")
    with pytest.raises(ValueError, match="at most 300"): word_attention(translators["char"], "dog", "x" * 400)


# ---- maps ----

def test_maps_hold_weights_words_and_truth():
    weights = np.array([[0.25, 0.75], [1, 0], [0.5, 0.5]])
    ax, bar = plot_attention(["$a", "b$"], ["x" * 50, "y_{", "</s>"], weights, [[0, 0], [1, 0]], "a $ title $").axes
    assert np.array_equal(ax.images[0].get_array(), weights) and ax.images[0].get_clim() == (0, 1)
    assert sorted(patch.get_xy() for patch in ax.patches) == [(-0.5, -0.5), (0.5, -0.5)]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["$a", "b$"]
    assert [len(label.get_text()) for label in ax.get_yticklabels()] == [20, 3, 4]
    ax.figure.canvas.draw()                   # a dollar begins no formula


def test_maps_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(1, 2\), not \(2, 1\)"): plot_attention(["a", "b"], ["c"], np.ones((2, 1)))
    for link in [2, 0], [0, 1], [-1, 0]:
        with pytest.raises(ValueError, match="alignment"): plot_attention(["a", "b"], ["c"], np.ones((1, 2)), [link])


def test_heads_are_drawn_in_their_places():
    weights = torch.rand(3, 2, 4, 5)
    axes = plot_heads(list("abcde"), list("wxyz"), weights).axes
    for i, (layer, head) in enumerate((layer, head) for layer in range(3) for head in range(2)):
        assert axes[i].get_title() == f"layer {layer + 1}, head {head + 1}"
        assert np.array_equal(axes[i].images[0].get_array(), weights[layer, head])


# ---- agreement ----

class Oracle:
    "Looks where it is told, in one of two layers and two heads; elsewhere at </s>"
    def __init__(self, tokenizers, pairs, layer, head):
        self.tokenizers, self.pairs, self.layer, self.head = tokenizers, pairs, layer, head

    def attention(self, source, target):
        pair = next(p for p in self.pairs if p["source"] == source)
        read, written = len(source.split()) + 1, len(target.split()) + 1
        weights = torch.zeros(2, 2, written, read)
        weights[..., -1] = 1
        for s, t in pair["alignment"]: weights[self.layer, self.head, t] = torch.eye(read)[s]
        return None, None, weights


def test_agreement_of_one_who_knows():
    rows = [("a b c", "x y", [[0, 1], [2, 0], [1, 0]]), ("d e", "v w u", [[1, 1], [0, 2]])]
    pairs = Dataset.from_list([dict(source=s, target=t, alignment=a) for s, t, a in rows])
    oracle = Oracle(TokenizerPair.train(pairs, "word", 50, False), pairs, 1, 0)
    agreement = alignment_agreement(oracle, pairs)
    assert agreement.tolist()[0] == [0, 0, 0] and agreement[1, :2].tolist() == [1, 0]
    assert choose_view(agreement, 2, 2) == (1, 0, "layer 2, head 1")
    oracle.pairs = pairs.map(lambda p: {"alignment": [[s, t] for s, t in p["alignment"] if [s, t] != [0, 1]] + (
        [[1, 1]] if p["source"] == "a b c" else [])})       # now one of its four aligned words is misled
    assert alignment_agreement(oracle, pairs)[1, 0] == 0.75
    assert alignment_agreement(oracle, pairs, n=1)[1, 0] == 0.5


def test_agreement_needs_alignments(translators, corpus):
    with pytest.raises(ValueError, match="only: source, target"):
        alignment_agreement(translators["word"], corpus["test"].select_columns(["source", "target"]))
    empty = Dataset.from_list([dict(source="a", target="b", alignment=[])])
    with pytest.raises(ValueError, match="no word"): alignment_agreement(translators["word"], empty)


def test_view_without_truth():
    assert choose_view(None, 6, 8) == (4, 8, "layer 5, mean of heads")
    assert choose_view(None, 1, 4)[0] == 0


# ---- embeddings ----

def test_components_against_the_covariance():
    x = torch.randn(40, 7, dtype=torch.float64) * torch.arange(1, 8)
    xy, shares = principal_components(x, 3)
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    theirs = (x - x.mean(0)) @ vectors.flip(1)[:, :3]
    torch.testing.assert_close(xy, theirs * (xy * theirs).sum(0).sign(), rtol=0, atol=1e-10)
    torch.testing.assert_close(shares, values.flip(0)[:3] / values.sum(), rtol=0, atol=1e-12)
    assert (xy.gather(0, xy.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("joint", [True, False])
def test_frequent_words_are_drawn(corpus, kind, joint):
    fig = plot_embeddings(make(corpus, kind, joint))
    for ax in fig.axes[:2]: assert len(ax.texts) >= 3 and all(text.get_text() for text in ax.texts)
    if kind != "char" and not joint: assert "the" in [text.get_text() for text in fig.axes[0].texts]


def test_words_that_are_asked_for(translators):
    kinds = {"Hund": "noun", "geht": "verb", "Katze": "noun"}
    fig = plot_embeddings(translators["bpe"], ["dog", "cat", "house", "$x$"], kinds)
    assert [text.get_text() for text in fig.axes[0].texts] == ["dog", "cat", "house", "$x$"]
    assert [text.get_text() for text in fig.axes[1].get_legend().get_texts()] == ["noun", "verb"]
    with pytest.raises(ValueError, match="'zebra' is not in the vocabulary"):
        plot_embeddings(translators["word"], ["the", "zebra", "and"])
    with pytest.raises(ValueError, match="2 target words"): plot_embeddings(translators["word"], None, ["der", "die"])


def test_toy_words_are_words_of_the_corpus():
    corpus = toy_corpus(5000, 0, 0)["train"]
    for side in "source", "target":
        seen = {word.strip(".,?") for text in corpus[side] for word in text.split()}
        assert not set(toy_words(side)) - seen
    assert toy_words("target")["Hund"] == "animal" and toy_words("source")["garden"] == "place"


# ---- a whole run ----

def names(paths): return [path.name for path in paths]


ALL = ["learning_curves.png", "attention.png", "heads.png", "embeddings.png"]
WITH_MORE = [*ALL[:3], "attention_2.png", "attention_3.png", ALL[3]]


def test_a_run_of_text_that_is_not_there(run):
    paths = plot_run(run)
    assert names(paths) == ALL and all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert names(plot_run(run, ["A dog.", "", "The cat sleeps."])) == WITH_MORE
    assert names(plot_run(run, "A dog.")) == ALL
    (run / "metrics.jsonl").unlink()
    assert names(plot_run(run)) == ALL[1:]


def test_a_run_that_was_evaluated(run, monkeypatch):
    drawn = []
    monkeypatch.setattr("flash_transformer.visualization.plot_attention",
                        lambda read, written, *rest: drawn.append((read[:-1], written[:-1])) or Figure())
    sentences = [dict(source=s, translation=t) for s, t in
                 [("short", "kurz"), ("one two three four five", "a b"), ("six seven eight nine ten", "")]]
    (run / "evaluation.json").write_text(json.dumps({"bleu": 1.0, "sentences": sentences}))
    plot_run(run)
    assert drawn == [("one two three four five".split(), ["a", "b"]), ("six seven eight nine ten".split(), [])]
    for damaged in "{", "[]", '{"sentences": [{}]}', '{"bleu": 1}':
        (run / "evaluation.json").write_text(damaged)
        with pytest.raises(ValueError, match="evaluation.json is damaged"): plot_run(run)


def test_a_run_of_the_toy_corpus(run, monkeypatch):
    recipe = yaml.safe_load((run / "config.yaml").read_text()) | {"data": {"corpus": "toy"}}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    small = toy_corpus(50, 5, 30)
    monkeypatch.setattr("flash_transformer.visualization.corpus_of", lambda config: small)
    assert names(plot_run(run)) == WITH_MORE


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"): plot_run(tmp_path)
    assert not (tmp_path / "plots").exists()


def test_no_figure_is_left_in_pyplot(run):
    import matplotlib.pyplot as plt
    plot_run(run)
    assert not plt.get_fignums()
