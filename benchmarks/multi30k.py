"""Scores of a Multi30k run, for the chapter on real text.

    flash-transformer train --config configs/multi30k.yaml --data.train DATA/train --data.validation DATA/val --run RUN
    python benchmarks/multi30k.py RUN --validation DATA/val --test DATA/test_2016_flickr

Which weights and which search are compared on validation text; the test text is translated once more, with what the
recipe says. Writes numbers, no sentences, to benchmarks/results/multi30k.json.
"""
import argparse
import json
import time
from pathlib import Path

import torch
import yaml

from flash_transformer.data import load_corpus
from flash_transformer.translation import Translator, evaluate


def ceiling(dtype, n=2048):
    "GFLOP/s of a matrix product, the median of 9"
    a, seconds = torch.randn(n, n).to(dtype), []
    for _ in range(9):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return round(2 * n**3 / sorted(seconds)[4] / 1e9)


def training(run):
    "What metrics.jsonl tells of the run"
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, validations = ([e for e in events if key in e] for key in ("loss", "validation_loss"))
    seconds, tokens = sum(e["seconds"] for e in steps), sum(e["tokens"] for e in steps)
    return {
        "steps": steps[-1]["step"], "epochs": steps[-1]["epoch"], "target_tokens": tokens,
        "minutes": round(seconds / 60, 1), "tokens_per_second": round(tokens / seconds),
        "curve": [[e["step"], round(e["plain_loss"], 4)] for e in steps],
        "validation_curve": [[e["step"], round(e["validation_loss"], 4)] for e in validations],
    }


def timed(translator, pairs, **search):
    start = time.perf_counter()
    scores = evaluate(translator, pairs, progress=True, **search)
    return scores, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--validation", required=True, help="prefix of the validation text")
    parser.add_argument("--test", required=True, help="prefix of the test text")
    parser.add_argument("--wall_minutes", type=float, help="of the whole train command, as the shell's `time` told it")
    options = parser.parse_args()
    recipe = yaml.safe_load((options.run / "config.yaml").read_text())
    source, target = recipe["data"]["source"], recipe["data"]["target"]
    corpus = load_corpus("files", validation=options.validation, test=options.test, source=source, target=target)
    data = {k: v for k, v in recipe["data"].items() if k not in ("train", "validation", "test")}
    result = {"recipe": recipe | {"data": data},
              "training": training(options.run) | {"wall_minutes": options.wall_minutes},
              "machine": {"threads": torch.get_num_threads(), "float32_gflops": ceiling(torch.float32),
                          "bf16_gflops": ceiling(torch.bfloat16)}}

    best_step = min(result["training"]["validation_curve"], key=lambda point: point[1])[0]
    weights = {f"average of the last {recipe['train']['average']}": None,
               f"best single (step {best_step})": options.run / f"checkpoints/{best_step:08d}/model.safetensors"}
    searches = [{"beam": 1, "length_penalty": 1.0}]
    searches += [{"beam": beam, "length_penalty": alpha} for beam in (4, 5) for alpha in (0.6, 1.0)]
    result["validation"] = []
    for name, path in weights.items():
        translator = Translator.from_run(options.run, weights=path)
        for search in searches if path is None else (searches[0], searches[-1]):
            scores, seconds = timed(translator, corpus["validation"], **search)
            result["validation"].append({
                "weights": name, **search, "bleu": round(scores.bleu, 2), "chrf": round(scores.chrf, 2),
                "sentences_per_second": round(len(scores.sentences) / seconds, 1)})
            print(result["validation"][-1])

    translator, result["test"] = Translator.from_run(options.run), []
    for search in ({"beam": recipe["decode"]["beam"]}, {"beam": 1}):
        scores, seconds = timed(translator, corpus["test"], **search)
        result["test"].append({"beam": search["beam"], "length_penalty": recipe["decode"]["length_penalty"],
            "bleu": round(scores.bleu, 2), "chrf": round(scores.chrf, 2), "seconds": round(seconds, 1),
            "bleu_signature": scores.bleu_signature, "chrf_signature": scores.chrf_signature,
            "sentence_chrf": sorted(round(s["chrf"], 1) for s in scores.sentences)})
        print({k: v for k, v in result["test"][-1].items() if k != "sentence_chrf"})
    out = Path(__file__).parent / "results" / "multi30k.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
