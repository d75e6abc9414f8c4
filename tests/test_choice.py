"Which backend is taken where, and why not the others: simulated machines. And FlexAttention, as far as a CPU goes."
import importlib.util
import re
import subprocess
import sys
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_transformer.attention import (
    AttentionMask,
    attention,
    attention_varlen,
    backends,
    explain,
    flash,
    flex,
    triton_kernels,
)
from flash_transformer.attention.functional import LARGEST_MASK, _choose
from flash_transformer.attention.packed import _choose_packed

CAPABILITIES = {"Tesla P100": (6, 0), "Tesla V100": (7, 0), "Tesla T4": (7, 5), "NVIDIA A100": (8, 0),
                "NVIDIA GeForce RTX 3090": (8, 6), "NVIDIA H100": (9, 0), "NVIDIA B200": (10, 0), "no GPU": None}
BOTH = ("flash_attn", "triton")


@pytest.fixture
def machine(monkeypatch):
    "Make believe that this GPU is here, and of these packages only those that are named"
    find = importlib.util.find_spec

    def simulate(gpu, installed=BOTH):
        def find_some(name, *args): return find("torch" if name in installed else name, *args)
        def find_these(name, *args): return None if name in BOTH and name not in installed else find_some(name, *args)
        for owner, name, answer in (
                (torch.cuda, "is_available", lambda: CAPABILITIES[gpu] is not None),
                (torch.cuda, "get_device_capability", lambda device=None: CAPABILITIES[gpu]),
                (torch.cuda, "get_device_name", lambda device=None: gpu),
                (importlib.util, "find_spec", find_these),
                (flash, "_package", lambda: (None, "")),            # it is not imported to be asked
                (triton_kernels, "INTERPRETED", False)):
            monkeypatch.setattr(owner, name, answer)
        for name in ("TRITON_INTERPRET", "FLASH_ATTENTION_TRITON_AMD_ENABLE"): monkeypatch.delenv(name, raising=False)
    return simulate


def tensors(shape=(8, 16, 512, 64), dtype="bfloat16", device="cuda", train=True, k_len=None, kv_heads=None):
    "Without any memory, so that they can lie on a GPU that is not there"
    b, h, n, d = shape
    with FakeTensorMode():
        def empty(*sizes): return torch.empty(sizes, dtype=getattr(torch, dtype), device=device, requires_grad=train)
        return empty(b, h, n, d), *(empty(b, kv_heads or h, k_len or n, d) for _ in range(2))


class Case(NamedTuple):
    gpu:str
    taken:str
    why_not:dict = {}  # backend → a word of the reason
    installed:tuple = BOTH
    tensors:dict = {}
    mask:dict = {}
    dropout:float = 0.


LENGTHS, SLOPES = [100] * 8, torch.rand(16)
half, single, cpu = {"dtype": "float16"}, {"dtype": "float32"}, {"device": "cpu", "dtype": "float32"}
long = {"shape": (1, 16, 20_000, 64)}
CASES = {
    "nothing special": Case("NVIDIA A100", "flash_attn", {"triton": "SDPA|PyTorch", "sdpa": "flash_attn is preferred"}),
    "RTX 3090": Case("NVIDIA GeForce RTX 3090", "flash_attn"),
    "H100": Case("NVIDIA H100", "flash_attn", tensors=half),
    "B200": Case("NVIDIA B200", "flash_attn"),
    "causal": Case("NVIDIA A100", "flash_attn", {"triton": "causal"}, mask={"causal": True}),
    "key_lengths": Case("NVIDIA A100", "flash_attn", mask={"key_lengths": LENGTHS}),
    "window": Case("NVIDIA A100", "flash_attn", mask={"window": (64, 0)}),
    "alibi": Case("NVIDIA A100", "flash_attn", mask={"alibi": SLOPES}),
    "alibi of each sentence": Case("NVIDIA A100", "flash_attn", mask={"alibi": torch.rand(8, 16)}),
    "dropout": Case("NVIDIA A100", "flash_attn", {"flex": "no dropout"}, dropout=0.1),
    "grouped heads": Case("NVIDIA A100", "flash_attn", tensors={"kv_heads": 4, "k_len": 700}),
    "key_lengths and causal": Case("NVIDIA A100", "triton", {"flash_attn": "key_lengths.*attention_varlen",
                                                             "flex": "triton is preferred"},
                                   mask={"causal": True, "key_lengths": LENGTHS}),
    "flash-attn not installed": Case("NVIDIA A100", "sdpa", {"flash_attn": "not installed.*pip install"}, ("triton",)),
    "nor is it, causal with more keys": Case("NVIDIA A100", "triton", {"flash_attn": "not installed"}, ("triton",),
                                             {"k_len": 700}, {"causal": True}),
    "nor is it, window": Case("NVIDIA A100", "triton", {"flash_attn": "not installed"}, ("triton",),
                              mask={"window": (64, 0)}),
    "nothing installed": Case("NVIDIA A100", "sdpa", {"flash_attn": "not installed", "triton": "not installed",
                                                      "flex": "Triton.*not installed"}, ()),
    "nothing installed, a mask too large to write": Case(
        "NVIDIA A100", "tiled", {"sdpa": "over a billion", "flex": "not installed"}, (), long, {"alibi": SLOPES}),
    "float32": Case("NVIDIA H100", "sdpa", {"flash_attn": "float32", "triton": "float32"}, tensors=single),
    "float64": Case("NVIDIA H100", "sdpa", {"flash_attn": "float64", "triton": "float64", "flex": "float64"},
                    tensors={"dtype": "float64"}),
    "head size 288": Case("NVIDIA A100", "sdpa", {"flash_attn": "256.*288", "triton": "256.*288"},
                          tensors={"shape": (8, 16, 512, 288)}),
    "head size 8": Case("NVIDIA A100", "flash_attn", {"flex": "at least 16.*8"}, tensors={"shape": (8, 16, 512, 8)}),
    "T4, fp16": Case("Tesla T4", "sdpa", {"flash_attn": "Turing.*Ampere", "triton": "tensor cores"}, tensors=half),
    "T4, bf16": Case("Tesla T4", "sdpa", {"flash_attn": "Turing", "triton": "bfloat16.*float16", "flex": "bf16.*fp16"}),
    "T4, float32": Case("Tesla T4", "sdpa", {"flash_attn": "Turing", "triton": "float32"}, tensors=single),
    "T4, key_lengths and dropout": Case("Tesla T4", "sdpa", {"flex": "no dropout"}, tensors=half,
                                        mask={"key_lengths": LENGTHS}, dropout=0.1),
    "T4, a mask too large to write": Case("Tesla T4", "flex", {"sdpa": "over a billion", "triton": "tensor cores"},
                                          tensors=long | half, mask={"alibi": SLOPES}),
    "T4, the same, dropout": Case("Tesla T4", "tiled", {"sdpa": "over a billion", "flex": "no dropout"},
                                  tensors=long | half, mask={"alibi": SLOPES}, dropout=0.1),
    "V100": Case("Tesla V100", "sdpa", {"flash_attn": "Volta", "triton": "7.5"}, tensors=half),
    "P100": Case("Tesla P100", "sdpa", {"flash_attn": "Pascal", "triton": "7.5", "flex": "sm_70"}, tensors=half),
    "tensors on the CPU of a machine with a GPU": Case(
        "NVIDIA A100", "sdpa", {"flash_attn": "cpu", "triton": "cpu", "flex": "backward", "tiled": "few"},
        tensors=cpu | {"dtype": "bfloat16"}),
    "no GPU": Case("no GPU", "sdpa", {"flash_attn": "needs a CUDA GPU", "triton": "no CUDA GPU", "flex": "backward",
                                      "tiled": "few", "naive": "sdpa is preferred"}, tensors=cpu),
    "no GPU, no gradient": Case("no GPU", "sdpa", {"flex": "uncompiled"}, tensors=cpu | {"train": False}),
    "no GPU, dropout": Case("no GPU", "naive", {"sdpa": "dropped out", "tiled": "few"},
                            tensors=cpu | {"shape": (8, 16, 256, 64)}, dropout=0.1),
    "no GPU, short, half precision": Case("no GPU", "naive", {"sdpa": "half precision"},
                                          tensors=cpu | {"shape": (64, 8, 32, 64), "dtype": "bfloat16"}),
    "no GPU, narrow window": Case("no GPU", "tiled", {"sdpa": "window hides", "naive": "tiled is preferred"},
                                  tensors=cpu | {"shape": (1, 4, 8192, 64)}, mask={"window": (256, 0)}),
    "no GPU, narrow window to the left, causal": Case("no GPU", "tiled", {"sdpa": "window hides"}, mask={
        "window": (256, -1), "causal": True}, tensors=cpu | {"shape": (1, 4, 8192, 64)}),
    "no GPU, wide window": Case("no GPU", "sdpa", {"tiled": "few"}, tensors=cpu | {"shape": (1, 1, 8192, 64)},
                                mask={"window": (4096, 0)}),
    "no GPU, window narrow enough with gradients": Case(
        "no GPU", "tiled", tensors=cpu | {"shape": (1, 4, 4096, 64)}, mask={"window": (256, 0)}),
    "no GPU, the same without": Case("no GPU", "sdpa", {"tiled": "few"}, mask={"window": (256, 0)},
                                     tensors=cpu | {"shape": (1, 1, 4096, 64), "train": False}),
    "no GPU, the same in half precision": Case("no GPU", "sdpa", {"tiled": "few"}, mask={"window": (256, 0)},
                                               tensors=cpu | {"shape": (1, 1, 4096, 64), "dtype": "bfloat16"}),
    "no GPU, narrow window, one query": Case("no GPU", "sdpa", tensors=cpu | {"shape": (1, 4, 1, 64), "k_len": 8192},
                                             mask={"window": (256, 0)}),
    "no GPU, long, key_lengths": Case("no GPU", "sdpa", tensors=cpu | {"shape": (8, 16, 20_000, 64)},
                                      mask={"key_lengths": LENGTHS}),
    "no GPU, a mask too large to write": Case("no GPU", "tiled", {"sdpa": "over a billion"}, tensors=cpu | long,
                                              mask={"alibi": SLOPES}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_taken_and_why_not_the_others(case, machine):
    machine(case.gpu, case.installed)
    said = explain(*tensors(**case.tensors), AttentionMask(**case.mask) if case.mask else None, case.dropout)
    assert said.taken == case.taken
    for name, words in case.why_not.items(): assert re.search(words, said.reasons[name]), said.reasons[name]


SITUATIONS = [{}, {"mask": {"causal": True}}, {"mask": {"causal": True, "key_lengths": LENGTHS}},
              {"mask": {"window": (3, 3)}}, {"mask": {"alibi": SLOPES}}, {"dropout": 0.1},
              {"shape": (8, 16, 512, 288)}, {"shape": (8, 16, 40, 8)}, {"shape": (8, 16, 50_000, 64)}]


@pytest.mark.parametrize("gpu", CAPABILITIES)
def test_every_reason_is_one_plain_sentence(gpu, machine):
    for installed, situation, dtype in product((BOTH, ("triton",), ()), SITUATIONS, ("float16", "bfloat16", "float32")):
        machine(gpu, installed)
        shape = {"shape": situation["shape"]} if "shape" in situation else {}
        mask = AttentionMask(**situation["mask"]) if "mask" in situation else None
        x = tensors(**shape, dtype=dtype, device="cpu" if gpu == "no GPU" else "cuda")
        said = explain(*x, mask, situation.get("dropout", 0.))
        for name, reason in said.reasons.items():
            reason = reason.removeprefix("not taken: ")
            assert 10 < len(reason) < 200 and reason == reason.strip().rstrip(".") and "\n" not in reason, reason
            assert "Traceback" not in reason and "Error" not in reason and "  " not in reason, reason
            assert reason.startswith("taken, ") == (name == said.taken)
        assert all(b.reason and "\n" not in b.reason for b in backends())


@pytest.mark.parametrize("gpu, dtype, installed, taken", [
    ("NVIDIA A100", "bfloat16", BOTH, "flash_attn"), ("NVIDIA A100", "bfloat16", ("triton",), "triton"),
    ("NVIDIA A100", "float32", BOTH, None), ("NVIDIA A100", "bfloat16", (), None), ("Tesla T4", "float16", BOTH, None),
    ("no GPU", "float32", BOTH, None)])
def test_packed(gpu, dtype, installed, taken, machine):
    "None: no packed kernel serves, and the sequences are computed one by one"
    machine(gpu, installed)
    with FakeTensorMode():
        x = torch.empty(2048, 16, 64, dtype=getattr(torch, dtype), device="cpu" if gpu == "no GPU" else "cuda")
    chosen = _choose_packed("auto", x, x, x, None, 0.)
    assert (chosen and chosen.name) == taken


# ---- by name ----

@pytest.mark.parametrize("backend, dropout, words", [
    ("flash_attn", 0., "CUDA GPU"), ("triton", 0., "CUDA GPU"), ("flex", 0.1, "no dropout"), ("flex", 0., "backward")])
def test_asked_for_but_cannot(backend, dropout, words, machine):
    machine("no GPU")
    x = torch.randn(2, 4, 5, 16, requires_grad=True)
    with pytest.raises(ValueError, match=words) as caught: attention(x, x, x, dropout=dropout, backend=backend)
    said = str(caught.value)
    assert said.startswith(f"the attention backend {backend!r} cannot serve here: ") and "\n" not in said
    assert said.endswith(explain(x, x, x, None, dropout).reasons[backend].removeprefix("not taken: "))


@pytest.mark.parametrize("name, near", [
    ("flash-attn", "flash_attn"), ("flashattn", "flash_attn"), ("FlashAttn", "flash_attn"), ("trition", "triton"),
    ("spda", "sdpa"), ("SDPA", "sdpa"), ("flexattention", "flex"), ("tilde", "tiled"), ("Naive", "naive"),
    ("automatic", "auto")])
def test_misspelt(name, near):
    x, cu = torch.randn(1, 1, 2, 8), torch.tensor([0, 1])
    for call in (lambda: attention(x, x, x, backend=name),
                 lambda: attention_varlen(x[0], x[0], x[0], cu, cu, backend=name)):
        with pytest.raises(ValueError, match=f"did you mean '{near}'"): call()


def test_the_last_serves_always():
    "So `auto` finds one whatever comes"
    b = _choose(*tensors((1, 1, 1, 1), dtype="float64", device="meta"), None, 0.)
    assert b.name in ("sdpa", "naive") and not backends()[-1].reason.startswith("not")


def test_interpreter_is_for_checking(machine, monkeypatch):
    machine("no GPU")
    monkeypatch.setattr(triton_kernels, "INTERPRETED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FLASH_ATTENTION_TRITON_AMD_ENABLE", "TRUE")
    said = explain(*tensors(dtype="float16", device="cpu"))
    assert said.taken == "sdpa" and all("interpreter" in said.reasons[name] for name in BOTH)
    said = explain(*tensors(dtype="float16", device="cpu"), AttentionMask(window=(3, 3)))
    assert "overlooks windows" in said.reasons["flash_attn"]


def test_importing_loads_no_kernels():
    code = ("import sys, flash_transformer.attention as a, torch; a.backends(); x = torch.ones(1, 1, 2, 16); "
            "a.attention(x, x, x); print([m for m in sys.modules if m in ('flash_attn', 'torch._dynamo', "
            "'torch._inductor', 'torch.nn.attention.flex_attention')], 'triton' in sys.modules)")
    at_import = code.replace("a.backends(); ", "").replace("a.attention(x, x, x); ", "")
    for text, allowed in ((at_import, ["[] False"]), (code, ["[] False", "[] True"])):
        out = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout.strip()
        assert out in allowed


# ---- FlexAttention ----

MASKS = {
    "none": {}, "causal": {"causal": True}, "key_lengths": {"key_lengths": [0, 130]}, "window": {"window": (20, 5)},
    "window to one side": {"window": (-1, 0)}, "alibi": {"alibi": torch.rand(4)},
    "alibi of each sentence": {"alibi": torch.rand(2, 4)},
    "all": {"causal": True, "key_lengths": [150, 3], "window": (140, -1), "alibi": torch.rand(2, 4)},
}


@pytest.mark.parametrize("q_len, k_len", [(140, 260), (30, 20), (1, 9)])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_flex_is_naive(mask, q_len, k_len):
    "Forward only: PyTorch has no backward pass of it on a CPU"
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, q_len, 12), *torch.randn(2, 2, 2, k_len, 12)
    if "key_lengths" in mask: mask = mask | {"key_lengths": [min(n, k_len) for n in mask["key_lengths"]]}
    mask = AttentionMask(**mask) if mask else None
    exact = attention(q.double(), k.double(), v.double(), mask, scale=0.4, backend="naive")
    torch.testing.assert_close(attention(q.double(), k.double(), v.double(), mask, scale=0.4, backend="flex"), exact,
                               atol=1e-12, rtol=0)
    plain = (attention(q, k, v, mask, scale=0.4, backend="naive") - exact).abs().max()
    out = attention(q, k, v, mask, scale=0.4, backend="flex")
    assert out.dtype == torch.float32 and (out - exact).abs().max() <= 2 * plain + 1e-7
    if mask is not None:
        hidden = ~mask.dense(q_len, k_len).any(-1).expand(2, 4, q_len)
        assert (out[hidden] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flex_half(dtype):
    torch.manual_seed(0)
    x, mask = torch.randn(3, 2, 2, 40, 16).to(dtype), AttentionMask(causal=True, key_lengths=[40, 7])
    exact, plain, out = (attention(*y, mask, backend=name) for y, name in (
        (x.double(), "naive"), (x, "naive"), (x, "flex")))
    assert out.dtype == dtype and (out - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_flex_without_gradients_takes_what_requires_them():
    x = torch.randn(2, 2, 4, 16, requires_grad=True)
    with torch.no_grad(): out = attention(x, x, x, backend="flex")
    torch.testing.assert_close(out, attention(x, x, x, backend="naive"))


@pytest.mark.parametrize("batch, q_len, k_len", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_flex_empty(batch, q_len, k_len):
    q, k = (torch.randn(batch, 4, n, 8) for n in (q_len, k_len))
    for mask in (None, AttentionMask(causal=True)):
        out = attention(q, k, k, mask, backend="flex")
        assert out.shape == q.shape and (out == 0).all()


def test_flex_layers_share_a_block_mask():
    mask, x = AttentionMask(causal=True), torch.randn(1, 2, 300, 16)
    first, second = (attention(x + n, x, x, mask, backend="flex") for n in range(2))
    kept = [value for key, value in mask._made.items() if key[0] == "flex"]
    assert len(kept) == 1
    blocks = kept[0][0]
    assert (blocks.kv_num_blocks + blocks.full_kv_num_blocks).tolist() == [[[1, 2, 3]]]  # of 3 blocks of 128 keys
    attention(x[:, :, 100:], x, x, mask, backend="flex")
    assert len([key for key in mask._made if key[0] == "flex"]) == 2


def test_flex_is_called_with_the_masks_own_rules():
    "The function given to PyTorch says what `AttentionMask.dense` and `bias` say, place by place"
    mask = AttentionMask(causal=True, key_lengths=[3, 6], window=(2, -1), alibi=torch.rand(2))
    may_see, score_mod = flex._mods(mask, 2, 2, 4, 6, torch.device("cpu"), torch.float32)
    dense, bias = mask.dense(4, 6).expand(2, 2, 4, 6), mask.bias(4, 6).expand(2, 2, 4, 6)
    for at in product(range(2), range(2), range(4), range(6)):
        place = [torch.tensor(n) for n in at]
        assert bool(may_see(*place)) == bool(dense[at])
        torch.testing.assert_close(score_mod(torch.tensor(1.), *place), 1 + bias[at])


def test_over_a_billion(): assert 10 ** 9 <= LARGEST_MASK < 1.1 * 10 ** 9  # as the reason says
