"""What half precision, recomputation, accumulation and compilation save and cost in a training step of a Transformer.

    python benchmarks/precision.py                the base model's blocks; about four minutes on two cores
    python benchmarks/precision.py --quick        a tiny model, seconds; writes nothing unless --out is given
    python benchmarks/precision.py --device cuda  on a GPU, with fp16 too

A step is forward, backward and Adam over the same batch of sentence pairs, its tokens at once or in parts. Time: the
settings in turns within each round, after a warm-up; the median of the rounds. Peak memory: a fresh process per
setting, how far its largest resident set (`peak_memory`) rises in the first whole step above what weights, gradients
and Adam's averages take, which a step on a few words has made before; on a GPU torch.cuda.max_memory_allocated,
likewise. Kept: the bytes that autograd keeps of a forward pass (`saved_bytes`), without weights. Loss: that process
goes on for a few more steps of the same batch. Utilisation: the FLOPs of the batch's real tokens (`training_flops`),
whatever was in fact computed, by the time and by the rate of large matrix products in the same precision.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from flash_transformer.data import PAD, Batch
from flash_transformer.model import Transformer, TransformerConfig
from flash_transformer.training import (
    adam,
    compile_blocks,
    label_smoothed_loss,
    matmul_ceiling,
    peak_memory,
    saved_bytes,
    training_flops,
)
from flash_transformer.training.precision import DTYPES

OUT = Path(__file__).parent / "results" / "precision.json"
SIZES = {"base": dict(vocab_size=8000), "tiny": dict(vocab_size=500, d_model=64, d_ff=128, heads=4, encoder_layers=2,
                                                     decoder_layers=2)}
PLAIN = dict(precision="float32", recompute=False, parts=1, compile=False)


def settings(device):
    "Name → what is set; half precision first alone, then with one more thing each"
    half = ["bf16", "fp16"] if device == "cuda" else ["bf16"]        # a CPU has no units for fp16
    more = {"recompute": dict(recompute=True), "4 parts": dict(parts=4), "compile": dict(compile=True),
            "recompute + 4 parts": dict(recompute=True, parts=4)}
    return {"float32": PLAIN, "float32 + recompute": PLAIN | dict(recompute=True),
            **{name: PLAIN | dict(precision=name) for name in half},
            **{f"bf16 + {name}": PLAIN | dict(precision="bf16") | change for name, change in more.items()}}


def machine(device):
    "What others need to know to compare, and nothing that names the machine"
    facts = {"torch": torch.__version__, "device": device}
    if device == "cuda": return facts | {"gpu": torch.cuda.get_device_name()}
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    return facts | {"cpu": name[1] if name else "unknown", "threads": torch.get_num_threads()}


def make_batch(pairs, vocabulary, device):
    "Sentences of 28 to 32 words, as a bucket holds them, and “translations”: for each word the next in the vocabulary"
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(28, 33, (pairs,), generator=draw)
    words = torch.randint(4, vocabulary - 1, (pairs, 32), generator=draw)
    real = torch.arange(32) < lengths[:, None]
    source, labels = words.where(real, PAD), (words + 1).where(real, PAD)
    target = torch.cat([torch.full((pairs, 1), 2), labels[:, :-1]], dim=1).where(real, PAD)
    return Batch(source, lengths, target, labels, lengths).to(device)


class Step:
    "A model and its training step under one setting"
    def __init__(self, size, precision, recompute, parts, compile, device, shared=None):
        torch.manual_seed(0)
        self.model = shared.model if shared else Transformer(TransformerConfig.base(**SIZES[size])).to(device)
        self.optimiser = shared.optimiser if shared else adam(self.model.parameters(), 3e-4)
        self.precision, self.recompute, self.parts, self.device = precision, recompute, parts, device
        self.scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
        if compile: compile_blocks(self.model)

    def loss(self, batch):
        "Sum over the words of the batch"
        self.model.recompute, real = self.recompute, batch.labels != PAD
        with torch.autocast(self.device, DTYPES[self.precision], enabled=self.precision != "float32"):
            logits = self.model(batch.source, batch.source_lengths, batch.target, keep=real)
        return label_smoothed_loss(logits.float(), batch.labels[real])[0]

    def __call__(self, batch): # → nats a word
        total = 0.0
        for rows in torch.arange(len(batch.source)).chunk(self.parts):
            loss = self.loss(Batch(*(x[rows] for x in batch[:5]))) / batch.tokens
            self.scaler.scale(loss).backward()
            total += float(loss.detach())
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()
        return total


def in_a_process_of_its_own(setting, size, pairs, steps, device, threads):
    "Peak memory of a step above what is there anyway, and the losses of `steps` steps"
    request = json.dumps(dict(setting=setting, size=size, pairs=pairs, steps=steps, device=device, threads=threads))
    answer = subprocess.check_output([sys.executable, __file__, "--child", request], text=True)
    return json.loads(answer.splitlines()[-1])


def child(setting, size, pairs, steps, device, threads):
    torch.set_num_threads(threads)
    step, batch = Step(size, **setting, device=device), make_batch(pairs, SIZES[size]["vocab_size"], device)
    few = Batch(*(x[:4, :2] if x.dim() == 2 else x[:4].clamp(max=2) for x in batch[:5]))
    for group in step.optimiser.param_groups: group["lr"] = 0.0      # makes gradients and averages, moves nothing
    step(few)
    for group in step.optimiser.param_groups: group["lr"] = 3e-4
    for p in step.model.parameters(): p.grad = torch.zeros_like(p)   # held while we look, as in the middle of a step
    if device == "cuda": torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else peak_memory(torch.device(device))
    losses = [step(batch)]
    peak = peak_memory(torch.device(device)) - before
    print(json.dumps({"peak_bytes": peak, "losses": losses + [step(batch) for _ in range(steps - 1)]}))


def time_in_turns(steps, batch, rounds, device):
    times = {name: [] for name in steps}
    for n in range(-1, rounds):                                     # the first round warms up
        for name, step in steps.items():
            start = time.perf_counter()
            step(batch)
            if device == "cuda": torch.cuda.synchronize()
            if n >= 0: times[name].append(time.perf_counter() - start)
    return times


def kept_bytes(step, batch):
    part = Batch(*(x[:len(batch.source) // step.parts] for x in batch[:5]))
    return saved_bytes(lambda: step.loss(part), step.model.parameters())


def measure(size, pairs, rounds, steps, device):
    "Everything, as it is written to the file"
    batch, todo = make_batch(pairs, SIZES[size]["vocab_size"], device), settings(device)
    models = {c: Step(size, **PLAIN | dict(compile=c), device=device) for c in (False, True)}  # settings share these
    timed = {name: Step(size, **s | dict(compile=False), device=device, shared=models[s["compile"]])
             for name, s in todo.items()}
    times = time_in_turns(timed, batch, rounds, device)
    lengths = batch.source_lengths.cpu().numpy()
    flops = training_flops(models[False].model.config, lengths, lengths)
    ceilings = {p: matmul_ceiling(p, torch.device(device)) for p in {s["precision"] for s in todo.values()}}
    results = []
    for name, s in todo.items():
        seconds = statistics.median(times[name])
        results.append(dict(name=name, **s, seconds=seconds, kept_bytes=kept_bytes(timed[name], batch),
                            utilisation=flops / seconds / ceilings[s["precision"]],
                            **in_a_process_of_its_own(s, size, pairs, steps, device, torch.get_num_threads())))
        print("{name:22} {seconds:7.3f} s, {kept_bytes:13,} bytes kept, peak {peak_bytes:13,}, utilisation "
              "{utilisation:4.0%}, loss {losses[0]:.4f} → {0:.4f}".format(results[-1]["losses"][-1], **results[-1]),
              flush=True)
    parameters = sum(p.numel() for p in models[False].model.parameters())
    return {"machine": machine(device), "model": SIZES[size] | {"size": size, "parameters": parameters}, "pairs": pairs,
            "words": batch.tokens, "rounds": rounds, "flops": flops, "ceilings": ceilings, "settings": results}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--pairs", type=int, help="sentence pairs a step; 64, with --quick 16")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="steps after which the loss is told")
    parser.add_argument("--out", type=Path, help=f"where the results go; {OUT.name} beside this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child: return child(**json.loads(args.child))
    start = time.perf_counter()
    found = measure("tiny" if args.quick else "base", args.pairs or (16 if args.quick else 64), args.rounds, args.steps,
                    args.device)
    print(f"{time.perf_counter() - start:.0f} s")
    if out := args.out or (None if args.quick else OUT): out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()
