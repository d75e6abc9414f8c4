"Several processes on CPUs: what they share, agree on and hold, against one process and plain PyTorch; when one dies."
import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import Failed, environment, free_port, launch
from torch import nn
from torch.testing import assert_close

from flash_transformer.model import Transformer, TransformerConfig
from flash_transformer.training import (
    adam,
    add_up,
    agree,
    all_alive,
    compile_blocks,
    distribute,
    distribute_like,
    full_tensor,
    processes,
    share,
    start_accelerator,
    synchronise,
)

SIZES = dict(d_model=16, d_ff=33, heads=2, encoder_layers=2, decoder_layers=1, norm="pre", dropout=0.,
             source_vocab_size=51, target_vocab_size=51)  # 33 and 51: no number of processes divides them
GROUP = ((3, 7), (5, 4), (2, 9), (6, 3), (1, 5))          # rows and length of the batches of a step


def small_model(seed=0):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(**SIZES))


def group_of_batches(step):
    g = torch.Generator().manual_seed(step)
    return [tuple(torch.randint(4, 51, (rows, length), generator=g) if i != 1 else torch.full((rows,), length)
                  for i in range(3)) for rows, length in GROUP]


def rank(): return int(os.environ.get("RANK", 0))


# ---- one process ----

@pytest.mark.parametrize("world", range(1, 9))
def test_share_gives_every_item_to_one_process(world):
    for items in range(1, 20):
        shares = [share(list(range(items)), rank, world) for rank in range(world)]
        assert len({len(s) for s in shares}) == 1 and len(shares[0]) == -(-items // world)
        assert sorted(item for s in shares for item, counts in s if counts) == list(range(items))
        assert all(0 <= item < items for s in shares for item, _ in s)
        assert [item for item, counts in shares[0] if counts] == list(range(0, items, world))
    assert share([], 0, world) == []


def test_alone_nothing_is_distributed():
    accelerator = start_accelerator("float32")
    assert accelerator.num_processes == 1 and accelerator.is_main_process and not dist.is_initialized()
    assert start_accelerator("bf16").mixed_precision == "bf16" and start_accelerator("float32").mixed_precision == "no"
    model = small_model()
    for parallel in ("ddp", "fsdp"):
        wrapped, optimiser = distribute(model, lambda p: adam(p, 1e-3), parallel, accelerator)
        assert wrapped is model and type(optimiser.optimizer) is torch.optim.AdamW
    assert agree(3) == 3 and add_up(torch.tensor(2.)) == 2
    weight = model.output.weight
    assert full_tensor(weight) is weight and distribute_like(torch.ones(2), weight).equal(torch.ones(2))
    with synchronise(wrapped, last=False): pass


def test_fp16_on_a_cpu_is_scaled():
    accelerator = start_accelerator("fp16")
    model, seen = nn.Sequential(nn.Linear(4, 4)), []
    wrapped = accelerator.prepare(model)
    model[0].register_forward_hook(lambda *_: seen.append(torch.get_autocast_dtype("cpu")))
    assert wrapped(torch.ones(1, 4)).dtype == torch.float32 and seen == [torch.float16]
    assert accelerator.scaler.scale(torch.ones(())) == 2 ** 16


def test_trackers_that_are_not_there(monkeypatch):
    with pytest.raises(ValueError, match="train.trackers knows tensorboard and wandb, not 'tensorbord'"):
        start_accelerator("float32", ["tensorbord"])
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb, which is not installed: pip install wandb"):
        start_accelerator("float32", ["wandb"])


def test_tensorboard_writes_into_the_folder(tmp_path):
    pytest.importorskip("tensorboard")
    accelerator = start_accelerator("float32", ["tensorboard"], tmp_path)
    accelerator.init_trackers("tensorboard")
    accelerator.log({"loss": 1.0}, step=1)
    for tracker in accelerator.trackers: tracker.finish()
    assert list((tmp_path / "tensorboard").glob("events.out.*"))


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in environment(0, 8, free_port()).items(): monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="8 processes were started on a machine with 4 GPUs: start 4"):
        start_accelerator("float32")


def test_other_errors_pass(tmp_path):
    for error in (RuntimeError("CUDA out of memory"), ValueError("gloo"), FloatingPointError("the loss is nan")):
        with pytest.raises(type(error)) as caught, all_alive(tmp_path): raise error
        assert caught.value is error


@pytest.mark.parametrize("error", [dist.DistBackendError("remote process exited"), dist.DistNetworkError("socket"),
    RuntimeError("[…/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), RuntimeError("NCCL communicator")])
def test_the_newest_checkpoint_is_named(tmp_path, error):
    with pytest.raises(ConnectionError, match="there is no checkpoint yet: start again"), all_alive(tmp_path):
        raise error
    for name in ("00000010", "00000020", "00000030.unfinished"): (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with pytest.raises(ConnectionError, match="has died.* checkpoint .*00000020 is whole: start again with --resume"):
        with all_alive(tmp_path): raise error


# ---- several ----

def _start():
    os.sched_getaffinity = lambda _: set(range(12))
    del os.environ["OMP_NUM_THREADS"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = start_accelerator("auto"), start_accelerator("bf16")
    tensor = torch.tensor([rank(), 1.5])
    patience = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    total, large = add_up(tensor), add_up(torch.tensor(2 ** 40))
    return (first.num_processes, second.process_index, second.mixed_precision, torch.get_num_threads(),
            agree(rank() * 7 - 5), total.tolist(), tensor.tolist(), int(large), patience)


@pytest.mark.parametrize("world", [2, 4])
def test_start_and_agree(world):
    everywhere = launch(world, _start)
    total = [world * (world - 1) / 2, 1.5 * world]
    for rank, found in enumerate(everywhere):
        assert found == (world, rank, "bf16", 12 // world, (world - 1) * 7 - 5, total, [rank, 1.5], world * 2 ** 40,
                         processes.PATIENCE)


def _train(parallel, steps=3):
    "A few steps in float64, where rounding cannot hide anything; gradients of the first, outputs and weights after all"
    accelerator = start_accelerator("float32")
    model = small_model(seed=rank()).double()              # process 0's weights are those that count
    wrapped, optimiser = distribute(model, lambda p: adam(p, 1e-2), parallel, accelerator)
    norms = []
    for step in range(steps):
        group = group_of_batches(step)
        tokens, mine = sum(batch[2].numel() for batch in group), share(group, rank(), accelerator.num_processes)
        for i, (batch, counts) in enumerate(mine):
            with synchronise(wrapped, last=i == len(mine) - 1):
                loss = F.cross_entropy(wrapped(*batch).flatten(0, 1), batch[2].flatten(), reduction="sum")
                accelerator.backward(loss * counts * accelerator.num_processes / tokens)
        if not step: gradients = {n: full_tensor(p.grad).clone() for n, p in model.named_parameters()}
        norms.append(full_tensor(accelerator.clip_grad_norm_(wrapped.parameters(), 0.5)))
        optimiser.step(), optimiser.zero_grad()
    wrapped.eval()
    with torch.no_grad(): logits = wrapped(*group_of_batches(0)[0])
    assert model.output.weight is model.encoder.embedding.tokens.weight is model.decoder.embedding.tokens.weight
    held = sum(p.to_local().numel() if parallel == "fsdp" and accelerator.num_processes > 1 else p.numel()
               for p in model.parameters())
    moments = {n: full_tensor(optimiser.state[p]["exp_avg_sq"]) for n, p in model.named_parameters()}
    return gradients, norms, {n: full_tensor(p).detach() for n, p in model.named_parameters()}, moments, logits, held


@pytest.fixture(scope="module")
def plain():
    "The same steps by PyTorch alone: one loss over all words of the group"
    model, norms = small_model(seed=0).double(), []
    optimiser = torch.optim.Adam(model.parameters(), 1e-2, betas=(0.9, 0.98), eps=1e-9)
    for step in range(3):
        group = group_of_batches(step)
        logits = torch.cat([model(*batch).flatten(0, 1) for batch in group])
        F.cross_entropy(logits, torch.cat([batch[2].flatten() for batch in group])).backward()
        if not step: gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimiser.step(), optimiser.zero_grad()
    with torch.no_grad(): logits = model(*group_of_batches(0)[0])
    moments = {n: optimiser.state[p]["exp_avg_sq"] for n, p in model.named_parameters()}
    return gradients, norms, {n: p.detach() for n, p in model.named_parameters()}, moments, logits


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("world", [1, 2, 4])               # a group of 5: with 2 and 4 some batches do not count
def test_training_is_that_of_one_process(plain, world, parallel):
    everywhere = launch(world, _train, parallel) if world > 1 else [_train(parallel)]
    for found in everywhere:
        # three steps of 0.01, by rounding of 1e-16 over Adam's 1e-9
        for ours, theirs in zip(found, plain): assert_close(ours, theirs, rtol=0, atol=1e-8)
        for ours, theirs in zip(found[:-1], everywhere[0]): assert_close(ours, theirs, rtol=0, atol=0)
    parameters, held = sum(p.numel() for p in plain[2].values()), [found[-1] for found in everywhere]
    if parallel == "ddp" or world == 1: assert held == [parameters] * world
    else: assert sum(held) == parameters and max(held) < 1.2 * parameters / world


def _precise(parallel, precision, overflow):
    accelerator = start_accelerator(precision)
    model = small_model()
    wrapped, optimiser = distribute(model, lambda p: adam(p, 1e-2), parallel, accelerator)
    before = full_tensor(model.output.weight).clone()
    batch = group_of_batches(0)[0]
    logits = wrapped(*batch)
    factor = 1e38 if overflow and rank() == accelerator.num_processes - 1 else 1    # in one process alone
    accelerator.backward(F.cross_entropy(logits.flatten(0, 1), batch[2].flatten()) * factor)
    norm = full_tensor(accelerator.clip_grad_norm_(wrapped.parameters(), 1.))
    optimiser.step()
    scale = accelerator.scaler.get_scale() if accelerator.scaler else None
    return logits.detach(), norm, scale, full_tensor(model.output.weight).equal(before)


def _three(parallel): return [_precise(parallel, *how) for how in (("bf16", False), ("fp16", False), ("fp16", True))]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_half_precision_is_that_of_one_process(parallel):
    for found in launch(2, _three, parallel):
        for (ours, norm, scale, unchanged), theirs in zip(found[:2], _three(parallel)):
            assert ours.dtype == torch.float32 and ours.equal(theirs[0]) and not unchanged
            assert_close(norm, theirs[1], rtol=1e-3, atol=0)
            assert scale == theirs[2]
        assert found[1][2] == 2. ** 16
        _, norm, scale, unchanged = found[2]               # what overflows in one process is skipped by all
        assert not norm.isfinite() and scale == 2. ** 15 and unchanged


def _gradients(parallel, recompute=False, compiled=False):
    accelerator = start_accelerator("float32")
    model = small_model().double()
    model.recompute = recompute
    if compiled: compile_blocks(model)
    wrapped, _ = distribute(model, lambda p: adam(p, 1e-3), parallel, accelerator)
    for batch in group_of_batches(0): wrapped(*batch).square().mean().backward()
    return {name: full_tensor(p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("how", ["recompute", pytest.param("compiled", marks=pytest.mark.long)])
def test_recomputed_and_compiled_are_the_same(parallel, how):
    for found in launch(2, partial(_gradients, parallel, **{how: True}), timeout=300):
        assert_close(found, _gradients(parallel), rtol=0, atol=1e-12)


def _exchange_late():
    accelerator = start_accelerator("float32")
    model = small_model().double()
    wrapped, _ = distribute(model, lambda p: adam(p, 1e-3), "ddp", accelerator)
    found = []
    for last in (False, True):
        batch = group_of_batches(rank())[last]
        with synchronise(wrapped, last): wrapped(*batch).square().mean().backward()
        found.append(model.output.weight.grad.clone())
    if rank() == 0:                                        # no equal number of calls is needed to validate
        with torch.no_grad(): wrapped.eval()(*batch)
    return found


def test_gradients_are_exchanged_with_the_last_batch_alone():
    (first, all_first), (second, all_second) = launch(2, _exchange_late)
    assert not torch.allclose(first, second) and all_first.equal(all_second)
    total = torch.zeros_like(first)
    for step in range(2):
        for batch in group_of_batches(step)[:2]:
            model = small_model().double()
            model(*batch).square().mean().backward()
            total += model.output.weight.grad / 2
    assert_close(all_first, total, rtol=0, atol=1e-12)


def _slices():
    from torch.distributed.fsdp import fully_shard
    start_accelerator("float32")
    torch.manual_seed(0)
    layer = nn.Linear(7, 3)                                # with four processes one of them holds nothing
    whole = {n: p.detach().clone() for n, p in layer.named_parameters()}
    fully_shard(layer)
    for name, p in layer.named_parameters():
        assert full_tensor(p).equal(whole[name])
        part = distribute_like(whole[name] * 2, p)
        assert part.to_local().equal(p.to_local() * 2) and full_tensor(part).equal(whole[name] * 2)
        assert distribute_like(torch.tensor(5.), p) == 5
    return layer.weight.to_local().numel()


def test_slices_and_back():
    assert launch(4, _slices) == [7, 7, 7, 0]


# ---- when one dies ----

def _one_dies(what, run):
    accelerator = start_accelerator("float32")
    wrapped, _ = distribute(small_model(), lambda p: adam(p, 1e-3), what if what != "agree" else "ddp", accelerator)
    agree(0)
    if rank() == 1: os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(ConnectionError) as caught, all_alive(run):
        if what == "agree": agree(1)
        wrapped(*group_of_batches(0)[0]).sum().backward()
    return str(caught.value), time.monotonic() - start


@pytest.mark.parametrize("what", ["agree", "ddp", "fsdp"])
def test_a_dead_process_is_noticed(tmp_path, what):
    (tmp_path / "checkpoints" / "00000040").mkdir(parents=True)
    outcomes = launch(3, _one_dies, what, tmp_path, check=False)
    assert isinstance(outcomes[1], Failed) and str(outcomes[1]) == "process 1 died with exit status -9"
    for message, seconds in (outcomes[0], outcomes[2]):
        assert message == ("another process of this run has died, and its own message says why; the checkpoint "
                           f"{tmp_path / 'checkpoints' / '00000040'} is whole: start again with --resume")
        assert seconds < 60


def _one_sleeps():
    from datetime import timedelta
    processes.PATIENCE = timedelta(seconds=2)
    start_accelerator("float32")
    agree(0)
    if rank() == 1: time.sleep(5)
    else:
        with pytest.raises(ConnectionError, match=r"has not answered for 0:00:02; there is no checkpoint yet"):
            with all_alive("nowhere"): agree(1)


def test_patience_ends():
    launch(2, _one_sleeps)


# ---- by the launchers ----

SCRIPT = """
import sys
from flash_transformer.training import agree, start_accelerator
accelerator = start_accelerator("float32")
rank = accelerator.process_index
line = f"process {rank} of {accelerator.num_processes} agrees on {agree(rank)}"
sys.stdout.write(line + chr(10))     # print would write twice
"""


def test_torchrun_says_nothing_of_its_own(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
        str(free_port()), tmp_path / "script.py"], capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)})
    assert done.returncode == 0 and done.stderr == ""
    assert sorted(done.stdout.splitlines()) == [f"process {rank} of 2 agrees on 1" for rank in range(2)]
