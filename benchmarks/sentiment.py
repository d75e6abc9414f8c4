"""What filling gaps does for telling good reviews from bad ones, for the chapter on BERT. Takes a quarter of an hour.

    python benchmarks/sentiment.py

Trains by configs/sentiment-mlm.yaml, then by configs/sentiment.yaml with all labels and with parts of them, begun with
that run and begun with nothing, with several seeds. Numbers go to benchmarks/results/sentiment.json.
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

from flash_transformer.cli import main as flash_transformer
from flash_transformer.data import load_labelled
from flash_transformer.language import TextClassifier, score_classes

HERE = Path(__file__).parent
CONFIGS, OUT = HERE.parent / "configs", HERE / "results" / "sentiment.json"


def train(recipe, run, **changes):
    "Minutes that it took"
    start, options = time.perf_counter(), [f"--{name.replace('__', '.')}={value}" for name, value in changes.items()]
    status = flash_transformer(["train", "--config", str(CONFIGS / recipe), "--run", str(run), *options])
    if status: raise SystemExit(status)
    return (time.perf_counter() - start) / 60


def validations(run):
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{"step": e["step"], "loss": round(e["validation_loss"], 4), "accuracy": round(e["accuracy"], 4)}
            for e in events if "validation_loss" in e]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, nargs="+", default=[1000, 4000], help="training texts with a label")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    corpus, steps, rows = load_labelled("sentiment"), None, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        minutes = train("sentiment-mlm.yaml", folder / "gaps")
        for split, texts in corpus.items(): texts.to_csv(folder / f"{split}.csv", index=False)
        for n in options.labels:
            corpus["train"].select(range(n)).to_csv(folder / "some.csv", index=False)
            for seed in range(options.seeds):
                for start in ("null", str(folder / "gaps")):
                    run = folder / f"{n}-{seed}-{Path(start).name}"
                    files = {f"data__{split}": str(folder / f"{split}.csv") for split in ("validation", "test")}
                    took = train("sentiment.yaml", run, data__corpus="labelled", data__train=str(folder / "some.csv"),
                        train__start=start, train__seed=seed, **files)
                    test = load_labelled(train=folder / "train.csv", test=folder / "test.csv")["test"]
                    score = score_classes(TextClassifier.from_run(run), test)
                    steps = validations(run)[-1]["step"]
                    rows.append({"labels": n, "seed": seed, "start": start != "null", "steps": steps,
                                 "minutes": round(took, 2), "accuracy": score.accuracy})
                    print(rows[-1], flush=True)
        OUT.write_text(json.dumps({"gaps": {"minutes": round(minutes, 2), "validation": validations(folder / "gaps")},
                                   "verdicts": rows}, indent=1) + "\n")
    print(f"written to {OUT}")


if __name__ == "__main__":
    main()
