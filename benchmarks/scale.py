"""What a corpus of millions of pairs costs, stage by stage, for the chapter on WMT14.

    python benchmarks/scale.py DATA [--pairs 1000000 4500000] [--work FOLDER]

DATA is a folder of the hub's layout for WMT14 with a few thousand training pairs, DATA/de-en/train-*.parquet. From them
corpora of so many pairs are made by variation. Every stage then runs in a process of its own, whose memory is sampled
every 50 ms: what belongs to it alone (RssAnon), and all that is resident, pages of mapped files among it. Needs Linux's
/proc. Times and sizes, no sentences, go to benchmarks/results/scale.json.

Each copy of the pairs is another one: a word in six is replaced by a word from anywhere in the same language, so that
no sentence comes twice and the frequencies stay; digits are others; and in as many words as it takes two letters are
replaced, so that a text has as many different words as one of that length would have. What that number is follows from
the sample by Heaps' law. One pair in a hundred stays as it is, a duplicate.
"""
import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

LANGUAGES = ("de", "en")
STAGES = ("cache", "tokenizer", "clean and encode", "plan", "first batch", "20 steps")
FILE = 250_000     # pairs of one Parquet file
RECIPE = {
    "data": {"corpus": "wmt14", "vocab_size": 37_000, "max_length": 256,
             "clean": ["empty", "ratio", "script", "copy", "duplicates"], "max_ratio": 2.0},
    "model": {"d_model": 128, "d_ff": 512, "heads": 4, "encoder_layers": 2, "decoder_layers": 2},
    "train": {"max_steps": 20, "tokens_per_batch": 512, "warmup_steps": 10, "log_every": 5, "checkpoint_every": 20,
              "keep_checkpoints": 1, "average": 1}}


# ---- the corpus ----

def words_of(text): # Arrow strings -> all words, where each sentence's begin
    split = pc.split_pattern(text, " ")
    return split.flatten(), split.offsets.to_numpy()


def different(words): return len(pc.unique(words))


def expected(sentences, pairs):
    "Different words in so many pairs: from those in a half and in all of the sample, by Heaps' law"
    half, all_ = (different(words_of(sentences[:n])[0]) for n in (len(sentences) // 2, len(sentences)))
    return all_ * (pairs / len(sentences)) ** np.log2(all_ / half)


class Variations:
    "Copies of a sample, each another one"
    def __init__(self, sample): # {language: Arrow strings}
        self.sample, self.n = sample, len(sample["en"])
        self.words = {language: words_of(text) for language, text in sample.items()}
        self.shard = 50_000
        self.changed = {language: self._share(language) for language in LANGUAGES}

    def _share(self, language):
        "Which share of words must be changed, so that a shard has as many different ones as it should"
        words, share, stays = self.words[language][0], 0.05, np.zeros(self.n, bool)
        wanted, given = expected(self.sample[language], self.shard), different(words)
        for _ in range(4):
            self.changed = {language: share}
            copies = [self._side(np.random.default_rng(i), language, stays) for i in range(-(-self.shard // self.n))]
            found = different(words_of(pa.chunked_array(copies).slice(0, self.shard).combine_chunks())[0])
            share = min(1., share * max(0.1, (wanted - given) / max(1, found - given)))
        return share

    def copy(self, number): # -> {language: Arrow strings}
        rng = np.random.default_rng(number)
        stays = rng.random(self.n) < 0.01
        return {language: self._side(rng, language, stays) for language in LANGUAGES}

    def _side(self, rng, language, stays):
        words, offsets = self.words[language]
        where = np.arange(len(words))
        swapped = rng.random(len(words)) < 1 / 6
        where[swapped] = rng.integers(0, len(words), swapped.sum())
        words = words.take(pa.array(where))
        at, letters = int(rng.integers(0, 4)), "".join(chr(97 + i) for i in rng.integers(0, 26, 2))
        words = self._replace(words, rng.random(len(words)) < self.changed[language],
                              lambda some: pc.utf8_replace_slice(some, at, at + 2, letters))
        digit = str(rng.integers(0, 10))
        words = self._replace(words, np.asarray(pc.match_substring_regex(words, r"\d\d")),
                              lambda some: pc.replace_substring_regex(some, r"\d(\d)", rf"\1{digit}"))
        text = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), words), " ")
        return pc.if_else(pa.array(stays), self.sample[language], text)

    @staticmethod
    def _replace(words, which, change):
        which = pa.array(which)
        return pc.replace_with_mask(words, which, change(words.filter(which)))


def make_corpus(data, pairs, folder):
    "A corpus of the hub's layout -> figures of its first shard"
    read = pq.read_table(next(data.glob("*/train-*.parquet"))).flatten().combine_chunks()
    sample = {language: read[f"translation.{language}"].chunk(0) for language in LANGUAGES}
    variations, files = Variations(sample), -(-pairs // FILE)
    (folder / "de-en").mkdir(parents=True)
    splits = "".join(f"  - {{split: {split}, path: de-en/{split}-*}}\n" for split in ("train", "validation", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: de-en\n  data_files:\n{splits}---\n")
    for path in data.glob("*/*.parquet"):
        if not path.name.startswith("train"): shutil.copy(path, folder / "de-en" / path.name)

    def write(number):
        first, last = number * FILE, min(pairs, (number + 1) * FILE)
        copies = [variations.copy(i) for i in range(first // variations.n, -(-last // variations.n))]
        sides = [pa.chunked_array([copy[language] for copy in copies]).slice(first % variations.n, last - first)
                 .combine_chunks() for language in LANGUAGES]
        pq.write_table(pa.table({"translation": pa.StructArray.from_arrays(sides, LANGUAGES)}),
                       folder / "de-en" / f"train-{number:05d}-of-{files:05d}.parquet", row_group_size=10_000)
    with ThreadPoolExecutor(os.cpu_count()) as pool: list(pool.map(write, range(files)))
    table = pq.read_table(folder / "de-en" / f"train-00000-of-{files:05d}.parquet").flatten()[:variations.shard]
    first = {language: table[f"translation.{language}"].combine_chunks() for language in LANGUAGES}
    return {language: {"characters_a_sentence": round(float(pc.mean(pc.utf8_length(text)).as_py()), 1),
                       "words_a_sentence": round(len(words_of(text)[0]) / len(text), 1),
                       "different_words": different(words_of(text)[0]),
                       "different_words_expected": round(expected(sample[language], len(text)))}
            for language, text in first.items()}


# ---- the stages, each in a process of its own ----

def stage(name, place):
    started = time.perf_counter()
    import datasets
    datasets.disable_progress_bars()
    from flash_transformer.config import load_recipe
    from flash_transformer.data import Prepared, TokenizerPair, plan_batches, prepare
    from flash_transformer.data.prepare import _Drawn, corpus_of
    config = load_recipe(place / "recipe.yaml").data
    run, told = place / "run", {}
    begun = time.perf_counter()                      # importing is no part of a stage, but of "first batch"
    if name == "cache": told["pairs"] = len(corpus_of(config, keep_empty=True)["train"])
    if name == "tokenizer":
        train = corpus_of(config, keep_empty=True)["train"]
        begun, drawn = time.perf_counter(), _Drawn(train, config, config.clean)
        TokenizerPair.train(drawn, config.tokenizer, config.vocab_size, config.joint).save(place / "tokenizer")
        told["pairs"] = len(drawn)
    if name == "words":                              # not measured: how many different ones the tokenizer saw
        drawn, seen = _Drawn(corpus_of(config, keep_empty=True)["train"], config, config.clean), set()
        for part in drawn: seen.update(*(text.split(" ") for side in part.values() for text in side))
        told["different_words"] = len(seen)
    if name == "clean and encode":
        prepared = prepare(config, run / "data", TokenizerPair.load(place / "tokenizer"))
        told |= {"pairs": prepared.report.pairs, "kept": prepared.report.kept, "taken": prepared.report.taken,
                 "tokens": [len(prepared.train.source), len(prepared.train.target)]}
    if name == "plan":
        train = Prepared.load(run / "data").train
        begun = time.perf_counter()
        told |= {"pairs": len(train), "batches": len(plan_batches(train.source_lengths, train.target_lengths, 25_000))}
    if name == "first batch":
        begun, prepared = started, prepare(config, run / "data")
        train = prepared.train
        plan = plan_batches(train.source_lengths, train.target_lengths, 25_000)
        told |= {"pairs": len(train), "tokens": train.batch(plan[0]).tokens}
    if name == "20 steps":
        from flash_transformer.cli import main
        assert main(["train", "--config", str(place / "recipe.yaml"), "--run", str(run)]) == 0
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        told["losses"] = [round(line["plain_loss"], 3) for line in steps if "plain_loss" in line]
    print(json.dumps(told | {"seconds": round(time.perf_counter() - begun, 2)}))


def tree(pid):
    "A process and all that it started"
    pids = [pid]
    for parent in pids:
        try: pids += [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
        except OSError: pass
    return pids


def memory(pid): # -> (RssAnon, VmRSS) of the tree, bytes
    sums = [0, 0]
    for one in tree(pid):
        try: lines = Path(f"/proc/{one}/status").read_text().splitlines()
        except OSError: continue
        for line in lines:
            for i, key in enumerate(("RssAnon:", "VmRSS:")):
                if line.startswith(key): sums[i] += 1024 * int(line.split()[1])
    return sums


def measure(name, place):
    "Run a stage in a process of its own -> what it tells, and its memory"
    environment = os.environ | {"HF_DATASETS_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1",
                                "PYTHONPATH": str(Path(__file__).parent.parent)}
    os.sync()
    start, peaks = time.perf_counter(), [0, 0]
    with open(place / "errors.txt", "w+") as errors:
        process = subprocess.Popen([sys.executable, __file__, "--stage", name, "--work", str(place)], env=environment,
                                   stdout=subprocess.PIPE, stderr=errors, text=True)
        while process.poll() is None:
            peaks = [max(pair) for pair in zip(peaks, memory(process.pid))]
            time.sleep(0.05)
        if process.returncode: raise SystemExit(f"{name} failed: {(place / 'errors.txt').read_text()[-2000:]}")
    told = json.loads(process.stdout.read().splitlines()[-1])
    if name in ("cache", "tokenizer", "clean and encode"):
        told["pairs_per_second"] = round(told["pairs"] / told["seconds"])
    return told | {"process_seconds": round(time.perf_counter() - start, 2), "peak_anon_mb": round(peaks[0] / 1e6),
                   "peak_resident_mb": round(peaks[1] / 1e6)}


# ---- the table ----

def told_of(sizes): # {pairs: {stage: figures}} -> lines
    lines = [f"{'stage':<17} {'pairs':>10} {'seconds':>8} {'pairs/s':>9} {'own memory':>11} {'resident':>9}"]
    for name in STAGES:
        for pairs, stages in sizes.items():
            s = stages[name]
            seconds = s["process_seconds"] if name == "first batch" else s["seconds"]
            lines.append(f"{name:<17} {int(pairs):>10,} {seconds:>8.1f} {s.get('pairs_per_second', ''):>9} "
                         f"{s['peak_anon_mb']:>8,} MB {s['peak_resident_mb']:>6,} MB")
    small, large = list(sizes)[0], list(sizes)[-1]
    if small != large:
        for name in STAGES:
            more = 1e6 * (sizes[large][name]["peak_anon_mb"] - sizes[small][name]["peak_anon_mb"])
            lines.append(f"{name}: {more / (int(large) - int(small)):.1f} bytes of own memory for each pair more")
        lines.append("(the lengths alone are 8)")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", help="a folder of the hub's layout")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000, 4_500_000])
    parser.add_argument("--tokenizer_pairs", type=int, default=200_000, help="that the tokenizer learns from")
    parser.add_argument("--work", type=Path, help="folder for the corpora, some 6 GB; a temporary one if not given")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/scale.json")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage: return stage(options.stage, options.work)
    if not options.data or not list(options.data.glob("*/train-*.parquet")):
        parser.error(f"there is no */train-*.parquet in {options.data}")
    import datasets
    import tokenizers
    import torch
    import yaml
    result = {"cores": os.cpu_count(), "machine": platform.machine(), "tokenizer_pairs": options.tokenizer_pairs,
              "versions": {m.__name__: m.__version__ for m in (np, pa, datasets, tokenizers, torch)},
              "corpus": {}, "sizes": {}}
    work = Path(tempfile.mkdtemp(dir=options.work))
    try:
        for pairs in sorted(options.pairs):
            place = work / str(pairs)
            start = time.perf_counter()
            result["corpus"][pairs] = make_corpus(options.data, pairs, place / "corpus")
            print(f"{pairs:,} pairs made in {time.perf_counter() - start:.0f} s", flush=True)
            data = {"path": str(place / "corpus"), "tokenizer_pairs": options.tokenizer_pairs}
            (place / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"data": RECIPE["data"] | data}))
            result["sizes"][pairs] = {}
            for name in STAGES:
                result["sizes"][pairs][name] = told = measure(name, place)
                print(f"  {name}: {told['process_seconds']} s", flush=True)
                if name == "tokenizer": told["different_words"] = measure("words", place)["different_words"]
            shutil.rmtree(place)
    finally: shutil.rmtree(work, ignore_errors=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(told_of(result["sizes"])), f"\nwritten to {options.out}", sep="\n")


if __name__ == "__main__": main()
