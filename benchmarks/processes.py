"What benchmarks/training.py and decoding.py share: engines in processes of their own, in environments of their own"
import json
import os
import subprocess
import tempfile
import venv
from pathlib import Path

from peers.turns import MARK

HERE = Path(__file__).parent


def python_of(
    folder,   # of the environment
    pins,     # what must be there, package==version
    more=(),  # other packages, of any version
    alone=(), # like pins, but installed without what they ask for
):
    "The Python of a peer's environment, which is made if it is not there"
    python, pins = folder.absolute() / "bin" / "python", [*pins, *alone]
    wanted = dict(pin.split("==") for pin in pins)
    check = (f"from importlib.metadata import version\n"
             f"assert all(version(name).split('+')[0] == v for name, v in {wanted}.items())\n"
             f"for name in {list(more)}: version(name)")
    if python.exists() and not subprocess.run([python, "-c", check], capture_output=True).returncode: return python
    print(f"making an environment in {folder}", flush=True)
    venv.create(folder, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *(pin for pin in pins if pin not in alone), *more], check=True)
    if alone: subprocess.run([*install, "--no-deps", *alone], check=True)
    return python


class Worker:
    "An engine in a process of its own; `facts` is what it says when it is ready"
    def __init__(self, command, threads, **environment):
        environment |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1",
                        "PYTHONWARNINGS": "ignore"}
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([*map(str, command)], env=os.environ | environment, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors, text=True)
        self.facts = self.answer()

    def answer(self):
        for line in self.process.stdout:
            if line.startswith(MARK): return json.loads(line)["answer"]
        self.process.wait()
        self.errors.seek(0)
        raise SystemExit(f"{self.process.args[1:]} ended: {self.errors.read()[-3000:]}")

    def ask(self, line):
        print(line, file=self.process.stdin, flush=True)
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait()
