"Several processes for a test: `launch(4, function, …)` calls a function of an importable module in each of them."
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from multiprocessing.connection import wait

# The fork server imports these once; a process forked from it starts in a tenth of a second.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "flash_transformer.training"])


class Failed(Exception):
    "A process raised an exception, or died without one"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(rank, world, port):
    "What torchrun tells a process of one machine"
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}


def _process(pipe, rank, world, port, function, arguments):
    os.environ.update(environment(rank, world, port) if world > 1 else {"OMP_NUM_THREADS": "1"})
    import torch
    torch.set_num_threads(1)
    try: outcome = function(*arguments)
    except BaseException as e:
        outcome = Failed(f"process {rank}: {type(e).__name__}: {e}\n{traceback.format_exc()}")
    pipe.send_bytes(pickle.dumps(outcome))  # by value: what the pipe does to tensors ends with this process


def launch(world, function, *arguments, timeout=90, check=True):
    """What `function(*arguments)` returned in each of `world` processes, by rank. A process that raised or died leaves
    a `Failed`, which is raised unless `check` is False. After `timeout` seconds all are killed: TimeoutError."""
    port, processes, outcomes = free_port(), [], {}
    for rank in range(world):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=_process, args=(theirs, rank, world, port, function, arguments), daemon=True)
        process.start()
        theirs.close()
        processes.append((process, ours))
    end = time.monotonic() + timeout
    try:
        while len(outcomes) < world:
            waiting = {ours: rank for rank, (_, ours) in enumerate(processes) if rank not in outcomes}
            ready = wait(list(waiting), max(0, end - time.monotonic()))
            if not ready: raise TimeoutError(f"processes {sorted(waiting.values())} did not end in {timeout} s")
            for ours in ready:
                rank = waiting[ours]
                try: outcomes[rank] = pickle.loads(ours.recv_bytes())
                except EOFError:
                    processes[rank][0].join()
                    outcomes[rank] = Failed(f"process {rank} died with exit status {processes[rank][0].exitcode}")
        for process, _ in processes: process.join(max(1, end - time.monotonic()))
    finally:
        for process, ours in processes:
            if process.is_alive(): process.kill()
            process.join()
            ours.close()
    failed = [outcome for outcome in outcomes.values() if isinstance(outcome, Failed)]
    if failed and check: raise failed[0]
    return [outcomes[rank] for rank in range(world)]
