"""Decoding speed, ours and the peers' in turn: same trained weights, same sentences, same cores.

    python benchmarks/decoding.py RUN --test PREFIX      a trained run folder; the text is PREFIX.en and PREFIX.de
    python benchmarks/decoding.py --plot FILE            measures nothing: draws what was measured

RUN is what `flash-transformer train` leaves, of a pre-norm model with joint embeddings. The work, for every engine:
all sentences with beam 4; all of them greedily; the first hundred one after another, greedily and with beam 4.

ours          `Translator.translate`, as `flash-transformer translate` calls it: text in, text out, so that tokenising
              and detokenising count, which they do for nobody else. In the precision that it chooses, float32, int8
ctranslate2   the C++ engine, with our weights; ids in, ids out
m2m100        `generate` of transformers with our weights: M2M100 is pre-norm, with ReLU and fixed sines, as ours
marian        `generate` with MarianMTModel, which is post-norm and cannot take our weights: random ones of the same
              size, made to go on for as many steps as the longest of our translations of the batch needs

Before anything is timed, CTranslate2 and m2m100 must write our translations, greedily and in float32: up to 1 in 100
may differ (ties, and sentences cut off). With a beam they need not: both divide by the length where we divide by
((5 + length) / 6) ** α; the length penalty is 1 for all of them, and BLEU is shown.

Ours is as it is by default, with a C library that keeps freed memory, as `flash-transformer train` has it. Every peer
gets the setting that is best for it, found first: its type, sentences (or tokens) at once, threads on one batch or each
on its own, memory kept or not; half of the sentences decide. "ctranslate2" is the fastest type, "ctranslate2 float32"
the fastest with this type.

Every engine is a process of its own, which sleeps until it is asked; all are asked in turn, round after round, after
one round that is not counted. Peers live in environments that this script makes once, in --peers; pip's environment
variables hold for that (PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu for a small PyTorch).

Profile: a quarter of the sentences, ours, beam 4, with one thread, under torch.profiler. Ranges are opened around our
functions from outside. Operations belong to the innermost range; what they do not cover is Python's and the profiler's.
"""
import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import sacrebleu
import torch
from peers_decoding.serve import request, serve
from processes import Worker, python_of
from training import PYTORCH, ceilings, machine

from flash_transformer.translation import DecodeConfig, Translator

HERE = Path(__file__).parent
OUT = HERE / "results" / "decoding.json"
EXTRA = 50                                       # tokens that a translation may have more than its source
WORKS = {"beam 4": dict(beam=4, single=False), "greedy": dict(beam=1, single=False),
         "one by one, greedy": dict(beam=1, single=True), "one by one, beam 4": dict(beam=4, single=True)}
SINGLE = 100                                     # sentences that are translated one by one
OURS = ("auto", "float32", "int8")
PEERS = {"ctranslate2": (["ctranslate2==4.8.5"], ["numpy", "safetensors"]), # environment → see `python_of`
         "transformers": ([PYTORCH, "transformers==5.23.0"], ["numpy", "safetensors"])}
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
GOALS = [("beam 4", "ctranslate2", 1.0), ("greedy", "ctranslate2", 1.0), ("beam 4", "generate", 4.0),
         ("one by one, greedy", "generate", 3.0)]


# ---- ours, in a process of its own ----

def serve_ours():
    asked = request()
    torch.set_num_threads(asked["threads"])
    translator, texts = Translator.from_run(asked["run"]), asked["texts"]

    def run(job, numbers):
        return translator.translate([texts[i] for i in numbers], beam=job["beam"], precision=job["type"],
                                    tokens_per_batch=DecodeConfig().tokens_per_batch)
    serve({"versions": {"torch": torch.__version__}, "types": OURS}, run)


# ---- the driver ----

class Engine:
    "A worker, or one with kept and one with freed memory, and what can be set"
    def __init__(self, start, threads):
        self.start, self.threads, self.workers = start, threads, {}
        self.types, self.versions = (self.worker(True).facts[key] for key in ("types", "versions"))

    def worker(self, keep):
        if keep not in self.workers: self.workers[keep] = self.start(keep)
        return self.workers[keep]

    def ask(self, job, setting, show=False):
        time.sleep(0.3)                                          # until the threads of who was asked before sleep, too
        return self.worker(setting.get("keep", True)).ask(json.dumps(job | setting | {"show": show}))

    def close(self):
        for worker in self.workers.values(): worker.close()

    def seconds(self, job, setting):
        "Of the first half of the sentences, the better of two tries"
        self.ask(job | {"sentences": min(32, job["sentences"])}, setting)   # loads the model
        job = job | {"sentences": -(-job["sentences"] // 2)}
        return min(self.ask(job, setting)["seconds"] for _ in range(2))


def choices(who, types, job, threads):
    "What is tried for an engine, one thing after another: alternatives for some of the settings"
    if who == "ours":
        yield [{"type": types[0]}]
        return
    if who == "ctranslate2": across, batches = [{"spread": False}, {"spread": True}], (32, 128, 256, -1024, -4096)
    else: across, batches = [{"threads": threads}] + [{"threads": 1}] * job["single"], (32, 128)
    yield [{"type": kind, "batch": 64} | a for kind, a in itertools.product(types, across)]
    if not job["single"]: yield [{"batch": batch} for batch in batches]
    yield [{"keep": False}]


def tune(engine, who, types, job, name, log):
    "The fastest setting of an engine for a job; `log` takes all that were tried"
    best, least = {"keep": True}, float("inf")
    for changes in choices(who, types, job, engine.threads):
        start = best
        for change in changes:
            seconds = engine.seconds(job, start | change)
            log.append({"engine": name, "work": job["work"], **start, **change, "seconds": seconds})
            if seconds < least: best, least = start | change, seconds
    print(f"{job['work']}: {name} is fastest with {best}", flush=True)
    return best


def read(options):
    "Sentences and references"
    lines = [Path(f"{options.test}.{side}").read_text(encoding="utf-8").splitlines()[:options.sentences]
             for side in (options.source, options.target)]
    if len(lines[0]) != len(lines[1]): raise SystemExit(f"{options.test}: {len(lines[0])} lines and {len(lines[1])}")
    return lines


def agree(engines, tokenizers, ours, log):
    "CTranslate2 and m2m100 write what we write, or the numbers mean nothing"
    for name, setting in (("ctranslate2", {"type": "float32", "spread": False}),
                          ("transformers", {"type": "m2m100 float32", "threads": engines["transformers"].threads})):
        job = WORKS["greedy"] | {"sentences": len(ours), "batch": 64}
        ids = engines[name].ask(job, setting, show=True)["translations"]
        log[name] = sum(a != b for a, b in zip(ours, tokenizers.decode_target(ids)))
        print(f"{name}, float32, greedy: {log[name]} of {len(ours):,} translations are not ours", flush=True)
        if log[name] > max(3, len(ours) / 100): raise SystemExit("that is another model, or one that does not end")


def engines_of(options, work, asked):
    "Starts everybody"
    path = work / "request.json"
    path.write_text(json.dumps(asked))
    commands = {"ours": [sys.executable, __file__, "--worker"]} | {
        name: [python_of(options.peers / name, *PEERS[name]), HERE / "peers_decoding" / f"{name}_worker.py"]
        for name in PEERS}
    def starter(name): return lambda keep: Worker([*commands[name], path], options.threads, **(KEEP if keep else {}))
    return {name: Engine(starter(name), options.threads) for name in commands}


def measure(options, work):
    "Everything, written to the file work by work"
    torch.set_num_threads(options.threads)
    texts, references = read(options)
    translator = Translator.from_run(options.run)
    tokenizers, shape = translator.tokenizers, translator.model.config
    if (shape.norm, shape.tie_embeddings) != ("pre", "all"):
        raise SystemExit(f"{options.run} is not pre-norm with one table, which is what goes into all of the peers")
    sources = tokenizers.encode_source(texts)
    greedy = translator.translate(texts, beam=1, precision="float32")
    longest = max(map(len, sources)) + EXTRA
    asked = {"run": str(options.run), "weights": str(options.run / "model.safetensors"), "shape": vars(shape),
        "texts": texts, "sources": sources, "longest": longest, "threads": options.threads,
        "written": [len(ids) - 2 for ids in tokenizers.encode_target(greedy)], "folder": str(work / "ctranslate2")}
    jobs = {name: {"work": name, "sentences": min(len(texts), SINGLE) if job["single"] else len(texts), **job}
            for name, job in WORKS.items() if name in options.works}
    result = {"machine": machine(options.threads), "ceilings": ceilings(), "model": vars(shape),
              "decode": vars(translator.config), "sentences": len(texts), "differ_greedy_float32": {},
              "profile": profile(translator, texts[::4]), "tried": [], "works": {}}
    engines = engines_of(options, work, asked)
    for engine in engines.values(): result["machine"] |= engine.versions
    agree(engines, tokenizers, greedy, result["differ_greedy_float32"])
    for name, job in jobs.items():
        contestants = {entry: (who, tune(engines[who], who, types, job, entry, result["tried"]))
                       for entry, who, types in entries(engines)}
        if contestants["ctranslate2"] == contestants["ctranslate2 float32"]: del contestants["ctranslate2 float32"]
        result["works"][name] = rounds(engines, contestants, job, options.rounds)
        for engine in result["works"][name].values():
            judge(engine, job, tokenizers, references)
        result["ratios"] = ratios(result["works"])
        options.out.write_text(json.dumps(result, indent=1) + "\n")        # so that an end before the end costs less
    for engine in engines.values(): engine.close()
    return result


def entries(engines):
    "Engines as they are compared: name, who runs it, types to choose from"
    for kind in engines["ours"].types: yield f"ours {kind}", "ours", [kind]
    yield "ctranslate2", "ctranslate2", engines["ctranslate2"].types
    yield "ctranslate2 float32", "ctranslate2", ["float32"]
    for model in ("m2m100", "marian"):
        yield model, "transformers", [kind for kind in engines["transformers"].types if kind.startswith(model)]


def rounds(engines, contestants, job, n):
    "Everybody in turn; the first round is for warming up, and to see the translations"
    found = {name: {"setting": setting, "seconds": [], "median_ms": []} for name, (_, setting) in contestants.items()}
    for turn in range(n + 1):
        for name, (who, setting) in contestants.items():
            answer = engines[who].ask(job, setting, show=turn == 0)
            if turn == 0: found[name]["translations"] = answer["translations"]
            else:
                found[name]["seconds"].append(answer["seconds"])
                found[name]["median_ms"].append(1000 * answer["median"])
        if turn: print(f"{job['work']}, round {turn}: " + ", ".join(
            f"{name} {job['sentences'] / e['seconds'][-1]:,.1f}" for name, e in found.items()), flush=True)
    return found


def judge(engine, job, tokenizers, references):
    "Rate, and in the place of the translations their length and BLEU; those of random weights say nothing"
    translations, seconds = engine.pop("translations"), statistics.median(engine["seconds"])
    engine["sentences_per_second"] = job["sentences"] / seconds
    if job["single"]: engine["median_ms"] = statistics.median(engine["median_ms"])
    else: del engine["median_ms"]
    if engine["setting"]["type"].startswith("marian"): return
    if isinstance(translations[0], str): ids = [row[1:-1] for row in tokenizers.encode_target(translations)]
    else: ids, translations = translations, tokenizers.decode_target(translations)
    engine["tokens_per_sentence"] = sum(map(len, ids)) / len(ids)
    engine["bleu"] = sacrebleu.corpus_bleu(translations, [references[:job["sentences"]]]).score


def ratios(works):
    "How many times as fast as the fastest of the peers ours is, by the medians; with what was to be reached"
    found = []
    for work, peer, goal in GOALS:
        if work not in works: continue
        speed = {name: e["sentences_per_second"] for name, e in works[work].items()}
        wanted = ("ctranslate2",) if peer == "ctranslate2" else ("m2m100", "marian")
        best = max((name for name in speed if name.startswith(wanted)), key=speed.get)
        found.append({"work": work, "against": best, "setting": works[work][best]["setting"]["type"],
                      "ratio": round(speed["ours auto"] / speed[best], 2), "goal": goal})
    return found


# ---- where the time goes ----

LABEL = "part: "
TEXT = "tokenising, batches, detokenising"


def ranges(fast):
    "What a range is opened around: where it is found, its name there, the part of the work"
    from flash_transformer.translation import fast_decoding, translator
    return [(translator, "_search", "rest of the search"),
            (type(fast), "read", "encoder, the source's keys and values"),
            (type(fast), "write", "decoder: feed-forward, norms, embedding"),
            (fast_decoding, "_self_attention", "decoder: attention to what is written"),
            (fast_decoding, "_cross_attention", "decoder: attention to the source"),
            (fast, "output", "vocabulary projection"), (fast_decoding, "_best_words", "best continuations"),
            (fast_decoding.Notes, "follow", "beams change places"),
            (fast_decoding.Notes, "make_room", "room for more words"),
            (fast_decoding.Notes, "keep", "finished sentences leave"),
            (fast_decoding, "_read_out", "reading the beams back")]


def ranged(function, part):
    def call(*args, **kwargs):
        with torch.profiler.record_function(LABEL + part): return function(*args, **kwargs)
    return call


def sort(event, part, operations, python):
    "Microseconds of what lies directly in a range, part by part"
    python[part] += event.time_range.elapsed_us() - sum(e.time_range.elapsed_us() for e in event.cpu_children)
    for e in event.cpu_children:
        if e.name.startswith(LABEL): sort(e, e.name.removeprefix(LABEL), operations, python)
        else: operations[part] += e.time_range.elapsed_us()


def profile(translator, texts):
    "Per cent of the time of each part: in operations, and in Python between them; one thread does it all"
    def seconds():
        start = time.perf_counter()
        translator.translate(texts, beam=4)
        return time.perf_counter() - start
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds()
    plain = min(seconds() for _ in range(3))
    with contextlib.ExitStack() as stack:
        for home, name, part in ranges(translator._copy(translator.config.precision)):
            stack.enter_context(mock.patch.object(home, name, ranged(getattr(home, name), part)))
        found = stack.enter_context(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]))
        ranged(seconds, TEXT)()
    torch.set_num_threads(threads)
    operations, python = Counter(), Counter()
    whole, = (e for e in found.events() if e.name == LABEL + TEXT)
    sort(whole, TEXT, operations, python)
    total = whole.time_range.elapsed_us()
    own = Counter({e.key: e.self_cpu_time_total for e in found.key_averages() if "::" in e.key})
    return {"sentences": len(texts), "seconds": plain, "seconds_profiled": total / 1e6,
        "per_cent": {part: {"operations": round(100 * operations[part] / total, 1),
                            "python": round(100 * python[part] / total, 1)} for part in operations | python},
        "operations": sum(e.name.startswith("aten::") for e in found.events()),
        "own_time_per_cent": {name: round(100 * t / total, 1) for name, t in own.most_common(16)}}


# ---- showing ----

def table(result): # → lines
    lines = []
    for work, found in result["works"].items():
        lines.append(f"{work:<22} {'sentences/s':>12} {'lowest':>8} {'highest':>8} {'BLEU':>6} {'tokens':>7}   setting")
        n = min(SINGLE, result["sentences"]) if WORKS[work]["single"] else result["sentences"]
        for name, e in found.items():
            bleu, tokens = (f"{e[key]:.2f}" if key in e else "" for key in ("bleu", "tokens_per_sentence"))
            setting = ", ".join(f"{key} {value}" for key, value in e["setting"].items())
            if "median_ms" in e: setting = f"{e['median_ms']:.1f} ms a sentence (median); {setting}"
            lines.append(f"  {name:<20} {e['sentences_per_second']:>12,.1f} {n / max(e['seconds']):>8,.1f} "
                         f"{n / min(e['seconds']):>8,.1f} {bleu:>6} {tokens:>7}   {setting}")
    lines += [f"{r['work']}: ours is {r['ratio']:.2f} × as fast as {r['against']} ({r['setting']}), "
              f"wanted {r['goal']} ×" for r in result["ratios"]]
    p = result["profile"]
    lines.append(f"{p['sentences']} sentences, beam 4, one thread: {p['seconds']:.2f} s, profiled "
                 f"{p['seconds_profiled']:.2f} s, {p['operations']:,} operations; per cent in operations, in Python")
    return lines + [f"{e['operations']:>6.1f} {e['python']:>6.1f}  {part}" for part, e in p["per_cent"].items()]


def draw(result, path):
    "A bar of the median for each engine and work, its rounds as dots"
    import matplotlib.pyplot as plt
    works = result["works"]
    _, axes = plt.subplots(len(works), figsize=(7, 0.45 * sum(map(len, works.values())) + 0.6 * len(works)),
        height_ratios=[len(found) for found in works.values()], layout="constrained", squeeze=False)
    for ax, (work, found) in zip(axes[:, 0], works.items()):
        n = min(SINGLE, result["sentences"]) if WORKS[work]["single"] else result["sentences"]
        for y, (name, e) in enumerate(reversed(found.items())):
            rates = [n / seconds for seconds in e["seconds"]]
            ax.barh(y, e["sentences_per_second"], color="C0" if name.startswith("ours") else "0.75")
            ax.plot(rates, [y] * len(rates), "k.", markersize=4)
            ax.annotate(f"  {e['sentences_per_second']:,.1f}", (max(rates), y), va="center")
        ax.set(yticks=range(len(found)), yticklabels=reversed(found), title=work)
        ax.margins(x=0.12)
        ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("sentences a second, median and rounds")
    plt.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder that training left")
    parser.add_argument("--test", help="prefix of the text")
    parser.add_argument("--source", default="en")
    parser.add_argument("--target", default="de")
    parser.add_argument("--sentences", type=int, help="so many of them, from the first on; else all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK",
                        help=f"some of: {', '.join(WORKS)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every engine")
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".peers", help="folder of the peers' environments")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the result there")
    options = parser.parse_args()
    if options.run and options.test:
        with tempfile.TemporaryDirectory() as work: result = measure(options, Path(work))
        print("\n".join(table(result)), f"\nwritten to {options.out}")
    elif not options.plot: parser.error("give a run folder and --test, or --plot alone")
    if options.plot: draw(json.loads(options.out.read_text()), options.plot)


if __name__ == "__main__": serve_ours() if sys.argv[1:2] == ["--worker"] else main()
