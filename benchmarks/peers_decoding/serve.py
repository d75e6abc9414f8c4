"How a decoding engine answers benchmarks/decoding.py; needs Python alone, for it runs in the peers' environments too"
import json
import statistics
import sys
import time
from pathlib import Path

MARK = '{"answer": '                              # other lines of an engine's output are not for us


def request(): return json.loads(Path(sys.argv[-1]).read_text())


def say(answer): print(MARK + json.dumps(answer) + "}", flush=True)


def serve(
    facts, # versions and the like, said at once
    run,   # (job, numbers of sentences) → their translations; a job is a dict, of an engine's own settings besides
):
    """Each line of standard input is a job: "beam"; "sentences", so many from the first on; "single", one after another
    or all at once; "show", are the translations wanted? It is done once. No CPU is used while there is nothing to do"""
    say(facts)
    for line in sys.stdin:
        job = json.loads(line)
        numbers, found, each = range(job["sentences"]), [], []
        start = time.perf_counter()
        for part in ([i] for i in numbers) if job["single"] else [numbers]:
            begin = time.perf_counter()
            found += run(job, part)
            each.append(time.perf_counter() - begin)
        answer = {"seconds": time.perf_counter() - start, "median": statistics.median(each)}
        say(answer | ({"translations": found} if job["show"] else {}))
