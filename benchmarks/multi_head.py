"""The three multi-head attentions of the chapter “Several heads” in a model that learns: the same losses, their speeds.

    python benchmarks/multi_head.py TEXT            three settings, 60 steps each; some three minutes on one core
    python benchmarks/multi_head.py TEXT --steps 5 --out small.json     quicker and rougher

TEXT is a file of plain text; the results are those of tiny Shakespeare (Karpathy's char-rnn, data/tinyshakespeare). A
small causal language model reads it character by character, in windows of 128. Three copies of one model, which differ
in how the heads of each block are computed, get the same batches and AdamW; they take turns step by step, on one
thread. Time: processor time, which other work on the machine touches least, the median of the steps without the first
two. Counted in one step: the operations that PyTorch is called for, matrix products and the attention kernel (forward
and backward) among them, and the FLOPs of the products, which must be the same.

The script fails where the losses differ. In float64, where rounding is 1e-16, they must agree to 1e-10 over the first
five steps: more would be no rounding. In float32 a loss of 4 is rounded to 2e-7, and a training that began with another
rounding drifts away from the first, since Adam divides by the size of the gradient and so makes steps of its noise,
too. How far is measured: a fourth copy has the inner units of its feed-forward networks in reverse order, the same
function with other sums. The three must not differ more than ten times as much as it does from the last of them.
"""
import argparse
import json
import re
import statistics
import sys
import time
from collections import Counter
from copy import deepcopy
from itertools import count, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flash_transformer.attention import MultiHeadAttention
from flash_transformer.attention.multihead import (
    SemiParallelMultiHeadAttention,
    SequentialMultiHeadAttention,
    take_apart,
)
from flash_transformer.cli import _keep_memory
from flash_transformer.data import EncodedText, encode_text, load_text, plan_batches, text_tokenizer
from flash_transformer.model import CausalLM, configuration

OUT = Path(__file__).parent / "results" / "multi_head.json"
KINDS = {"one head after another": SequentialMultiHeadAttention, "joint projections": SemiParallelMultiHeadAttention,
         "all at once": MultiHeadAttention}
SIZE = dict(d_model=128, d_ff=512, decoder_layers=4, dropout=0.0, attention_dropout=0.0)
WINDOW = 128
SETTINGS = [(4, 16), (16, 16), (16, 1)]                                # heads, windows in a batch
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


def batches(ids, windows):
    "Ids and labels, (windows, WINDOW) each, epoch after epoch"
    corpus = EncodedText(ids, WINDOW)
    for epoch in count():
        cut = corpus.window(epoch, 0)
        for rows in plan_batches(cut.source_lengths, cut.target_lengths, windows * WINDOW, 0, epoch):
            if len(rows) == windows: yield (batch := cut.batch(rows)).target, batch.labels


def with_heads(model, kind):
    "A copy of the model, each block's self-attention in another form with the same weights"
    model = deepcopy(model)
    if kind is MultiHeadAttention: return model
    for block in model.decoder.blocks:
        block.self_attention = heads = take_apart(block.self_attention, kind)
        heads.register_forward_pre_hook(_without_cache, with_kwargs=True)
    return model


def _without_cache(module, args, kwargs): # a block also hands on a cache, None in training
    return args, {"mask": kwargs["mask"]}


class Run:
    "A model and its training step"
    def __init__(self, model):
        self.model, self.optimiser = model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def __call__(self, ids, labels): # → nats a character
        loss = F.cross_entropy(self.model(ids).flatten(0, 1), labels.flatten())
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()


def start(vocabulary, heads, dtype=torch.float32):
    "One run for each of the KINDS, from the same first weights"
    torch.manual_seed(0)
    first = CausalLM(configuration("gpt2", heads=heads, max_length=WINDOW, target_vocab_size=vocabulary, **SIZE))
    return {name: Run(with_heads(first.to(dtype), kind)) for name, kind in KINDS.items()}


def reordered(model):
    "A copy that computes the same function by other sums: the inner units of the feed-forward networks, last one first"
    model = deepcopy(model)
    with torch.no_grad():
        for up, _, down in (block.feed_forward for block in model.decoder.blocks):
            for p, units in ((up.weight, 0), (up.bias, 0), (down.weight, 1)): p.copy_(p.flip(units))
    return model


def train(runs, steps):
    "In turns, each time another one first → losses and seconds of each"
    losses, seconds = ({name: [] for name in runs} for _ in range(2))
    for i, batch in enumerate(steps):
        for name in islice([*runs] * 2, i % len(runs), i % len(runs) + len(runs)):
            begin = time.process_time()
            losses[name].append(runs[name](*batch))
            seconds[name].append(time.process_time() - begin)
    return losses, seconds


def spread(losses, names=tuple(KINDS)):
    "The largest difference of any two in any step"
    return max(max(step) - min(step) for step in zip(*(losses[name] for name in names)))


class Calls(TorchDispatchMode):
    "Counts PyTorch's operations by name"
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.names[f.overloadpacket.__name__] += 1
        return f(*args, **(kwargs or {}))


def counts(run, batch):
    with Calls() as calls, FlopCounterMode(display=False) as flops: run(*batch)
    def those(wanted): return sum(n for name, n in calls.names.items() if wanted(name))
    return {"operations": calls.names.total(), "products": those(lambda name: name in PRODUCTS),
            "attention_calls": those(lambda name: "scaled_dot_product" in name),
            "product_flops": flops.get_total_flops(), "parameter_tensors": len([*run.model.parameters()])}


def measure(ids, vocabulary, heads, windows, steps):
    double, _ = train(start(vocabulary, heads, torch.float64), islice(batches(ids, windows), min(steps, 5)))
    runs = start(vocabulary, heads)
    other = {"reordered": Run(reordered(runs["all at once"].model))}
    losses, seconds = train(runs | other, islice(batches(ids, windows), steps))
    batch = next(batches(ids, windows))
    kinds = [{"name": name, "seconds": statistics.median(seconds[name][2:]), **counts(run, batch),
              "losses": [float(f"{loss:.8g}") for loss in losses[name]]} for name, run in runs.items()]
    return {"heads": heads, "windows": windows, "difference": spread(losses), "difference_float64": spread(double),
            "difference_reordered": spread(losses, ("all at once", "reordered")), "kinds": kinds}


def check(setting):
    "Raises RuntimeError where the three are not one function"
    ulps = 1e-6                                                        # two units in the last place of a loss of 4
    for what, limit in (("difference_float64", 1e-10), ("difference", 10 * setting["difference_reordered"] + ulps)):
        if not (found := setting[what]) <= limit: raise RuntimeError(f"{what} is {found:.0e}, above {limit:.0e}")
    if len({kind["product_flops"] for kind in setting["kinds"]}) > 1: raise RuntimeError("the FLOPs are not the same")


def say(setting):
    print(f"{setting['heads']} heads, {setting['windows']} windows of {WINDOW}: losses agree to "
          f"{setting['difference']:.0e} (other sums: {setting['difference_reordered']:.0e}), in float64 to "
          f"{setting['difference_float64']:.0e}", flush=True)
    quickest = setting["kinds"][-1]["seconds"]
    for kind in setting["kinds"]:
        print(f"  {kind['name']:<24} loss {kind['losses'][0]:.4f} → {kind['losses'][-1]:.4f} "
              f"{1e3 * kind['seconds']:7.1f} ms, {kind['seconds'] / quickest:.2f} ×, {kind['operations']:5,} calls, "
              f"{kind['products']} of products, {kind['attention_calls']} of attention", flush=True)


def machine():
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    return {"cpu": name[1] if name else "unknown", "threads": torch.get_num_threads(), "torch": torch.__version__}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="TEXT", help="a file of plain text")
    parser.add_argument("--steps", type=int, default=60, help="of each setting, at least 3")
    parser.add_argument("--out", type=Path, default=OUT, help=f"where the results go; {OUT.name} in results/")
    options = parser.parse_args()
    if options.steps < 3: parser.error("--steps: the first two are not timed, so give at least 3")
    try: text = load_text(options.text)["train"]
    except (OSError, ValueError) as error: sys.exit(str(error))
    torch.set_num_threads(1)
    _keep_memory()
    tokenizers = text_tokenizer(text, "char")
    ids, vocabulary = encode_text(text, tokenizers), tokenizers.source_size
    settings = []
    for heads, windows in SETTINGS:
        settings.append(measure(ids, vocabulary, heads, windows, options.steps))
        say(settings[-1])
        check(settings[-1])
    result = {"machine": machine(), "characters": len(text), "vocabulary": vocabulary, "model": SIZE, "window": WINDOW,
              "settings": settings}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__": main()
