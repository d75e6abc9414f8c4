"""Tokenizers: any text there and back, ids on the right side, files that are not what they should be."""
import itertools
import json
import random
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from flash_transformer.data import BOS, EOS, PAD, UNK, EncodedPairs, TokenizerPair, batches

KINDS = "bpe", "word", "char"
SIDES = list(itertools.product(KINDS, [True, False]))


def corpus(n=400, seed=0):
    "English and German of a few dozen words that share little but names and punctuation"
    rng = random.Random(seed)
    names = ["Anna", "Peter", "Maria", "Thomas"]
    pairs = {"see": "sieht", "buy": "kauft", "love": "liebt", "find": "findet", "paint": "malt"}
    things = {"house": "Haus", "tree": "Baum", "bridge": "Brücke", "apple": "Apfel", "window": "Fenster"}
    rows = []
    for _ in range(n):
        name, verb, thing = rng.choice(names), rng.choice(list(pairs)), rng.choice(list(things))
        rows.append((f"{name} can {verb} the {thing}.", f"{name} {pairs[verb]}, ja, \"{things[thing]}\"!"))
    return Dataset.from_dict({"source": [s for s, _ in rows], "target": [t for _, t in rows]})


@pytest.fixture(scope="module")
def pairs(): return corpus()


@pytest.fixture(scope="module")
def trained(pairs): return {(kind, joint): TokenizerPair.train(pairs, kind, 400, joint) for kind, joint in SIDES}


# ---- any text, there and back ----

# all characters but lone surrogates (not text) and those that this Python does not know yet (its NFC may be older)
characters = st.characters(exclude_categories=["Cs", "Cn"])
texts = st.one_of(st.text(characters), st.text(st.sampled_from(" \t\n\r\u2028\xa0ab.</s>1ß\u0301")),
                  st.lists(st.sampled_from(
                      "<pad> <unk> <s> </s> Anna Haus. 👩‍👩‍👧 ▁ Ġ \0".split(" ") + [" "])).map("".join))


@pytest.mark.parametrize("joint", [True, False])
def test_bpe_gives_back_every_text(trained, joint):
    tokenizers = trained["bpe", joint]

    @settings(max_examples=500, deadline=None)
    @given(texts)
    @example("")
    @example(" ")
    @example("  two  spaces  ")
    @example("\tA tab,\na line\r\n")
    @example("</s>")
    @example("<pad><s>Anna</s>")
    @example("e\u0301 is é")
    @example("\u0301 combines with nothing")
    @example("🙂🏳️‍🌈 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff \ufeff\ufffd")
    @example("漢字かな עברית العربية हिन्दी ไทย")
    def check(text):
        for encode, decode in ((tokenizers.encode_source, tokenizers.decode_source),
                               (tokenizers.encode_target, tokenizers.decode_target)):
            ids = encode([text])[0]
            assert decode(ids) == unicodedata.normalize("NFC", text)
            body = [i for i in ids[:-1] if i != BOS] if encode == tokenizers.encode_source else ids[1:-1]
            assert not {PAD, UNK, BOS, EOS} & set(body)
    check()


@pytest.mark.parametrize("kind", ["word", "char"])
def test_word_and_char_give_back_known_text(trained, pairs, kind):
    for joint in True, False:
        tokenizers = trained[kind, joint]
        for side in "source", "target":
            texts = pairs[side][:]
            ids = getattr(tokenizers, f"encode_{side}")(texts)
            assert getattr(tokenizers, f"decode_{side}")(ids) == texts
            assert UNK not in itertools.chain(*ids)


def test_unknown_words_and_characters(trained):
    word, char = trained["word", True], trained["char", True]
    ids = word.encode_source(["Anna can see the elephant."])[0]
    assert ids.count(UNK) == 1 and word.decode_source(ids) == "Anna can see the <unk>."
    ids = char.encode_target(["Anna: ж"])[0]
    assert ids.count(UNK) == 2 and char.decode_target(ids) == "Anna<unk> <unk>"


@pytest.mark.parametrize("kind, joint", SIDES)
@pytest.mark.parametrize("special", ["<pad>", "<unk>", "<s>", "</s>"])
def test_specials_in_a_text_are_text(trained, kind, joint, special):
    "whoever translates a page of HTML must not end the sentence by it"
    tokenizers = trained[kind, joint]
    for text in special, f"Anna {special} Peter", f"Anna{special}":
        source, target = tokenizers.encode_source([text])[0], tokenizers.encode_target([text])[0]
        assert not {PAD, BOS, EOS} & set(source[:-1]) and not {PAD, BOS, EOS} & set(target[1:-1])
        assert source[-1] == EOS and target[0] == BOS and target[-1] == EOS


def test_special_words_are_not_merged_from_a_corpus_full_of_them():
    "a merge that spells </s> would be given the id 3, which ends sentences"
    texts = ["a </s> b <s> c <pad> d <unk> </s></s><s>"] * 50
    data = Dataset.from_dict({"source": texts, "target": texts})
    for kind in KINDS:
        tokenizers = TokenizerPair.train(data, kind, 300)
        assert not {PAD, UNK, BOS, EOS} & set(tokenizers.encode_source(texts[:1])[0][:-1])
        assert tokenizers.decode_source(tokenizers.encode_source(texts[:1])) == texts[:1]


# ---- many texts at once, as arrays ----

def same_arrays(tokenizers, texts, given=None):
    for side, dtype in (("source", np.uint16), ("target", np.uint16)):
        ids, offsets = getattr(tokenizers, f"{side}_arrays")(texts if given is None else given)
        rows = getattr(tokenizers, f"encode_{side}")(texts)
        assert ids.dtype == dtype and offsets.dtype == np.int64
        assert offsets.tolist() == [0, *itertools.accumulate(map(len, rows))]
        assert ids.tolist() == list(itertools.chain(*rows))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.one_of(st.sampled_from(" \t\xa0\u2028.,'aé\u0301\u0308-1<>"),
                                  st.characters(exclude_categories=["Cs"])), max_size=30), max_size=6))
def test_each_word_once_is_each_sentence_whole(trained, texts):
    same_arrays(trained["bpe", True], texts)
    same_arrays(trained["bpe", False], texts)


@pytest.mark.parametrize("kind, joint", SIDES)
def test_arrays_of_every_kind(trained, pairs, kind, joint):
    tokenizers, texts = trained[kind, joint], pairs["target"][:500]
    same_arrays(tokenizers, texts)
    same_arrays(tokenizers, texts[7:20], pa.array(texts)[7:20])
    same_arrays(tokenizers, texts, pa.chunked_array([texts[:3], [], texts[3:]]))
    same_arrays(tokenizers, texts, pa.array(texts, pa.large_string()))
    same_arrays(tokenizers, [])
    same_arrays(tokenizers, ["", " ", "a", ""])
    same_arrays(tokenizers, ["a" * 1000, "b" * 300 + " " * 200, "x " * 500])


def test_a_tokenizer_that_cuts_otherwise_is_taken_at_its_word(trained):
    "what joins words across spaces cannot be had word by word"
    plain = json.loads(trained["bpe", True].source.to_str())
    plain["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "_"}
    other = Tokenizer.from_str(json.dumps(plain))
    same_arrays(TokenizerPair(other, other), ["Anna can see.", "a b c"])


def test_four_bytes_an_id_for_a_large_vocabulary():
    words = [f"w{i}" for i in range(65_600)]
    for n, dtype in (65_532, np.uint16), (65_533, np.int32):
        vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *words[:n]])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        ids, offsets = TokenizerPair(tokenizer, tokenizer).source_arrays([words[n - 1]])
        assert ids.dtype == dtype and ids.tolist() == [n + 3, EOS] and offsets.tolist() == [0, 2]


def test_bad_texts_for_arrays(trained):
    for tokenizers in trained["bpe", True], trained["word", True]:
        with pytest.raises(TypeError, match="list of sentences, not one str"): tokenizers.source_arrays("Anna")
        with pytest.raises(TypeError, match="Text 1 is no str but NoneType"): tokenizers.source_arrays(["Anna", None])
        with pytest.raises(TypeError, match="Text 0 is no str but int"): tokenizers.target_arrays([3])
        with pytest.raises(ValueError, match="Text 1 holds a lone"): tokenizers.target_arrays(["a", "b\ud800"])
    with pytest.raises(TypeError, match="Text 1 is no str but NoneType"):
        trained["bpe", True].source_arrays(pa.array(["a", None]))


# ---- what the pieces are like ----

def test_a_word_is_the_same_at_the_start_and_inside(trained):
    for kind in "bpe", "word":
        start, inside = (trained[kind, True].encode_source([t])[0] for t in ("house.", "the house."))
        assert start == inside[1:]


def test_merges_stay_within_words(pairs):
    "the same sentence 400 times would be one token if merges crossed words"
    same = Dataset.from_dict({"source": ["Anna can see the house."] * 400, "target": ["Anna sieht das Haus."] * 400})
    tokens = TokenizerPair.train(same, "bpe", 1000).source.encode("Anna can see the house.").tokens
    assert tokens == ["ĠAnna", "Ġcan", "Ġsee", "Ġthe", "Ġhouse", "."]


@pytest.mark.parametrize("kind, joint", SIDES)
def test_sizes_special_ids_and_determinism(trained, pairs, kind, joint):
    tokenizers, again = trained[kind, joint], TokenizerPair.train(pairs, kind, 400, joint)
    assert tokenizers.joint is joint and (tokenizers.source is tokenizers.target) is joint
    for side in "source", "target":
        tokenizer = getattr(tokenizers, side)
        vocabulary = tokenizer.get_vocab()
        assert sorted(vocabulary.values()) == list(range(getattr(tokenizers, f"{side}_size")))
        assert len(vocabulary) <= 400
        assert [tokenizer.id_to_token(i) for i in (PAD, UNK, BOS, EOS)] == ["<pad>", "<unk>", "<s>", "</s>"]
        assert tokenizer.to_str() == getattr(again, side).to_str()


def test_vocabulary_sizes_are_kept_to(pairs):
    assert TokenizerPair.train(pairs, "bpe", 260).source_size == 260        # bytes alone
    assert TokenizerPair.train(pairs, "bpe", 300).source_size == 300
    assert TokenizerPair.train(pairs, "word", 20).target_size == 20
    assert TokenizerPair.train(pairs, "char", 5).target_size == 5


# ---- the classic bug: the wrong side's ids ----

@pytest.mark.parametrize("kind", KINDS)
def test_each_part_of_a_batch_has_its_own_sides_ids(pairs, kind):
    """
    With two vocabularies, the encoder input carries source ids; decoder input and labels carry target ids.

    The sides are shown apart: every id is looked up in the very side's vocabulary, and the texts that come back
    are the corpus's; read with the other side's vocabulary they are not.
    """
    tokenizers = TokenizerPair.train(pairs, kind, 400, joint=False)
    assert tokenizers.source.get_vocab() != tokenizers.target.get_vocab()
    corpus = sorted(zip(pairs["source"], pairs["target"]))
    seen = []
    for batch in batches(EncodedPairs.encode(pairs, tokenizers), tokens_per_batch=600, seed=1):
        assert tokenizers.decode_source(batch.source) != tokenizers.decode_target(batch.source)
        assert tokenizers.decode_target(batch.labels) != tokenizers.decode_source(batch.labels)
        assert tokenizers.decode_target(batch.target) == tokenizers.decode_target(batch.labels)
        seen += zip(tokenizers.decode_source(batch.source), tokenizers.decode_target(batch.labels))
        for ids, lengths, tokenizer in ((batch.source, batch.source_lengths, tokenizers.source),
                                        (batch.target, batch.target_lengths, tokenizers.target),
                                        (batch.labels, batch.target_lengths, tokenizers.target)):
            pad = tokenizer.token_to_id("<pad>")
            assert ids.max() < tokenizer.get_vocab_size()
            assert torch.equal(ids == pad, torch.arange(ids.shape[1]) >= lengths[:, None])
        last = batch.target_lengths[:, None] - 1
        assert (batch.labels.gather(1, last) == tokenizers.target.token_to_id("</s>")).all()
        assert (batch.target[:, 0] == tokenizers.target.token_to_id("<s>")).all()
        last = batch.source_lengths[:, None] - 1
        assert (batch.source.gather(1, last) == tokenizers.source.token_to_id("</s>")).all()
    assert sorted(seen) == corpus


# ---- decoding's shapes ----

def test_decode_takes_lists_tensors_and_rows(trained):
    tokenizers = trained["bpe", True]
    texts = ["Anna can see.", "The house"]
    rows = tokenizers.encode_target(texts)
    assert tokenizers.decode_target(rows) == texts and tokenizers.decode_target(rows[0]) == texts[0]
    padded = torch.tensor([row + [PAD] * (20 - len(row)) for row in rows])
    assert tokenizers.decode_target(padded) == texts and tokenizers.decode_target(padded[1]) == texts[1]
    assert tokenizers.decode_target(padded.numpy()) == texts and tokenizers.decode_target(list(padded)) == texts
    assert tokenizers.decode_target([]) == "" and tokenizers.decode_target([[], [EOS]]) == ["", ""]
    assert tokenizers.encode_source([]) == [] and tokenizers.encode_target([""]) == [[BOS, EOS]]


# ---- files ----

@pytest.mark.parametrize("kind, joint", SIDES)
def test_saved_and_loaded_the_same(trained, tmp_path, kind, joint):
    tokenizers = trained[kind, joint]
    tokenizers.save(tmp_path / "new" / "folder")
    loaded = TokenizerPair.load(tmp_path / "new" / "folder")
    names = sorted(p.name for p in (tmp_path / "new" / "folder").iterdir())
    assert names == (["tokenizer.json"] if joint else ["source.json", "target.json"])
    assert loaded.joint is joint
    assert loaded.source.to_str() == tokenizers.source.to_str() and loaded.target.to_str() == tokenizers.target.to_str()
    text = ["Anna can see </s> the Brücke 🙂 \t x"]
    assert loaded.encode_source(text) == tokenizers.encode_source(text)
    assert loaded.encode_target(text) == tokenizers.encode_target(text)


def test_saving_leaves_no_tokenizer_of_before(trained, tmp_path):
    for joint in True, False, True:
        trained["word", joint].save(tmp_path)
        assert TokenizerPair.load(tmp_path).joint is joint


def test_missing_files(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json, nor source.json and target.json"):
        TokenizerPair.load(tmp_path / "nowhere")
    trained["bpe", False].save(tmp_path)
    (tmp_path / "target.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no target.json"):
        TokenizerPair.load(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda b: b"", lambda b: b[:len(b) // 2], lambda b: b"{}", lambda b: b"\xff\xfe" + b,
    lambda b: b"<html>404</html>", lambda b: b.replace(b'"BPE"', b'"CPE"')])
def test_damaged_files(trained, tmp_path, damage):
    trained["bpe", True].save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer's file"):
        TokenizerPair.load(tmp_path)


def test_foreign_files(tmp_path):
    Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: id 0 must be <pad>, but is \[UNK\]"):
        TokenizerPair.load(tmp_path)


def test_the_file_itself_does_not_parse_specials(trained, tmp_path):
    "whatever program reads it"
    trained["bpe", True].save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"] == []
    assert EOS not in Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a </s> b").ids


# ---- bad input ----

@pytest.mark.parametrize("arguments, message", [
    (dict(kind="sentencepiece"), "no kind of tokenizer 'sentencepiece'. There are: bpe, word, char"),
    (dict(kind="bpe", vocab_size=259), "vocab_size=259 is too small: bpe needs 260 at the least .256 bytes"),
    (dict(kind="word", vocab_size=4), "vocab_size=4 is too small: word needs 5"),
])
def test_bad_arguments(pairs, arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenizerPair.train(pairs, **arguments)


def test_no_pairs():
    with pytest.raises(ValueError, match="no pairs to train a tokenizer on"):
        TokenizerPair.train(Dataset.from_dict({"source": [], "target": []}))


def test_bad_texts(trained):
    tokenizers = trained["bpe", True]
    with pytest.raises(TypeError, match="list of sentences, not one str"):
        tokenizers.encode_source("Anna")
    with pytest.raises(TypeError, match="Text 1 is no str but NoneType"):
        tokenizers.encode_source(["Anna", None])
    with pytest.raises(ValueError, match="Text 1 holds a lone surrogate"):
        tokenizers.encode_target(["a", "b\ud800"])


def test_a_line_of_100_000_characters(trained):
    for text in "a" * 100_000, "ab, " * 25_000, "漢" * 100_000, " " * 100_000:
        ids = trained["bpe", True].encode_source([text])[0]
        assert trained["bpe", True].decode_source(ids) == text


def test_training_survives_a_word_of_100_000_letters():
    "pieces of words are bounded: the trainer's time would grow with the square of the longest"
    texts = ["a" * 100_000, " " * 100_000, "-" * 100_000, "1" * 100_000]
    tokenizers = TokenizerPair.train(Dataset.from_dict({"source": texts, "target": texts}), "bpe", 300)
    assert tokenizers.decode_source(tokenizers.encode_source(texts)) == texts
    assert max(map(len, tokenizers.source.get_vocab())) <= 65
