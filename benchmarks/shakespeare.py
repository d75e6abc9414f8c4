"""What the two recipes for Shakespeare reach, for the chapter on GPT.

    time flash-transformer train --config configs/shakespeare-char.yaml --data.train TEXT --run RUN
    python benchmarks/shakespeare.py RUN --wall_minutes MINUTES

Curves, samples and score go to benchmarks/results/shakespeare.json, under the name of the recipe's tokenizer. TEXT is
the file of a million letters that char-rnn made known; without --data.train it comes from the hub, which has it cut
elsewhere: its validation text is half as long.
"""
import argparse
import json
from pathlib import Path

from flash_transformer.data import load_text
from flash_transformer.language import TextGenerator, score_text
from flash_transformer.training import training_flops
from flash_transformer.translation import open_run

OUT = Path(__file__).parent / "results" / "shakespeare.json"


def curves(run):
    "What metrics.jsonl tells: at each validation the step, the seconds of training before it, the loss, a sample"
    lines, seconds, training, validations = (run / "metrics.jsonl").read_text().splitlines(), 0.0, [], []
    for event in map(json.loads, lines):
        seconds += event.get("seconds", 0)
        if "loss" in event: training.append([event["step"], round(event["loss"], 4)])
        else: validations.append({"step": event["step"], "seconds": round(seconds, 1),
                                  "loss": round(event["validation_loss"], 4), "sample": event["samples"][0]})
    events = [event for event in map(json.loads, lines) if "loss" in event]
    rates = sorted(event["tokens_per_second"] for event in events)
    uses = sorted(event["utilisation"] for event in events)
    return {"training": training, "validation": validations, "tokens": sum(event["tokens"] for event in events),
            "tokens_per_second": rates[len(rates) // 2], "utilisation": round(uses[len(uses) // 2], 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--wall_minutes", type=float, help="of the whole train command, as the shell's `time` told it")
    options = parser.parse_args()
    generator, (model, _, _, data) = TextGenerator.from_run(options.run), open_run(options.run)
    text = load_text(data["train"], data["validation"], corpus=data["corpus"], path=data["path"])["validation"]
    score = score_text(generator, text)
    length, found = generator.context, curves(options.run)
    found |= {
        "parameters": sum(p.numel() for p in model.parameters()), "vocabulary": model.config.target_vocab_size,
        "flops_a_token": (flops := training_flops(model.config, [0], [length]) / length),
        "wall_minutes": options.wall_minutes,
        "gflops": round(found["tokens_per_second"] * flops / 1e9),
        "score": {"tokens": score.tokens, "characters": score.characters, "loss": round(score.loss, 4),
                  "per_character": round(score.per_character, 4)},
        "prompted": generator.write("ROMEO:", max_new_tokens=400, temperature=0.8)}
    results = json.loads(OUT.read_text()) if OUT.exists() else {}
    results[data["tokenizer"]] = found
    OUT.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{score}\n\n{found['prompted']}\n\nwritten to {OUT}")


if __name__ == "__main__":
    main()
