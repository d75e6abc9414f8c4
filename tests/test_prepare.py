"Preparing once: what lies in the folder is taken only if it is whole, and made of the same text by the same settings"
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import ascii_letters

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flash_transformer.data import DataConfig, EncodedPairs, Prepared, TokenizerPair, corpus_of, prepare

MODULE = sys.modules[Prepared.__module__]


@pytest.fixture
def config(tmp_path):
    for split, n in ("train", 40), ("val", 5):
        for language, word in ("en", "dog"), ("de", "Hund"):
            lines = [f"{i} {word if i % 4 else ascii_letters}\n" for i in range(n)]    # every fourth is long
            (tmp_path / f"{split}.{language}").write_text("".join(lines))
    return DataConfig(train=f"{tmp_path}/train", validation=f"{tmp_path}/val", vocab_size=280, max_length=20)


def changed(config, **fields): return DataConfig(**vars(config) | fields)


def same(one, other):
    for a, b in (one.train, other.train), (one.validation, other.validation):
        assert a.dropped == b.dropped and type(b.dropped) is int
        for name in ("source", "source_offsets", "source_lengths", "target", "target_offsets", "target_lengths"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype and np.array_equal(x, y)
    assert one.tokenizers.source.to_str() == other.tokenizers.source.to_str()
    assert one.report == other.report


def test_made_once(config, tmp_path, monkeypatch, contents):
    first = prepare(config, tmp_path / "data")
    assert first.train.dropped == 10 and len(first.train) == 30
    assert len(first.validation) == 5 and first.validation.dropped == 0
    assert first.report.pairs == 40 and first.report.kept == 30 and first.report.taken == {"empty": 0, "too_long": 10}
    before = contents(tmp_path / "data")
    assert {name.split("/")[0] for name in before} == {"data.json", "report.json", "tokenizer.json", "train",
                                                       "validation"}
    for name in "corpus_of", "_learn", "_make_shard": monkeypatch.setattr(MODULE, name, None)    # not to be called
    same(first, prepare(config, tmp_path / "data"))
    assert contents(tmp_path / "data") == before


def test_the_arrays_are_what_each_sentence_gives(config, monkeypatch):
    monkeypatch.setattr(MODULE, "SHARD", 7)          # 6 shards, the last one of 5 pairs
    prepared = prepare(config)
    kept = [i for i in range(40) if i % 4]
    for split, rows in ("train", kept), ("validation", range(5)):
        text, pairs = corpus_of(config)[split], getattr(prepared, split)
        assert len(pairs) == len(rows)
        for i, row in enumerate(rows):
            batch = pairs.batch([i])
            assert batch.source.tolist() == prepared.tokenizers.encode_source([text[row]["source"]])
            assert batch.labels.tolist() == [prepared.tokenizers.encode_target([text[row]["target"]])[0][1:]]


def test_shards_do_not_show(config, monkeypatch):
    config = changed(config, clean=["duplicates", "ratio"])
    one = prepare(config)
    for size in 1, 7, 40:
        monkeypatch.setattr(MODULE, "SHARD", size)
        same(one, prepare(config))


def test_nothing_is_kept_without_a_folder(config, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    prepared = prepare(config)
    assert not list((tmp_path / "tmp").iterdir()) and prepared.train.source.sum() > 0


# ---- what is noticed ----

@pytest.mark.parametrize("fields", [
    dict(vocab_size=262), dict(max_length=100), dict(clean=["copy"]), dict(joint=False)])
def test_other_settings_are_prepared_anew(config, tmp_path, fields):
    prepare(config, tmp_path / "data")
    other = changed(config, **fields)
    same(prepare(other), prepare(other, tmp_path / "data"))
    assert not list((tmp_path / "data").glob("unfinished*"))


def test_other_text_is_prepared_anew(config, tmp_path):
    first = prepare(config, tmp_path / "data")
    for path in tmp_path / "train.de", tmp_path / "val.en":
        text = path.read_text()
        path.write_text(text.replace("1 ", "7 ", 1))                 # as many bytes
        other = prepare(config, tmp_path / "data")
        same(other, prepare(config))
        with pytest.raises(AssertionError): same(first, other)
        first = other


def test_other_text_in_a_folder_of_the_hubs_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub/de-en").mkdir(parents=True)
    (tmp_path / "hub/README.md").write_text("---\nconfigs:\n- config_name: de-en\n  data_files:\n" + "".join(
        f"  - {{split: {split}, path: de-en/{split}-*}}\n" for split in ("train", "validation")) + "---\n")
    config = DataConfig(corpus="wmt14", path=str(tmp_path / "hub"), vocab_size=280)
    for word in "dog", "cat":
        for split in "train", "validation":
            rows = [{"de": f"{word} {i}", "en": f"{i}"} for i in range(30)]
            pq.write_table(pa.table({"translation": rows}), tmp_path / f"hub/de-en/{split}-0.parquet")
        prepared = prepare(config, tmp_path / "data")
        text = prepared.tokenizers.decode_target(prepared.train.batch([3]).labels)
        assert text == [f"{word} 3"]


def test_text_that_is_gone_is_no_reason_to_stop(config, tmp_path):
    first = prepare(config, tmp_path / "data")
    (tmp_path / "train.de").unlink()
    same(first, prepare(config, tmp_path / "data"))
    with pytest.raises(FileNotFoundError): prepare(changed(config, vocab_size=262), tmp_path / "data")
    same(first, prepare(config, tmp_path / "data"))          # which has done it no harm


def test_tokenizers_given_are_kept(config, tmp_path):
    given = TokenizerPair.train(corpus_of(config)["train"], "char", 100)
    assert prepare(config, tokenizers=given).tokenizers.source.to_str() == given.source.to_str()
    prepare(config, tmp_path / "data")
    first = prepare(config, tmp_path / "data", given)        # another tokenizer than the one that lies there
    assert first.tokenizers.source.to_str() == given.source.to_str()
    same(first, prepare(config, tmp_path / "data", given))
    same(first, prepare(config, tmp_path / "data"))


# ---- cleaning, and the tokenizer's sample ----

def write(folder, name, pairs):
    for language, side in zip(("en", "de"), zip(*pairs)):
        (folder / f"{name}.{language}").write_text("".join(f"{text}\n" for text in side))


def test_rules_in_their_order(tmp_path, monkeypatch):
    pairs = [("a dog", "ein Hund"), ("", "leer"), ("a cat", "a cat"), ("a dog", "ein Hund"), ("x" * 300, "kurz"),
             ("x" * 300, "kurz"), ("a cat", "a cat"), ("the end", "das Ende"), ("a  dog", "ein Hund")]
    write(tmp_path, "train", pairs)
    write(tmp_path, "val", pairs)
    monkeypatch.setattr(MODULE, "SHARD", 2)          # the second of two equal pairs is in another shard
    config = DataConfig(train=f"{tmp_path}/train", validation=f"{tmp_path}/val", tokenizer="char", vocab_size=60,
                        max_length=50)
    taken = {"duplicates copy ratio": dict(empty=1, duplicates=4, copy=1, ratio=1, too_long=0),
             "copy duplicates": dict(empty=1, copy=2, duplicates=3, too_long=1),
             "too_long ratio copy": dict(empty=1, ratio=2, copy=2, too_long=0),
             "duplicates empty": dict(duplicates=4, empty=1, too_long=1)}
    for rules, counts in taken.items():
        prepared = prepare(changed(config, clean=rules.split()))
        assert prepared.report.taken == counts and list(prepared.report.taken) == list(counts)
        assert len(prepared.train) == prepared.report.kept == 9 - sum(counts.values())
        assert prepared.train.dropped == counts["too_long"]
        assert len(prepared.validation) == 8         # the pair that is empty goes, and no other
    assert prepared.tokenizers.decode_source(prepared.train.batch(range(3)).source) == ["a dog", "a cat", "the end"]


def test_unknown_rule(config):
    with pytest.raises(ValueError, match="no cleaning rule 'ration'. Did you mean 'ratio'"):
        prepare(changed(config, clean=["ration"]))


def test_no_pairs_left(config, tmp_path):
    with pytest.raises(ValueError, match="No training pairs left: of 40, too_long took 40."):
        prepare(changed(config, max_length=1), tmp_path / "new/data")
    assert not (tmp_path / "new").exists()


def test_the_tokenizer_learns_from_cleaned_pairs_drawn_evenly(tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(letter * 3, letter) if i % 2 else ("left out", "") for letter in letters for i in range(1000)]
    write(tmp_path, "train", pairs)
    write(tmp_path, "val", [("validated", "b")])
    config = DataConfig(train=f"{tmp_path}/train", validation=f"{tmp_path}/val", tokenizer="word", vocab_size=100)
    def words(**fields):
        found = prepare(changed(config, **fields)).tokenizers.source.get_vocab()
        return {word.strip() for word in found} - {"<pad>", "<unk>", "<s>", "</s>"}
    every = {letter * n for letter in letters for n in (1, 3)}
    assert words() == words(tokenizer_pairs=26_000) == words(tokenizer_pairs=1_000_000) == every
    sample = words(tokenizer_pairs=30)               # from A to Z, but every other pair is empty
    assert sample < every and any(letter in sample for letter in "abc") and any(letter in sample for letter in "xyz")


# ---- what breaks off ----

SCRIPT = """
import os, signal, sys
from flash_transformer.data import DataConfig
module = sys.modules["flash_transformer.data.prepare"]
module.SHARD = 3
where, at = sys.argv[1], int(sys.argv[2])
plain, calls = getattr(module, where), 0

def killed(*arguments, **more):
    global calls
    calls += 1
    if calls == at: os.kill(os.getpid(), signal.SIGKILL)
    return plain(*arguments, **more)

setattr(module, where, killed)
module.prepare(DataConfig(train=sys.argv[3], validation=sys.argv[4], vocab_size=280, max_length=20), sys.argv[5])
"""


@pytest.mark.parametrize("where, at", [("_learn", 1), ("_make_shard", 9), ("write_array", 4), ("_finish", 1)])
def test_killed_and_taken_up(config, tmp_path, monkeypatch, where, at):
    "by kill -9, with and without an earlier result in the folder"
    monkeypatch.setattr(MODULE, "SHARD", 3)
    whole, data = prepare(config), tmp_path / "data"
    arguments = [sys.executable, "-c", SCRIPT, where, str(at), config.train, config.validation, str(data)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    assert subprocess.run(arguments, env=environment).returncode == -signal.SIGKILL
    assert not (data / "data.json").exists()
    made = {path: path.stat().st_mtime_ns for path in data.glob("unfinished-*/*/??????/source.npy")}
    assert len(made) == (0 if where == "_learn" else made and 14 if where != "_make_shard" else len(made))
    if where == "_make_shard" and at == 9: assert len(made) >= 5
    finish, seen = MODULE._finish, {}

    def look(work, *rest):
        seen.update({path: path.stat().st_mtime_ns for path in work.glob("*/??????/source.npy")})
        finish(work, *rest)
    monkeypatch.setattr(MODULE, "_finish", look)
    same(whole, prepare(config, data))
    assert len(seen) == 14 and all(seen[path] == time for path, time in made.items())     # not one was made again
    assert not list(data.glob("unfinished*"))


def test_two_at_once(config, tmp_path, monkeypatch):
    "the one that comes second waits, and makes nothing again"
    make_shard, made = MODULE._make_shard, []

    def slowly(*arguments):
        made.append(arguments[-1].name)
        time.sleep(0.05)
        make_shard(*arguments)
    monkeypatch.setattr(MODULE, "SHARD", 3)
    monkeypatch.setattr(MODULE, "_make_shard", slowly)
    with ThreadPoolExecutor(2) as pool: one, other = pool.map(prepare, [config] * 2, [tmp_path / "data"] * 2)
    assert sorted(made) == [f"{number:06d}" for number in range(14)]
    same(one, other)


@pytest.mark.long
def test_killed_at_any_moment(config, tmp_path, monkeypatch):
    "again and again by the clock, until a call comes to its end"
    for language in "en", "de":
        path = tmp_path / f"train.{language}"
        path.write_text(path.read_text() * 500)
    monkeypatch.setattr(MODULE, "SHARD", 100)
    script = SCRIPT.replace("SHARD = 3", "SHARD = 100").replace("if calls == at:", "if False:")
    arguments = [sys.executable, "-c", script, "_learn", "1", config.train, config.validation, str(tmp_path / "data")]
    environment, rng, killed = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}, random.Random(0), 0
    for attempt in range(40):                # each is given some more time than the one before
        process = subprocess.Popen(arguments, env=environment)
        try:
            assert process.wait(rng.uniform(1, 2 + attempt)) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    else: raise AssertionError("no call came to its end")
    assert killed
    same(prepare(config), Prepared.load(tmp_path / "data"))


@pytest.mark.parametrize("at", range(1, 6))
def test_replacing_that_breaks_off_leaves_nothing_that_counts(config, tmp_path, monkeypatch, at):
    "whichever of the last moves fails: never a mixture of two results"
    prepare(config, tmp_path / "data")
    other, plain, calls = changed(config, vocab_size=262), os.replace, []
    whole = prepare(other)

    def fails(source, target):
        calls.append(target)
        if len(calls) == at: raise KeyboardInterrupt
        plain(source, target)
    monkeypatch.setattr(MODULE.os, "replace", fails)
    try: prepare(other, tmp_path / "data")
    except KeyboardInterrupt: assert len(calls) == at
    else: assert len(calls) < at
    monkeypatch.undo()
    same(prepare(other, tmp_path / "data"), whole)
    same(prepare(config, tmp_path / "data"), prepare(config))


@pytest.mark.parametrize("at", [1, 5, 9])
def test_a_full_disk(config, tmp_path, monkeypatch, at):
    first, plain, calls = prepare(config, tmp_path / "data"), MODULE.write_array, []
    encoded = EncodedPairs.save

    def full(*arguments):
        calls.append(1)
        if len(calls) == at: raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*arguments)
    monkeypatch.setattr(MODULE, "write_array", full)
    monkeypatch.setattr(sys.modules[EncodedPairs.__module__], "write_array", full)
    monkeypatch.setattr(MODULE, "SHARD", 39)
    other = changed(config, vocab_size=262)
    with pytest.raises(OSError, match="no space left for .*data: make room, start again"):
        prepare(other, tmp_path / "data")
    assert EncodedPairs.save is encoded
    same(first, Prepared.load(tmp_path / "data"))              # what was there is there
    same(prepare(other, tmp_path / "data"), prepare(other))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
def test_a_really_full_disk():
    with pytest.raises(OSError) as told: MODULE.write_array("/dev/full", np.int32, 1000, [np.zeros(1000, np.int32)])
    assert told.value.errno == errno.ENOSPC


def test_unfinished_work_of_other_settings_goes(config, tmp_path):
    (tmp_path / "data/unfinished-0123456789abcdef/x").mkdir(parents=True)
    prepare(config, tmp_path / "data")
    assert not list((tmp_path / "data").glob("unfinished*"))


# ---- damage ----

@pytest.mark.parametrize("content", ["", '{"corpus": "to', "[]", "null", "{}", '{"stamp": 3}'])
def test_broken_settings_are_no_settings(config, tmp_path, content):
    first = prepare(config, tmp_path / "data")
    (tmp_path / "data/data.json").write_text(content)
    (tmp_path / "data/train/source.npy").unlink()
    (tmp_path / "data/train/source.npy").write_bytes(b"")
    same(first, prepare(config, tmp_path / "data"))


@pytest.mark.parametrize("name, content", [
    ("train/source.npy", b""), ("train/target_offsets.npy", b"x" * 100), ("validation/target.npy", None),
    ("train/pairs.json", b"{}"), ("report.json", b"[]"), ("tokenizer.json", b"{}"), ("tokenizer.json", None)])
def test_damaged_afterwards(config, tmp_path, name, content):
    prepare(config, tmp_path / "data")
    path = tmp_path / "data" / name
    path.unlink()
    if content is not None: path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)) as told:
        Prepared.load(tmp_path / "data")
    assert "\n" not in str(told.value)


def test_both_splits_are_needed(config):
    with pytest.raises(ValueError, match="needs a validation split.*--data.validation"):
        prepare(changed(config, validation=None))


def test_the_settings_are_plain_json(config, tmp_path):
    prepare(config, tmp_path / "data")
    written = json.loads((tmp_path / "data/data.json").read_text())
    assert written.pop("stamp") and DataConfig(**written) == config


def test_a_copy_of_the_folder_will_do(config, tmp_path):
    first = prepare(config, tmp_path / "data")
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    same(first, prepare(config, tmp_path / "elsewhere"))


# ---- the benchmark ----

@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_benchmark_of_scale(tmp_path):
    from flash_transformer.data import toy_corpus
    (tmp_path / "toy/de-en").mkdir(parents=True)
    for split, pairs in toy_corpus(2000, 50, 50).items():
        rows = [{"de": pair["target"], "en": pair["source"]} for pair in pairs]
        pq.write_table(pa.table({"translation": rows}), tmp_path / f"toy/de-en/{split}-00000-of-00001.parquet")
    script = Path(__file__).parent.parent / "benchmarks/scale.py"
    subprocess.run([sys.executable, script, tmp_path / "toy", "--pairs", "3000", "6000", "--tokenizer_pairs", "1000",
                    "--work", tmp_path, "--out", tmp_path / "scale.json"], check=True)
    found = json.loads((tmp_path / "scale.json").read_text())
    assert list(found["sizes"]) == ["3000", "6000"]
    for pairs, stages in found["sizes"].items():
        assert stages["cache"]["pairs"] == stages["clean and encode"]["pairs"] == int(pairs)
        assert stages["tokenizer"]["pairs"] == 1000 and len(stages["20 steps"]["losses"]) == 4
        assert stages["plan"]["pairs"] == stages["first batch"]["pairs"] == stages["clean and encode"]["kept"]
        assert all(50 < stage["peak_anon_mb"] <= stage["peak_resident_mb"] for stage in stages.values())
    assert not [p for p in tmp_path.iterdir() if p.is_dir() and p.name != "toy"]     # cleaned up
