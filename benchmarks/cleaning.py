"""What the cleaning rules take from a corpus, for the chapter on cleaning.

    python benchmarks/cleaning.py DATA

DATA is a folder of the hub's layout for WMT14, DATA/de-en/train-*.parquet. Counts, times and histograms go to
benchmarks/results/cleaning.json; no sentence does. What somebody found by reading pairs is no output of a program:
it is given by --read, and stays in the file until it is given anew:

    --read "ratio above 2" 50 31 17     # of 50 pairs read 31 were no translation, 17 half of one, the rest was fine
"""
import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds
from datasets import Dataset

from flash_transformer.data import RULES, Report, TokenizerPair, taken_by
from flash_transformer.data.cleaning import LATER, copy, first_occurrences, pair_hashes

PART = 10_000 # pairs that are cleaned at a time
RATIOS = np.arange(-4, 4.01, 1 / 8) # edges of the histogram, exponents of two
THRESHOLDS = np.arange(1.25, 4.01, 0.25).tolist()


def lengths_of(column): return np.asarray(pc.fill_null(pc.utf8_length(column), 0))


def histogram(source, target, rows):
    "How often target is so many times as long as source"
    s, t = source[rows], target[rows]
    both = (s > 0) & (t > 0)
    return np.histogram(np.clip(np.log2(t[both] / s[both]), RATIOS[0], RATIOS[-1]), RATIOS)[0].tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="a folder of the hub's layout")
    parser.add_argument("--source", default="en")
    parser.add_argument("--target", default="de")
    parser.add_argument("--max_ratio", type=float, default=2.0)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--read", nargs=4, action="append", metavar=("WHAT", "READ", "UNRELATED", "HALF"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/cleaning.json")
    options = parser.parse_args()
    files = sorted(map(str, options.data.glob("*/train-*.parquet")))
    if not files: parser.error(f"there is no */train-*.parquet in {options.data}")
    table = ds.dataset(files).to_table().flatten()
    source, target = (table[f"translation.{language}"] for language in (options.source, options.target))
    n = len(table)

    texts, rules = [name for name in RULES if name not in LATER], list(RULES)
    gone, seconds, hashes, taker = {name: np.zeros(n, bool) for name in rules}, {}, [], []
    for start in range(0, n, PART):
        part = [column.slice(start, PART).combine_chunks() for column in (source, target)]
        for name in texts:                        # each alone: what it takes, and the best of three times
            times = []
            for _ in range(3):
                begin = time.process_time()
                gone[name][start:start + PART] = RULES[name](*part, options)
                times.append(time.process_time() - begin)
            seconds[name] = seconds.get(name, 0) + min(times)
        taker.append(taken_by(*part, options, texts))
        begin = time.process_time()
        hashes.append(pair_hashes(*part))
        seconds["duplicates"] = seconds.get("duplicates", 0) + time.process_time() - begin
    hashes, taker = np.concatenate(hashes), np.concatenate(taker)
    begin = time.process_time()
    gone["duplicates"] = ~first_occurrences(hashes)
    seconds["duplicates"] += time.process_time() - begin

    # tokens: the vocabulary is learned from what the other rules leave
    report = Report()
    report.add(texts, taker)
    kept = np.flatnonzero(taker < 0)
    kept = kept[first_occurrences(hashes[kept])]
    report.take("duplicates", report.kept - len(kept))
    clean = Dataset.from_dict({"source": source.take(kept).to_pylist(), "target": target.take(kept).to_pylist()})
    tokenizers = TokenizerPair.train(clean, "bpe", 8000)
    tokens = (np.array([len(ids) for ids in tokenizers.encode_source(source.to_pylist())]),
              np.array([len(ids) - 1 for ids in tokenizers.encode_target(target.to_pylist())]))   # without <s>
    begin = time.process_time()
    gone["too_long"] = RULES["too_long"](*tokens, options)
    seconds["too_long"] = time.process_time() - begin
    report.take("too_long", gone["too_long"][kept].sum())
    kept = kept[~gone["too_long"][kept]]
    print(report)

    s, t = lengths_of(source), lengths_of(target)
    copied = copy(source, target)
    measured = {
        "pairs": n, "kept": report.kept, "max_ratio": options.max_ratio, "max_length": options.max_length,
        "characters": [round(float(s.mean()), 1), round(float(t.mean()), 1)],
        "rules": {name: {"alone": int(gone[name].sum()), "in_order": report.taken[name],
                         "microseconds": round(seconds[name] / n * 1e6, 2)} for name in rules},
        "longest_copy": int(s[copied].max(initial=0)),
        "taken_by_max_ratio": {str(r): int(RULES["ratio"](source, target, SimpleNamespace(max_ratio=r)).sum())
                               for r in THRESHOLDS},
        "log2_ratio": {"edges": RATIOS.tolist(), "before": histogram(s, t, slice(None)),
                       "after": histogram(s, t, kept)},
    }
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    measured["read"] = before.get("read", {}) | {
        what: {"read": int(read), "unrelated": int(unrelated), "half": int(half)}
        for what, read, unrelated, half in options.read or []}
    options.out.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__": main()
