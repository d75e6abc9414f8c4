"Streams: the same pairs as the corpus at hand, window by window, in any order of asking; files, folders and the hub."
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from flash_transformer.data import DataConfig, EncodedPairs, StreamedPairs, read_split, stream
from flash_transformer.data.corpora import load_corpus
from flash_transformer.data.streaming import ParquetPieces, Pieces
from flash_transformer.model import Transformer, TransformerConfig
from flash_transformer.training import TrainConfig, Trainer

ARRAYS = ("source", "source_offsets", "target", "target_offsets")
CARD = """---
configs:
- config_name: de-en
  data_files:
  - {split: train, path: de-en/train-*}
  - {split: validation, path: de-en/validation-*}
---
"""


def sentences(n, start=0): # n pairs of a few words, each pair once
    numbers = range(start, start + n)
    return [(f"dog {i} runs" + " far" * (i % 5), f"Hund {i} rennt" + " weit" * (i % 7)) for i in numbers]


def parquet(path, pairs, row_group_size):
    path.parent.mkdir(parents=True, exist_ok=True)
    sides = [pa.array([pair[i] for pair in pairs], pa.string()) for i in (1, 0)]
    rows = pa.StructArray.from_arrays(sides, ["de", "en"])
    pq.write_table(pa.table({"translation": rows}), path, row_group_size=row_group_size)


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    "A folder of hubs with one corpus: three files with row groups of all sizes, some sides empty, some pairs twice"
    repo = tmp_path_factory.mktemp("hub") / "wmt/wmt14"
    pairs = sentences(230)
    pairs[5], pairs[77], pairs[101] = ("", "leer"), ("nothing", None), ("  ", "\t")
    pairs[120], pairs[229] = pairs[119], pairs[3]
    for k, (start, stop, size) in enumerate([(0, 100, 7), (100, 130, 100), (130, 230, 33)]):
        parquet(repo / f"de-en/train-{k:05}-of-00003.parquet", pairs[start:stop], size)
    parquet(repo / "de-en/validation-00000-of-00001.parquet", [("", "x"), *sentences(6, 500)], 4)
    parquet(repo / "de-en/test-00000-of-00001.parquet", sentences(5, 600), 4)
    (repo / "README.md").write_text(CARD.removesuffix("---\n") + "  - {split: test, path: de-en/test-*}\n---\n")
    return repo


@pytest.fixture(scope="module")
def texts(layout):
    "The same pairs as text files, PREFIX text plain, PREFIX packed with one side as .gz; Windows has been here"
    folder = layout.parent
    for split in "train", "validation", "test":
        for side in "en", "de":
            rows = [row["translation"][side] or "" for path in sorted(layout.glob(f"de-en/{split}-*"))
                    for row in pq.read_table(path).to_pylist()]
            text = "\r\n".join(rows) if side == "de" else "\ufeff" + "\n".join(rows)             # no newline at the end
            (folder / f"{split}.{side}").write_bytes(text.encode())
            if side == "de": (folder / f"packed-{split}.de.gz").write_bytes(gzip.compress(text.encode()))
            else: (folder / f"packed-{split}.en").write_bytes(text.encode())
    return folder


@pytest.fixture(scope="module")
def recipe(layout, texts):
    "A `DataConfig` by the sort of its corpus, with changes"
    def make(sort="folder", **changes):
        where = {"folder": dict(corpus="wmt14", path=str(layout)),
                 "text": {split: str(texts / split) for split in ("train", "validation", "test")},
                 "packed": {split: str(texts / f"packed-{split}") for split in ("train", "validation", "test")}}[sort]
        small = dict(tokenizer="word", vocab_size=2000, streaming=True, window=50, max_length=64)
        return DataConfig(**small | where | changes)
    return make


pytestmark = pytest.mark.filterwarnings("ignore:.*dropped 1 of 7 pairs")      # of the validation split


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def windows(pairs, epoch=0):
    found = []
    while (window := pairs.window(epoch, len(found))) is not None: found.append(window)
    return found


def equal(a, b): return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)


def rows(parts): # ids of each pair
    return Counter((tuple(p.source[p.source_offsets[i]:p.source_offsets[i + 1]].tolist()),
                    tuple(p.target[p.target_offsets[i]:p.target_offsets[i + 1]].tolist()))
                   for p in parts for i in range(len(p)))


# ---- which pairs ----

@pytest.mark.parametrize("sort", ["folder", "text", "packed"])
def test_the_pairs_of_the_corpus_at_hand(recipe, sort):
    config = recipe(sort, max_length=9)
    tokenizers, train, validation = stream(config)
    with pytest.warns(UserWarning, match="dropped 3 of 230"):
        corpus = load_corpus(config.corpus, config.train, config.validation, path=config.path)
    expected = EncodedPairs.encode(corpus["train"], tokenizers, 9)
    for epoch in 0, 3:
        parts = windows(train, epoch)
        assert len(parts) == 5 and rows(parts) == rows([expected])                # 230 pairs, 50 a window
        assert sum(part.dropped for part in parts) == expected.dropped > 0
    assert len(train) == 230
    assert equal(validation, EncodedPairs.encode(corpus["validation"], tokenizers)) and len(validation) == 6
    assert read_split(config, "test")["target"][:] == [de for _, de in sentences(5, 600)]


def test_rules_and_duplicates_within_a_window(recipe):
    def kept(window, **changes): return sum(map(len, windows(stream(recipe(window=window, **changes))[1])))
    assert kept(230) == 227 and kept(230, clean=["duplicates"]) == 225            # two twins, all at hand
    assert kept(10, clean=["duplicates"]) in (225, 226, 227)                      # a twin may be in another window
    assert kept(1, clean=["duplicates"]) == 227
    config = recipe(window=230, clean=["ratio"], max_ratio=1.2)
    with pytest.warns(UserWarning, match="dropped 3"): left = load_corpus("wmt14", path=config.path)["train"]
    left = [1 for pair in left if max(n := [len(pair["source"]), len(pair["target"])]) <= 1.2 * (min(n) + 5)]
    assert kept(230, clean=["ratio"], max_ratio=1.2) == len(left) < 227


def test_a_window_of_which_nothing_is_left(recipe, texts):
    (texts / "odd.en").write_text("a\nb\n" + "c d e f g h\n" * 2), (texts / "odd.de").write_text("x\ny\n" + "z\n" * 2)
    config = recipe("text", train=str(texts / "odd"), window=1, max_length=3)
    parts = windows(stream(config)[1])
    assert sorted(map(len, parts)) == [0, 0, 1, 1] and sum(part.dropped for part in parts) == 2
    for part in parts: assert len(part.source_lengths) == len(part) and part.source_offsets[-1] == len(part.source)
    (texts / "odd.de").write_text((texts / "odd.en").read_text())
    copies = recipe("text", train=str(texts / "odd"), clean=["copy", "duplicates"], window=2)
    assert [len(part) for part in windows(stream(copies, stream(recipe())[0])[1])] == [0, 0]


# ---- which window ----

class Numbers(Pieces):
    def __init__(self, counts): self.rows = np.array(counts, np.int64)
    def read(self, piece):
        names = [f"{piece}.{i}" for i in range(self.rows[piece])]
        return pa.table({side: pa.array(names, pa.string()) for side in ("source", "target")})


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 25), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_windows_cut_the_order_where_they_should(counts, window, seed):
    pieces = Numbers(counts)
    order = pieces.order(seed, 1)
    assert sorted(order) == list(range(len(counts)))
    all_pairs = [f"{piece}.{i}" for piece in order for i in range(counts[piece])]
    for start in range(0, len(all_pairs) + window, window):
        table = pieces.pairs(order, start, start + window)
        assert table["source"].to_pylist() == table["target"].to_pylist() == all_pairs[start:start + window]


@pytest.mark.parametrize("sort, window", [("folder", 9), *((sort, window) for sort in ("folder", "text", "packed")
                                                           for window in (50, 229, 230, 1000))])
def test_asked_alone_a_window_is_the_same(recipe, sort, window):
    config = recipe(sort, window=window, clean=["duplicates", "copy"])
    tokenizers, train, _ = stream(config)
    undisturbed = {epoch: windows(train, epoch) for epoch in (0, 1)}
    assert {len(parts) for parts in undisturbed.values()} == {-(-230 // window)}
    rng = np.random.default_rng(0)
    other = stream(config, tokenizers)[1]
    for _ in range(12):
        epoch, index = int(rng.integers(2)), int(rng.integers(len(undisturbed[0]) + 1))
        got = (other if rng.integers(2) else StreamedPairs(other.pieces, tokenizers, config)).window(epoch, index)
        if index == len(undisturbed[0]): assert got is None
        else: assert equal(got, undisturbed[epoch][index])


def test_orders(recipe):
    tokenizers, train, _ = stream(recipe())
    first = [train.window(epoch, 0) for epoch in range(4)]
    assert not any(equal(first[i], first[j]) for i in range(4) for j in range(i))
    assert not equal(stream(recipe(seed=1), tokenizers)[1].window(0, 0), first[0])
    pieces = stream(recipe("text"))[1].pieces
    assert pieces.shuffled and not np.array_equal(pieces.order(0, 0), pieces.order(0, 1))
    assert not stream(recipe("packed"))[1].pieces.shuffled                                 # a .gz has one order


def test_a_window_comes_from_all_over(recipe, tmp_path):
    parquet(tmp_path / "a.parquet", sentences(10_000), 10)
    pieces = ParquetPieces([str(tmp_path / "a.parquet")], "en", "de", 20)
    assert set(pieces.rows) == {20} and len(pieces.rows) == 500                            # two row groups each
    table = pieces.pairs(pieces.order(0, 0), 0, 2000)
    numbers = np.array([int(text.split()[1]) for text in table["source"].to_pylist()])
    assert np.bincount(numbers // 1000, minlength=10).min() > 40                           # 200 on the average


# ---- tokenizers ----

def test_the_tokenizer_learns_from_a_sample(recipe):
    few = stream(recipe(tokenizer_pairs=10))[0]
    window = stream(recipe())[0]
    assert few.source_size < window.source_size < stream(recipe(window=230))[0].source_size
    assert stream(recipe(), few)[0] is few


# ---- memory ----

MEMORY = """
import json, sys, weakref
import pyarrow as pa
from flash_transformer.data import DataConfig, stream
for folder in sys.argv[1:]:                      # the small one first: what is measured is the highest so far
    config = DataConfig("wmt14", path=folder, tokenizer="word", vocab_size=2000, streaming=True, window=5000)
    train, alive, most, index = stream(config)[1], weakref.WeakSet(), 0, 0
    while (window := train.window(0, index)) is not None:
        alive.add(window)
        most, index = max(most, len(alive)), index + 1
    print(json.dumps([pa.default_memory_pool().max_memory(), most, index]))
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    "Arrow's memory in a process of its own, and how many windows of ids were alive at a time"
    for n in 20_000, 200_000:
        folder = tmp_path / str(n)
        for k in range(4): parquet(folder / f"de-en/train-{k}.parquet", sentences(n // 4, n * k), 1000)
        parquet(folder / "de-en/validation-0.parquet", sentences(5), 1000)
        (folder / "README.md").write_text(CARD)
    done = subprocess.run([sys.executable, "-c", MEMORY, "20000", "200000"], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
                          capture_output=True, text=True, timeout=600)       # only against a hang
    assert done.returncode == 0, done.stderr
    (small, _, few), (large, alive, many) = map(json.loads, done.stdout.splitlines())
    assert (few, many) == (4, 40)
    # ten times as many pairs; it depends on luck which of its steps two threads are in at a time
    assert alive <= 2 and large < 3 * small, (small, large, alive)


# ---- what is wrong is said ----

def test_sentences(recipe, texts, layout, tmp_path):
    def refused(error, message, *arguments, **changes):
        with pytest.raises(error, match=message) as caught: stream(recipe(*arguments, **changes))
        assert "\n" not in str(caught.value)

    refused(ValueError, "the corpus here is 'toy': leave out --data.streaming", corpus="toy", path=None)
    refused(ValueError, "the corpus here is 'files': leave out", corpus="files", path=None)
    refused(ValueError, "path replaces the hub", "text", path=str(layout))
    refused(ValueError, "data.window must be at least 1, not 0", window=0)
    refused(ValueError, "no cleaning rule 'copi'.*Did you mean 'copy'", clean=["copi"])
    refused(ValueError, "both 'en'", target="en")
    refused(ConnectionError, r"Could not read .*wmt14 \(.*'fr-en' not found.*Ways out", target="fr")
    refused(FileNotFoundError, "no folder .*nowhere", path=str(layout / "nowhere"))
    refused(ValueError, "validation split, but there are: train.*--data.validation", "text", validation=None)
    refused(FileNotFoundError, "no .*nothing.en nor", "text", train=str(texts / "nothing"))
    for name, en, de, message in [
        ("short", b"a\nb\nc\n", b"x\ny\n", r"short\.en has 3 lines, .*short\.de has 2"),
        ("empty", b"a\n", b"", r"empty\.de is empty"),
        ("latin", b"a\nb\n", "x\ngrün\n".encode("latin-1"), r"latin\.de, line 2: byte 3 .*is not UTF-8"),
        ("nul", b"a\nb\0\n", b"x\ny\n", r"nul\.en, line 2: a NUL byte"),
    ]:
        (texts / f"{name}.en").write_bytes(en), (texts / f"{name}.de").write_bytes(de)
        refused(ValueError, message, "text", train=str(texts / name))
    (texts / "torn.en").write_bytes(b"a\n"), (texts / "torn.de.gz").write_bytes(gzip.compress(b"x\n" * 999)[:-9])
    refused(ValueError, r"torn\.de\.gz: broken \.gz", "text", train=str(texts / "torn"))

    folder = tmp_path / "copy"
    (folder / "de-en").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for split in "train", "validation": parquet(folder / f"de-en/{split}-0.parquet", sentences(9), 5)
    (folder / "de-en/train-0.parquet").write_bytes(b"PAR1 is how it starts, and then no more")
    refused(ConnectionError, r"Could not read .*train-0.parquet \(", path=str(folder))
    pq.write_table(pa.table({"translation": [{"de": "x", "it": "y"}]}), folder / "de-en/train-0.parquet")
    refused(ValueError, "train-0.parquet has no language 'en'; its columns are: de, it", path=str(folder))
    parquet(folder / "de-en/train-0.parquet", [], 5)
    refused(ValueError, "no pairs", path=str(folder))
    for path in folder.rglob("*.parquet"): path.unlink()
    (folder / "README.md").write_text("")
    for split in "train", "val": (folder / f"{split}.jsonl").write_text('{"en": "a", "de": "x"}\n')
    refused(ValueError, "Only Parquet and text files can be streamed, not .*jsonl", corpus="multi30k", path=str(folder))


def test_a_file_that_changes_under_the_stream(recipe, texts):
    for side in "en", "de": (texts / f"moving.{side}").write_text("".join(f"{side} {i}\n" for i in range(20_000)))
    train = stream(recipe("text", train=str(texts / "moving"), window=1000))[1]
    (texts / "moving.de").write_text("short\n")
    with pytest.raises(ValueError, match=r"moving\.de was changed"): windows(train)


def test_what_goes_wrong_ahead_is_said_when_it_is_asked_for_and_may_heal(recipe):
    config = recipe()
    tokenizers, train, _ = stream(config)
    undisturbed, read, down = windows(train), train.pieces.read, set()
    order = train.pieces.order(config.seed, 0)
    def of(pair): return order[np.searchsorted(np.cumsum(train.pieces.rows[order]), pair, side="right")]

    def broken(piece):
        if piece in down: raise ConnectionError("gone")
        return read(piece)

    down.add(of(149))                                             # the last pair of window 2
    assert of(149) not in [of(pair) for pair in range(100)]
    train.pieces.read = broken
    assert equal(train.window(0, 0), undisturbed[0]) and equal(train.window(0, 1), undisturbed[1])
    with pytest.raises(ConnectionError, match="gone"): train.window(0, 2)
    down.clear()
    assert equal(train.window(0, 2), undisturbed[2]) and equal(train.window(0, 3), undisturbed[3])


# ---- training ----

def test_resumed_training_is_the_same(recipe, tmp_path):
    "Stopped in the second epoch, within a window, and taken up by another `StreamedPairs`, as in another process"
    def trainer(run, steps):
        tokenizers, train, validation = stream(recipe(window=60, clean=["duplicates"]))
        torch.manual_seed(0)
        shape = TransformerConfig(d_model=16, d_ff=32, heads=2, encoder_layers=1, decoder_layers=1, dropout=0.1,
                                  source_vocab_size=tokenizers.source_size, target_vocab_size=tokenizers.target_size)
        config = TrainConfig(max_steps=steps, tokens_per_batch=200, packing=False, warmup_steps=5, checkpoint_every=5,
                             log_every=1, precision="float32")
        return Trainer(Transformer(shape), train, validation, config, tmp_path / run)

    trainer("whole", 30).fit()
    first = trainer("parts", 17)
    first.fit()
    assert first.at.epoch == 1 and first.at.window > 0 and first.at.batch > 0, first.at
    trainer("parts", 30).fit(resume=True)
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


# ---- the hub, over HTTP ----

# The server runs in the same process, so that it can be made to fail at a moment of our choosing. Hugging Face's
# libraries read their environment when they are imported: so the server comes first.
SCRIPT = """
import json, os, sys, time
from pathlib import Path
import hub_server
with hub_server.HubServer(sys.argv[1]) as hub:
    os.environ["HF_ENDPOINT"] = hub.url
    from flash_transformer.data import DataConfig, StreamedPairs, stream
    time.sleep = lambda seconds: None            # between two attempts
    config = DataConfig("wmt14", tokenizer="word", vocab_size=2000, streaming=True, window=50)
    def files(): return [p.rsplit("/", 1)[-1] for method, p in hub.asked if method == "GET" and p.endswith(".parquet")]
    tokenizers, train, validation = stream(config)
    started = files()
    def ids(window): return window and [window.source.tolist(), window.target.tolist(), len(window)]
    undisturbed = [ids(train.window(1, i)) for i in range(6)]
    resumed = StreamedPairs(train.pieces, tokenizers, config)
    hub.asked.clear()
    same = ids(resumed.window(1, 4)) == undisturbed[4]
    resumed._coming[1].result()
    for_one = files()

    answer, left = hub_server._Handler.do_GET, [0]
    def do_GET(self):
        if left[0]:
            left[0] -= 1
            self.close_connection = True         # hangs up without an answer
        else: answer(self)
    hub_server._Handler.do_GET = do_GET
    left[0] = 3
    survives = ids(StreamedPairs(train.pieces, tokenizers, config).window(1, 2)) == undisturbed[2]
    attempts, left[0] = 3 - left[0], 10**6
    try: StreamedPairs(train.pieces, tokenizers, config).window(1, 0)
    except ConnectionError as error: said = str(error)
    disk = sum(p.stat().st_size for p in Path(os.environ["HF_HOME"]).rglob("*") if p.is_file())
    print(json.dumps([undisturbed, len(validation), started, same, for_one, survives, attempts, said, disk]))
    sys.stdout.flush()
    os._exit(0)                                  # the thread that prepares the next window is still trying
"""


def test_from_the_hub(recipe, layout, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.upper().startswith("HF_") and "PROXY" not in k.upper()}
    here = Path(__file__).parent
    environment |= dict(HF_HOME=str(tmp_path), PYTHONPATH=f"{here}{os.pathsep}{here.parent}")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(layout.parent.parent)], env=environment, cwd=tmp_path,
                          capture_output=True, text=True, timeout=600)       # only against a hang
    assert done.returncode == 0, done.stderr
    undisturbed, validation, started, same, for_one, survives, attempts, said, disk = json.loads(done.stdout)
    # the same pairs in the same order as from a local folder, in another process
    local = stream(recipe(max_length=256))[1]
    expected = [local.window(1, i) for i in range(5)]
    assert undisturbed == [[w.source.tolist(), w.target.tolist(), len(w)] for w in expected] + [None]
    assert validation == 6 and same and survives and attempts == 3
    # nothing is fetched of the test split; the training files give their footers and the pieces of the first window
    assert not [name for name in started if name.startswith("test")] and disk < 20_000
    assert len(for_one) <= len(local.pieces.rows), for_one
    assert said.startswith("Could not read hf://datasets/wmt/wmt14@") and said.endswith(
        "--resume goes on from the last checkpoint.") and "\n" not in said
