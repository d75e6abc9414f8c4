"Preparing once: what lies in the folder is taken only if it is whole and of the same settings"
import json
from string import ascii_letters

import numpy as np
import pytest

from flash_transformer.data import DataConfig, EncodedPairs, Prepared, TokenizerPair, corpus_of, prepare


@pytest.fixture
def config(tmp_path):
    for split, n in ("train", 40), ("val", 5):
        for language, word in ("en", "dog"), ("de", "Hund"):
            lines = [f"{i} {word if i % 4 else ascii_letters}\n" for i in range(n)]    # every fourth is long
            (tmp_path / f"{split}.{language}").write_text("".join(lines))
    return DataConfig(train=f"{tmp_path}/train", validation=f"{tmp_path}/val", vocab_size=280, max_length=20)


def same(one, other):
    for a, b in (one.train, other.train), (one.validation, other.validation):
        assert a.dropped == b.dropped and type(b.dropped) is int
        for name in ("source", "source_offsets", "source_lengths", "target", "target_offsets", "target_lengths"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype and np.array_equal(x, y)
    assert one.tokenizers.source.to_str() == other.tokenizers.source.to_str()


def test_saved_and_taken_again(config, tmp_path, monkeypatch):
    first = prepare(config, tmp_path / "data")
    assert first.train.dropped == 10 and len(first.train) == 30
    assert len(first.validation) == 5 and first.validation.dropped == 0
    first.save(tmp_path / "data", config)
    monkeypatch.setattr(TokenizerPair, "train", None)     # not to be called again
    monkeypatch.setattr(EncodedPairs, "encode", None)
    same(first, prepare(config, tmp_path / "data"))


def test_other_settings_are_prepared_anew(config, tmp_path):
    prepare(config).save(tmp_path / "data", config)
    other = DataConfig(**vars(config) | {"vocab_size": 262})
    assert prepare(other, tmp_path / "data").tokenizers.source_size == 262


def test_tokenizers_given_are_kept(config):
    given = TokenizerPair.train(corpus_of(config)["train"], "char", 100)
    assert prepare(config, tokenizers=given).tokenizers is given


@pytest.mark.parametrize("content", ["", '{"corpus": "to', "[]", "null"])
def test_broken_settings_are_no_settings(config, tmp_path, content):
    first = prepare(config)
    first.save(tmp_path / "data", config)
    (tmp_path / "data/data.json").write_text(content)
    (tmp_path / "data/train/source.npy").write_bytes(b"")
    same(first, prepare(config, tmp_path / "data"))


def test_overwriting_that_breaks_off_leaves_nothing_that_counts(config, tmp_path, monkeypatch):
    first = prepare(config)
    first.save(tmp_path / "data", config)

    def full(*_): raise OSError("no space left")

    monkeypatch.setattr(EncodedPairs, "save", full)
    other = DataConfig(**vars(config) | {"vocab_size": 262})
    with pytest.raises(OSError, match="no space"):
        prepare(other).save(tmp_path / "data", other)
    same(first, prepare(config, tmp_path / "data"))       # by the settings of before, but not from the folder


@pytest.mark.parametrize("name, content", [
    ("train/source.npy", b""), ("train/target_offsets.npy", b"x" * 100), ("validation/target.npy", None),
    ("tokenizer.json", b"{}"), ("tokenizer.json", None)])
def test_damaged_afterwards(config, tmp_path, name, content):
    prepare(config).save(tmp_path / "data", config)
    path = tmp_path / "data" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)) as told:
        Prepared.load(tmp_path / "data")
    assert "\n" not in str(told.value)


def test_both_splits_are_needed(config):
    with pytest.raises(ValueError, match="needs a validation split.*--data.validation"):
        prepare(DataConfig(**vars(config) | {"validation": None}))


def test_the_settings_are_plain_json(config, tmp_path):
    prepare(config).save(tmp_path / "data", config)
    assert DataConfig(**json.loads((tmp_path / "data/data.json").read_text())) == config
