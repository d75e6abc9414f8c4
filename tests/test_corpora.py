"""Corpora from files of every sort of badness, and from the hub: a local copy of its layout, and its API over HTTP."""
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer

from flash_transformer.data import load_corpus

EN, DE = "A dog runs.\nTwo men talk.\nIt rains.\n", "Ein Hund rennt.\nZwei Männer reden.\nEs regnet.\n"


def write(folder, en=EN, de=DE, name="train"):
    for language, text in ("en", en), ("de", de):
        (folder / f"{name}.{language}").write_bytes(text.encode() if isinstance(text, str) else text)
    return str(folder / name)


# ---- files ----

def test_files(tmp_path):
    corpus = load_corpus(train=write(tmp_path), test=write(tmp_path, "Hi.", "Hallo.", "test"))
    assert list(corpus) == ["train", "test"] and corpus["train"].column_names == ["source", "target"]
    assert corpus["train"]["target"][1] == "Zwei Männer reden."
    assert corpus["test"][0] == {"source": "Hi.", "target": "Hallo."}        # no newline at the end


def test_files_whatever_corpus_says_and_other_languages(tmp_path):
    prefix = write(tmp_path)
    corpus = load_corpus("wmt14", validation=prefix, source="de", target="en")
    assert list(corpus) == ["validation"] and corpus["validation"][0]["source"] == "Ein Hund rennt."


def test_gz_on_one_side(tmp_path):
    prefix = write(tmp_path)
    with gzip.open(prefix + ".de.gz", "wb") as file:
        file.write(DE.encode())
    Path(prefix + ".de").unlink()
    assert load_corpus(train=prefix)["train"]["target"][:] == DE.splitlines()


@pytest.mark.parametrize("odd", "\u2028 \u2029 \x0b \x0c \x1c \x1d \x1e \x85 \r \t \xa0".split(" "))
def test_only_newlines_end_lines(tmp_path, odd):
    "str.splitlines would see four lines, and pair every later sentence with its neighbour's translation"
    pairs = load_corpus(train=write(tmp_path, f"A{odd}dog runs.\nTwo men talk.\nIt rains.\n"))["train"]
    assert pairs["source"][:] == [f"A{odd}dog runs.", "Two men talk.", "It rains."]


def test_carriage_returns_and_byte_order_mark(tmp_path):
    pairs = load_corpus(train=write(tmp_path, b"\xef\xbb\xbf" + EN.replace("\n", "\r\n").encode()))["train"]
    assert pairs["source"][:] == EN.splitlines()


@pytest.mark.parametrize("en, de, left", [
    ("a\n\nc\n", "x\ny\nz\n", [("a", "x"), ("c", "z")]),
    ("a\nb\nc\n", "x\ny\n \t\u3000\n", [("a", "x"), ("b", "y")]),
    ("\n\nc\n", "x\n\nz\n", [("c", "z")]),
])
def test_empty_lines_go_as_pairs(tmp_path, en, de, left):
    with pytest.warns(UserWarning, match=rf"files validation: dropped {3 - len(left)} of 3 pairs .* pair \d"):
        pairs = load_corpus(validation=write(tmp_path, en, de))["validation"]
    assert list(zip(pairs["source"], pairs["target"])) == left


BAD = {   # English side, German side, what the sentence must say
    "unequal": ("a\nb\nc\n", "x\ny\n", r"train\.en has 3 lines, .*train\.de has 2"),
    "unequal, German longer": ("a\n", "x\ny\n", r"train\.en has 1 lines, .*train\.de has 2"),
    "unequal by an empty line": ("a\nb\n", "x\ny\n\n", r"train\.en has 2 lines, .*train\.de has 3"),
    "empty file": ("a\n", "", r"train\.de is empty"),
    "both empty": ("", "", r"train\.en is empty"),
    "only empty lines": ("\n\n", "x\ny\n", r"files train has no pair with text on both sides"),
    "Latin-1": (EN, DE.encode("latin-1"), r"train\.de, line 2: byte 7 \(0xe4\) is not UTF-8"),
    "cut in a character": ("a\nb\n", DE.encode()[:23], r"train\.de, line 2: byte 7 \(0xc3\) is not UTF-8"),
    "surrogate": (b"a\n\xed\xa0\x80\n", "x\ny\n", r"train\.en, line 2: byte 1 \(0xed\) is not UTF-8"),
    "NUL": ("a\nb\0b\n", "x\ny\n", r"train\.en, line 2: a NUL byte"),
    "UTF-16": (EN, DE.encode("utf-16"), r"train\.de, line 1: a NUL byte"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    en, de, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        load_corpus(train=write(tmp_path, en, de))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda b: b[:-12], lambda b: b[:-8] + b"12345678", lambda b: b"plain text\n",
                                    lambda b: b[:20] + b"\xff\xff\xff" + b[23:]])
def test_broken_gz(tmp_path, damage):
    prefix = write(tmp_path)
    Path(prefix + ".de").unlink()
    Path(prefix + ".de.gz").write_bytes(damage(gzip.compress(DE.encode())))
    with pytest.raises(ValueError, match=r"train\.de\.gz: broken \.gz"):
        load_corpus(train=prefix)


def test_unequal_across_chunks(tmp_path):
    "the reader works in chunks of 10,000 lines; the counts are of the whole files all the same"
    with pytest.raises(ValueError, match="has 25003 lines, .* has 9999"):
        load_corpus(train=write(tmp_path, "a\n" * 25_003, "x\n" * 9_999))
    pairs = load_corpus(train=write(tmp_path, *("".join(f"{c}{i}\n" for i in range(25_003)) for c in "ax")))["train"]
    assert len(pairs) == 25_003 and all(s[1:] == t[1:] == str(i)
                                        for i, (s, t) in enumerate(zip(pairs["source"], pairs["target"])))


def test_text_is_read_once_and_mapped(tmp_path, no_cache, monkeypatch):
    prefix = write(tmp_path)
    first = load_corpus(train=prefix)["train"]
    [file] = (tmp_path / "cache/flash_transformer").iterdir()
    assert [cached["filename"] for cached in first.cache_files] == [str(file)]
    monkeypatch.setattr("flash_transformer.data.corpora.read_lines", None)         # not to be called again
    again = load_corpus(train=prefix)["train"]
    assert again[:] == first[:] and again._fingerprint == first._fingerprint


def test_corrected_text_is_read_anew(tmp_path, no_cache):
    prefix = write(tmp_path)
    first = load_corpus(train=prefix)["train"]
    other = load_corpus(train=write(tmp_path, EN.replace("dog", "cat")))["train"]  # as many bytes
    assert other["source"][0] == "A cat runs." and first["source"][0] == "A dog runs."
    assert load_corpus(train=prefix, source="de", target="en")["train"]["target"][0] == "A cat runs."


def test_reading_that_breaks_off_leaves_nothing(tmp_path, no_cache):
    with pytest.raises(ValueError, match="25003 lines"): load_corpus(train=write(tmp_path, "a\n" * 25_003, "x\n" * 9))
    assert not list((tmp_path / "cache/flash_transformer").iterdir())


def test_empty_pairs_are_kept_for_those_who_clean(tmp_path, no_cache):
    prefix = write(tmp_path, "a\n\nc\n", "x\ny\nz\n")
    with pytest.warns(UserWarning, match="files test: dropped 1 of 3"):
        corpus = load_corpus(train=prefix, test=prefix, keep_empty=True)
    assert corpus["train"]["source"][:] == ["a", "", "c"] and corpus["test"]["source"][:] == ["a", "c"]


def test_very_long_line_is_kept(tmp_path):
    pairs = load_corpus(train=write(tmp_path, "ab " * 33_334 + "\nb\n", "x\ny\n"))["train"]
    assert [len(text) for text in pairs["source"]] == [100_002, 1]


def test_missing_files(tmp_path):
    write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no .*valid\.en nor .*\.gz; .*there is: train\.de, train\.en"):
        load_corpus(validation=tmp_path / "valid")
    with pytest.raises(FileNotFoundError, match=r"no .*train\.fr nor .*train\.fr\.gz"):
        load_corpus(train=tmp_path / "train", target="fr")
    with pytest.raises(FileNotFoundError, match="no such folder as .*nowhere"):
        load_corpus(train=tmp_path / "nowhere" / "train")
    with pytest.raises(FileNotFoundError, match="A split is given as PREFIX"):   # the file instead of its prefix
        load_corpus(train=tmp_path / "train.en")


@pytest.mark.parametrize("arguments, message", [
    (dict(corpus="mutli30k"), r"no corpus 'mutli30k'\. Did you mean 'multi30k'\?"),
    (dict(corpus="wmt"), r"Did you mean 'wmt14'\?"),
    (dict(corpus="zzz"), r"There is no corpus 'zzz'\. There are: toy, files, multi30k, wmt14, opus_books"),
    (dict(corpus="files"), "'files' needs a prefix"),
    (dict(corpus="toy", target="fr"), "toy corpus goes from 'en' to 'de', not from 'en' to 'fr'"),
    (dict(corpus="wmt14", source="de"), "Source and target are both 'de'"),
    (dict(corpus="toy", path="."), "path replaces the hub"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(**arguments)


# ---- the hub's layout, written here ----

def structs(*languages, n, wrong=()):
    "n translations as WMT and OPUS store them; at `wrong` the first language is empty"
    rows = [{c: "" if i in wrong and c == languages[0] else f"{c} {i}" for c in languages} for i in range(n)]
    kind = pa.struct([(c, pa.string()) for c in languages])
    return pa.table({"translation": pa.array(rows, kind)})


def card(**configs): # split names of each config
    lines = [f"- config_name: {config}\n  data_files:\n" +
             "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
             for config, splits in configs.items()]
    return "---\nconfigs:\n" + "".join(lines) + "---\nWritten by a test.\n"


SPLITS = dict(train=40, validation=5, test=6)


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for name, configs in {"wmt/wmt14": {"de-en": SPLITS, "fr-en": SPLITS},
                          "Helsinki-NLP/opus_books": {"en-it": dict(train=60)}}.items():
        repo = root / name
        for config, splits in configs.items():
            (repo / config).mkdir(parents=True)
            for split, n in splits.items():
                table = structs(*config.split("-"), n=n, wrong=(7, 9) if config == "fr-en" and split == "train" else ())
                pq.write_table(table, repo / config / f"{split}-00000-of-00001.parquet")
        (repo / "README.md").write_text(card(**configs))
    repo = root / "bentrevett/multi30k"      # JSON lines at the top, no card that says so, as the real one has it
    repo.mkdir(parents=True)
    for split, n in SPLITS.items():
        lines = [json.dumps({"en": f"en {i}", "de": f"de ü {i}"}) for i in range(n)]
        (repo / f"{'val' if split == 'validation' else split}.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def sizes(corpus): return {name: len(pairs) for name, pairs in corpus.items()}


@pytest.mark.parametrize("corpus, source, target", [
    ("wmt14", "en", "de"), ("wmt14", "de", "en"), ("multi30k", "en", "de"), ("multi30k", "de", "en")])
def test_local_copy(hub_folder, no_cache, corpus, source, target):
    name = {"wmt14": "wmt/wmt14", "multi30k": "bentrevett/multi30k"}[corpus]
    splits = load_corpus(corpus, source=source, target=target, path=hub_folder / name)
    assert sizes(splits) == SPLITS
    for pairs in splits.values():
        assert pairs.column_names == ["source", "target"]
        for i, pair in enumerate(pairs):
            for side, language in ("source", source), ("target", target):
                assert pair[side].startswith(language) and pair[side].endswith(f" {i}")


def test_local_copy_that_was_changed(hub_folder, no_cache, tmp_path):
    copy = shutil.copytree(hub_folder / "wmt/wmt14", tmp_path / "copy")
    assert sizes(load_corpus("wmt14", path=copy)) == SPLITS
    pq.write_table(structs("de", "en", n=39), copy / "de-en/train-00000-of-00001.parquet")
    assert sizes(load_corpus("wmt14", path=copy)) == SPLITS | {"train": 39}


def test_empty_sides_of_a_hub_corpus(hub_folder, no_cache):
    with pytest.warns(UserWarning, match="wmt14 train: dropped 2 of 40 pairs .*the first is pair 8"):
        splits = load_corpus("wmt14", target="fr", path=hub_folder / "wmt/wmt14")
    assert sizes(splits) == SPLITS | {"train": 38} and "fr 8" in splits["train"]["target"][:]


def test_opus_books_is_held_out_by_seed(hub_folder, no_cache):
    path = hub_folder / "Helsinki-NLP/opus_books"
    one, again, other = (load_corpus("opus_books", target="it", path=path, seed=seed) for seed in (0, 0, 1))
    assert sizes(one) == {"train": 48, "validation": 6, "test": 6}
    assert sorted(text for pairs in one.values() for text in pairs["source"]) == sorted(f"en {i}" for i in range(60))
    assert all(one[name]["target"][:] == again[name]["target"][:] for name in one)
    assert one["test"]["target"][:] != other["test"]["target"][:]
    back = load_corpus("opus_books", source="it", target="en", path=path)      # the same config, read the other way
    assert back["test"]["source"][:] == one["test"]["target"][:]


@pytest.mark.parametrize("arguments, error, message", [
    (dict(corpus="multi30k", target="fr", path="bentrevett/multi30k"), ValueError, "no language 'fr'; .* en, de"),
    (dict(corpus="wmt14", target="xx", path="wmt/wmt14"), ConnectionError, "wmt14, config xx-en.*'xx-en' not found"),
    (dict(corpus="wmt14", path="wmt/nothing"), FileNotFoundError, "There is no folder .*nothing"),
])
def test_bad_local_copy(hub_folder, no_cache, arguments, error, message):
    arguments["path"] = hub_folder / arguments["path"]
    with pytest.raises(error, match=message) as caught:
        load_corpus(**arguments)
    assert "\n" not in str(caught.value)


def test_broken_parquet(hub_folder, no_cache, tmp_path):
    (tmp_path / "de-en").mkdir()
    (tmp_path / "README.md").write_text(card(**{"de-en": ["train"]}))
    (tmp_path / "de-en/train-00000-of-00001.parquet").write_bytes(b"PAR1 is how it starts, and then no more")
    with pytest.raises(ConnectionError, match=r"Could not load .*config de-en.*Ways out"):
        load_corpus("wmt14", path=tmp_path)


def test_sample_of_wmt14(no_cache):
    folder = os.environ.get("FLASH_TRANSFORMER_DATA")
    if not folder:
        pytest.skip("FLASH_TRANSFORMER_DATA names no folder with wmt14-sample")
    if not Path(folder, "wmt14-sample").is_dir():
        pytest.skip(f"no wmt14-sample in {folder}")
    with pytest.warns(UserWarning, match="wmt14 train: dropped"):
        splits = load_corpus("wmt14", path=Path(folder, "wmt14-sample"))
    table = pq.read_table(next(Path(folder, "wmt14-sample/de-en").glob("test-*.parquet"))).to_pylist()
    assert [row["translation"]["de"] for row in table] == splits["test"]["target"][:]
    assert [row["translation"]["en"] for row in table] == splits["test"]["source"][:]


# ---- the hub itself, over HTTP: the path users take ----

SCRIPT = """
import json, sys, time
from flash_transformer.data import load_corpus
time.sleep = lambda seconds: None      # the hub's library waits 25 s in all before it gives up; here it need not
for arguments in json.loads(sys.argv[1]):
    try:
        splits = load_corpus(**arguments)
        print(json.dumps([{name: len(pairs) for name, pairs in splits.items()}, splits["test"][0]]))
    except ConnectionError as error:
        print(json.dumps(["error", str(error)]))
"""


def load_in_a_new_process(endpoint, home, *requests):
    "What `load_corpus` makes of each request; Hugging Face's libraries read their environment once, at import"
    environment = {k: v for k, v in os.environ.items() if not k.upper().startswith("HF_") and "PROXY" not in k.upper()}
    environment |= dict(HF_ENDPOINT=endpoint, HF_HOME=str(home), PYTHONPATH=str(Path(__file__).parent.parent))
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(requests)], env=environment, cwd=home,
                          capture_output=True, text=True, timeout=1200)   # only against a hang
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_from_the_hub(hub_folder, tmp_path):
    with HubServer(hub_folder) as hub:
        multi30k, wmt14, opus_books, missing = load_in_a_new_process(
            hub.url, tmp_path, dict(corpus="multi30k"), dict(corpus="wmt14", source="de", target="en"),
            dict(corpus="opus_books", target="it"), dict(corpus="wmt14", target="cs"))
        fetched = [path for method, path in hub.asked if method == "GET" and path.endswith((".parquet", ".jsonl"))]
    assert multi30k == [SPLITS, {"source": "en 0", "target": "de ü 0"}]
    assert wmt14 == [SPLITS, {"source": "de 0", "target": "en 0"}]
    assert opus_books[0] == {"train": 48, "validation": 6, "test": 6}
    assert opus_books[1]["target"] == opus_books[1]["source"].replace("en", "it")
    assert missing[0] == "error" and missing[1].startswith(f"Could not load wmt/wmt14, config cs-en, from {hub.url} (")
    # every file once, and none of the config that nobody asked for
    assert len(set(fetched)) == len([path for path in fetched if "fr-en" not in path]) == 3 + 3 + 1, fetched


def test_hub_without_the_dataset_and_out_of_reach(tmp_path):
    with HubServer(tmp_path) as hub:
        [[kind, message]] = load_in_a_new_process(hub.url, tmp_path, dict(corpus="multi30k"))
    assert kind == "error" and message.startswith(f"Could not load bentrevett/multi30k from {hub.url} (")
    # its port is closed now
    [[kind, message]] = load_in_a_new_process(hub.url, tmp_path, dict(corpus="wmt14"))
    assert kind == "error" and message.startswith(f"Could not load wmt/wmt14, config de-en, from {hub.url} (")
    assert all(way in message for way in ("--data.path", "--data.train", "--data.corpus toy")) and "\n" not in message
