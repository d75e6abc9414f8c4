"""Does a model learn as well as before? BLEU after equally many steps, an older state of the package against this one.

    git worktree add ../before COMMIT
    python benchmarks/quality.py --before ../before --train PREFIX --validation PREFIX --test PREFIX --work FOLDER

Trains configs/multi30k.yaml with both, once with each seed, for --steps steps, in run folders under --work; what is
there already is gone on with. All are scored alike: the weights after the last step, translated by this package in
float32. Writes benchmarks/results/quality.json.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from flash_transformer.translation import Translator, score

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "quality.json"
COMMAND = [sys.executable, "-c", "import sys; from flash_transformer.cli import main; sys.exit(main())"]
SEARCHES = {"greedy": 1, "beam 4": 4}


def train(checkout, run, seed, options):
    "Trains, or goes on where a run was stopped"
    if (run / "model.safetensors").exists(): return
    data = {"train": options.train, "validation": options.validation, "test": options.test}
    fresh = ["--config", ROOT / "configs" / "multi30k.yaml", "--train.seed", seed]
    for name, prefix in data.items(): fresh += [f"--data.{name}", os.path.abspath(prefix)]
    how = ["--resume"] if (run / "checkpoints").exists() else fresh
    length = ["--train.max_steps", options.steps, "--train.max_epochs", "null"]
    threads = max(1, options.threads // options.jobs)
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    print(f"training {run.name}", flush=True)
    with open(options.work / f"{run.name}.log", "a") as log:
        subprocess.run([*map(str, COMMAND), "train", "--run", run.absolute(), *map(str, how), *map(str, length)],
                       cwd=checkout, env=environment, stdout=log, stderr=log, check=True)


def last_loss(run): # → validation loss, nats a token
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(row["validation_loss"] for row in reversed(rows) if "validation_loss" in row)


def measure(options):
    checkouts = {"before": options.before.resolve(), "after": ROOT}
    runs = {(name, seed): options.work / f"{name}{seed}" for seed in options.seeds for name in checkouts}
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda key: train(checkouts[key[0]], runs[key], key[1], options), runs))
    torch.set_num_threads(options.threads)
    source, reference = (Path(f"{options.test}.{name}").read_text("utf-8").splitlines() for name in ("en", "de"))
    result = {"steps": options.steps, "sentences": len(source), "runs": []}
    for (name, seed), run in runs.items():
        translator = Translator.from_run(run, weights=run / "checkpoints" / f"{options.steps:08}" / "model.safetensors")
        found = {"code": name, "seed": seed, "validation_loss": round(last_loss(run), 4)}
        for search, beam in SEARCHES.items():
            scores = score(source, translator.translate(source, beam=beam, precision="float32"), reference)
            found[search], result["signature"] = round(scores.bleu, 2), scores.bleu_signature
        result["runs"].append(found)
        print(found, flush=True)
    result["mean"] = {name: {key: round(statistics.mean(r[key] for r in result["runs"] if r["code"] == name), 3)
                             for key in (*SEARCHES, "validation_loss")} for name in checkouts}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the older state")
    for name in ("train", "validation", "test"): parser.add_argument(f"--{name}", required=True, help="prefix of text")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=972)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of all runs together")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    result = measure(options)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["mean"], indent=1))


if __name__ == "__main__": main()
