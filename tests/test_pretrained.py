"""
Published models in our blocks: transformers' own classes, with random weights, saved by them and loaded by us, and the
other way round.
"""
import json
import os

import pytest
import torch
from torch.testing import assert_close

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")

from flash_transformer.model import (  # noqa: E402
    SampleConfig,
    configuration,
    from_pretrained,
    generate,
    save_pretrained,
)
from flash_transformer.translation import beam_search, greedy_search  # noqa: E402

transformers.logging.set_verbosity_error()
BERT = dict(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
    max_position_embeddings=20, attn_implementation="eager")
T5 = dict(vocab_size=61, d_model=24, d_kv=10, d_ff=40, num_layers=2, num_decoder_layers=3, num_heads=3,
    decoder_start_token_id=0, attn_implementation="eager")
MARIAN = dict(vocab_size=61, d_model=24, encoder_layers=2, decoder_layers=3, encoder_attention_heads=3,
    decoder_attention_heads=3, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=64, pad_token_id=60,
    decoder_start_token_id=60, eos_token_id=0, activation_function="swish", attn_implementation="eager")
LLAMA = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=64, attn_implementation="sdpa") # eager: its softmax is in float32
GPT2 = dict(vocab_size=61, n_embd=24, n_layer=2, n_head=3, n_positions=32, bos_token_id=60, eos_token_id=60,
    attn_implementation="eager")
MODELS = { # name → their model class, their configuration
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2, inner width": ("GPT2LMHeadModel", "GPT2Config", GPT2 | dict(n_inner=50, activation_function="relu")),
    "gpt2, untied": ("GPT2LMHeadModel", "GPT2Config", GPT2 | dict(tie_word_embeddings=False)),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "bert, classes": ("BertForSequenceClassification", "BertConfig", BERT | dict(num_labels=5)),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT | dict(type_vocab_size=1, layer_norm_eps=1e-5)),
    "roberta, classes": ("RobertaForSequenceClassification", "RobertaConfig",
        BERT | dict(type_vocab_size=1, layer_norm_eps=1e-5)),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5, small buckets": ("T5ForConditionalGeneration", "T5Config", T5 | dict(relative_attention_num_buckets=6,
        relative_attention_max_distance=9)),
    "t5 v1.1": ("T5ForConditionalGeneration", "T5Config", T5 | dict(feed_forward_proj="gated-gelu",
        tie_word_embeddings=False)),
    "marian": ("MarianMTModel", "MarianConfig", MARIAN),
    "marian, scaled": ("MarianMTModel", "MarianConfig", MARIAN | dict(scale_embedding=True)),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama, tied, wide heads": ("LlamaForCausalLM", "LlamaConfig", LLAMA | dict(tie_word_embeddings=True, head_dim=10,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0})),
}


@pytest.fixture(autouse=True)
def in_full_precision(monkeypatch):
    "T5's and Llama's norms, and Llama's angles, are computed in float32 by transformers even for a model in float64"
    def norm(self, x): return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))
    for kind in (transformers.models.t5.modeling_t5.T5LayerNorm, transformers.models.llama.modeling_llama.LlamaRMSNorm):
        monkeypatch.setattr(kind, "forward", norm)

    def angles(self, x, position_ids):
        d = self.config.head_dim
        frequency = 1 / self.config.rope_parameters["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
        angle = (position_ids[..., None] * frequency).repeat(1, 1, 2)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaRotaryEmbedding, "forward", angles)


def theirs(name, seed=0, dtype=torch.float64):
    "Their model with weights large enough that an error shows"
    model, config, fields = MODELS[name]
    torch.manual_seed(seed)
    model = getattr(transformers, model)(getattr(transformers, config)(**fields)).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.normal_(0, 0.3)      # Marian's sinusoids are a parameter, too
        for n, buffer in model.named_buffers():
            if n == "final_logits_bias": buffer.normal_()
        if model.config.model_type == "marian": model.model.shared.weight[60] = 0          # as published ones have it
    return model


def texts():
    "Token ids of five texts of up to 18, and their lengths"
    g = torch.Generator().manual_seed(1)
    lengths = torch.tensor([18, 1, 7, 18, 12])
    return torch.randint(4, 59, (5, 18), generator=g), lengths


def their_logits(model, ids, lengths, types):
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    kind = model.config.model_type
    if kind == "roberta":       # finds places by counting ids that are no padding
        ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
    if kind == "bert": return model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
    if kind in ("t5", "marian"):
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids.flip(1)).logits
    return model(input_ids=ids, attention_mask=mask).logits


def our_logits(model, ids, lengths, types):
    kind = type(model).__name__
    if kind == "Transformer": return model(ids, lengths, ids.flip(1))
    if kind == "CausalLM": return model(ids)
    return model(ids, lengths, types if model.config.token_types == 2 else None)


def real(logits, lengths): # without what stands at padding, where everybody may say something else
    return logits if logits.dim() == 2 else logits[torch.arange(logits.shape[1]) < lengths[:, None]]


def compare(one, other, atol, gradients=True):
    "Logits, and what their gradient does to the word table"
    ids, lengths = texts()
    types = (torch.arange(18) >= 5).long().expand(5, -1)
    found = []
    for model, logits, table in ((one, their_logits, one.get_input_embeddings().weight),
                                 (other, our_logits, getattr(other, "encoder", None) or other.decoder)):
        out = real(logits(model, ids, lengths, types), lengths)
        if not isinstance(table, torch.Tensor): table = table.embedding.tokens.weight
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        found.append((out, torch.autograd.grad((out * weights).sum(), table)[0]))
    (out, gradient), (our, ours) = found
    assert out.abs().max() > 0.1
    assert_close(our, out, atol=atol, rtol=0)
    if other.config.scale_embeddings and one.config.model_type == "t5": ours = ours / other.config.d_model ** 0.5
    if gradients: assert_close(ours, gradient, atol=100 * atol, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_the_same(name, tmp_path):
    model = theirs(name)
    model.save_pretrained(tmp_path)
    for dtype, atol in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        compare(model.to(dtype), from_pretrained(tmp_path, dtype=dtype), atol, gradients=dtype == torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_and_back(name, tmp_path):
    "Saved by us, read by them: the same numbers, and nothing that they miss or do not know"
    model = theirs(name)
    model.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs", dtype=torch.float64)
    save_pretrained(ours, tmp_path / "ours", model.config.model_type)
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True, dtype=torch.float64,
        attn_implementation=MODELS[name][2]["attn_implementation"])
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    compare(again.eval(), ours, 1e-9)
    written = json.loads((tmp_path / "ours/config.json").read_text())
    assert written["model_type"] == model.config.model_type


FULL = { # as published
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict()),
    "bert": ("BertForMaskedLM", "BertConfig", dict()),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", dict(vocab_size=50265, max_position_embeddings=514,
        type_vocab_size=1, layer_norm_eps=1e-5)),
    "t5": ("T5ForConditionalGeneration", "T5Config", dict(decoder_start_token_id=0)),
    "marian": ("MarianMTModel", "MarianConfig", dict(d_model=512, encoder_layers=6, decoder_layers=6,
        encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048,
        max_position_embeddings=512, activation_function="swish", scale_embedding=True)),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size(name, tmp_path):
    "The smallest published one of each family, with the weights that transformers starts from; the description, too"
    model, config, fields = FULL[name]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**fields)).eval()
    model.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    special = {} if name != "bert" else {"bos_id": ours.config.bos_id, "eos_id": ours.config.eos_id}   # it has none
    assert vars(ours.config) == vars(configuration(name)) | special
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for n, p in model.named_parameters()
        if "embed_positions" not in n) + (58101 if name == "marian" else 0) - (2 * 768 if name == "roberta" else 0)
    ids, lengths = texts()
    with torch.no_grad():
        out = real(their_logits(model, ids, lengths, None), lengths)
        assert_close(real(our_logits(ours, ids, lengths, None), lengths), out, atol=1e-4, rtol=0)
    assert out.std() > 0.1


def ends(row, end): # of what their `generate` returns: without the start sign, up to the end sign
    row = row.tolist()[1:]
    return row[:row.index(end)] if end in row else row


@pytest.mark.parametrize("name", ["t5", "t5 v1.1", "marian", "marian, scaled"])
@pytest.mark.parametrize("seed", range(1, 4))
def test_same_words(name, seed, tmp_path):
    "Greedy and beam search against their `generate`, until the end sign; their length penalty is another formula"
    model = theirs(name, seed)
    end = model.config.eos_token_id
    with torch.no_grad():                                  # an end sign within some words
        if "marian" in name: model.final_logits_bias[:, end] += 3
        else: model.lm_head.weight[end] *= 5               # the same as shared.weight, if tied
    model.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, dtype=torch.float64)
    ids, lengths = texts()
    mask = (torch.arange(18) < lengths[:, None]).long()
    n = 25
    settings = dict(input_ids=ids, attention_mask=mask, max_new_tokens=n, do_sample=False, length_penalty=0.0,
        forced_eos_token_id=None, bad_words_ids=[[60]] if "marian" in name else None,
        use_cache=False)         # their cache has as many layers as T5's encoder
    expected = [ends(row, end) for row in model.generate(num_beams=1, **settings)]
    # ours may go on for longer: its limit is so many words more than the source has
    assert [row[:n] for row in greedy_search(ours, ids, lengths, n)] == expected
    whole = 0
    for beam in (2, 5):
        expected = [ends(row, end) for row in model.generate(num_beams=beam, **settings)]
        found = [best[0].ids for best in beam_search(ours, ids, lengths, beam, 0.0, n)]
        for row, their in zip(found, expected):                # at the limit the two take different ones
            if len(their) < n and len(row) < n:
                assert row == their
                whole += 1
    assert whole >= 3


@pytest.mark.parametrize("name", ["gpt2", "gpt2, untied", "llama", "llama, tied, wide heads"])
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_writes_on(name, penalty, tmp_path):
    "Greedy, token for token, until the end sign or the last place"
    model = theirs(name, 3)
    model.save_pretrained(tmp_path)
    ours, prompt = from_pretrained(tmp_path, dtype=torch.float64), texts()[0][:, :4]
    end = int(model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, -1])   # one that comes
    expected = model.generate(prompt, max_new_tokens=28, do_sample=False, repetition_penalty=penalty, pad_token_id=end,
        eos_token_id=end)
    found = generate(ours, prompt, SampleConfig(28, temperature=0, repetition_penalty=penalty), end)
    assert torch.equal(found, expected)
    assert expected.shape[1] == 32 or (expected[:, -1] == end).all()


def test_classifiers_have_their_classes(tmp_path):
    model, names = theirs("bert, classes"), ["joy", "anger", "fear", "NEGATIVE", "5 of 5"]
    model.config.id2label = dict(enumerate(names))
    model.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    assert ours.output.out_features == 5 and ours.labels == names
    save_pretrained(ours, tmp_path / "ours", "bert")
    assert list(type(model).from_pretrained(tmp_path / "ours").config.id2label.values()) == names
