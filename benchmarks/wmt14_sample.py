"""The recipe of WMT14, scaled down, on a sample of WMT14: the curve for the chapter on WMT14.

    python benchmarks/wmt14_sample.py DATA

DATA is a folder of the layout of wmt/wmt14 on the hub: de-en/train-00000-of-00001.parquet and so on. The way is the one
that everybody goes: a hub is asked, here a small one on this machine, and the commands are `flash-transformer train
--dry-run`, `preprocess` and `train --config configs/wmt14-base.yaml`, each a process of its own, with an empty cache.
Writes numbers, no sentences, to benchmarks/results/wmt14_sample.json.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from hub_server import HubServer  # noqa: E402

from flash_transformer.data import Prepared, plan_batches  # noqa: E402

# What differs from the recipe. A five-hundredth of the corpus wants a smaller model, and more steps of fewer pairs.
SCALED = {"data.vocab_size": 4000, "model.d_model": 256, "model.d_ff": 1024, "model.heads": 4,
          "model.encoder_layers": 3, "model.decoder_layers": 3, "train.accumulate": 1, "train.learning_rate": 0.001,
          "train.warmup_steps": 200, "train.log_every": 10, "train.checkpoint_every": 80}


def command(environment, *arguments):
    "A command of flash-transformer in a process of its own: what it printed, and its seconds"
    start = time.perf_counter()
    script = "import sys; from flash_transformer.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, env=environment,
                          stdout=subprocess.PIPE, text=True)
    if done.returncode: raise SystemExit(f"{arguments[0]} failed with {done.returncode}")
    print(*(line for line in done.stdout.splitlines() if not line.startswith("  ")), sep="\n", flush=True) # no samples
    return done.stdout.splitlines(), round(time.perf_counter() - start, 1)


def curves(run):
    "What metrics.jsonl tells"
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, validations = ([e for e in events if key in e] for key in ("plain_loss", "validation_loss"))
    seconds, tokens = sum(e["seconds"] for e in steps), sum(e["tokens"] for e in steps)
    return {"training": [[e["step"], round(e["plain_loss"], 4)] for e in steps],
            "validation": [[e["step"], round(e["validation_loss"], 4)] for e in validations],
            "steps": steps[-1]["step"], "epochs": steps[-1]["epoch"], "target_tokens": tokens,
            "seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds),
            "utilisation": round(sum(e["utilisation"] * e["seconds"] for e in steps) / seconds, 3)}


def measure(data, scaled):
    "Everything, with this sample in the hub"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "hub" / "wmt").mkdir(parents=True)
        (folder / "hub" / "wmt" / "wmt14").symlink_to(Path(data).resolve(), target_is_directory=True)
        with HubServer(folder / "hub") as hub:
            run = folder / "run"
            environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
            environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "cache")}
            recipe = ["--config", ROOT / "configs" / "wmt14-base.yaml", "--run", run]
            recipe += [word for name, value in scaled.items() for word in (f"--{name}", value)]
            dry, _ = command(environment, "train", "--dry-run", *recipe)
            prepared, preparing = command(environment, "preprocess", *recipe)
            _, training = command(environment, "train", *recipe)
            asked = [path for method, path in hub.asked if method == "GET" and path.endswith(".parquet")]
        result = curves(run)
        train, recipe = Prepared.load(run / "data").train, yaml.safe_load((run / "config.yaml").read_text())
        plan = plan_batches(train.source_lengths, train.target_lengths, recipe["train"]["tokens_per_batch"])
        result["filled"] = {side: round(int(lengths.sum()) / len(plan)) for side, lengths in    # real tokens a batch
                            (("source", train.source_lengths), ("target", train.target_lengths))}
        result["tokens_a_pair"] = [round(float(lengths.mean()), 2) for lengths in
                                   (train.source_lengths, train.target_lengths)]
        report = run / "data" / "report.json"
        return {"scaled": scaled, "recipe": recipe, "dry_run": dry,
                "cleaning": json.loads(report.read_text()) if report.exists() else None,
                "preprocess": [line.replace(str(folder), "") for line in prepared], "preprocess_seconds": preparing,
                "train_seconds": training, "fetched": sorted({Path(path).name for path in asked}), **result}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of the layout of wmt/wmt14 on the hub")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "wmt14_sample.json")
    options = parser.parse_args()
    result = measure(options.data, SCALED | {"train.max_steps": options.steps,
        "train.checkpoint_every": max(1, options.steps // 10)})
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
