"""How benchmarks/training.py makes training loops take turns. Needs Python alone, for it runs in peers' environments.

A training loop runs in a process of its own and calls `Turns.done` after every step. At first it may warm up; then it
gives its free memory back, so that many can wait at a time, and sleeps until a line comes on standard input. That is a
number: so many steps, or with a decimal point so many seconds of steps. Two steps that are not counted come first, in
which the process takes its memory again. What was measured is answered in one line. At the end of input it ends.
"""
import ctypes
import json
import sys
import time

MARK = '{"answer": '                         # how a line begins that is meant for the driver; the rest is talk
AGAIN = 2


class Turns:
    def __init__(self, warm, about): # steps before the first turn; () -> what the driver shall know of the engine
        self.about, self.again = about, 0
        self.begin(warm, None)

    def begin(self, steps, seconds):
        self.tokens = self.flops = self.steps = 0
        self.left, self.until, self.start = steps, seconds, time.perf_counter()

    def done(self, tokens, flops=0): # target tokens of the step without padding; its FLOPs, where they are known
        "A step is done: go on, or wait for the next turn"
        if self.again:
            self.again -= 1
            return self.begin(self.left, self.until)
        self.tokens, self.flops, self.steps = self.tokens + tokens, self.flops + flops, self.steps + 1
        seconds = time.perf_counter() - self.start
        if self.steps < self.left or (self.until and seconds < self.until): return
        print(MARK + json.dumps({"tokens": self.tokens, "flops": self.flops, "steps": self.steps,
                                 "seconds": seconds, **self.about()}) + "}", flush=True)
        give_back_memory()
        line = sys.stdin.readline().strip()
        if not line: raise SystemExit
        self.again = AGAIN
        self.begin(*((1, float(line)) if "." in line else (int(line), None)))


def glibc(function, *args):
    if sys.platform != "linux": return
    try: getattr(ctypes.CDLL(None), function)(*args)
    except AttributeError: pass              # another C library


def keep_memory():
    "What `flash-transformer train` asks of glibc: keep what a step frees for the next one"
    glibc("mallopt", -4, 0)                  # M_MMAP_MAX
    glibc("mallopt", -1, 2**31 - 1)          # M_TRIM_THRESHOLD


def give_back_memory(): glibc("malloc_trim", 0)
