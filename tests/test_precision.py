"Precision and memory: FLOPs against PyTorch's counter, recomputation, fp16 with its scaler, compiled blocks."
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from flash_transformer.attention import MultiHeadAttention
from flash_transformer.model import Classifier, MaskedLM, Transformer, TransformerConfig, build, configuration
from flash_transformer.training import (
    adam,
    choose_precision,
    compile_blocks,
    label_smoothed_loss,
    matmul_ceiling,
    peak_memory,
    saved_bytes,
    start_accelerator,
    training_flops,
)
from flash_transformer.training.precision import check_compiler

CPU = torch.device("cpu")
SMALL = dict(d_model=24, d_ff=40, heads=3, encoder_layers=2, decoder_layers=3, source_vocab_size=60,
             target_vocab_size=60)


def make(**changes):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**SMALL | changes))


def draw(batch, source_len, target_len, seed=0):
    "source, source_lengths, target, kept positions"
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, source_len + 1, (batch,), generator=g)
    lengths[0] = source_len
    target = torch.randint(4, 60, (batch, target_len), generator=g)
    keep = torch.rand(batch, target_len, generator=g) < 0.8
    keep[0, 0] = True
    return torch.randint(4, 60, (batch, source_len), generator=g), lengths, target, keep


def gradients(model, inputs, seed=1, half=False):
    "Loss, gradients, and the random number that comes next"
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=half): logits = model(*inputs)
    loss = logits.float().log_softmax(-1)[:, 5].sum()
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()], torch.rand(1)


# ---- what auto means ----

@pytest.mark.parametrize("capability, precision", [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_on_gpus(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda")) == precision
    assert choose_precision("float32", torch.device("cuda")) == "float32"


def test_auto_elsewhere(monkeypatch):
    for avx, amx, precision in ((False, False, "float32"), (True, False, "bf16"), (False, True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert choose_precision("auto", CPU) == precision
        assert choose_precision("auto", torch.device("mps")) == "float32"
    assert choose_precision("fp16", CPU) == "fp16"


# ---- counted ----

@pytest.mark.parametrize("changes", [{}, dict(norm="pre", tie_embeddings="none", target_vocab_size=45),
                                     dict(d_model=32, d_ff=16, heads=4, encoder_layers=3, decoder_layers=1),
                                     dict(experts=5, gated=True), dict(experts=3, experts_per_token=1)])
def test_flops_are_those_that_pytorch_counts(changes):
    "Pair by pair, as real tokens count; by plain products, since PyTorch's counter skips the fused kernel of CPUs"
    model, pairs, total = make(**changes), [(7, 9), (13, 4), (1, 1), (5, 5)], 0
    for module in model.modules():
        if isinstance(module, MultiHeadAttention): module.backend = "naive"
    for s, t in pairs:
        with FlopCounterMode(display=False) as counter:
            model(torch.full((1, s), 5), torch.tensor([s]), torch.full((1, t), 6)).sum().backward()
        assert counter.get_total_flops() == training_flops(model.config, [s], [t])
        total += counter.get_total_flops()
    for dtype in (np.uint16, np.int32, np.int64):
        assert training_flops(model.config, *np.array(pairs, dtype=dtype).T) == total
    many = np.full(3_000_000, 100, dtype=np.uint16)
    assert training_flops(model.config, many, many) == 3_000_000 * training_flops(model.config, [100], [100])
    assert training_flops(model.config, [], []) == 0


def test_flops_of_an_encoder_alone():
    "Gaps and classes: the head's matrix and its output, for as many places as there are labels"
    c = TransformerConfig(d_model=16, d_ff=24, heads=2, encoder_layers=2, decoder_layers=0, source_vocab_size=30,
        target_vocab_size=30)
    masked, classifier = MaskedLM(c), Classifier(c, 3)
    for module in [*masked.modules(), *classifier.modules()]:
        if isinstance(module, MultiHeadAttention): module.backend = "naive"
    ids, keep = torch.full((2, 9), 5), torch.zeros(2, 9, dtype=torch.bool)
    keep[:, [1, 4, 7]] = True
    for run, labels, classes in ((lambda: masked(ids, keep=keep), 3, 0),
                                 (lambda: classifier(ids), 1, 3)):
        with FlopCounterMode(display=False) as counter: run().sum().backward()
        assert counter.get_total_flops() == training_flops(c, [9, 9], [labels] * 2, classes)


def test_ceiling_and_peak():
    assert 1e8 < matmul_ceiling("float32", CPU) < 1e16
    code = ("import torch; from flash_transformer.training import peak_memory; c = torch.device('cpu'); "
            "before = peak_memory(c); x = torch.ones(2 ** 26); held = peak_memory(c); del x; "
            "print(held - before, peak_memory(c) - held)")
    rise, after = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert 2 ** 28 <= rise < 1.2 * 2 ** 28 and abs(after) < 2 ** 22      # 256 MiB, and it does not fall again
    assert peak_memory(CPU) > 2 ** 26


# ---- recomputation ----

@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_recomputation_gives_the_same_gradients(norm, half):
    "Dropout included, that of attention too; and whoever draws next draws the same"
    model, inputs = make(dropout=0.3, attention_dropout=0.2, norm=norm), draw(5, 11, 8)
    plain = [gradients(model, inputs, seed, half) for seed in (1, 2)]
    plain = [(loss, [g.clone() for g in grads], rest) for loss, grads, rest in plain]
    assert plain[0][0] != plain[1][0]                                    # dropout drops
    model.recompute = True
    for seed, (loss, grads, rest) in enumerate(plain, start=1):
        again = gradients(model, inputs, seed, half)
        assert_close(again[0], loss, rtol=0, atol=0)
        assert_close(again[1], grads, rtol=1e-6, atol=1e-7)
        assert_close(again[2], rest, rtol=0, atol=0)


def test_recomputation_keeps_what_goes_into_each_block_and_no_more():
    model, (source, lengths, target, keep) = make(dropout=0.1), draw(6, 30, 30)
    kept = {}
    for model.recompute in (False, True):
        kept[model.recompute] = saved_bytes(lambda: model(source, lengths, target, keep), model.parameters())
    one = 6 * 30 * 24 * 4                                                # a vector for each word, float32
    between = 5 + 1                                                      # the five blocks' inputs, and the memory
    ends = 4 * one + 2 * source.nbytes + keep.sum() * 24 * 4 + keep.nbytes + 2 * keep.sum() * 8   # embeddings, output
    assert between * one <= kept[True] <= between * one + ends + 4096, (kept, one)
    assert kept[False] > 5 * kept[True]


def test_recomputation_is_for_training_only():
    model, (source, lengths, target, _) = make(dropout=0.3), draw(3, 7, 6)
    model.eval()
    right, kept = model(source, lengths, target), saved_bytes(lambda: model(source, lengths, target))
    model.recompute = True
    assert_close(model(source, lengths, target), right, rtol=0, atol=0)
    assert saved_bytes(lambda: model(source, lengths, target)) == kept
    with torch.no_grad():
        for model.training in (False, True):                             # caches too
            memory, cache = model.encode(source, lengths), model.cache(6)
            steps = [model.decode(target[:, i:i + 1], memory, lengths, cache) for i in range(6)]
    assert_close(model.output(torch.cat(steps, dim=1)), right, rtol=1e-4, atol=1e-5)


BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "precision.py"


def test_peak_memory_falls():
    "In processes of their own, as the benchmark measures it: enough pairs that the page of a library does not matter"
    peak = {}
    for recompute in (False, True):
        setting = dict(precision="float32", recompute=recompute, parts=1, compile=False)
        request = dict(setting=setting, size="tiny", pairs=512, steps=1, device="cpu", threads=1)
        answer = subprocess.check_output([sys.executable, BENCHMARK, "--child", json.dumps(request)], text=True)
        peak[recompute] = json.loads(answer.splitlines()[-1])
    assert_close(peak[True]["losses"], peak[False]["losses"], rtol=1e-6, atol=0)
    assert peak[True]["peak_bytes"] < 0.75 * peak[False]["peak_bytes"], peak


# ---- fp16 ----

def fp16_training(scale):
    accelerator = start_accelerator("fp16")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    bare = make(dropout=0.0)
    model, optimiser = accelerator.prepare(bare, adam(bare.parameters(), 1e-3))
    inputs, labels = draw(5, 11, 8), torch.randint(4, 60, (5, 8), generator=torch.Generator().manual_seed(3))

    def step(factor=1.0): # → gradient norm; as the trainer does it
        logits = model(*inputs)
        assert logits.dtype == torch.float32
        accelerator.backward(label_smoothed_loss(logits, labels[inputs[3]])[0] / inputs[3].sum() * factor)
        norm = accelerator.clip_grad_norm_(model.parameters(), math.inf)
        optimiser.step(), optimiser.zero_grad()
        return float(norm)
    return accelerator, bare, optimiser, step


def test_fp16_is_scaled_and_an_overflow_skipped():
    accelerator, bare, optimiser, step = fp16_training(2.0 ** 40)
    before = [p.clone() for p in bare.parameters()]
    assert not math.isfinite(step())                                     # 2⁴⁰ times a gradient is no number in fp16
    assert accelerator.scaler.get_scale() == 2.0 ** 39
    assert all(torch.equal(a, b) for a, b in zip(before, bare.parameters()))
    assert all(float(state["step"]) == 0 and not state["exp_avg"].any() for state in optimiser.state.values())
    while accelerator.scaler.get_scale() > 2.0 ** 10 and not math.isfinite(norm := step()): pass
    assert math.isfinite(norm) and not all(torch.equal(a, b) for a, b in zip(before, bare.parameters()))
    kept = json.loads(json.dumps(accelerator.scaler.state_dict()))       # as a checkpoint keeps it
    other = fp16_training(2.0 ** 16)[0].scaler
    other.load_state_dict(kept)
    assert other.get_scale() == kept["scale"] == accelerator.scaler.get_scale() and other.state_dict() == kept


def test_fp16_gradients_are_those_of_float32_to_its_rounding():
    "And its products are fp16's: the loss is not float32's to the last digit"
    accelerator, bare, _, _ = fp16_training(2.0 ** 8)
    inputs, exact = draw(5, 11, 8), make(dropout=0.0)
    wrapped = accelerator.prepare(bare)
    right = exact(*inputs).log_softmax(-1)[:, 5].mean()
    ours = wrapped(*inputs).log_softmax(-1)[:, 5].mean()
    assert ours != right and abs(ours - right) < 2 ** -9 * abs(right)
    right.backward(), accelerator.backward(ours)
    for a, b in zip(bare.parameters(), exact.parameters()):
        assert (a.grad / 2 ** 8 - b.grad).norm() < 0.02 * b.grad.norm() + 1e-6


# ---- compiled ----

def needs_compiler():
    try: check_compiler("cpu")
    except OSError as missing: pytest.skip(str(missing))


def graphs(): return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_blocks():
    "Gradients are eager's at every length, in few graphs; evaluation and decoding are what they were"
    needs_compiler()
    eager, model = make(dropout=0.0), make(dropout=0.0)
    compile_blocks(model)
    assert list(model.state_dict()) == list(eager.state_dict())
    torch._dynamo.reset()
    before = graphs()
    for i, sizes in enumerate([(3, 7, 9), (5, 12, 6), (8, 30, 31), (2, 60, 50), (16, 5, 5)]):
        inputs = draw(*sizes, seed=i)
        (loss, grads, _), (right, right_grads, _) = gradients(model, inputs), gradients(eager, inputs)
        assert_close(loss, right, rtol=1e-5, atol=1e-5)
        for a, b in zip(grads, right_grads): assert (a - b).norm() <= 1e-5 * b.norm() + 1e-5
    assert 2 <= graphs() - before <= 3, "a residual, a feed-forward network, and none for another length or layer"
    assert not torch._dynamo.utils.counters["graph_break"]
    model.recompute = True                                               # both at once
    for a, b in zip(gradients(model, inputs)[1], right_grads): assert (a - b).norm() <= 1e-5 * b.norm() + 1e-5

    now = graphs()
    source, lengths, target, _ = draw(3, 7, 6)
    for m in (model.eval(), eager.eval()):
        with torch.no_grad():
            memory, cache = m.encode(source, lengths), m.cache(6)
            steps = torch.cat([m.decode(target[:, i:i + 1], memory, lengths, cache) for i in range(6)], dim=1)
            assert_close(m.output(steps), eager(source, lengths, target), rtol=1e-4, atol=1e-5)
    assert graphs() == now, "nothing is compiled for one word at a time"


def test_compiled_dropout():
    "It drops as often as it should, the same places forward and backward, and others with another seed"
    needs_compiler()
    model = make(dropout=0.25, d_model=96, heads=2)
    compile_blocks(model)
    residual = model.encoder.blocks[0].residuals[0]
    residual.pre = True                                                  # no norm behind the sum: dropout can be seen
    x = torch.ones(20, 30, 96, requires_grad=True)

    def masks(seed):
        torch.manual_seed(seed)
        x.grad = None
        out = residual(x, lambda normed: 3 * x)
        out.sum().backward()
        assert_close(x.grad, out.detach())                               # 1 or 1 + 3 / (1 − p), and so is its slope
        return (out.detach() > 1).float()
    first, again, other = masks(1), masks(1), masks(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert abs(first.mean() - 0.75) < 5 * (0.75 * 0.25 / x.numel()) ** 0.5
    assert_close(residual(x, lambda normed: 3 * x).unique().tolist(), [1.0, 5.0])


@pytest.mark.parametrize("device, missing", [("cpu", "g++"), ("cuda", "Triton")])
def test_a_missing_compiler_is_said(monkeypatch, device, missing):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(OSError, match=rf"needs .*{missing.replace('+', '.')}.* set train.compile to false"):
        check_compiler(device)


@pytest.mark.parametrize("name, changes", [("gpt2", {}), ("modern", dict(kv_heads=2)), ("t5", dict(head_dim=5)),
    ("marian", dict(gated=True))])
def test_flops_of_the_family(name, changes):
    "Switches count, too: gates, fewer keys than queries, heads of another width, no encoder; against PyTorch's counter"
    sizes = dict(d_model=48, d_ff=80, heads=6, source_vocab_size=61, target_vocab_size=61, dropout=0.0)
    model = build(configuration(name, **sizes | changes))
    for m in model.modules():
        if isinstance(m, MultiHeadAttention): m.backend = "naive"         # one product each, and both are counted
    ids = torch.randint(4, 61, (1, 17))
    with FlopCounterMode(display=False) as counter:
        out = model(ids[:, :11], torch.tensor([11]), ids) if model.config.encoder_layers else model(ids)
        out.sum().backward()
    # the lowest product's input has no gradient where it is a table's
    assert counter.get_total_flops() == training_flops(model.config, np.array([11]), np.array([17]))
