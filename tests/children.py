"""Commands and trainers in processes of their own, for the tests that stop, starve and kill them.

A fork server has paid for the imports, so a child begins within a tenth of a second. What runs in a child stands
here; its standard output and error go to `<output>.out` and `<output>.err`."""
import ctypes
import json
import os
import shutil
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import launch

_server = launch._context
_server.set_forkserver_preload(["pytest", "torch._dynamo", "torch.distributed.fsdp", "flash_transformer.cli"])


def start(function, *arguments, output, environment=None):
    "`function` of this module in a new process; what it returns is the exit status"
    child = _server.Process(target=_enter, args=(function, arguments, str(output), environment or {}), daemon=True)
    child.start()
    return child


def _enter(function, arguments, output, environment):
    import torch

    from flash_transformer.training import trainer
    for descriptor, ending in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output + ending, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666), descriptor)
    os.environ.update({"OMP_NUM_THREADS": "1"} | environment)
    torch.set_num_threads(1)
    trainer._ceiling = lambda *_: 1e12                   # measuring it takes half a second, and nobody compares times
    sys.exit(function(*arguments))


def wait(child, seconds=300):
    "Its exit status, or minus the signal that ended it; the time is only against a hang"
    child.join(seconds)
    if child.exitcode is None:
        child.kill()
        raise TimeoutError(f"the child was not done after {seconds} s")
    return child.exitcode


# ---- the command line, and what befalls it ----

# a learning rate far too high, so that the best checkpoint is the first one, which prune has to keep
RECIPE = """
data: {{train: {text}/train, validation: {text}/validation, test: {text}/test, vocab_size: 400}}
model: {{d_model: 16, d_ff: 32, heads: 2, encoder_layers: 1, decoder_layers: 1, norm: pre, dropout: 0.2}}
train: {{max_steps: 17, tokens_per_batch: 400, accumulate: 2, learning_rate: 1, warmup_steps: 10,
        precision: float32, log_every: 2, checkpoint_every: 3, keep_checkpoints: 4, average: 2, clip_norm: 1}}
decode: {{beam: 1, extra_length: 5}}
"""


def prepare(text, folder):
    "RECIPE on this text in `folder`/recipe.yaml, and a run folder with its corpus, `folder`/run"
    (folder / "recipe.yaml").write_text(RECIPE.format(text=text))
    arguments = preparing(folder / "run", folder / "recipe.yaml")
    assert wait(start(command, arguments, output=folder / "log")) == 0, (folder / "log.err").read_text()
    return folder / "run"


def preparing(run, recipe): return ["preprocess", "--config", recipe, "--run", run]


def afresh(run, recipe): return ["train", "--config", recipe, "--run", run]


def saved(run): return sorted(p for p in (run / "checkpoints").glob("*") if p.name.isdigit())


def go_on(run, recipe):
    "What a user types next"
    return ["train", "--resume", "--run", run] if saved(run) else [*afresh(run, recipe), "--overwrite"]


TIMES = ("seconds", "tokens_per_second", "utilisation", "memory")        # of this machine, today


def everything(run):
    "Each file of a run but the corpus; of metrics.jsonl all but times"
    files = {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    files = {name: content for name, content in files.items() if not name.startswith("data/")}
    lines = [json.loads(line) for line in files.pop("metrics.jsonl").splitlines()]
    return files | {"metrics.jsonl": [{k: v for k, v in line.items() if k not in TIMES} for line in lines]}


def difference(found, right):
    "The first lines of metrics that differ, in what; of other files nothing"
    if isinstance(right, bytes): return
    for a, b in zip(found, right):
        yield from ((b["step"], k, a.get(k), b.get(k)) for k in {*a, *b} if a.get(k) != b.get(k))
    if len(found) != len(right): yield f"{len(found)} lines, not {len(right)}"


def same(run, undisturbed):
    "No file more, none less, and the same in each to the last bit"
    found, right = everything(run), everything(undisturbed)
    assert found.keys() == right.keys()
    for name in right: assert found[name] == right[name], (name, *difference(found[name], right[name]))


def one_line(path, *words):
    "What a command said on standard error, namely one line with these words"
    said = Path(path).read_text()
    assert said.startswith("flash-transformer") and said.count("\n") == 1, said
    for word in words: assert word.lower() in said.lower(), said


def command(arguments, *faults):
    "`flash-transformer …`, after these functions have prepared what befalls it"
    from flash_transformer.cli import main
    ends = [fault() for fault in faults]
    status = main([str(a) for a in arguments])
    for end in filter(None, ends): end()
    return status


def command_of_rank(arguments, faults):
    "`command` with the fault of this process, if it has one"
    return command(arguments, *filter(None, [faults[int(os.environ["RANK"])]]))


def at_operation(folder, then, number, since="", log=None):
    """Call `then` before the so-manieth file operation of Python's in `folder`, counted from the first one on a file
    whose name begins with `since`; write what each of them is to the file `log`"""
    names = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fsync"}
    count, fsync = [None if since else 0], os.fsync
    log = log and os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event, arguments):                          # Python calls it before each
        if event not in names or not isinstance(arguments[0], (str, bytes, os.PathLike)): return
        path = Path(os.fsdecode(arguments[0]))
        if path.is_absolute() and Path(folder) not in (path, *path.parents): return    # relative: rmtree at work
        if count[0] is None and path.name.startswith(since): count[0] = 0
        if count[0] is None: return
        if log: os.write(log, f"{event} {path}\n".encode())
        count[0] += 1
        if count[0] == number + 1: then()

    def audited(file):
        sys.audit("fsync", folder)
        fsync(file)
    os.fsync = audited
    sys.addaudithook(hook)


def at_call(function, then, number):
    "Call `then` at the so-manieth call of flash_transformer's `function`, named in full"
    module, _, name = function.rpartition(".")
    module, count = sys.modules[module], [0]
    before = getattr(module, name)

    def called(*args, **more):
        count[0] += 1
        if count[0] == number + 1: then()
        return before(*args, **more)
    setattr(module, name, called)


def send(number): os.kill(os.getpid(), number)
kill = partial(send, signal.SIGKILL)
def fail(): raise OSError("the disk is on fire")


def poison(function, number):
    "Losses are not a number from the so-manieth call of `function` on"
    module, _, name = function.rpartition(".")
    module, count, before = sys.modules[module], [0], getattr(sys.modules[module], name)

    def poisoned(*args, **more):
        count[0] += 1
        return [x * float("nan") if count[0] > number else x for x in before(*args, **more)]
    setattr(module, name, poisoned)


def eager_scaler():
    "Let fp16's scale double every second step, and begin near to where it overflows"
    from torch.amp import GradScaler
    before, eager = GradScaler.__init__, {"init_scale": 2.0 ** 19, "growth_interval": 2}
    GradScaler.__init__ = lambda self, *args, **more: before(self, *args, **more | eager)


def slow_fsync(seconds):
    fsync = os.fsync
    os.fsync = lambda file: (time.sleep(seconds), fsync(file))[1]


def note_unflushed(folder, log):
    """Write to the file `log`, for each renaming in `folder`, what of it was not on the disk yet; and after it, if the
    new name itself was not flushed before the next one, that it might be lost"""
    flushed, fsync, names = {}, os.fsync, ("rename", "replace")

    def of(status): return (status.st_ino, status.st_mtime_ns, status.st_size)

    def noting_fsync(file):
        status = os.fstat(file)
        fsync(file)
        flushed[status.st_ino] = of(status)              # what was written until now

    def noting(rename):
        def called(source, target, **more):
            tree = [Path(source), *Path(source).rglob("*")]
            if renamed: settle()
            missing = [p.name for p in tree if flushed.get(p.stat().st_ino) != of(p.stat())]
            rename(source, target, **more)
            if Path(folder) not in Path(target).parents or str(target).endswith(".removed"): return
            write("rename", Path(source).name, Path(target).name, *missing)
            flushed.pop(Path(target).parent.stat().st_ino, None)
            renamed.append((Path(target).name, Path(target).parent))
        return called

    def write(*words):
        with open(log, "a") as file: print(*words, file=file)

    def settle():                                        # the name itself is flushed with the folder
        name, parent = renamed.pop()
        if parent.stat().st_ino not in flushed: write("lost", name)
    renamed = []
    os.fsync = noting_fsync
    for name in names: setattr(os, name, noting(getattr(os, name)))
    return lambda: settle() if renamed else None


# ---- a full disk ----

def small_disk(folder, size):
    "Mount a disk of so many bytes at `folder`, for this process and its children alone; raises OSError"
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name, *arguments):
        if getattr(libc, name)(*arguments): raise OSError(ctypes.get_errno(), f"{name} is not allowed")
    new_mounts, new_user, recursive_private = 0x20000, 0x10000000, 0x4000 | 0x40000
    user, group = os.getuid(), os.getgid()
    try: call("unshare", new_mounts)                     # root may
    except OSError:                                      # others become root of a world of their own
        call("unshare", new_mounts | new_user)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
    call("mount", b"none", b"/", None, recursive_private, None)
    call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())


def quota(size):
    "No file may grow beyond so many bytes: what comes nearest to a full disk where nobody may mount one"
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def can_mount(folder):
    "Exit status 0 if small_disk works here"
    small_disk(folder, 2 ** 20)
    return 0


def fork(function, *arguments, output):
    "`function` in a copy of this process; its exit status"
    sys.stdout.flush(), sys.stderr.flush()
    if not (child := os.fork()):
        status = 1
        try: _enter(function, arguments, str(output), {})
        except SystemExit as e: status = e.code or 0
        except BaseException: traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def starve(how, room, before, run, first, then, output):
    """A copy of the folder `before` at `run`, where `how` ("disk" or "quota") leaves so many bytes; there the command
    `first`; then room enough, and the command that `then(run)` gives. What `first` left goes to <output>.left, the end
    to <output>.end, exit statuses to <output>.status."""
    run.parent.mkdir()
    if how == "disk": small_disk(run.parent, SIZE)
    if before: shutil.copytree(before, run)
    if how == "disk":
        ballast, free = run.parent / "ballast", shutil.disk_usage(run.parent).free
        with open(ballast, "wb") as file: file.write(bytes(max(0, free - room)))
        release = ballast.unlink
    else: release = quota(room)
    status = [fork(command, first, output=f"{output}.1")]
    release()
    if run.exists(): shutil.copytree(run, f"{output}.left")
    status.append(fork(command, then(run), output=f"{output}.2"))
    shutil.copytree(run, f"{output}.end")
    Path(f"{output}.status").write_text(" ".join(map(str, status)))
    return 0


SIZE = 8 * 2 ** 20


# ---- several processes ----

def processes(world, function, *arguments, output):
    "`function` in so many processes that know of each other, as torchrun starts them"
    from torch.distributed import TCPStore
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = []
    for rank in range(world):
        told = launch.environment(rank, world, store.port) if world > 1 else {}
        told |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}      # the store is here
        children.append(start(function, *arguments, output=f"{output}.{rank}", environment=told))
        children[-1].store = store                       # lives as long as they do
    return children


def fit(data, run, resume, dtype, shape, train, *faults):
    "Train a model of this shape and dtype on a prepared corpus, by the library"
    import torch

    from flash_transformer.data import Prepared
    from flash_transformer.model import Transformer, TransformerConfig
    from flash_transformer.training import TrainConfig, Trainer
    for fault in faults: fault()
    prepared = Prepared.load(data)
    torch.manual_seed(int(os.environ.get("RANK", 0)))    # each its own: the model shall be that of process 0
    size = prepared.tokenizers.source_size
    config = TransformerConfig(source_vocab_size=size, target_vocab_size=size, **shape)
    model = Transformer(config).to(getattr(torch, dtype))
    Trainer(model, prepared.train, prepared.validation, TrainConfig(**train), run).fit(resume)
    return 0
