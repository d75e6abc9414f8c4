"Several sentences a row: kept apart by the mask, laid out without loss, trained as if each were alone."
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from flash_transformer.attention import AttentionMask, attention, backends, explain
from flash_transformer.data import PAD, EncodedPairs, TokenizerPair, pack_batches, row_length, toy_corpus
from flash_transformer.model import Transformer, TransformerConfig
from flash_transformer.model.embeddings import Dropout
from flash_transformer.model.transformer import places
from flash_transformer.training import batch_loss, label_smoothed_loss, optimisation, projected_loss


@pytest.fixture(scope="module")
def pairs():
    splits = toy_corpus(300, 1, 1)
    return EncodedPairs.encode(splits["train"], TokenizerPair.train(splits["train"], "bpe", 300))


# ---- the mask ----

OF_Q = torch.tensor([[1] * 4 + [2] * 5 + [1] * 2, [1] * 11, [1] * 3 + [2] * 3 + [3] * 5])
OF_K = torch.tensor([[1] * 5 + [2] * 4, [1] * 6 + [0] * 3, [1] * 2 + [2] * 3 + [3] * 4])


def qkv(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, heads, n, 8, dtype=dtype, generator=generator).requires_grad_()
            for heads, n in ((4, 11), (2, 9), (2, 9))]


@pytest.mark.parametrize("backend", ["naive", "sdpa", "tiled", "flex"])
def test_each_sentence_is_alone(backend):
    "Against PyTorch on every sentence by itself, outputs and gradients; FlexAttention has no gradients on a CPU"
    q, k, v = qkv()
    expected = torch.zeros_like(q)
    for row in range(3):
        for number in OF_Q[row].unique():
            i, j = OF_Q[row] == number, OF_K[row] == number
            expected[row, :, i] = F.scaled_dot_product_attention(
                q[row, :, i], *(x[row, :, j].repeat_interleave(2, 0) for x in (k, v)))
    mask, weight = AttentionMask(segments=(OF_Q, OF_K)), torch.randn(q.shape, dtype=q.dtype)
    if backend == "flex":
        with torch.no_grad(): return assert_close(attention(q, k, v, mask, backend=backend), expected)
    out = attention(q, k, v, mask, backend=backend)
    assert_close(out, expected)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, expected))): assert_close(a, b)


def test_a_query_without_a_partner_gives_zeros():
    q, k, v = qkv()
    of_q = OF_Q.clone()
    of_q[1, 3] = 7
    for backend in ("naive", "sdpa", "tiled"):
        out = attention(q, k, v, AttentionMask(segments=(of_q, OF_K)), backend=backend)
        assert not out[1, :, 3].any() and out[1, :, 4].all()


def test_segments_and_causal_together_see_less():
    mask = AttentionMask(causal=True, segments=(OF_K, OF_K))
    parts = AttentionMask(causal=True), AttentionMask(segments=(OF_K, OF_K))
    assert torch.equal(mask.dense(9, 9), parts[0].dense(9, 9) & parts[1].dense(9, 9))
    assert mask.spans(2, 4, 9)[1] == range(0)                  # nothing may be taken for seen by all


@pytest.mark.parametrize("segments, words", [
    ((OF_Q,), "two tensors"), (OF_Q.float(), "two tensors"), ((OF_Q.float(), OF_K), "whole numbers"),
    ((OF_Q[0], OF_K), "two tensors")])
def test_segments_that_are_none(segments, words):
    with pytest.raises(ValueError, match=words): AttentionMask(segments=segments)


def test_segments_that_do_not_fit():
    with pytest.raises(ValueError, match=r"segments have shapes .*\(3, 11\) for queries and \(3, 9\) for keys"):
        attention(*qkv(), AttentionMask(segments=(OF_K, OF_K)))


def test_kernels_that_know_no_segments_say_so():
    q, k, v = (x.detach().half() for x in qkv())
    told = explain(q, k, v, AttentionMask(segments=(OF_Q, OF_K)))
    assert told.taken in ("sdpa", "naive")
    available = {b.name for b in backends() if b.available}
    if "triton" in available: assert "attention_varlen" in told.reasons["triton"]


# ---- the rows ----

def first_fit(s, t, length):
    "Plainly: the first row with room on both sides, longest first"
    rows, row = [], [0] * len(s)
    for i in sorted(range(len(s)), key=lambda i: -max(s[i], t[i])):
        row[i] = next((n for n, (a, b) in enumerate(rows) if max(a + s[i], b + t[i]) <= length), len(rows))
        if row[i] == len(rows): rows.append((0, 0))
        rows[row[i]] = rows[row[i]][0] + s[i], rows[row[i]][1] + t[i]
    return len(rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=600), st.integers(1, 5),
       st.integers(0, 2))
def test_a_plan(lengths, rows, epoch):
    s, t = np.array(lengths, dtype=np.int32).T
    length = row_length(int(max(s.max(), t.max())), 1000)
    plan = pack_batches(s, t, rows * length, length, seed=3, epoch=epoch)
    assert sorted(np.concatenate(plan)) == list(range(len(s)))
    again = pack_batches(s, t, rows * length, length, seed=3, epoch=epoch)
    assert all(np.array_equal(a, b) for a, b in zip(plan, again))
    for i in plan:                                             # in their order they need no more rows than there are
        row, a, b = 1, 0, 0
        for x, y in zip(s[i], t[i]):
            if max(a + x, b + y) > length: row, a, b = row + 1, 0, 0
            a, b = a + x, b + y
        assert row <= rows
    order = np.random.default_rng((3, epoch)).permutation(len(s))                    # decides among equally long ones
    if len(s) <= 256: assert len(plan) == -(-first_fit(s[order], t[order], length) // rows)


def test_epochs_differ_and_little_is_wasted():
    generator = np.random.default_rng(0)
    s = generator.integers(4, 30, 20_000).astype(np.int32)
    t = np.clip(s + generator.integers(-3, 4, len(s)), 1, None).astype(np.int32)
    plans = [pack_batches(s, t, 4096, 64, epoch=epoch) for epoch in (0, 1)]
    assert not np.array_equal(plans[0][0], plans[1][0])
    assert all((s.sum() + t.sum()) / (2 * 4096 * len(plan)) > 0.93 for plan in plans)


def test_rows_hold_what_padded_rows_hold(pairs):
    length = row_length(int(max(pairs.source_lengths.max(), pairs.target_lengths.max())), 1000)
    rows = pack_batches(pairs.source_lengths, pairs.target_lengths, 10 * length, length)[2]
    alone, packed = pairs.batch(rows), pairs.batch(rows, length)
    assert packed.source.shape == packed.target.shape == packed.labels.shape == (10, length)
    assert packed.tokens == alone.tokens and len(packed.source_lengths) == len(rows)
    for name, side, lengths in (("source", 0, alone.source_lengths), ("target", 1, alone.target_lengths),
                                ("labels", 1, alone.target_lengths)):
        cells, segments = getattr(packed, name), packed.segments[side]
        found = [row[numbers == n] for row, numbers in zip(cells, segments) for n in range(1, int(numbers.max()) + 1)]
        assert len(found) == len(rows) and ((cells == PAD) == (segments == 0)).all()
        for sentence, row, n in zip(found, getattr(alone, name), lengths): assert torch.equal(sentence, row[:n])
    moved = packed.to("meta")
    assert all(x.device.type == "meta" for x in [*moved[:5], *moved.segments])


def test_places():
    segments = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 3]])
    assert places(segments).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 0, 1, 2]]


def test_too_long_for_a_row(pairs):
    with pytest.raises(ValueError, match="no room in a row of 4"): pairs.batch([0], 4)
    with pytest.raises(ValueError, match="tokens_per_batch=50"):
        pack_batches(pairs.source_lengths, pairs.target_lengths, 50, 64)


# ---- the training ----

@pytest.mark.parametrize("norm, tie", [("pre", "all"), ("post", "none")])
def test_packed_training_is_padded_training(pairs, norm, tie):
    "Loss and every gradient, in float64; padded rows by the plain loss on logits"
    size = 300
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(32, 64, 4, 2, 2, dropout=0.0, norm=norm, tie_embeddings=tie,
        source_vocab_size=size, target_vocab_size=size)).double().train()
    reference = copy.deepcopy(model)
    length = row_length(int(max(pairs.source_lengths.max(), pairs.target_lengths.max())), 1000)
    rows = pack_batches(pairs.source_lengths, pairs.target_lengths, 10 * length, length)[1]
    found = batch_loss(model, pairs.batch(rows, length))
    batch = pairs.batch(rows)
    logits = reference(batch.source, batch.source_lengths, batch.target)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=PAD, label_smoothing=0.1,
                               reduction="sum")
    plain = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=PAD, reduction="sum")
    assert_close(found[0], expected, rtol=1e-12, atol=0)
    assert_close(found[1], plain.detach(), rtol=1e-12, atol=0)
    found[0].backward()
    expected.backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters()):
        assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    assert_close(batch_loss(model, batch)[0], expected, rtol=1e-12, atol=0)          # padded, by the same function


# ---- the loss in chunks ----

def projected(dtype=torch.float64, n=41, v=53, d=16):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*size, d, dtype=torch.float64, generator=generator) for size in ((n,), (v,)))
    labels = torch.randint(1, v, (n,), generator=generator)
    labels[::5] = PAD
    return [x.to(dtype).requires_grad_() for x in (hidden, weight)], labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("chunk, block", [(1024, 64), (8, 3), (41, 41), (1, 1)])
def test_projected_loss(monkeypatch, smoothing, chunk, block):
    "Against PyTorch's cross-entropy on all logits; the gradient multiplied by what comes from above"
    monkeypatch.setattr(optimisation, "CHUNK", chunk)
    monkeypatch.setattr(optimisation, "BLOCK", block)
    inputs, labels = projected()
    smoothed, plain = projected_loss(*inputs, labels, smoothing)
    logits = inputs[0] @ inputs[1].T
    expected = [F.cross_entropy(logits, labels, ignore_index=PAD, label_smoothing=s, reduction="sum")
                for s in (smoothing, 0)]
    assert_close((smoothed, plain), (expected[0], expected[1].detach()))
    for a, b in zip(*(torch.autograd.grad(loss * 0.37, inputs) for loss in (smoothed, expected[0]))): assert_close(a, b)
    assert_close((smoothed, plain), label_smoothed_loss(logits, labels, smoothing))


def test_projected_loss_in_bf16():
    "Under autocast its errors are those of plain PyTorch under autocast, against float64"
    def errors(loss_of):
        inputs, labels = projected(torch.float32, n=300, v=400, d=64)
        with torch.autocast("cpu", torch.bfloat16): loss = loss_of(*inputs, labels)
        found = [loss.detach(), *torch.autograd.grad(loss, inputs)]
        exact, labels = projected(torch.float64, n=300, v=400, d=64)
        loss = F.cross_entropy(exact[0] @ exact[1].T, labels, ignore_index=PAD, label_smoothing=0.1, reduction="sum")
        exact = [loss.detach(), *torch.autograd.grad(loss, exact)]
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact)]
    plain = errors(lambda x, w, y: F.cross_entropy(F.linear(x, w).float(), y, ignore_index=PAD, label_smoothing=0.1,
                                                   reduction="sum"))
    ours = errors(lambda x, w, y: projected_loss(x, w, y)[0])
    assert all(a <= 2 * b + 1e-4 for a, b in zip(ours, plain)), (ours, plain)


def test_projected_loss_without_gradients():
    inputs, labels = projected()
    expected = projected_loss(*inputs, labels)
    with torch.no_grad(): found = projected_loss(*inputs, labels)
    assert torch.equal(found[0], expected[0].detach()) and not found[0].requires_grad


def test_projected_loss_refuses():
    inputs, labels = projected()
    with pytest.raises(ValueError, match=r"vectors \(41, 16\), labels \(40,\)"): projected_loss(*inputs, labels[1:])
    gradient, = torch.autograd.grad(projected_loss(*inputs, labels)[0], inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError): gradient.sum().backward()


# ---- what flows ----

def test_dropout_added_in_one_pass():
    dropout = Dropout(0.3).train()
    x, y = (torch.randn(50, 41, requires_grad=True) for _ in range(2))
    torch.manual_seed(5)
    found = dropout.add(x, y)
    torch.manual_seed(5)
    expected = x + dropout(y)
    assert_close(found, expected, rtol=0, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(z.square().sum(), (x, y)) for z in (found, expected))): assert_close(a, b)
    assert torch.equal(dropout.eval().add(x, y), x + y)


@pytest.mark.parametrize("autocast, stream", [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_between_blocks_flows_bf16_under_autocast(pairs, autocast, stream):
    model = Transformer(TransformerConfig(32, 64, 4, 1, 1, source_vocab_size=300, target_vocab_size=300))
    batch, seen = pairs.batch(range(4)), []
    model.encoder.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=bool(autocast)):
        model.encode(batch.source, batch.source_lengths)
    assert seen == [stream]
