"""Batches: nothing lost, nothing doubled, nothing over the budget, the same again for the same seed and epoch."""
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_transformer.data import (
    BOS,
    EOS,
    PAD,
    EncodedPairs,
    TokenizerPair,
    batches,
    encode_texts,
    join_pairs,
    load_corpus,
    padding_waste,
    plan_batches,
)
from flash_transformer.data.tokenizers import as_arrays


class Spelled:
    "A tokenizer pair whose ids are plain to see: a letter's code on the source side, 1000 more on the target side"
    def encode_source(self, texts): return [[ord(c) for c in str(text)] + [EOS] for text in texts]
    def encode_target(self, texts): return [[BOS] + [1000 + ord(c) for c in str(text)] + [EOS] for text in texts]
    def source_arrays(self, texts): return as_arrays(self.encode_source(texts), np.uint16)
    def target_arrays(self, texts): return as_arrays(self.encode_target(texts), np.uint16)


def dataset(n, seed=0, longest=30):
    rng = random.Random(seed)
    def text(): return "".join(rng.choices("abcdefghij", k=rng.randint(0, longest)))
    return Dataset.from_dict({"source": [text() for _ in range(n)], "target": [text() for _ in range(n)]})


def lengths(n, seed=0):
    rng = np.random.default_rng(seed)
    source = rng.integers(1, 41, n)
    return source, np.clip(source + rng.integers(-6, 7, n), 1, 40)


# ---- the plan ----

@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=120), st.integers(60, 500),
       st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_plan(pairs, budget, seed, epoch, shuffle):
    source, target = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    plan = plan_batches(source, target, budget, seed, epoch, shuffle)
    assert sorted(i for batch in plan for i in batch) == list(range(len(pairs)))     # none lost, none doubled
    for batch in plan:
        assert len(batch) > 0
        for side in source, target:
            assert len(batch) * side[batch].max() <= budget
    again = plan_batches(source, target, budget, seed, epoch, shuffle)
    assert len(plan) == len(again) and all(np.array_equal(a, b) for a, b in zip(plan, again))
    assert 0 <= padding_waste(source, target, plan) < 1


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 60)), min_size=1, max_size=200), st.integers(0, 9))
def test_the_order_is_that_of_a_plain_sort(pairs, epoch):
    "one packed number a pair, sorted in place, against NumPy's sort by several keys; with noise and without"
    s, t = np.array(pairs).T.astype(np.int32)
    longest, to_and_fro = np.maximum(s, t), np.where(np.maximum(s, t) % 2, s - t, t - s)
    plan = plan_batches(s, t, 4000, epoch=epoch, shuffle=False)
    assert np.array_equal(np.concatenate(plan), np.lexsort((to_and_fro, longest)))
    rng = np.random.default_rng((7, epoch))
    order = np.lexsort((to_and_fro + rng.uniform(-1, 1, len(s)), longest))
    plan = plan_batches(s, t, 4000, seed=7, epoch=epoch)
    back = np.argsort(rng.permutation(len(plan)))             # the batches in the order they were cut
    assert np.array_equal(np.concatenate([plan[i] for i in back]), order)


def test_the_order_of_many_and_of_long_ones():
    "parts of 65,536 pairs are filled one after the other; lengths may need most of the bits"
    s, t = lengths(200_000)
    s[::1000] = 1 << 30
    longest, orders = np.maximum(s, t), []
    for epoch in 0, 1:
        plan = sorted(plan_batches(s, t, 1 << 30, epoch=epoch), key=lambda i: longest[i[0]])
        orders.append(np.concatenate(plan))
        assert np.array_equal(longest[orders[-1]], np.sort(longest))
    assert not np.array_equal(*orders) and sorted(orders[0]) == list(range(len(s)))


def test_batches_are_full():
    "each batch could not have taken the next pair in order of length: no budget is left lying"
    source, target = lengths(3000)
    plan = plan_batches(source, target, 700, shuffle=False)
    for batch, after in zip(plan, plan[1:]):
        joined = np.append(batch, after[0])
        assert len(joined) * max(source[joined].max(), target[joined].max()) > 700


def test_unshuffled_goes_from_short_to_long():
    source, target = lengths(500)
    order = np.concatenate(plan_batches(source, target, 200, shuffle=False))
    assert (np.diff(np.maximum(source, target)[order]) >= 0).all()


def test_seed_and_epoch():
    source, target = lengths(2000)
    plans = {(seed, epoch): plan_batches(source, target, 512, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)}
    orders = {key: tuple(np.concatenate(plan)) for key, plan in plans.items()}
    assert len(set(orders.values())) == 6
    unshuffled = [np.concatenate(plan_batches(source, target, 512, seed, seed, shuffle=False)) for seed in (0, 1)]
    assert np.array_equal(*unshuffled)


def test_an_epoch_is_not_biased_by_length():
    "the order of the batches says nothing of their lengths, and in another epoch a pair has other neighbours"
    source, target = lengths(20_000)
    size = np.maximum(source, target)
    first = plan_batches(source, target, 1000)
    for epoch in range(1, 5):
        plan = plan_batches(source, target, 1000, epoch=epoch)
        mean = np.array([size[batch].mean() for batch in plan])
        assert abs(np.corrcoef(np.arange(len(plan)), mean)[0, 1]) < 4 / np.sqrt(len(plan))   # 4 standard errors
        number = np.empty(len(source), int)
        number[np.concatenate(plan)] = np.repeat(np.arange(len(plan)), [len(batch) for batch in plan])
        again = np.mean([(number[batch][:, None] == number[batch]).mean() for batch in first])
        assert again < 0.5, again        # the share of a pair's neighbours that it had in epoch 0


def test_pair_longer_than_the_budget():
    with pytest.raises(ValueError, match="Pair 2 has 300 tokens, more than tokens_per_batch=256: .*max_length"):
        plan_batches(np.array([5, 9, 7]), np.array([5, 9, 300]), 256)
    assert [list(batch) for batch in plan_batches(np.array([256]), np.array([1]), 256)] == [[0]]


def test_no_pairs():
    empty = np.array([], dtype=np.int64)
    assert plan_batches(empty, empty, 100) == [] and padding_waste(empty, empty, []) == 0


def test_padding_waste_by_hand():
    # two batches: 2x3 + 2x4 positions with 5 + 6 real ones, and 1x2 + 1x1 with no padding
    assert padding_waste([3, 2, 2], [2, 4, 1], [np.array([0, 1]), np.array([2])]) == pytest.approx(1 - 14 / 17)


# ---- the batches ----

def test_batch_against_plain_python():
    data = dataset(300)
    pairs = EncodedPairs.encode(data, Spelled())
    assert len(pairs) == 300 and pairs.dropped == 0
    rng = np.random.default_rng(0)
    for indices in ([0], [299, 0, 7, 7], rng.permutation(300), rng.integers(0, 300, 50).tolist()):
        source = [Spelled().encode_source([data[int(i)]["source"]])[0] for i in indices]
        target = [Spelled().encode_target([data[int(i)]["target"]])[0] for i in indices]
        batch = pairs.batch(indices)

        def padded(rows): return torch.tensor([row + [PAD] * (max(map(len, rows)) - len(row)) for row in rows])
        assert torch.equal(batch.source, padded(source)) and batch.source.dtype == torch.int64
        assert torch.equal(batch.target, padded([row[:-1] for row in target]))
        assert torch.equal(batch.labels, padded([row[1:] for row in target]))
        assert batch.source_lengths.tolist() == [len(row) for row in source]
        assert batch.target_lengths.tolist() == [len(row) - 1 for row in target]
        assert batch.tokens == sum(len(row) - 1 for row in target) == int((batch.labels != PAD).sum())
        assert type(batch.tokens) is int


def test_epoch_of_batches():
    data = dataset(500)
    pairs = EncodedPairs.encode(data, Spelled())
    assert (pairs.source_lengths == [len(text) + 1 for text in data["source"]]).all()
    assert (pairs.target_lengths == [len(text) + 1 for text in data["target"]]).all()      # labels: no <s>
    epoch = list(batches(pairs, 256, seed=3, epoch=2))
    text = [("".join(map(chr, s[:n - 1])), "".join(chr(i - 1000) for i in t[:m - 1])) for b in epoch
            for s, n, t, m in zip(b.source.tolist(), b.source_lengths, b.labels.tolist(), b.target_lengths)]
    assert sorted(text) == sorted(zip(data["source"], data["target"]))
    assert all(max(b.source.numel(), b.target.numel(), b.labels.numel()) <= 256 for b in epoch)
    assert sum(b.tokens for b in epoch) == pairs.target_lengths.sum()
    plan = plan_batches(pairs.source_lengths, pairs.target_lengths, 256, 3, 2)
    rest = list(batches(pairs, 256, seed=3, epoch=2, start=4))
    assert len(rest) == len(plan) - 4
    for one, other in zip(epoch[4:], rest):
        assert all(torch.equal(a, b) for a, b in zip(one[:5], other[:5]))
    assert list(batches(pairs, 256, start=len(plan))) == []


def test_to_device():
    batch = EncodedPairs.encode(dataset(3), Spelled()).batch([0, 1, 2])
    moved = batch.to("meta")
    assert type(moved) is type(batch) and all(x.device.type == "meta" for x in moved[:5]) and moved.segments is None
    assert [x.shape for x in moved[:5]] == [x.shape for x in batch[:5]]


def test_arrays_are_compact():
    pairs = EncodedPairs.encode(dataset(200), Spelled())
    assert pairs.source.dtype == pairs.target.dtype == np.uint16
    assert pairs.source_lengths.dtype == pairs.target_lengths.dtype == np.int32
    assert len(pairs.source) == pairs.source_lengths.sum() == pairs.source_offsets[-1]
    assert len(pairs.target) == pairs.target_lengths.sum() + 200 == pairs.target_offsets[-1]


def test_saved_and_mapped(tmp_path):
    pairs = EncodedPairs.encode(dataset(200), Spelled(), max_length=25)
    pairs.save(tmp_path / "new" / "folder")
    again = EncodedPairs.open(tmp_path / "new" / "folder")
    assert again.dropped == pairs.dropped > 0 and len(again) == len(pairs) == 200 - pairs.dropped
    for name in ("source", "source_offsets", "source_lengths", "target", "target_offsets", "target_lengths"):
        one, other = getattr(pairs, name), getattr(again, name)
        assert one.dtype == other.dtype and np.array_equal(one, other)
    assert not again.source.flags.owndata and not again.source.flags.writeable
    assert all(torch.equal(a, b) for a, b in zip(pairs.batch([5, 0])[:5], again.batch([5, 0])[:5]))


@pytest.mark.parametrize("damage", [
    lambda p: p.write_bytes(b""), lambda p: p.write_bytes(p.read_bytes()[:-2]), lambda p: p.write_bytes(b"x" * 500),
    lambda p: np.save(p, np.load(p)[:-1]), lambda p: np.save(p, np.array([{}], dtype=object))])
@pytest.mark.parametrize("name", ["source", "source_offsets", "target", "target_offsets"])
def test_damaged_arrays(tmp_path, name, damage):
    EncodedPairs.encode(dataset(20), Spelled()).save(tmp_path)
    damage(tmp_path / f"{name}.npy")
    words = f"{tmp_path}.* is damaged: (no whole array|offsets and tokens)"
    with pytest.raises(ValueError, match=words) as told: EncodedPairs.open(tmp_path)
    assert "\n" not in str(told.value)


def test_joined_parts_are_the_whole():
    data = dataset(100)
    whole = EncodedPairs.encode(data, Spelled(), max_length=25)
    parts = [data.select(range(a, b)) for a, b in ((0, 1), (1, 40), (40, 100))]
    joined = join_pairs([encode_texts(part["source"][:], part["target"][:], Spelled(), 25) for part in parts])
    assert all(np.array_equal(x, vars(joined)[name]) for name, x in vars(whole).items())


def test_one_window():
    pairs = EncodedPairs.encode(dataset(5), Spelled())
    assert pairs.window(3, 0) is pairs and pairs.window(3, 1) is None


def test_max_length_counts_each_side_with_its_end():
    data = Dataset.from_dict({"source": ["abcd", "abcde", "a", "abcd"], "target": ["abcd", "a", "abcde", ""]})
    pairs = EncodedPairs.encode(data, Spelled(), max_length=5)
    assert pairs.dropped == 2 and pairs.source_lengths.tolist() == [5, 5] and pairs.target_lengths.tolist() == [5, 1]
    with pytest.raises(ValueError, match="No pairs left: all 4 have more than max_length=0 tokens"):
        EncodedPairs.encode(data, Spelled(), max_length=0)
    with pytest.raises(ValueError, match="There are no pairs to encode"):
        EncodedPairs.encode(Dataset.from_dict({"source": [], "target": []}), Spelled())


def test_a_line_of_100_000_characters_is_dropped_and_counted(tmp_path):
    lines = ["a dog runs"] * 20 + ["ab " * 33_334] + ["a" * 100_000] + ["a, !b" * 20_000]
    for language in "en", "de":
        (tmp_path / f"train.{language}").write_text("\n".join(lines) + "\n")
    train = load_corpus(train=tmp_path / "train")["train"]
    assert len(train) == 23
    tokenizers = TokenizerPair.train(train, "bpe", 300)
    pairs = EncodedPairs.encode(train, tokenizers, max_length=128)
    assert len(pairs) == 20 and pairs.dropped == 3
    with pytest.raises(ValueError, match="Pair 2[012] has .*max_length"):
        list(batches(EncodedPairs.encode(train, tokenizers), 4096))


@pytest.mark.parametrize("budget", [2048, 4096])
def test_waste_on_multi30k(multi30k, budget):
    for epoch in range(3):
        plan = plan_batches(multi30k.source_lengths, multi30k.target_lengths, budget, epoch=epoch)
        assert padding_waste(multi30k.source_lengths, multi30k.target_lengths, plan) < 0.05


@pytest.fixture(scope="module")
def multi30k():
    folder = os.environ.get("FLASH_TRANSFORMER_DATA")
    if not folder:
        pytest.skip("FLASH_TRANSFORMER_DATA names no folder with multi30k")
    if not Path(folder, "multi30k").is_dir():
        pytest.skip(f"no multi30k in {folder}")
    train = load_corpus(train=Path(folder, "multi30k/train"))["train"]
    return EncodedPairs.encode(train, TokenizerPair.train(train, "bpe", 8000))
