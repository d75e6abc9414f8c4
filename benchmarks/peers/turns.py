"""How benchmarks/training.py makes training loops take turns. Needs Python alone, for it runs in peers' environments.

A training loop runs in a process of its own and calls `Turns.done` after every step. At first it may warm up; then it
waits, asleep, for lines on standard input. Each line is a number: so many more steps, or with a decimal point so many
seconds of steps. They are answered by one line of JSON. At the end of input the process ends.
"""
import ctypes
import json
import sys
import time

MARK = '{"turn": '                           # how a line begins that is meant for the driver; the rest is talk


class Turns:
    def __init__(self, warm, about): # steps before the first turn; () -> what the driver shall know of the engine
        self.left, self.until, self.about = warm, None, about
        self.tokens = self.flops = self.steps = 0
        self.start = time.perf_counter()

    def done(self, tokens, flops=0): # target tokens of the step without padding; its FLOPs, where they are known
        "A step is done: go on, or wait for the next turn"
        self.tokens, self.flops, self.steps = self.tokens + tokens, self.flops + flops, self.steps + 1
        seconds = time.perf_counter() - self.start
        if self.steps < self.left or (self.until and seconds < self.until): return
        print(MARK + json.dumps({"tokens": self.tokens, "flops": self.flops, "steps": self.steps,
                                 "seconds": seconds, **self.about()}) + "}", flush=True)
        line = sys.stdin.readline().strip()
        if not line: raise SystemExit
        self.left, self.until = (1, float(line)) if "." in line else (int(line), None)
        self.tokens = self.flops = self.steps = 0
        self.start = time.perf_counter()


def keep_memory():
    "What `flash-transformer train` asks of glibc: keep what a step frees for the next one"
    if sys.platform != "linux": return
    try: mallopt = ctypes.CDLL(None).mallopt
    except AttributeError: return            # another C library
    mallopt(-4, 0)                           # M_MMAP_MAX
    mallopt(-1, 2**31 - 1)                   # M_TRIM_THRESHOLD
