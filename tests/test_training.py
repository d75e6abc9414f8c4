"Loss and trainer against a plain loop of PyTorch; resuming bit for bit; what stops a run, and what is left of it."
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close

from flash_transformer.data import PAD, EncodedPairs, TokenizerPair, toy_corpus
from flash_transformer.model import Transformer, TransformerConfig, load_weights
from flash_transformer.training import (
    RunFolder,
    TrainConfig,
    Trainer,
    choose_precision,
    label_smoothed_loss,
    plan_for,
    validation_loss,
    warmup_inverse_sqrt,
)

# ---- the loss ----

@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("ignore", [0, 4])
def test_loss_is_pytorchs(smoothing, ignore):
    torch.manual_seed(0)
    logits = torch.randn(50, 9, dtype=torch.float64) * 3
    labels = torch.randint(9, (50,))
    ours, right = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    smoothed, plain = label_smoothed_loss(ours, labels, smoothing, ignore)
    theirs = F.cross_entropy(right, labels, ignore_index=ignore, label_smoothing=smoothing, reduction="sum")
    smoothed.backward(), theirs.backward()
    assert_close(smoothed, theirs, rtol=1e-12, atol=0)
    assert_close(ours.grad, right.grad, rtol=0, atol=1e-12)
    assert (ours.grad[labels == ignore] == 0).all() and (labels == ignore).any()
    assert_close(plain, F.cross_entropy(logits, labels, ignore_index=ignore, reduction="sum"), rtol=1e-12, atol=0)
    assert not plain.requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_padding_alone(smoothing):
    logits = torch.randn(4, 9, requires_grad=True)
    smoothed, plain = label_smoothed_loss(logits, torch.zeros(4).long(), smoothing)
    smoothed.backward()
    assert smoothed == plain == 0 and (logits.grad == 0).all()


def test_loss_that_does_not_fit():
    with pytest.raises(ValueError, match=r"logits \(4, 9\), labels \(5,\)"):
        label_smoothed_loss(torch.zeros(4, 9), torch.ones(5).long())


# ---- a small corpus and trainers on it ----

@pytest.fixture(scope="module")
def corpus():
    splits = toy_corpus(200, 20, 0)
    tokenizers = TokenizerPair.train(splits["train"], "bpe", 300)
    train, validation = (EncodedPairs.encode(splits[name], tokenizers) for name in ("train", "validation"))
    return train, validation, tokenizers.source_size


def plan(train, epoch): return plan_for(train, 700, True, seed=3, epoch=epoch)[0]


@pytest.fixture
def make(corpus, tmp_path):
    "A trainer into a folder of this name"
    train, validation, size = corpus

    def make(name="run", dropout=0.0, kind=Trainer, on_validation=None, seed=0, train=train, experts=None,
             **changes):
        config = TrainConfig(**dict(max_steps=12, tokens_per_batch=700, warmup_steps=5, learning_rate=3e-3, log_every=1,
                                    checkpoint_every=4, keep_checkpoints=9, precision="float32", seed=3) | changes)
        torch.manual_seed(seed)
        model = Transformer(TransformerConfig(d_model=16, d_ff=32, heads=2, encoder_layers=1, decoder_layers=1,
            norm="pre", dropout=dropout, attention_dropout=dropout, source_vocab_size=size, target_vocab_size=size,
            experts=experts))
        return kind(model, train, validation, config, tmp_path / name, on_validation)
    return make


@pytest.fixture
def losses(monkeypatch):
    "Let the validation after so many steps find this loss"
    def plan(table):
        now, fit = [], Trainer.fit
        monkeypatch.setattr(Trainer, "fit", lambda self, *args, **more: now.append(self) or fit(self, *args, **more))
        monkeypatch.setattr("flash_transformer.training.trainer.validation_loss", lambda *_: table[now[-1].at.step])
    return plan


def steps(run): return [int(folder.name) for folder in RunFolder(run).checkpoints()]
def read(path): return {name: t.clone() for name, t in load_file(path).items()}      # it is the file, mapped
def weights(trainer, step): return read(trainer.run.checkpoint(step) / "model.safetensors")
def final(trainer): return read(trainer.run.path / "model.safetensors")


def timeless(lines):
    "Metrics without what depends on the machine and the hour"
    machine = {"seconds", "tokens_per_second", "utilisation", "memory"}
    return [{name: value for name, value in line.items() if name not in machine} for line in lines]


def same(a, b):
    "To the last bit"
    assert a.keys() == b.keys()
    for name in a: assert torch.equal(a[name], b[name]), name


# ---- a step ----

@pytest.mark.parametrize("accumulate, clip", [(1, None), (3, None), (3, 0.5)])
def test_training_is_a_plain_loop_over_big_batches(make, corpus, metrics, accumulate, clip):
    """Steps of `accumulate` batches against one batch of all their pairs, PyTorch's loss and its unfused Adam. In
    float64: Adam divides by a gradient's size, and where that is nearly zero, a float32's last bit becomes a step."""
    train, _, _ = corpus
    groups = [[i for part in plan(train, epoch)[start:start + accumulate] for i in part]
              for epoch in (0, 1) for start in range(0, len(plan(train, epoch)), accumulate)]
    assert len(plan(train, 0)) % 3                       # the last group of an epoch is a smaller one
    trainer = make(accumulate=accumulate, clip_norm=clip, max_steps=len(groups), checkpoint_every=len(groups))
    trainer.bare.double()
    reference = Transformer(trainer.bare.config).double()
    reference.load_state_dict(trainer.bare.state_dict())
    trainer.fit()
    optimiser, logged = torch.optim.Adam(reference.parameters(), betas=(0.9, 0.98), eps=1e-9), metrics(trainer.run.path)
    for step, (pairs, line) in enumerate(zip(groups, logged), 1):
        batch = train.batch(pairs)
        logits = reference(batch.source, batch.source_lengths, batch.target).flatten(0, 1)
        loss = F.cross_entropy(logits, batch.labels.flatten(), ignore_index=PAD, label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip or math.inf)
        assert clip is None or norm > clip
        optimiser.param_groups[0]["lr"] = 3e-3 * min(step / 5, (5 / step) ** 0.5)
        optimiser.step()
        assert line["step"] == step and line["tokens"] == batch.tokens
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert line["gradient_norm"] == pytest.approx(norm.item(), rel=1e-7)
    ours = dict(trainer.bare.named_parameters())
    for name, p in reference.named_parameters(): assert_close(ours[name], p, rtol=0, atol=1e-9)


def test_learning_rate_is_the_papers(make, metrics):
    "Equation 3 as it is printed: d^-0.5 · min(step^-0.5, step · warmup^-1.5)"
    trainer = make(learning_rate=None, warmup_steps=6, max_steps=20)
    trainer.fit()
    found = {line["step"]: line["learning_rate"] for line in metrics(trainer.run.path) if "loss" in line}
    assert found == pytest.approx({n: 16 ** -0.5 * min(n ** -0.5, n * 6 ** -1.5) for n in range(1, 21)}, rel=1e-12)
    assert warmup_inverse_sqrt(4000, 0.5, 4000) == 0.5


def test_validation_loss(make, corpus):
    "The mean over all real words, in eval mode, whatever the batches; the model is left in the mode it was in"
    _, validation, _ = corpus
    model = make(dropout=0.4).bare.train()
    found = validation_loss(model, validation, 10, torch.device("cpu"))     # less than its longest sentence has
    assert model.training
    batch = validation.batch(range(len(validation)))
    logits = model.eval()(batch.source, batch.source_lengths, batch.target)
    right = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=PAD)
    assert found == pytest.approx(right.item(), rel=1e-6)


# ---- resuming ----

@pytest.mark.parametrize("stop", [5, 8])
def test_resumed_bit_for_bit(make, metrics, stop):
    "In the middle of an epoch, with dropout and accumulation, from a model that was made with another seed"
    def noisy(*args, **more): return make(*args, dropout=0.3, accumulate=2, max_steps=12, **more)
    whole = noisy("whole")
    whole.fit()
    first = make("parts", dropout=0.3, accumulate=2, max_steps=stop)
    first.fit()
    assert json.loads((first.run.checkpoint(stop) / "state.json").read_text())["batch"] > 0
    torch.randn(100)
    second = noisy("parts", seed=99)
    second.fit(resume=True)
    same(weights(whole, 12), weights(second, 12))
    same(load_file(whole.run.checkpoint(12) / "optimiser.safetensors"),
         load_file(second.run.checkpoint(12) / "optimiser.safetensors"))
    losses = [{line["step"]: line["loss"] for line in metrics(t.run.path) if "loss" in line} for t in (whole, second)]
    assert losses[0] == losses[1]


def test_what_lies_behind_the_checkpoint_is_forgotten(make, metrics):
    "A run that was killed: metrics, a torn line and an unfinished checkpoint behind the last whole one"
    trainer = make(dropout=0.3)
    trainer.fit()
    end, before = weights(trainer, 12), metrics(trainer.run.path)
    for step in 8, 12: shutil.rmtree(trainer.run.checkpoint(step))
    shutil.copytree(trainer.run.checkpoint(4), trainer.run.path / "checkpoints" / "00000008.unfinished")
    with open(trainer.run.path / "metrics.jsonl", "a") as file: file.write('{"step": 13, "lo')
    again = make(dropout=0.3)
    again.fit(resume=True)
    same(weights(again, 12), end)
    after = metrics(trainer.run.path)
    assert timeless(before) == timeless(after)
    left = sorted(p.name for p in (trainer.run.path / "checkpoints").iterdir())
    assert left == ["00000004", "00000008", "00000012"]


def test_resumed_when_it_was_finished(make, contents):
    trainer = make()
    trainer.fit()
    before = contents(trainer.run.path)
    assert make(seed=5).fit(resume=True) == trainer.at.best
    assert contents(trainer.run.path) == before


def test_existing_checkpoints_are_refused(make, contents):
    trainer = make()
    trainer.fit()
    before = contents(trainer.run.path)
    with pytest.raises(FileExistsError, match="run already holds checkpoints"): make(seed=5).fit()
    assert contents(trainer.run.path) == before
    with pytest.raises(FileNotFoundError, match="elsewhere holds no checkpoint to resume from"):
        make("elsewhere").fit(resume=True)


def cut(path): path.write_bytes(path.read_bytes()[:-50])
def put(text): return lambda path: path.write_text(text)
def foreign(path): shutil.copy(path.with_name("model.safetensors"), path)


@pytest.mark.parametrize("file, damage", [
    ("model.safetensors", cut), ("model.safetensors", Path.unlink), ("optimiser.safetensors", cut),
    ("optimiser.safetensors", Path.unlink), ("optimiser.safetensors", foreign), ("optimiser.safetensors", put("")),
    ("state.json", cut), ("state.json", Path.unlink), ("state.json", put("{}")), ("state.json", put("[1]")),
    ("state.json", put("")),
], ids=lambda x: x if isinstance(x, str) else getattr(x, "__name__", "damage"))
def test_damaged_checkpoint_is_named(make, file, damage):
    trainer = make()
    trainer.fit()
    end, last = weights(trainer, 12), trainer.run.checkpoint(12)
    damage(last / file)
    with pytest.raises((ValueError, OSError)) as caught: make().fit(resume=True)
    assert str(last) in str(caught.value) and "\n" not in str(caught.value)
    shutil.rmtree(last)                                  # as the message advises
    again = make()
    again.fit(resume=True)
    same(weights(again, 12), end)


# ---- what is kept ----

def test_newest_checkpoints_and_the_best_are_kept(make, losses):
    losses({2: 5, 4: 4, 6: 3, 8: 6, 10: 7, 12: 8})
    trainer = make(max_steps=12, checkpoint_every=2, keep_checkpoints=2)
    assert trainer.fit() == 3
    assert steps(trainer.run.path) == [6, 10, 12]
    same(final(trainer), weights(trainer, 6))
    table = "encoder.embedding.tokens.weight"
    assert not torch.equal(weights(trainer, 12)[table], final(trainer)[table])


def test_average_is_the_mean(make):
    trainer = make(average=3)
    trainer.fit()
    parts = [weights(trainer, step) for step in (4, 8, 12)]
    for name, found in final(trainer).items():
        right = (parts[0][name].double() + parts[1][name].double() + parts[2][name].double()) / 3
        assert_close(found, right.float(), rtol=1.2e-7, atol=0)      # one rounding to float32
        assert not torch.equal(found, parts[2][name])
    model = make("other").bare
    load_weights(model, trainer.run.path / "model.safetensors")
    assert model.encoder.embedding.tokens.weight is model.output.weight


def test_patience(make, losses, metrics):
    table = {4: 3, 8: 2, 12: 2.5, 16: 2.4, 20: 1}
    losses(table)
    def patient(name, **more): return make(name, patience=2, **{"max_steps": None, "max_epochs": 1000} | more)
    trainer = patient("run")
    assert trainer.fit() == 2 and trainer.at.step == 16
    same(final(trainer), weights(trainer, 8))
    assert [line["validation_loss"] for line in metrics(trainer.run.path) if "perplexity" in line] == [3, 2, 2.5, 2.4]
    patient("parts", max_steps=12).fit()                 # the same, stopped while it is losing patience
    again = patient("parts", seed=7)
    assert again.fit(resume=True) == 2 and again.at.step == 16
    same(final(again), final(trainer))
    done = patient("parts")                              # and once it has ended so, it has ended
    assert done.fit(resume=True) == 2 and done.at.step == 16


def test_epochs(make, corpus):
    trainer = make(max_epochs=2, max_steps=None, checkpoint_every=1000, accumulate=2)
    trainer.fit()
    assert trainer.at.step == sum(math.ceil(len(plan(corpus[0], epoch)) / 2) for epoch in (0, 1))
    assert (trainer.at.epoch, trainer.at.batch) == (2, 0) and steps(trainer.run.path) == [trainer.at.step]


def test_metrics(make, metrics):
    "A line every two steps and one a validation, all of them JSON, in order"
    trainer = make(max_steps=9, log_every=2, on_validation=lambda model: {"samples": ["Ä\n"]})
    trainer.fit()
    lines = metrics(trainer.run.path)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 9]
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 8, 9]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    for line in lines:
        if "loss" in line:
            numbers = {"loss", "plain_loss", "tokens_per_second", "tokens", "gradient_norm", "learning_rate", "seconds",
                       "utilisation", "memory"}
            assert line.keys() == numbers | {"step", "epoch"} and all(line[name] > 0 for name in numbers)
        else:
            assert line.keys() == {"step", "epoch", "validation_loss", "perplexity", "samples"}
            assert line["perplexity"] == pytest.approx(math.exp(line["validation_loss"])) and line["samples"] == ["Ä\n"]
    assert sum(line.get("tokens", 0) for line in lines) <= 9 * 700


def test_tensorboard_hears_of_the_same(make, metrics):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make(trackers=["tensorboard"], on_validation=lambda model: {"samples": ["a"]})
    trainer.fit()
    heard = accumulator.EventAccumulator(str(trainer.run.path / "trackers" / "flash_transformer"))
    heard.Reload()
    for name in "loss", "gradient_norm", "utilisation", "validation_loss":
        lines = [line for line in metrics(trainer.run.path) if name in line]
        scalars = heard.Scalars(name)
        assert [scalar.step for scalar in scalars] == [line["step"] for line in lines] and len(lines) >= 3
        assert [scalar.value for scalar in scalars] == pytest.approx([line[name] for line in lines], rel=1e-6)


def test_tracker_that_is_not_there(make, monkeypatch):
    monkeypatch.setattr("flash_transformer.training.processes.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="train.trackers names wandb.*pip install wandb"): make(trackers=["wandb"])


# ---- windows of a corpus that is streamed ----

class Windows:
    "Some rows of `pairs` at a time; remembers what it was asked for"
    tokens_a_label = 1.

    def __init__(self, pairs, parts): self.parts, self.pairs, self.asked = parts, pairs, []

    def window(self, epoch, index):
        self.asked.append((epoch, index))
        if index == len(self.parts): return None
        rows = self.parts[index]
        sides = [[side[start:stop] for start, stop in zip(offsets[:-1][rows], offsets[1:][rows])] for side, offsets in
            ((self.pairs.source, self.pairs.source_offsets), (self.pairs.target, self.pairs.target_offsets))]
        arrays = [x for side in sides for x in (np.concatenate([*side, []]).astype(np.int32),
                                                np.cumsum([0, *map(len, side)]))]
        return EncodedPairs(*arrays)


@pytest.fixture
def windows(corpus): return lambda *parts: Windows(corpus[0], [np.arange(*part) for part in parts])


def test_an_epoch_of_windows(make, windows):
    "Each pair once an epoch, a window after the other, an empty one passed over; each window asked for once"
    source, seen = windows((0, 70), (0, 0), (70, 150), (150, 200)), []

    class Watched(Trainer):
        def _gradient(self, group):
            seen.append((self.at.epoch, self.at.window, sum(map(len, group))))
            super()._gradient(group)

    trainer = make(kind=Watched, max_steps=None, max_epochs=2, accumulate=2, train=source)
    trainer.fit()
    for epoch in 0, 1:
        assert [sum(n for e, w, n in seen if (e, w) == (epoch, window)) for window in range(4)] == [70, 0, 80, 50]
    assert source.asked == [(epoch, index) for epoch in (0, 1) for index in range(5)]
    assert (trainer.at.epoch, trainer.at.window, trainer.at.batch) == (2, 0, 0)


def test_resumed_within_a_window(make, windows, metrics):
    parts = (0, 70), (70, 150), (150, 200)
    def noisy(*args, **more): return make(*args, dropout=0.3, accumulate=2, train=windows(*parts), **more)
    whole, first = noisy("whole", max_steps=20), noisy("parts", max_steps=5)
    whole.fit(), first.fit()
    assert first.at.window == 1 and first.at.batch > 0
    second = noisy("parts", max_steps=20, seed=99)
    second.fit(resume=True)
    same(final(whole), final(second))
    after = [[line for line in timeless(metrics(t.run.path)) if line["step"] > 5] for t in (whole, second)]
    assert after[0] == after[1] and second.course.pairs.asked[0] == (0, 1)


def test_windows_of_nothing(make, windows):
    with pytest.raises(ValueError, match="no training pairs"): make(train=windows((0, 0), (0, 0))).fit()


# ---- less memory, more processes ----

def test_activation_checkpointing_changes_nothing(make):
    "The same random state is put back for the second time: the same to the last bit, dropout included"
    plain, recomputed = make("plain", dropout=0.3), make("recomputed", dropout=0.3, activation_checkpointing=True)
    plain.fit(), recomputed.fit()
    assert recomputed.bare.recompute
    same(final(plain), final(recomputed))


def test_more_processes_than_batches(make, monkeypatch):
    from accelerate import Accelerator
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 4))
    with pytest.raises(ValueError, match="train.accumulate is 3.*4 processes: set it to a multiple of 4"):
        make(accumulate=3)


# ---- numbers that are none ----

class Poisoned(Trainer):
    "Weights are set to `poison` right after this step"
    when, poison = None, None

    def _train_step(self):
        super()._train_step()
        if self.at.step == self.when:
            with torch.no_grad(): self.bare.decoder.blocks[0].feed_forward[0].weight.fill_(self.poison)


@pytest.mark.parametrize("at", [5, 7, 8])
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e38])
def test_no_longer_finite(make, at, poison):
    "In the loss, in the weights, or in the validation alone: it stops, and the last checkpoint is a good one"
    undisturbed = make("undisturbed")
    undisturbed.fit()
    trainer = make(kind=Poisoned)
    trainer.when, trainer.poison = at, poison
    with pytest.raises(FloatingPointError, match=r"at step \d.*lower train.learning_rate.*kept in .*run") as caught:
        trainer.fit()
    assert "\n" not in str(caught.value)
    assert steps(trainer.run.path) == [4]
    again = make()
    again.fit(resume=True)                                # goes on from there as if nothing had been
    same(weights(again, 12), weights(undisturbed, 12))


def test_learning_rate_far_too_high(make):
    trainer = make(learning_rate=1e30, warmup_steps=1, max_steps=50, checkpoint_every=50)
    with pytest.raises(FloatingPointError, match="lower train.learning_rate"): trainer.fit()
    assert not (trainer.run.path / "model.safetensors").exists()


# ---- precision ----

CASES = [  # asked for, device, capability, AVX512-BF16, AMX → taken
    ("auto", "cuda", (9, 0), False, False, "bf16"), ("auto", "cuda", (8, 0), False, False, "bf16"),
    ("auto", "cuda", (7, 5), True, True, "fp16"), ("auto", "cuda", (7, 0), False, False, "fp16"),
    ("auto", "cpu", None, True, False, "bf16"), ("auto", "cpu", None, False, True, "bf16"),
    ("auto", "cpu", None, False, False, "float32"), ("auto", "mps", None, True, True, "float32"),
    ("float32", "cuda", (9, 0), True, True, "float32"), ("bf16", "cpu", None, False, False, "bf16"),
    ("fp16", "cuda", (9, 0), False, False, "fp16"),
]


@pytest.mark.parametrize("asked, device, capability, avx, amx, taken", CASES)
def test_precision(monkeypatch, asked, device, capability, avx, amx, taken):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_precision(asked, torch.device(device)) == taken


def test_bf16(make, corpus, metrics):
    "Weights stay float32; the products are rounded"
    trainers = {precision: make(precision, precision=precision) for precision in ("float32", "bf16")}
    for trainer in trainers.values(): trainer.fit()
    first = {precision: metrics(t.run.path)[0]["loss"] for precision, t in trainers.items()}
    assert first["bf16"] != first["float32"]
    assert first["bf16"] == pytest.approx(first["float32"], rel=2 ** -8)       # the first step: one rounding to 8 bits
    assert trainers["bf16"].at.best < math.log(corpus[2])                         # that of guessing
    assert all(p.dtype == torch.float32 for p in trainers["bf16"].bare.parameters())


# ---- stopping it ----

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_stopped_from_outside(text, tmp_path, command, name):
    "Another process, stopped as soon as it has validated once; resumed here it ends like a run that never stopped"
    def arguments(run): return ["train", "--config", str(text / "tiny.yaml"), "--run", str(tmp_path / run)]
    script = "import sys; from flash_transformer.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments("stopped"), "--train.max_steps", "1000000"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())})
    try:
        for line in process.stdout:
            if line.startswith("step 5,"): break
        process.send_signal(getattr(signal, name))
        _, error = process.communicate(timeout=600)       # only against a hang
    finally: process.kill()
    assert process.returncode == 2 and error.count("\n") == 1, error
    step = steps(tmp_path / "stopped")[-1]
    assert f"stopped by {name} at step {step}" in error and f"checkpoints/{step:08d} is safe, --resume goes on" in error
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    end = ["--train.max_steps", str(step + 7)]
    assert command("train", "--run", tmp_path / "stopped", "--resume", *end)[0] == 0       # by the run's own recipe
    assert command(*arguments("whole"), *end)[0] == 0
    for file in f"checkpoints/{step + 7:08d}/model.safetensors", "model.safetensors":
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


class Interrupted(Trainer):
    "Gets this signal, so many times, in this step"
    when, times, number = None, 1, signal.SIGINT

    def _train_step(self):
        super()._train_step()
        if self.at.step == self.when:
            for _ in range(self.times): os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("average", [0, 2])
def test_a_stop_leaves_no_trace_in_the_result(make, losses, average):
    "The checkpoint that it leaves is to resume from: the best is chosen, and the mean taken, without it"
    losses({4: 3, 8: 2, 11: 1, 12: 2.5})
    whole = make("whole", average=average)
    assert whole.fit() == 2
    before = signal.getsignal(signal.SIGINT)
    stopped = make("stopped", average=average, kind=Interrupted)
    stopped.when = 11
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT at step 11; the checkpoint .*00000011 is safe"):
        stopped.fit()
    assert steps(stopped.run.path) == [4, 8, 11] and signal.getsignal(signal.SIGINT) == before
    again = make("stopped", average=average)
    assert again.fit(resume=True) == 2
    same(final(again), final(whole))


@pytest.mark.parametrize("stop, experts", [(3, None), (11, None), (3, 3)])
def test_a_stop_leaves_no_trace_in_the_metrics(make, metrics, stop, experts):
    "In the middle of what a line of metrics tells of"
    def noisy(*args, **more): return make(*args, log_every=5, dropout=0.3, experts=experts, **more)
    whole = noisy("whole")
    whole.fit()
    assert all(("balance" in line) == (experts is not None) for line in metrics(whole.run.path) if "loss" in line)
    stopped = noisy("stopped", kind=Interrupted)
    stopped.when = stop
    with pytest.raises(KeyboardInterrupt): stopped.fit()
    noisy("stopped", seed=9).fit(resume=True)
    assert timeless(metrics(stopped.run.path)) == timeless(metrics(whole.run.path))


def test_told_to_end_where_it_was_stopped(make):
    whole, stopped = make("whole", max_steps=11, average=2), make("stopped", average=2, kind=Interrupted)
    whole.fit()
    stopped.when = 11
    with pytest.raises(KeyboardInterrupt): stopped.fit()
    again = make("stopped", max_steps=11, average=2)
    assert again.fit(resume=True) == whole.at.best and steps(again.run.path) == [4, 8, 11]
    same(final(again), final(whole))


def test_a_stop_does_not_cost_patience(make, losses):
    losses({4: 3, 8: 2, 10: 2.5, 12: 2.5, 16: 2.4})
    stopped = make(patience=2, max_steps=None, max_epochs=1000, kind=Interrupted)
    stopped.when = 10
    with pytest.raises(KeyboardInterrupt): stopped.fit()
    again = make(patience=2, max_steps=None, max_epochs=1000)
    assert again.fit(resume=True) == 2 and again.at.step == 16


def test_stopped_twice_stops_at_once(make):
    stopped = make(kind=Interrupted)
    stopped.when, stopped.times = 6, 2
    with pytest.raises(KeyboardInterrupt, match="since the last checkpoint is lost"): stopped.fit()
    assert steps(stopped.run.path) == [4]


def test_stopped_in_its_last_step_is_finished(make):
    trainer = make(kind=Interrupted)
    trainer.when = 12
    trainer.fit()
    assert (trainer.run.path / "model.safetensors").exists()


def test_trains_in_a_thread(make):
    "Where Python delivers no signals, and lets nobody ask for them"
    trainer = make(max_steps=4)
    thread = threading.Thread(target=trainer.fit)
    thread.start(), thread.join()
    assert (trainer.run.path / "model.safetensors").exists()


# ---- bad input ----

BAD = {
    "no end": (dict(), "train.max_steps or train.max_epochs"),
    "no steps": (dict(max_steps=0), "train.max_steps must be at least 1, not 0"),
    "epochs": (dict(max_epochs=-1), "train.max_epochs"),
    "tokens": (dict(max_steps=1, tokens_per_batch=0), "train.tokens_per_batch"),
    "accumulate": (dict(max_steps=1, accumulate=0), "train.accumulate"),
    "warm-up": (dict(max_steps=1, warmup_steps=0), "train.warmup_steps"),
    "log": (dict(max_steps=1, log_every=0), "train.log_every"),
    "checkpoints": (dict(max_steps=1, checkpoint_every=0), "train.checkpoint_every"),
    "keep": (dict(max_steps=1, keep_checkpoints=0), "train.keep_checkpoints"),
    "patience": (dict(max_steps=1, patience=0), "train.patience"),
    "learning rate": (dict(max_steps=1, learning_rate=0.0), "train.learning_rate must be positive, not 0.0"),
    "learning rate not a number": (dict(max_steps=1, learning_rate=math.nan), "train.learning_rate"),
    "endless learning rate": (dict(max_steps=1, learning_rate=math.inf), "train.learning_rate"),
    "clip": (dict(max_steps=1, clip_norm=-1.0), "train.clip_norm"),
    "smoothing": (dict(max_steps=1, label_smoothing=1.0), r"train.label_smoothing must be in \[0, 1\), not 1.0"),
    "average of more than is kept": (dict(max_steps=1, average=6), "between 0 and train.keep_checkpoints .5., not 6"),
    "negative average": (dict(max_steps=1, average=-1), "train.average"),
    "precision": (dict(max_steps=1, precision="double"), "train.precision is one of .* not 'double'"),
    "parallel": (dict(max_steps=1, parallel="pipeline"), "train.parallel is one of ddp, fsdp, not 'pipeline'"),
}


@pytest.mark.parametrize("fields, words", BAD.values(), ids=BAD)
def test_config_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words) as caught: TrainConfig(**fields)
    assert "\n" not in str(caught.value)


def test_pairs_that_cannot_be_trained_on(make, corpus, tmp_path):
    train, validation, _ = corpus
    trainer = make()
    none = EncodedPairs(train.source[:0], train.source_lengths[:0], train.target[:0], train.target_lengths[:0])
    for name, pairs in (("training", (none, validation)), ("validation", (train, none))):
        with pytest.raises(ValueError, match=f"no {name} pairs"):
            Trainer(trainer.bare, *pairs, trainer.config, tmp_path / "none")
    with pytest.raises(ValueError, match="tokens_per_batch=5"): make("small", tokens_per_batch=5).fit()
