"Labelled texts: the grammar's labels are right, files and hub give what was written, batches are what a loop gives."
import gzip
import json
import os
import re
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
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hub_server import HubServer

from flash_transformer.data import (
    LabelledTexts,
    TokenizerPair,
    load_labelled,
    pack_batches,
    plan_batches,
    toy_sentiment,
)

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def made(): return toy_sentiment(1000, 101, 100)


@pytest.fixture
def no_cache(monkeypatch, tmp_path): monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# ---- the grammar ----

GOOD = """gripping clever original moving charming convincing likeable beautiful elegant haunting funny witty sharp good
    great excellent wonderful superb joy delight triumph success like liked love loved enjoy enjoyed admire
    admired""".split()
BAD = """boring silly predictable confusing annoying wooden dull ugly clumsy tiresome flat stale lame bad terrible awful
    dreadful poor mess bore failure disaster hate hated dislike disliked loathe loathed resent resented""".split()
NEGATED = re.compile(r"\b(not|never|hardly|far from|anything but)\b")
VERDICT = {"recommend it": 1, "watch it again": 1, "enjoyed it": 1, "enjoy it": 1, "worth the ticket": 1, "going": 0,
           "my money back": 0, "disappointed": 0, "a waste of time": 0}
ASPECT = re.compile(r"\bthe (story|plot|ending|twists|scenes|hero|villain|actors|children|music|scenery|costumes"
                    r"|pictures|dialogue|script|jokes|songs)\b", re.I)


def opinion(clause):
    "1 for praise, 0 for blame, of a clause that speaks of one aspect"
    assert len(ASPECT.findall(clause)) == 1, clause
    [word] = [word for word in re.findall(r"\w+", clause) if word in GOOD + BAD]
    return (word in GOOD) ^ bool(NEGATED.search(clause))


def judged(text):
    "The label of a review, by the rules of the chapter: -> label, how it came about"
    assert text.endswith(".")
    sentences, opinions, verdicts = text[:-1].split(". "), [], []
    assert 2 <= len(sentences) <= 6
    for sentence in sentences:
        if found := re.match(r"(Overall|All in all|In the end|On the whole), (.*)", sentence):
            [good] = [good for end, good in VERDICT.items() if found[2].endswith(end)]
            verdicts.append(good ^ bool(NEGATED.search(found[2])))
        elif not ASPECT.search(sentence):
            assert re.match(r"(I saw it|It (is about|takes|lasts|was (made|shot) in)|The (cinema|theatre)) ", sentence)
        elif "lthough" in sentence:
            if sentence.startswith("Although "): weak, strong = sentence.removeprefix("Although ").split(", ")
            else: strong, weak = sentence.split(", although ")
            opinions.append(opinion(strong))
            assert opinion(weak) != opinions[-1], sentence
        elif ", but " in sentence:
            weak, strong = sentence.split(", but ")
            opinions.append(opinion(strong))
            assert opinion(weak) != opinions[-1], sentence
        else: opinions.append(opinion(sentence))
    assert len(verdicts) <= 1 and opinions
    if verdicts: return verdicts[0], "overruled" if verdicts[0] not in opinions else "decided"
    [label] = set(opinions)
    return label, "agreed"


def test_labels_of_the_grammar_are_right():
    corpus = toy_sentiment(3000, 300, 300, seed=5)
    how = Counter()
    for split in corpus.values():
        for text, label in zip(split["text"], split["label"]):
            good, why = judged(text)
            assert good == label, text
            how[why] += 1
    assert min(how.values()) > 100 and len(how) == 3, how           # each rule is needed


def test_made_corpus(made):
    assert list(made) == list(SPLITS) and [len(split) for split in made.values()] == [1000, 101, 100]
    for split in made.values():
        assert split.features == Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
        assert abs(len(split) - 2 * sum(split["label"])) == len(split) % 2
    texts = [text for split in made.values() for text in split["text"]]
    assert len(set(texts)) == len(texts) == 1201
    again, other = toy_sentiment(1000, 101, 100), toy_sentiment(1000, 101, 100, seed=1)
    assert all(again[name][:] == made[name][:] for name in made)
    assert len(set(texts) & {text for split in other.values() for text in split["text"]}) < 60
    assert 2 * Counter(made["train"]["label"][:100])[0] != Counter(made["train"]["label"])[0]      # shuffled


def test_no_text_comes_twice(monkeypatch):
    monkeypatch.setattr("flash_transformer.data.labelled._review", lambda rng, good: f"{good} {rng.randrange(50)}")
    corpus = toy_sentiment(60, 30, 10)                                       # all that there are
    assert len({text for split in corpus.values() for text in split["text"]}) == 100


def test_the_door_gives_the_made_corpus_by_seed():
    one, two = load_labelled(seed=3), toy_sentiment(seed=3)
    assert all(one[name][:] == two[name][:] for name in SPLITS) and len(one["train"]) == 4000


@pytest.mark.parametrize("arguments, message", [
    (dict(train=-1), "train must be a number of texts, 0 or more, but is -1"), (dict(test=True), "test must be"),
    (dict(validation=2.0), "validation must be"), (dict(seed="x"), "seed must be a whole number")])
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message): toy_sentiment(**arguments)


# ---- files ----

def write(path, rows):
    "Rows (text, label) into a file of the kind that its name says"
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind in (".jsonl", ".json"): lines = [json.dumps({"n": 1, "label": b, "text": a}) for a, b in rows]
    elif kind == ".csv": lines = ["id,text,label", *('7,"{}",{}'.format(a.replace('"', '""'), b) for a, b in rows)]
    else: lines = ["label\ttext", *(f"{b}\t{a}" for a, b in rows)]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


ODD = ['He said: "No, never."', "NA", "null", "12", "Straße, 東京 🙂", '"', "a\u2028b", "  two  spaces "]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".csv.gz", ".tsv.gz", ".jsonl.gz", ".json.gz"])
def test_files(ending, tmp_path, no_cache):
    rows = [(text, "good" if i % 3 else "bad") for i, text in enumerate(ODD)]
    files = {"train": write(tmp_path / f"a{ending}", rows), "test": write(tmp_path / f"b{ending}", rows[:1])}
    corpus = load_labelled(**files)
    assert list(corpus) == ["train", "test"]
    assert corpus["train"].features == Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    assert corpus["train"][:] == {"text": ODD, "label": [int(b == "good") for _, b in rows]}
    assert corpus["test"][:] == {"text": ODD[:1], "label": [0]}


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_numbers_for_labels_are_in_order_of_numbers(ending, tmp_path, no_cache):
    labels = [10, 9, -1, 2, 10]
    corpus = load_labelled("imdb", train=write(tmp_path / f"a{ending}", [(f"t{i}", n) for i, n in enumerate(labels)]))
    assert corpus["train"].features["label"].names == ["-1", "2", "9", "10"]
    assert corpus["train"]["label"][:] == [3, 2, 0, 1, 3]


def test_names_and_numbers_of_other_kinds(tmp_path, no_cache):
    yes = load_labelled(train=write(tmp_path / "a.jsonl", [("x", True), ("y", False)]))["train"]
    assert yes.features["label"].names == ["False", "True"] and yes["label"][:] == [1, 0]
    numbers = write(tmp_path / "b.jsonl", [("x", 1), ("y", 0)])         # numbers here, the same as names there
    corpus = load_labelled(train=numbers, test=write(tmp_path / "c.jsonl", [("z", "1")]))
    assert corpus["test"]["label"][:] == [1]
    (tmp_path / "d.csv").write_bytes(b'\xef\xbb\xbftext,label\r\n"one\r\ntwo",a\r\nthree,b\r\n')
    assert load_labelled(train=tmp_path / "d.csv")["train"]["text"][:] == ["one\r\ntwo", "three"]
    (tmp_path / "e.json").write_text('[{"text": "x", "label": 1}, {"text": "y", "label": 0}]')
    assert load_labelled(train=tmp_path / "e.json")["train"]["label"][:] == [1, 0]


@pytest.mark.parametrize("ending", [".csv", ".jsonl.gz"])
def test_corrected_file_is_read_anew(ending, tmp_path, no_cache):
    path = write(tmp_path / f"a{ending}", [("one", "x"), ("two", "y")])
    load_labelled(train=path)
    write(path, [("six", "x"), ("two", "y")])                            # as many bytes
    assert load_labelled(train=path)["train"]["text"][0] == "six"


BAD_FILES = {
    "no text column": ("a.csv", "review,label\na,x\nb,y\n", r"a\.csv has no column 'text'; .* are: review, label"),
    "no label column": ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n', r"a\.jsonl has no column 'label'; .*: text"),
    "empty": ("a.csv", "", r"a\.csv is empty"), "empty JSON": ("a.jsonl", "", r"a\.jsonl is empty"),
    "only a head": ("a.csv", "text,label\n", r"a\.csv has no texts"),
    "only blanks": ("a.jsonl", "\n\n", r"a\.jsonl cannot be read"),
    "empty text": ("a.csv", "text,label\na,x\n,y\n", r"a\.csv: text 2 is empty"),
    "white space": ("a.tsv", "text\tlabel\na\tx\n \u3000\ty\n", r"a\.tsv: text 2 is empty"),
    "null": ("a.jsonl", '{"text": "a", "label": 1}\n{"text": null, "label": 0}\n', r"a\.jsonl: text 2 is empty"),
    "number": ("a.jsonl", '{"text": 3, "label": 1}\n{"text": 4, "label": 0}\n', "'text' holds something else than"),
    "a number": ("a.jsonl", '{"text": "a", "label": 1}\n{"text": 4, "label": 0}\n', "'text' holds something else than"),
    "list": ("a.jsonl", '{"text": ["a"], "label": 1}\n', "'text' holds something else than texts"),
    "label missing": ("a.csv", "text,label\na,x\nb\n", r"a\.csv: text 2 has no label"),
    "label null": ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": null}\n', r"text 2 has no label"),
    "label left out": ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', r"text 2 has no label"),
    "labels of two kinds": ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": 1}\n', "numbers only, or"),
    "labels in lists": ("a.jsonl", '{"text": "a", "label": ["x"]}\n', "'label' has to hold numbers only"),
    "one class": ("a.csv", "text,label\na,x\nb,x\n", r"a\.csv has only one class, 'x'"),
    "commas everywhere": ("a.csv", "text,label\na, b,x\nc, d,y\n", r"a\.csv has more cells in a row than names"),
    "a comma": ("a.csv", "text,label\na,x\nc, d,y\n", r"a\.csv cannot be read \(ParserError: .*line 3"),
    "open quote": ("a.csv", 'text,label\n"a,x\nb,y\n', r"a\.csv"),
    "Latin-1": ("a.csv", "text,label\nä,x\nb,y\n".encode("latin-1"), r"a\.csv cannot be read \(UnicodeDecodeError"),
    "Latin-1 far behind": ("a.csv", b"text,label\n" + b"a,x\n" * 300_000 + b"\xe4,y\n", r"a\.csv cannot be read \(Uni"),
    "Latin-1 JSON": ("a.jsonl", '{"text": "ä", "label": 1}\n'.encode("latin-1"), r"a\.jsonl is no text in UTF-8"),
    "broken JSON": ("a.jsonl", '{"text": "a", "label":\n', r"a\.jsonl cannot be read"),
    "broken .gz": ("a.csv.gz", gzip.compress(b"text,label\na,x\n")[:-9], r"a\.csv\.gz cannot be read \(EOFError"),
    "no .gz": ("a.jsonl.gz", b"text,label\na,x\n", r"a\.jsonl\.gz cannot be read"),
    "of another kind": ("a.txt", "a\n", r"a\.txt: labelled texts are read from \.csv, \.tsv, \.jsonl, \.json"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case, tmp_path, no_cache):
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught: load_labelled(train=tmp_path / name)
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_label_that_training_has_not(tmp_path, no_cache):
    train = write(tmp_path / "a.csv", [("one", "x"), ("two", "y")])
    for split in ("validation", "test"):
        with pytest.raises(ValueError, match=r"b\.csv has the label 'z', which .*a\.csv has not"):
            load_labelled(train=train, **{split: write(tmp_path / "b.csv", [("six", "x"), ("ten", "z")])})
    assert len(load_labelled(train=train, test=write(tmp_path / "c.csv", [("six", "x")]))["test"]) == 1


@pytest.mark.parametrize("arguments, error, message", [
    (dict(corpus="imbd"), ValueError, r"'imbd'\. Did you mean 'imdb'\? There are: sentiment, labelled, imdb"),
    (dict(corpus="labelled"), ValueError, "'labelled' needs a file to learn from: train"),
    (dict(test="a.csv"), ValueError, "needs a file to learn from: train"),
    (dict(path="x"), ValueError, "path replaces the hub for imdb; the corpus here is 'sentiment'"),
    (dict(corpus="imdb", path="no/where"), FileNotFoundError, "There is no folder no/where; .* stanfordnlp/imdb"),
    (dict(train="no/a.csv"), FileNotFoundError, r"There is no file no/a\.csv"),
])
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message): load_labelled(**arguments)


# ---- the hub ----

NAMES = ClassLabel(names=["neg", "pos"])
CARD = """---
dataset_info:
  config_name: plain_text
  features:
  - {name: text, dtype: string}
  - name: label
    dtype: {class_label: {names: {'0': neg, '1': pos}}}
configs:
- config_name: plain_text
  default: true
  data_files:
  - {split: train, path: plain_text/train-*}
  - {split: test, path: plain_text/test-*}
  - {split: unsupervised, path: plain_text/unsupervised-*}
---
"""


def imdb(root, card=True, label=NAMES, **sizes):
    "A small stanfordnlp/imdb as it lies on the hub: sorted by label, Parquet with the features in its metadata"
    (root / "plain_text").mkdir(parents=True)
    for name, n in (dict(train=60, test=50, unsupervised=70) | sizes).items():
        labels = [-1] * n if name == "unsupervised" else [int(i >= n // 3) for i in range(n)]
        table = Dataset.from_dict({"text": [f"{name} {i}" for i in range(n)], "label": labels},
                                  features=Features({"text": Value("string"), "label": label}))
        pq.write_table(table.with_format("arrow")[:], root / f"plain_text/{name}-00000-of-00001.parquet")
    if card: (root / "README.md").write_text(CARD)
    return root


@pytest.mark.parametrize("card", [True, False])
def test_local_copy(card, tmp_path, no_cache):
    root = imdb(tmp_path / "imdb", card)
    one, again, other = (load_labelled("imdb", path=root, seed=seed) for seed in (0, 0, 1))
    assert list(one) == list(SPLITS) and all(split.features["label"] == NAMES for split in one.values())
    assert one["test"]["text"][:] == [f"test {i}" for i in range(50)] and sum(one["test"]["label"]) == 34
    assert Counter(one["validation"]["label"]) == {0: 2, 1: 4} and len(one["train"]) == 54    # a tenth of each class
    for split in (one["train"], one["validation"]):
        assert all(label == (int(text.split()[1]) >= 20) for text, label in zip(split["text"], split["label"]))
    assert {*one["train"]["text"], *one["validation"]["text"]} == {f"train {i}" for i in range(60)}
    assert all(one[name][:] == again[name][:] for name in SPLITS)
    assert one["validation"]["text"][:] != other["validation"]["text"][:]


def test_of_a_large_one_two_thousand_are_held_out(tmp_path, no_cache):
    corpus = load_labelled("imdb", path=imdb(tmp_path / "imdb", train=25_000))
    assert len(corpus["train"]) == 23_001 and Counter(corpus["validation"]["label"]) == {0: 666, 1: 1333}


def test_local_copies_of_other_sorts(tmp_path, no_cache):
    whole = load_labelled("imdb", path=imdb(tmp_path / "a", card=False, validation=9))     # has one: none is held out
    assert [len(whole[name]) for name in SPLITS] == [60, 9, 50]
    plain = load_labelled("imdb", path=imdb(tmp_path / "b", card=False, label=Value("int64")))
    assert plain["train"].features["label"].names == ["0", "1"]
    with pytest.raises(ValueError, match="9 texts are too few"):
        load_labelled("imdb", path=imdb(tmp_path / "c", card=False, train=9))
    (tmp_path / "c/plain_text/train-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="c has no split train"): load_labelled("imdb", path=tmp_path / "c")
    (tmp_path / "a/plain_text/test-00000-of-00001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConnectionError, match="Ways out: --data.path .*--data.corpus sentiment"):
        load_labelled("imdb", path=tmp_path / "a")
    table = pa.table({"text": ["a", "b"], "label": pa.array([0, None])})
    pq.write_table(table, tmp_path / "b/plain_text/test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="b, split test: text 2 has no label"):
        load_labelled("imdb", path=tmp_path / "b")


SCRIPT = """
import json, time
from flash_transformer.data import labelled
time.sleep = lambda seconds: None      # the hub's library waits long before it gives up; here it need not
splits = labelled.load_labelled("imdb")
names = splits["train"].features["label"].names
print(json.dumps([{name: len(texts) for name, texts in splits.items()}, splits["test"][0], names]))
labelled.IMDB = "stanfordnlp/nothing"
try: labelled.load_labelled("imdb")
except ConnectionError as error: print(json.dumps(str(error)))
open("bad.csv", "w").write("text,label\\na,x\\nb, c,y\\n")
try: labelled.load_labelled(train="bad.csv")
except ValueError as error: print(json.dumps(str(error)))
"""


def test_from_the_hub(tmp_path):
    imdb(tmp_path / "hub/stanfordnlp/imdb")
    environment = {k: v for k, v in os.environ.items() if not k.upper().startswith("HF_") and "PROXY" not in k.upper()}
    with HubServer(tmp_path / "hub") as hub:
        environment |= dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), PYTHONPATH=str(Path(__file__).parent.parent))
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, cwd=tmp_path, text=True,
                              capture_output=True)
    assert done.returncode == 0, done.stderr
    [sizes, first, names], message, bad = map(json.loads, done.stdout.splitlines())
    assert sizes == {"train": 54, "validation": 6, "test": 50} and names == ["neg", "pos"]
    assert first == {"text": "test 0", "label": 0}
    assert message.startswith(f"Could not load stanfordnlp/nothing from {hub.url} (") and "\n" not in message
    assert all(way in message for way in ("--data.path", "--data.train with a file", "--data.corpus sentiment"))
    assert bad.startswith("bad.csv cannot be read (ParserError") and "Failed" not in done.stderr   # it is said once


# ---- ids, classes, batches ----

@pytest.fixture(scope="module")
def tokenizers(made): return TokenizerPair.train([{"source": made["train"]["text"][:], "target": []}], "bpe", 400)


def expected(tokenizers, text, max_length):
    ids = [2, *tokenizers.encode_source([text])[0]]
    return ids if max_length is None or len(ids) <= max_length else [*ids[:max_length - 1], 3]


@pytest.mark.parametrize("max_length", [None, 3, 17, 40, 1000])
def test_batches_are_what_a_loop_gives(made, tokenizers, max_length):
    texts = LabelledTexts.encode(made["train"], tokenizers, max_length)
    rows = [expected(tokenizers, text, max_length) for text in made["train"]["text"]]
    whole = [len(expected(tokenizers, text, None)) for text in made["train"]["text"]]
    assert texts.cut == sum(n > (max_length or 10**9) for n in whole) and texts.names == ["neg", "pos"]
    assert len(texts) == 1000 and texts.source.dtype == np.uint16 and texts.classes.dtype == np.int64
    assert texts.source_lengths.tolist() == [len(row) for row in rows] and (texts.target_lengths == 1).all()
    plan = plan_batches(texts.source_lengths, texts.target_lengths, 2000, seed=3)
    assert sorted(i for indices in plan for i in indices.tolist()) == list(range(1000))
    for indices in plan[:20]:
        batch = texts.batch(indices)
        wanted = [torch.tensor(rows[i]) for i in indices]
        assert torch.equal(batch.source, torch.nn.utils.rnn.pad_sequence(wanted, batch_first=True))
        assert batch.source_lengths.tolist() == [len(row) for row in wanted]
        assert batch.labels.tolist() == [[made["train"][int(i)]["label"]] for i in indices]
        assert batch.labels.dtype == torch.int64 and batch.target.shape == (len(indices), 0)
        assert batch.target_lengths.tolist() == [1] * len(indices) and batch.tokens == len(indices)
        assert batch.segments is None


def test_texts_are_not_packed(made, tokenizers):
    texts = LabelledTexts.encode(made["test"], tokenizers)
    plan = pack_batches(texts.source_lengths, texts.target_lengths, 512, 256)
    for x, y in zip(texts.batch(plan[0], row_length=256)[:5], texts.batch(plan[0])[:5]): assert torch.equal(x, y)
    assert texts.window(3, 0) is texts and texts.window(3, 1) is None


def test_one_text_and_other_tokenizers(made, tokenizers):
    one = made["train"].select([7])
    two = TokenizerPair(tokenizers.source, TokenizerPair.train(made["test"].rename_columns(
        {"text": "source"}).add_column("target", ["x"] * 100), "char", 50).target)
    for pair in (tokenizers, two):                                         # of a pair its source side
        batch = LabelledTexts.encode(one, pair, 30).batch([0])
        assert batch.source.tolist() == [expected(tokenizers, one["text"][0], 30)]


def test_many_parts(tokenizers):
    "The tokenizer sees 10,000 texts at a time"
    n = 20_001
    data = Dataset.from_dict({"text": [f"good {i % 7}" for i in range(n)], "label": [i % 3 for i in range(n)]},
                             features=Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])}))
    texts = LabelledTexts.encode(data, tokenizers, 4)
    batch = texts.batch([0, 9_999, 10_000, 20_000])
    assert batch.labels[:, 0].tolist() == [i % 3 for i in (0, 9_999, 10_000, 20_000)]
    assert batch.source.tolist() == [expected(tokenizers, f"good {i % 7}", 4) for i in (0, 9_999, 10_000, 20_000)]


def test_bad_encoding(made, tokenizers):
    texts = made["test"]
    with pytest.raises(ValueError, match="no texts to encode"): LabelledTexts.encode(texts.select([]), tokenizers)
    with pytest.raises(ValueError, match="max_length=2 leaves no room"): LabelledTexts.encode(texts, tokenizers, 2)
    ids, offsets = np.array([2, 7, 3], np.uint16), np.array([0, 3])
    for classes, names in (([2], ["a", "b"]), ([-1], ["a", "b"]), ([0, 1], ["a", "b"]), ([0], ["a"]), ([0], ["a", "a"]),
                           ([0], "ab"), ([0], [1, 2]), ([0], [])):
        with pytest.raises(ValueError, match="class"): LabelledTexts(ids, offsets, np.array(classes), names)


def test_saved_and_mapped(made, tokenizers, tmp_path):
    texts = LabelledTexts.encode(made["train"], tokenizers, 20)
    texts.save(tmp_path / "texts")
    again = LabelledTexts.open(tmp_path / "texts")
    assert (again.names, again.cut, again.dropped) == (["neg", "pos"], texts.cut, 0) and texts.cut > 0
    assert isinstance(again.source.base.base, np.memmap) or isinstance(again.source.base, np.memmap)
    for x, y in zip(again.batch([5, 999, 0])[:5], texts.batch([5, 999, 0])[:5]): assert torch.equal(x, y)


def _replace(name, array): return lambda folder: np.save(folder / name, array)
def _about(text): return lambda folder: (folder / "labelled.json").write_text(text)


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "source.npy").write_bytes((folder / "source.npy").read_bytes()[:200]),
    lambda folder: (folder / "target.npy").write_bytes(b""), lambda folder: (folder / "pairs.json").write_text("{"),
    _replace("source.npy", np.arange(7, dtype=np.uint16)), _replace("target.npy", np.full(200, 2)),
    _replace("target.npy", np.tile([3, 1], 100)), _replace("target.npy", np.arange(7)),
    _replace("target_offsets.npy", np.array([0, 200])), _about(""), _about("[]"), _about('{"names": ["neg", "pos"]}'),
    _about('{"cut": 0, "names": ["neg"]}'), _about('{"cut": 0, "names": 3}'), _about('{"cut": 0, "names": [[], {}]}'),
])
def test_damaged(damage, made, tokenizers, tmp_path):
    folder = tmp_path / "texts"
    LabelledTexts.encode(made["test"], tokenizers).save(folder)
    damage(folder)
    with pytest.raises(ValueError, match="damaged") as caught: LabelledTexts.open(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["labelled.json", "source.npy", "target.npy", "pairs.json"])
def test_missing(name, made, tokenizers, tmp_path):
    LabelledTexts.encode(made["test"], tokenizers).save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(OSError, match=re.escape(name)): LabelledTexts.open(tmp_path)


def test_a_corpus_of_the_users_own(tokenizers):
    "Whoever has a `DatasetDict` of this layout needs no door"
    data = DatasetDict(train=Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]},
                                               features=Features({"text": Value("string"), "label": NAMES})))
    assert LabelledTexts.encode(data["train"], tokenizers).batch([0, 1]).labels.tolist() == [[1], [0]]
