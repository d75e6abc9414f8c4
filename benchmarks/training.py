"""Training speed, ours and the peers' in turn: same corpus, same shapes, same cores.

    python benchmarks/training.py --train PREFIX --validation PREFIX     Multi30k: PREFIX.en, PREFIX.de
    python benchmarks/training.py --plot FILE                            measures nothing: draws what was measured

The model: pre-norm, d 256, 3 + 3 layers, 4 heads, 1,024 inner units, a joint BPE vocabulary of 8,000, one table for
source, target and output; dropout 0.3, label smoothing 0.1, Adam, gradients clipped to 1, batches of 4,096 padded
tokens. What is counted are target tokens without padding.

Every engine is a process of its own, which warms up and then sleeps until it is asked for so many more steps; they are
asked one after another, round after round. All have the same number of threads, and glibc keeps freed memory in all of
them, as `flash-transformer train` has it (but not while they sleep, so that all fit into the machine); the peers keep
oneDNN's own cache of 1,024 shapes.

ours, ours …           the command `flash-transformer train` itself: what is timed is its loop, logging and all
marian, marian bf16    transformers' MarianMTModel, random weights, in the loop that transformers' Trainer has inside:
                       forward, LabelSmoother, backward, clipping, fused AdamW, schedule. Post-norm, for it knows no
                       other: the arithmetic is the same. attn_implementation is eager: for rows as short as these that
                       is a third faster in bf16 than its default, sdpa
torch, torch bf16      torch.nn.Transformer in the same loop; cross_entropy with label smoothing
joeynmt                JoeyNMT 2.3.0, its own command, data pipeline and SentencePiece model; it has no bf16 on a CPU.
                       joeynmt as it is: without the help with memory that is said above

bf16 is autocast. Ours makes its batches as it goes, several sentences a row. Marian and torch cannot read such rows;
they get rows of one sentence, sentences of like length together (`plan_batches`: hardly any padding), ready-made, so
that their time is the step's alone. “ours unpacked” trains on the very same batches, in the same order. JoeyNMT makes
its own as it goes, of sentences of any length; it is given seconds, not steps. Dropout 0.3 is on the embeddings and on
what each sub-layer adds, in marian and torch too; JoeyNMT drops attention weights and inner units of the feed-forward
network besides.

Peers live in environments that this script makes once, in --peers, with the PyTorch version that runs it; pip's
environment variables hold for that (PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu for a small PyTorch).

Utilisation: FLOPs of the real tokens (`training_flops`), by the time, by the rate of large matrix products in the same
precision, measured in each round (`matmul_ceiling`).

Profile: a few steps of ours under torch.profiler. Modules work in named ranges; an operation of the forward pass
belongs to the range it runs in, and one of the backward pass to the range in which its node was made, found by
autograd's sequence number. What no operation covers is Python's, and the profiler's: see the two step times. Only where
NumPy works, as dropout is drawn and batches are made, it belongs to these.
"""
import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from peers.turns import MARK, Turns
from processes import Worker, python_of

HERE = Path(__file__).parent
OUT = HERE / "results" / "training.json"
MODEL = {"d_model": 256, "d_ff": 1024, "heads": 4, "encoder_layers": 3, "decoder_layers": 3, "dropout": 0.3}
TRAIN = {"tokens_per_batch": 4096, "learning_rate": 0.001, "warmup_steps": 800, "label_smoothing": 0.1,
         "clip_norm": 1.0}
VOCABULARY, SEED = 8000, 0
SECONDS = 10.0                                   # of a turn of JoeyNMT
PYTORCH = f"torch=={torch.__version__.split('+')[0]}"
PEERS = {"transformers": ([PYTORCH, "transformers==5.23.0"], ["numpy"], []), # environment → see `python_of`
         "joeynmt": ([PYTORCH, "sentencepiece==0.2.0"],
                     ["sacrebleu", "datasets", "subword-nmt", "sacremoses", "tensorboard", "pyyaml", "matplotlib",
                      "seaborn", "packaging", "portalocker", "importlib_metadata"], ["joeynmt==2.3.0"])}
ENGINES = { # name → who runs it, and how
    "ours": ("ours", []), "ours unpacked": ("ours", ["--train.packing", "false"]),
    "ours float32": ("ours", ["--train.precision", "float32"]),
    "marian": ("plain_loop", {"engine": "marian", "bf16": False, "attention": "eager"}),
    "marian bf16": ("plain_loop", {"engine": "marian", "bf16": True, "attention": "eager"}),
    "torch": ("plain_loop", {"engine": "torch", "bf16": False, "attention": "sdpa"}),
    "torch bf16": ("plain_loop", {"engine": "torch", "bf16": True, "attention": "sdpa"}),
    "joeynmt": ("joeynmt_training", {"keep": True}), "joeynmt as it is": ("joeynmt_training", {"keep": False}),
}


# ---- ours, in a process of its own ----

def train_ours(run, changes, done):
    "The command itself; `done(trainer, step)` does a step, and may stop to wait"
    from flash_transformer.cli import main as command
    from flash_transformer.training import Trainer
    step = Trainer._train_step
    Trainer._train_step = lambda trainer: done(trainer, step)
    # neither the end nor a validation is to come while we measure
    endless = ["--train.max_steps", "1000000", "--train.max_epochs", "null", "--train.checkpoint_every", "1000000"]
    return command(["train", "--config", str(run.parent / "recipe.yaml"), "--run", str(run),
                    *changes, *endless])


def serve_ours(run, changes, warm):
    facts = {"torch": torch.__version__}
    turns = Turns(warm, lambda: facts)

    def done(trainer, step):
        before = trainer.meter.tokens, trainer.meter.flops
        step(trainer)
        facts.update(precision=trainer.precision, parameters=sum(p.numel() for p in trainer.bare.parameters()))
        turns.done(trainer.meter.tokens - before[0], trainer.meter.flops - before[1])
    return train_ours(run, changes, done)


# ---- where a step's time goes ----

PARTS = {"batch": "making the batch", "embedding": "embedding", "projections": "projections of attention",
         "attention": "attention between them", "feed-forward": "feed-forward", "dropout": "dropout and residual sums",
         "blocks": "norms, masks and the rest of the blocks", "loss": "logits and loss",
         "optimiser": "optimiser, clipping, adding up gradients", "python": "Python between operations"}
LABEL = "part: "


def open_ranges():
    "Let each module of a kind, whoever calls it, work in a named range"
    from flash_transformer.attention import MultiHeadAttention
    from flash_transformer.model import Embedding, FeedForward
    from flash_transformer.model.embeddings import Dropout
    from flash_transformer.model.transformer import Decoder, Encoder

    def name(kind, method, part):
        inner = getattr(kind, method)

        def ranged(self, *args, **kwargs):
            with torch.profiler.record_function(LABEL + part): return inner(self, *args, **kwargs)
        setattr(kind, method, ranged)
    for kind, part in ((Embedding, "embedding"), (FeedForward, "feed-forward"), (MultiHeadAttention, "attention"),
                       (Encoder, "blocks"), (Decoder, "blocks"), (Dropout, "dropout")): name(kind, "forward", part)
    if hasattr(Dropout, "add"): name(Dropout, "add", "dropout")


class Sorter:
    "Sorts a step's events into parts, microseconds each"
    def __init__(self): self.time, self.part_of, self.phase = Counter(), {}, "batch"

    def step(self, event):
        self.phase = "batch"
        self.sort(event)

    def sort(self, event, part=None):
        "What lies directly in a range; `part` None: the step as a whole, where the phase decides"
        at = event.time_range.start
        for e in sorted(event.cpu_children, key=lambda e: e.time_range.start):
            self.gap(e.time_range.start - at, part)
            at = e.time_range.end
            if e.name.startswith(LABEL):
                self.sort(e, e.name.removeprefix(LABEL))
                if part is None: self.phase = "loss"                  # the last such range is the decoder's
            elif e.name.startswith("Optimizer."): self.sort(e, "optimiser")
            elif e.name.startswith("autograd::engine::evaluate_function"):
                self.phase = "optimiser"                              # what comes after the backward pass
                self.time[self.part_of.get(e.sequence_nr, "optimiser")] += e.time_range.elapsed_us()
            else:
                mine = part or self.phase
                if mine == "attention" and e.name == "aten::linear": mine = "projections"
                self.time[mine] += e.time_range.elapsed_us()
                self.remember(e, mine)
        self.gap(event.time_range.end - at, part)

    def gap(self, microseconds, part):
        "No operation of PyTorch: NumPy's where batches are made and dropout is drawn, else Python's"
        numpy = part == "dropout" or (part is None and self.phase == "batch")
        self.time[(part or self.phase) if numpy else "python"] += microseconds

    def remember(self, event, part):
        "The node with this number was made here: the last who sees a number is the one who makes it"
        if event.sequence_nr >= 0: self.part_of[event.sequence_nr] = part
        for e in event.cpu_children: self.remember(e, part)


def profile_ours(run, changes, warm, steps):
    "Prints where the time of so many steps goes, in per cent, and what the same steps take without the profiler"
    seen, seconds = [], []

    def done(trainer, step):
        seen.append(1)
        if len(seen) <= warm + steps:
            start = time.perf_counter()
            step(trainer)
            if len(seen) > warm: seconds.append(time.perf_counter() - start)
            return
        open_ranges()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            for _ in range(steps):
                with torch.profiler.record_function("step"): step(trainer)
        sorter, whole_steps = Sorter(), [e for e in found.events() if e.name == "step"]
        for one in whole_steps: sorter.step(one)
        whole = sum(one.time_range.elapsed_us() for one in whole_steps)
        own = Counter({e.key: e.self_cpu_time_total for e in found.key_averages() if "::" in e.key})
        print(MARK + json.dumps({
            "seconds_a_step": statistics.median(seconds), "seconds_a_step_profiled": whole / 1e6 / steps,
            "per_cent": {PARTS[part]: round(100 * sorter.time[part] / whole, 1) for part in PARTS},
            "operations_a_step": round(sum(e.name.startswith("aten::") for e in found.events()) / steps),
            "own_time_per_cent": {name: round(100 * t / whole, 1) for name, t in own.most_common(16)},
        }) + "}", flush=True)
        raise SystemExit
    return train_ours(run, changes, done)


# ---- the driver ----

def prepare(options, work):
    "Our tokenizer, arrays and recipe in `work`, and the first epoch's batches in a file for the peers"
    from flash_transformer.cli import main as command
    from flash_transformer.data import Prepared, batches
    data = {"train": options.train, "validation": options.validation, "source": options.source,
            "target": options.target, "vocab_size": VOCABULARY, "max_length": 100}
    recipe = {"data": data, "model": MODEL | {"norm": "pre"}, "train": TRAIN | {"seed": SEED, "max_epochs": 10}}
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if command(["preprocess", "--config", str(work / "recipe.yaml"), "--run", str(work / "prepared")]): sys.exit(2)
    train = Prepared.load(work / "prepared" / "data").train
    made = [{"source": b.source, "target": b.target, "labels": b.labels}
            for b in batches(train, TRAIN["tokens_per_batch"], SEED, epoch=0)]
    torch.save(made, work / "batches.pt")
    return {"pairs": len(train), "source_tokens": int(train.source_lengths.sum()),
            "target_tokens": int(train.target_lengths.sum()), "batches": len(made)}


def worker_command(job, run, changes, options): # of this script
    return [sys.executable, __file__, "--worker", job, "--work", run, "--warm", options.warm, "--steps", options.steps,
            "--changes", json.dumps(changes)]


def command_of(name, options, work):
    "How an engine is started"
    who, how = ENGINES[name]
    own = work / name.replace(" ", "-")
    if who == "ours":
        shutil.copytree(work / "prepared" / "data", own / "data", dirs_exist_ok=True)
        return worker_command("serve", own, how, options)
    request = MODEL | TRAIN | how | {"vocab_size": VOCABULARY, "threads": options.threads, "work": str(own),
        "warm": options.warm if who == "plain_loop" else -(-options.warm // 3), "batches": str(work / "batches.pt"),
        "train": os.path.abspath(options.train), "validation": os.path.abspath(options.validation),
        "source": options.source, "target": options.target}
    own.mkdir()
    (own / "request.json").write_text(json.dumps(request))
    environment = "joeynmt" if who == "joeynmt_training" else "transformers"
    python = python_of(options.peers / environment, *PEERS[environment])
    return [python, HERE / "peers" / f"{who}.py", own / "request.json"]


def ceilings():
    from flash_transformer.training import matmul_ceiling
    time.sleep(1)                                # threads of whoever worked before may still be spinning
    return {precision: max(matmul_ceiling(precision, torch.device("cpu")) for _ in range(5))
            for precision in ("bf16", "float32")}


def machine(threads):
    "What others need to know to compare, and nothing that names the machine"
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    return {"cpu": name[1] if name else "unknown", "threads": threads, "python": sys.version.split()[0],
            **{package: version(package) for package in ("torch", "numpy", "accelerate")}}


def measure(options, work):
    "Everything, as it is written to the file"
    torch.set_num_threads(options.threads)
    result = {"machine": machine(options.threads), "model": MODEL | {"norm": "pre", "vocabulary": VOCABULARY},
              "train": TRAIN, "steps_a_turn": options.steps, "seconds_a_turn_of_joeynmt": SECONDS,
              "corpus": prepare(options, work)}
    commands = {name: command_of(name, options, work) for name in options.engines}
    workers = {}
    for name, command in commands.items():
        workers[name] = Worker(command, options.threads)
        print(f"{name} is warm after {workers[name].facts['seconds']:.0f} s", flush=True)
    result["engines"] = {name: {"turns": []} for name in workers}
    result["ceilings"] = []
    for n in range(options.rounds):
        result["ceilings"].append(ceilings())
        for name, worker in workers.items():
            turn = worker.ask(SECONDS if ENGINES[name][0] == "joeynmt_training" else options.steps)
            turns = result["engines"][name].setdefault("turns", [])
            turns.append({key: turn.pop(key) for key in ("tokens", "flops", "steps", "seconds")})
            result["engines"][name] |= turn                      # the rest: versions and the like, the last word holds
        rates = {name: e["turns"][-1]["tokens"] / e["turns"][-1]["seconds"] for name, e in result["engines"].items()}
        print(f"round {n + 1}: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()), flush=True)
    for worker in workers.values(): worker.close()
    summarise(result)
    if "ours" in workers:
        run = work / "profile"
        shutil.copytree(work / "prepared" / "data", run / "data")
        worker = Worker(worker_command("profile", run, [], options), options.threads)
        result["profile"] = worker.facts
        worker.close()
    return result


def summarise(result):
    "Rates, medians, ratios and utilisation of what was measured"
    engines = result["engines"]
    for e in engines.values():
        e["rates"] = [round(turn["tokens"] / turn["seconds"]) for turn in e["turns"]]
        e["median"] = statistics.median(e["rates"])
        if any(turn["flops"] for turn in e["turns"]):
            rate = [turn["flops"] / turn["seconds"] for turn in e["turns"]]
            e["utilisation"] = statistics.median(f / c[e["precision"]] for f, c in zip(rate, result["ceilings"]))
            e["flops_a_token"] = round(sum(t["flops"] for t in e["turns"]) / sum(t["tokens"] for t in e["turns"]))
    if "ours" in engines:
        result["ratios"] = {name: round(engines["ours"]["median"] / e["median"], 2) for name, e in engines.items()}


def table(result): # → lines
    lines = [f"{'engine':<14} {'target tokens/s':>16} {'lowest':>8} {'highest':>8} {'ours is':>8}"]
    for name, e in result["engines"].items():
        ratio = f"{result['ratios'][name]:.2f} ×" if "ratios" in result else ""
        lines.append(f"{name:<14} {e['median']:>16,.0f} {min(e['rates']):>8,} {max(e['rates']):>8,} {ratio:>8}")
    for name, e in result["engines"].items():
        if "utilisation" not in e: continue
        ceiling = statistics.median(c[e["precision"]] for c in result["ceilings"]) / 1e9
        lines.append(f"{name}: {e['utilisation']:.1%} of {ceiling:,.0f} GFLOP/s in {e['precision']}, "
                     f"{e['flops_a_token'] / 1e6:.1f} MFLOP a target token")
    if "profile" in result:
        lines += [f"{share:>6.1f} %  {part}" for part, share in result["profile"]["per_cent"].items()]
    return lines


def draw(result, path):
    "A bar of the median for each engine, its rounds as dots"
    import matplotlib.pyplot as plt
    names = list(result["engines"])[::-1]
    _, axes = plt.subplots(figsize=(7, 0.5 * len(names) + 1), layout="constrained")
    for y, name in enumerate(names):
        e = result["engines"][name]
        axes.barh(y, e["median"], color="C0" if name.startswith("ours") else "0.75")
        axes.plot(e["rates"], [y] * len(e["rates"]), "k.", markersize=4)
        axes.annotate(f" {e['median']:,.0f}", (max(e["rates"]), y), va="center")
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="target tokens a second, median and rounds")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    plt.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="prefix of the training text")
    parser.add_argument("--validation", help="prefix of the validation text")
    parser.add_argument("--source", default="en")
    parser.add_argument("--target", default="de")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="of a turn")
    parser.add_argument("--warm", type=int, default=24, help="steps before the first turn, of JoeyNMT a third")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every engine")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="NAME",
                        help=f"some of: {', '.join(ENGINES)}")
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".peers", help="folder of the peers' environments")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the result there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--changes", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "profile": return profile_ours(options.work, options.changes, options.warm, options.steps)
    if options.worker == "serve": return serve_ours(options.work, options.changes, options.warm)
    if options.train and options.validation:
        with tempfile.TemporaryDirectory() as work: result = measure(options, Path(work))
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print("\n".join(table(result)), f"\nwritten to {options.out}")
    elif not options.plot: parser.error("give --train and --validation, or --plot alone")
    if options.plot: draw(json.loads(options.out.read_text()), options.plot)


if __name__ == "__main__": sys.exit(main())
