"Plain text: nothing is lost between file and windows, and the trainer learns from it as from pairs."
import gzip
import json
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from flash_transformer.data import (
    MASK,
    EncodedText,
    MaskedText,
    encode_text,
    load_text,
    text_pieces,
    text_tokenizer,
    toy_corpus,
)
from flash_transformer.model import CausalLM, TransformerConfig
from flash_transformer.training import TrainConfig, Trainer, training_flops, validation_loss

TEXT = "\n".join(toy_corpus(600, 1, 1)["train"]["source"])


@given(st.text(), st.integers(1, 30))
def test_pieces_are_the_text(text, size): assert " ".join(text_pieces(text, size)) == text


@settings(deadline=None, max_examples=50)
@given(st.text(min_size=1), st.sampled_from(["bpe", "char"]))
def test_there_and_back(text, kind):
    text = unicodedata.normalize("NFC", text)       # what our tokenizers do
    tokenizers = text_tokenizer(TEXT + text, kind, 600)
    assert tokenizers.decode_source(encode_text(text, tokenizers).tolist()) == text


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8") as file: file.write(TEXT[:500])
    train, validation = load_text(tmp_path / "a.txt").values()
    assert train + validation == TEXT and len(train) == len(TEXT) * 9 // 10
    both = {"train": TEXT, "validation": TEXT[:500]}
    assert load_text(tmp_path / "a.txt", tmp_path / "b.txt.gz") == both
    assert load_text(tmp_path / "a.txt", tmp_path / "b.txt.gz", tmp_path / "a.txt") == both | {"test": TEXT}
    with pytest.raises(ValueError, match="none to learn from"): load_text(validation=tmp_path / "a.txt")
    with pytest.raises(ValueError, match="path replaces the hub"): load_text(tmp_path / "a.txt", path=tmp_path)
    with pytest.raises(ValueError, match="--data.train"): load_text()
    with pytest.raises(FileNotFoundError, match="c.txt"): load_text(tmp_path / "c.txt")
    (tmp_path / "d.txt").write_text("short")
    with pytest.raises(ValueError, match="too few"): load_text(tmp_path / "d.txt")
    (tmp_path / "e.txt").write_bytes(b"good line\n" * 5 + b"\xff\n")
    with pytest.raises(ValueError, match="e.txt, line 6"): load_text(tmp_path / "e.txt")


@pytest.mark.parametrize("tokens, length", [(100, 7), (14, 7), (20, 7), (21, 7), (1000, 64)])
def test_windows(tokens, length):
    "Whatever the epoch, each window is a piece of the text and its labels the next tokens; one follows the other"
    ids = np.arange(4, 4 + tokens, dtype=np.uint16)
    text = EncodedText(ids, length, seed=3)
    for epoch in range(5):
        window = text.window(epoch, 0)
        assert window.window(epoch, 1) is None and len(window) == len(text) == (tokens - length) // length
        batch = window.batch(np.arange(len(window)))
        assert batch.source.shape == (len(window), 0) and (batch.labels - batch.target == 1).all()
        assert batch.target.flatten().diff().eq(1).all() and batch.labels.max() <= 3 + tokens
        assert torch.equal(batch.target, text.window(epoch, 0).batch(np.arange(len(window))).target)
    firsts = {int(text.window(epoch, 0).batch([0]).target[0, 0]) for epoch in range(10 * length)}
    assert firsts == set(range(4, 4 + length))                  # every place is a beginning, sooner or later


def test_too_short():
    with pytest.raises(ValueError, match="13 tokens"): EncodedText(np.arange(13, dtype=np.uint16), 7)


@pytest.mark.parametrize("damage", [lambda f: (f / "ids.npy").write_bytes((f / "ids.npy").read_bytes()[:50]),
    lambda f: (f / "text.json").write_text("{"), lambda f: (f / "text.json").write_text('{"width": 3}'),
    lambda f: (f / "text.json").write_text('{"length": 5000, "seed": 0}')])
def test_damaged(damage, tmp_path):
    EncodedText(np.arange(500, dtype=np.uint16), 16).save(tmp_path)
    assert len(EncodedText.open(tmp_path)) == 30
    damage(tmp_path)
    with pytest.raises(ValueError, match="damaged"): EncodedText.open(tmp_path)
    (tmp_path / "text.json").unlink()
    with pytest.raises((OSError, ValueError)): EncodedText.open(tmp_path)


# ---- gaps ----

@settings(deadline=None, max_examples=60)
@given(st.integers(20, 400), st.integers(3, 12), st.floats(0.02, 0.9), st.integers(0, 5), st.integers(0, 3))
def test_gaps(tokens, length, share, epoch, seed):
    "With the gaps filled in, the windows of an epoch are the text, each between its marks; of each as many are chosen"
    if tokens < 2 * (length - 2): tokens = 2 * length
    ids = np.arange(5, 5 + tokens, dtype=np.uint16)
    text = MaskedText(ids, length, 4, 5 + tokens, share, seed).window(epoch, 0)
    batch = text.batch(np.arange(len(text)))
    gaps, n = batch.labels != 0, max(1, round(share * (length - 2)))
    assert batch.source.shape == batch.labels.shape == (len(text), length) and batch.target.shape == (len(text), 0)
    assert (gaps.sum(1) == n).all() and batch.tokens == n * len(text) and (batch.source_lengths == length).all()
    filled = torch.where(gaps, batch.labels, batch.source)
    assert (filled[:, 0] == 2).all() and (filled[:, -1] == 3).all() and not gaps[:, [0, -1]].any()
    assert filled[:, 1:-1].flatten().diff().eq(1).all() and batch.source[:, 1:-1].min() >= 4
    assert batch.source.max() < 5 + tokens and len(text) == (tokens - length + 2) // (length - 2)


def test_four_fifths_are_masked():
    ids = np.full(60_000, 7, np.uint16)
    batch = (text := MaskedText(ids, 102, 4, 10_000)).batch(np.arange(len(text)))
    words = batch.source[batch.labels != 0]
    n = len(words)
    for share, found in ((.8, words == 4), (.1, words == 7), (.1, (words != 4) & (words != 7))):
        assert abs(float(found.float().mean()) - share) < 4 * (share * (1 - share) / n) ** 0.5
    assert n == 15 * len(text) and (words[words != 4] > 4).all()


def test_gaps_are_those_of_seed_and_epoch_and_window():
    "in whatever batch"
    ids = np.arange(5, 905, dtype=np.uint16)
    def source(seed, epoch, rows): return MaskedText(ids, 32, 4, 905, seed=seed).window(epoch, 0).batch(rows).source
    assert torch.equal(source(1, 2, [3, 4]), source(1, 2, [9, 4, 3, 0])[[2, 1]])
    places = {tuple((source(seed, epoch, [row]) == 4)[0].tolist()) for seed, epoch, row in
              ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))}
    assert len(places) == 4


def test_gaps_are_saved_and_mapped(tmp_path):
    text = MaskedText(np.arange(5, 905, dtype=np.uint16), 32, 4, 905, 0.2, 6)
    text.save(tmp_path)
    again = MaskedText.open(tmp_path)
    assert again.settings == text.settings and torch.equal(again.batch([1]).source, text.batch([1]).source)
    (tmp_path / "masked.json").write_text('{"length": 32}')
    with pytest.raises(ValueError, match="damaged"): MaskedText.open(tmp_path)


@pytest.mark.parametrize("wrong", [dict(share=0.0), dict(share=1.0), dict(length=2), dict(length=600)])
def test_gaps_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="data.ma"):
        MaskedText(np.arange(5, 905, dtype=np.uint16), **dict(length=32, mask_id=4, vocab_size=905) | wrong)


def test_the_mask_is_no_text():
    "A text may say <mask>: it is spelled, and comes back"
    tokenizers = text_tokenizer(TEXT, "bpe", 400, mask=True)
    assert tokenizers.mask_id == 4 and tokenizers.source.id_to_token(4) == MASK
    ids = tokenizers.encode_source(["the <mask> sleeps"])[0]
    assert 4 not in ids and tokenizers.decode_source(ids) == "the <mask> sleeps"
    assert text_tokenizer(TEXT, "bpe", 400).mask_id is None
    with pytest.raises(ValueError, match="261"): text_tokenizer(TEXT, "bpe", 260, mask=True)


@given(st.text())
def test_inside_a_text_no_space_is_put_before(text):
    text = unicodedata.normalize("NFC", text)
    tokenizers = text_tokenizer_of_bytes()
    assert tokenizers.decode_source(tokenizers.encode_inner("." + text)) == "." + text
    if text: assert tokenizers.encode_inner(" " + text) == tokenizers.encode_source([text])[0][:-1]


def text_tokenizer_of_bytes(kept=[]):                      # noqa: B006 - made once
    if not kept: kept.append(text_tokenizer(TEXT, "bpe", 400))
    return kept[0]


# ---- trained ----

def parts(positions="rotary"):
    tokenizers = text_tokenizer(TEXT, "char", 200)
    ids = encode_text(TEXT, tokenizers)
    n = len(ids) * 9 // 10
    torch.manual_seed(0)
    model = CausalLM(TransformerConfig(d_model=32, d_ff=64, heads=2, encoder_layers=0, decoder_layers=1, norm="pre",
        positions=positions, max_length=32, dropout=0.1, target_vocab_size=tokenizers.source_size))
    return model, EncodedText(ids[:n], 32), EncodedText(ids[n:], 32)


def config(**changes):
    return TrainConfig(**dict(max_steps=40, tokens_per_batch=512, learning_rate=1e-2, warmup_steps=10, log_every=10,
        label_smoothing=0.0, checkpoint_every=20, precision="float32") | changes)


def test_learns_and_goes_on_where_it_was(tmp_path):
    "A run that stopped and was resumed ends in the very weights of one that was not disturbed, into a second epoch"
    model, train, validation = parts()
    plain = Trainer(model, train, validation, config(max_epochs=2, max_steps=None), tmp_path / "whole").fit()
    steps = json.loads((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert plain < 2.7 < validation_loss(parts()[0], validation, 512, torch.device("cpu"))
    stop = steps // 2 + 7                                    # in the second epoch
    Trainer(parts()[0], train, validation, config(max_steps=stop), tmp_path / "two").fit()
    Trainer(parts()[0], train, validation, config(max_epochs=2, max_steps=None), tmp_path / "two").fit(resume=True)
    one, two = (load_file(sorted((tmp_path / name / "checkpoints").iterdir())[-1] / "model.safetensors")
                for name in ("whole", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("packing", [None, True, False])
def test_rows_are_windows(packing, tmp_path):
    "Packed or not: a window fills its row"
    model, train, validation = parts("learned")               # 32 places: a longer row would not do
    Trainer(model, train, validation, config(max_steps=2, packing=packing), tmp_path / "run").fit()
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert line["tokens"] == 2 * 512


def test_validation_loss_is_the_mean_over_all_labels():
    model, _, validation = parts()
    batch = validation.batch(np.arange(len(validation)))
    with torch.no_grad(): logits = model.eval()(batch.target)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert abs(validation_loss(model, validation, 512, torch.device("cpu")) - expected) < 1e-5


def test_flops_of_a_text_have_no_source():
    model, train, _ = parts()
    rows = np.arange(4)
    c, counted = model.config, training_flops(model.config, train.source_lengths[rows], train.target_lengths[rows])
    block = 2 * (4 * 32 * 32 + 2 * 32 * 64) * 32 + 4 * 32 * 32 * 32
    assert counted == 3 * 4 * (block + 2 * 32 * 32 * c.target_vocab_size)
