"Cleaning: each rule against what Python's own strings and Unicode tables say, parts against the whole, reports."
import json
import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_transformer.data import RULES, Report, check_rules, first_occurrences, pair_hashes, taken_by
from flash_transformer.data.cleaning import LATER, SCRIPT_OF, copy, duplicates, empty, ratio, script, too_long

HOW = SimpleNamespace(source="en", target="de", max_ratio=2.0, max_length=5)
PAIRWISE = [name for name in RULES if name not in LATER]

# few characters, so that pairs are often alike: letters with and without case, all kinds of space, other scripts
CHARACTERS = "aA bBß  \t\n\r\x0b\x1c\x85\xa0\u2003\u2028\u3000\u200b\u00ad.7яЖ東カαé�"
TEXTS = st.text(st.sampled_from(CHARACTERS), max_size=8)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), max_size=30)


def columns(pairs, type="string"):
    return [pa.array([pair[side] for pair in pairs], type) for side in (0, 1)]


def tidy(text): return " ".join(text.split())


def test_the_rules_there_are():
    assert list(RULES) == ["empty", "ratio", "script", "copy", "duplicates", "too_long"]
    for rule in RULES.values():                       # the report prints it: one sentence, one line
        assert rule.__doc__ and "\n" not in rule.__doc__ and not rule.__doc__.endswith(".")


# ---- each rule ----

@pytest.mark.parametrize("nothing", ["", " ", "\t\r\n", "\u00a0", "\u200b", "\ufeff", "\u3000\u2028", "\x00\x07", None])
def test_empty(nothing):
    assert empty(*columns([(nothing, "b"), ("a", nothing), (nothing, nothing), ("a", "b")])).tolist() == [1, 1, 1, 0]


@given(PAIRS)
@settings(deadline=None)
def test_ratio_is_of_characters(pairs):
    expected = [max(len(s), len(t)) > 2 * (min(len(s), len(t)) + 5) for s, t in pairs]
    assert ratio(*columns(pairs), HOW).tolist() == expected


def test_ratio_at_the_edge():
    pairs = [("ö" * 30, "o" * 10), ("ö" * 31, "o" * 10), ("o" * 10, "東" * 31), ("o" * 11, "ö"), ("o" * 13, "ö"),
             ("a", None)]
    assert ratio(*columns(pairs), HOW).tolist() == [0, 1, 1, 0, 1, 0]
    assert ratio(*columns(pairs), SimpleNamespace(max_ratio=3.0)).sum() == 0


@pytest.mark.parametrize("wrong", [0.99, 0, -2.0, float("nan")])
def test_ratio_less_than_one(wrong):
    with pytest.raises(ValueError, match=f"max_ratio={wrong}"):
        ratio(*columns([("a", "b")]), SimpleNamespace(max_ratio=wrong))


OWN = {"en": "The bridge is old.", "de": "Die Brücke heißt so.", "vi": "Cây cầu này đã cũ.", "tr": "Köprü eskiydi, ığ.",
       "ru": "Мост старый.", "uk": "Міст її старий, ґ.", "el": "Η γέφυρα είναι παλιά.", "hy": "Կամուրջը հին է։",
       "ka": "ხიდი ძველია.", "he": "הגשר ישן.", "ar": "الجسر قديم.", "fa": "پل قدیمی است.", "hi": "पुल पुराना है।",
       "bn": "সেতুটি পুরানো।", "ta": "பாலம் பழையது.", "th": "สะพานเก่า", "am": "ድልድዩ አሮጌ ነው።", "zh": "桥很旧。",
       "ja": "この橋はメーカーが古い。", "ko": "다리가 오래되었다."}


@pytest.mark.parametrize("language", OWN)
def test_script_of_each_language(language):
    how = SimpleNamespace(source=language, target="xx")
    other = [text for code, text in OWN.items() if not set(SCRIPT_OF[code]) & set(SCRIPT_OF[language])]
    texts = [OWN[language], "2026 – 17 %!", "", None, *other]
    expected = [False] * 4 + [True] * len(other)
    assert script(pa.array(texts), pa.array(texts), how).tolist() == expected
    how = SimpleNamespace(source="xx", target=language)
    assert script(pa.array(texts), pa.array(texts), how).tolist() == expected


def by_script(text, language):
    return script(pa.array([text]), pa.array(["x"]), SimpleNamespace(source=language, target="en"))[0]


def test_every_script_is_one_that_the_regular_expressions_know():
    for language in SCRIPT_OF: assert not by_script("1", language)


def test_script_takes_a_share():
    def letters(foreign, n, c="я"): return "a" * (n - foreign) + " 7 ." + c * foreign
    of = by_script
    assert [of(letters(k, 100), "de") for k in (0, 3, 4, 100)] == [0, 0, 1, 1]
    assert [of(letters(k, 100, "\ufffd"), "de") for k in (3, 4)] == [0, 1]         # no character at all
    assert [of(letters(100 - k, 100), "ru") for k in (49, 50, 51)] == [0, 0, 1]    # k Latin letters of 100
    assert not of("3 µm ʼ 7 µF", "en") and not of("µµµ ー", "ru")                   # letters of no script in particular
    assert of("Größe".encode().decode("cp1251"), "de") and not of("Größe", "de")
    assert [of("мост", code) for code in ("de-AT", "de_CH", "DE", "sr", "nonsense", "ru-RU")] == [1, 1, 1, 0, 0, 0]


@given(PAIRS)
@settings(deadline=None)
def test_copy(pairs):
    assert copy(*columns(pairs)).tolist() == [tidy(s).lower() == tidy(t).lower() for s, t in pairs]


@given(PAIRS)
@settings(deadline=None)
def test_duplicates_and_hashes(pairs):
    keys, seen = [(tidy(s), tidy(t)) for s, t in pairs], set()
    expected = [key in seen or seen.add(key) is not None for key in keys]
    assert duplicates(*columns(pairs)).tolist() == expected
    hashes = pair_hashes(*columns(pairs))
    assert hashes.dtype == np.uint64 and hashes.shape == (len(pairs),)
    assert len(set(hashes.tolist())) == len(set(keys))


def test_where_one_side_ends_counts():
    pairs = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("a b", "c"), ("a", "b c")]
    assert len(set(pair_hashes(*columns(pairs)))) == len(pairs)


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 20), max_size=200))
@settings(max_examples=200, deadline=None)
def test_first_occurrences(numbers):
    expected = [n not in numbers[:i] for i, n in enumerate(numbers)]
    assert first_occurrences(np.array(numbers, np.uint64)).tolist() == expected


def test_first_occurrences_of_many_in_little_memory():
    hashes = np.random.default_rng(0).integers(0, 2**64, 500_000, np.uint64)
    hashes[400_000:] = hashes[:100_000]
    tracemalloc.start()
    first = first_occurrences(hashes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first[:400_000].all() and not first[400_000:].any()
    assert peak <= 8 * len(hashes)
    assert first_occurrences(hashes[::2]).sum() == 200_000      # an array that is not in one piece


def test_too_long_is_of_tokens():
    assert too_long(np.array([5, 6, 1]), np.array([5, 1, 9]), HOW).tolist() == [0, 1, 1]


@pytest.mark.parametrize("name", [*PAIRWISE, "duplicates"])
def test_any_kind_of_column(name):
    pairs = [("Hallo  Welt", "hallo welt"), (None, "b"), ("a", "яяя"), ("a", "яяя"), ("a" * 30, "b"), ("one", "eins")]
    plain = RULES[name](*columns(pairs), HOW)
    assert plain.dtype == bool and plain.shape == (len(pairs),) and plain.any()
    assert (RULES[name](*columns(pairs, "large_string"), HOW) == plain).all()
    chunked = [pa.chunked_array([column.slice(0, 2), column.slice(2, 0), column.slice(2)]) for column in columns(pairs)]
    assert (RULES[name](*chunked, HOW) == plain).all()
    sliced = [pa.concat_arrays([column, column]).slice(3, 6) for column in columns(pairs)]
    assert (RULES[name](*sliced, HOW) == RULES[name](*columns(pairs[3:] + pairs[:3]), HOW)).all()
    nothing = RULES[name](*columns([]), HOW)
    assert nothing.dtype == bool and nothing.shape == (0,)


# ---- several rules, parts, and the report ----

@given(PAIRS, st.permutations(list(RULES)), st.integers(0, 6), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_parts_and_order(pairs, rules, used, size):
    rules = rules[:used]
    source, target = columns(pairs)
    taker = taken_by(source, target, HOW, rules)
    alone = {name: RULES[name](source, target, HOW) for name in rules if name in PAIRWISE}
    for i, who in enumerate(taker):
        takes = [n for n, name in enumerate(rules) if name in alone and alone[name][i]]
        assert who == (takes[0] if takes else -1)
    whole, by_parts = Report(), Report()
    whole.add(rules, taker)
    for start in range(0, len(pairs), size):
        part = taken_by(source.slice(start, size), target.slice(start, size), HOW, rules)
        assert (part == taker[start:start + size]).all()
        by_parts.add(rules, part)
    assert whole.kept == (taker < 0).sum() and list(whole.taken) == rules
    if pairs: assert by_parts == whole


def test_report(tmp_path):
    report = Report()
    report.add(["empty", "duplicates"], np.array([0, -1, -1, 0, -1] * 400, np.int8))
    report.take("duplicates", np.int64(3)); report.take("too_long", 1)
    assert (report.pairs, report.taken, report.kept) == (2000, {"empty": 800, "duplicates": 3, "too_long": 1}, 1196)
    lines = str(report).splitlines()
    assert [line.split()[:2] for line in lines] == [["pairs", "2,000"], ["empty", "800"], ["duplicates", "3"],
                                                    ["too_long", "1"], ["kept", "1,196"]]
    assert len({line.index("%") for line in lines}) == 1                                     # aligned
    for name, line in zip(report.taken, lines[1:]): assert line.endswith(RULES[name].__doc__)
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["kept"] == 1196
    assert str(Report()).split() == ["pairs", "0", "0.00%", "kept", "0", "0.00%"]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"pairs": 3}', '{"pairs": 3, "taken": 4}',
                                  '{"pairs": null, "taken": {}}', '{"pairs": 3, "taken": {"magic": 1}}',
                                  '{"pairs": 3, "taken": {"empty": "many"}}', b"\xff\xfe"])
def test_a_report_that_is_damaged(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="report.json is no report"): Report.load(path)


def test_names_of_rules():
    check_rules([]); check_rules(list(RULES))
    with pytest.raises(ValueError, match="'ration'.*mean 'ratio'.*empty, ratio"): check_rules(["empty", "ration"])
    with pytest.raises(ValueError, match="no cleaning rule 3"): check_rules([3])
    with pytest.raises(ValueError, match="'copy' is named more than once"): check_rules(["copy", "empty", "copy"])


# ---- the sample of WMT14 ----

@pytest.mark.skipif("FLASH_TRANSFORMER_DATA" not in os.environ, reason="FLASH_TRANSFORMER_DATA names no folder")
def test_the_sample_that_the_chapter_tells_of():
    measured = json.loads((Path(__file__).parent.parent / "benchmarks/results/cleaning.json").read_text())
    files = sorted(map(str, Path(os.environ["FLASH_TRANSFORMER_DATA"]).glob("wmt14-sample/de-en/train-*.parquet")))
    table = ds.dataset(files).to_table().flatten()
    source, target = (table[f"translation.{language}"] for language in ("en", "de"))
    assert len(table) == measured["pairs"]
    for name in [*PAIRWISE, "duplicates"]:
        assert RULES[name](source, target, HOW).sum() == measured["rules"][name]["alone"], name
    report = Report()
    report.add(PAIRWISE, taken_by(source, target, HOW, PAIRWISE))
    assert report.taken == {name: measured["rules"][name]["in_order"] for name in PAIRWISE}
