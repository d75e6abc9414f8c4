"""
The files of published models: fetched from a hub, in the forms in which they are found, and damaged in every way that
we could think of. What is wrong is said in one sentence that names the culprit.
"""
import errno
import json
import os
import pickle
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

transformers = pytest.importorskip("transformers")

from test_pretrained import MODELS, our_logits, texts, their_logits, theirs  # noqa: E402

from flash_transformer.model import FAMILY, TransformerConfig, build, from_pretrained, pretrained, save_pretrained  # noqa: E402
from flash_transformer.model.pretrained import FAMILIES, to_config  # noqa: E402

ONE_OF_EACH = ["gpt2", "bert", "roberta", "t5", "t5 v1.1", "marian", "llama"]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    "The folder of one of `MODELS`, saved by transformers; nobody writes into it"
    @cache
    def save(name):
        theirs(name, dtype=torch.float32).save_pretrained(folder := tmp_path_factory.mktemp("saved"))
        return folder
    return save


@pytest.fixture
def rewrite(saved, tmp_path):
    "Such a folder with other tensors, other fields in its description, or without them where they are None"
    def write(name, tensors=None, **fields):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        described = json.loads((saved(name) / "config.json").read_text()) | fields
        described = {field: value for field, value in described.items() if field not in fields or value is not None}
        (folder / "config.json").write_text(json.dumps(described))
        save_file(tensors_of(saved(name)) if tensors is None else tensors, folder / WEIGHTS)
        return folder
    return write


def tensors_of(folder): return load_file(folder / WEIGHTS)


@contextmanager
def refused(error, *words):
    "Exactly this error, its message one sentence with these words"
    with pytest.raises(error) as caught: yield
    assert type(caught.value) is error, repr(caught.value)
    one_sentence(str(caught.value), *words)


def one_sentence(message, *words):
    assert message and "\n" not in message and len(message) < 600, message
    for word in words: assert str(word) in message, message


def same(model, other):
    "Kind, configuration and every parameter"
    return type(model) is type(other) and model.config == other.config and same_tensors(model, other.state_dict())


def same_tensors(model, tensors):
    ours = model.state_dict()
    return ours.keys() == tensors.keys() and all(torch.equal(ours[name], tensors[name]) for name in ours)


# ---- from a hub ----

LOAD = """
import json, sys
import torch
from flash_transformer.model import from_pretrained
for i, (name, revision) in enumerate(json.loads(sys.argv[1])):
    try:
        model = from_pretrained(name, revision)
        torch.save((type(model).__name__, repr(model.config), model.state_dict()), f"{i}.pt")
        print(json.dumps(["loaded", f"{i}.pt"]))
    except Exception as e: print(json.dumps([type(e).__name__, str(e)]))
"""


def load_in_a_new_process(endpoint, home, *requests, **environment):
    "What `from_pretrained` makes of each name; Hugging Face's library reads its environment once, at import"
    inherited = {k: v for k, v in os.environ.items() if not k.upper().startswith("HF_") and "PROXY" not in k.upper()}
    environment |= dict(HF_ENDPOINT=endpoint, HF_HOME=str(home), PYTHONPATH=str(Path(__file__).parent.parent))
    requests = [request if isinstance(request, tuple) else (request, None) for request in requests]
    done = subprocess.run([sys.executable, "-c", LOAD, json.dumps(requests)], env=inherited | environment, cwd=home,
                          capture_output=True, text=True, timeout=300)       # only against a hang
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def same_as(answer, home, folder):
    "Whether the other process loaded what stands in this folder"
    what, file = answer
    assert what == "loaded", answer
    kind, config, tensors = torch.load(home / file)
    model = from_pretrained(folder)
    return (kind, config) == (type(model).__name__, repr(model.config)) and same_tensors(model, tensors)


def files(hub, name):
    "Which files of a repository were asked for"
    begin = f"/{name}/resolve/"
    return {path.removeprefix(begin).split("/", 1)[1] for method, path in hub.asked if path.startswith(begin)}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    "A hub's folder: a repository as they are, with much that we do not need, and others that lack something"
    root = tmp_path_factory.mktemp("hub")
    someone = root / "models" / "someone"
    model = theirs("gpt2", dtype=torch.float32)
    model.save_pretrained(someone / "tiny-gpt2")
    theirs("bert", dtype=torch.float32).save_pretrained(someone / "sharded", max_shard_size="9KB")
    model.config.save_pretrained(someone / "only-bin")
    torch.save(model.state_dict(), someone / "only-bin" / "pytorch_model.bin")
    model.config.save_pretrained(someone / "empty")
    (someone / "no-description").mkdir()
    save_file(tensors_of(someone / "tiny-gpt2"), someone / "no-description" / WEIGHTS)
    (someone / "data-only").mkdir()
    (someone / "data-only" / "README.md").write_text("nothing here\n")
    # what else lies in such repositories: other formats, and the same weights in fewer bits
    for name in ("README.md", "tokenizer.json", "vocab.json", "tf_model.h5", "onnx/model.onnx", "flax_model.msgpack",
                 "generation_config.json", "training_args.bin", "pytorch_model.bin"):
        (someone / "tiny-gpt2" / name).parent.mkdir(exist_ok=True)
        (someone / "tiny-gpt2" / name).write_bytes(b"not for us")
    model.config.save_pretrained(someone / "fewer-bits")
    torch.save(model.state_dict(), someone / "fewer-bits" / "pytorch_model.bin")
    save_file(tensors_of(someone / "tiny-gpt2"), someone / "fewer-bits" / "model.fp16.safetensors")
    return root


GOOD = "tiny-gpt2", "only-bin", "sharded"
OTHERS = "fewer-bits", "empty", "no-description", "data-only", "nothing"


@pytest.fixture(scope="module")
def fetched(repositories, tmp_path_factory):
    "A cache into which all were loaded, the hub, which is gone, and the answers by name"
    home = tmp_path_factory.mktemp("home")
    with HubServer(repositories) as hub:
        names = [f"someone/{name}" for name in GOOD + OTHERS]
        answers = load_in_a_new_process(hub.url, home, *names, ("someone/sharded", "v9"))
    return home, hub, dict(zip([*GOOD, *OTHERS, "revision v9"], answers, strict=True))


def test_from_the_hub(repositories, fetched):
    home, hub, answers = fetched
    for name in GOOD: assert same_as(answers[name], home, repositories / "models" / "someone" / name), name
    assert files(hub, "someone/tiny-gpt2") == {"config.json", WEIGHTS}
    assert files(hub, "someone/only-bin") == {"config.json", "pytorch_model.bin"}
    shards = {p.name for p in (repositories / "models" / "someone" / "sharded").glob("model*.safetensors")}
    assert len(shards) > 1 and files(hub, "someone/sharded") == shards | {"config.json", f"{WEIGHTS}.index.json"}
    downloads = [path for method, path in hub.asked if method == "GET" and path.startswith("/cdn/")]
    assert len(downloads) == len(set(downloads))


def test_a_repository_with_weights_in_fewer_bits_beside_those_that_load(repositories, fetched):
    "diffusers and others put model.fp16.safetensors there, which is not what we look for"
    home, hub, answers = fetched
    assert same_as(answers["fewer-bits"], home, repositories / "models" / "someone" / "fewer-bits")
    assert files(hub, "someone/fewer-bits") == {"config.json", "pytorch_model.bin"}


def test_what_the_hub_has_not(fetched):
    *_, answers = fetched
    for answer, *words in (("nothing", "someone/nothing", "Not Found"), ("revision v9", "someone/sharded", "v9")):
        kind, message = answers[answer]
        assert kind == "ConnectionError"
        one_sentence(message, *words, "check the name", "give its folder")
    for name, lacking in ("empty", "no weights"), ("data-only", "config.json"), ("no-description", "config.json"):
        kind, message = answers[name]
        assert kind == "FileNotFoundError"
        one_sentence(message, f"someone--{name}", lacking)


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["gone", "offline"])
def test_from_the_cache(repositories, fetched, environment):
    home, hub, _ = fetched                       # its port is closed now
    *answers, (kind, message) = load_in_a_new_process(
        hub.url, home, *(f"someone/{n}" for n in GOOD), "someone/other", **environment)
    for name, answer in zip(GOOD, answers, strict=True):
        assert same_as(answer, home, repositories / "models" / "someone" / name), name
    assert kind == "ConnectionError"
    one_sentence(message, "someone/other", "the network", "give its folder")


def test_a_folder_with_a_slip_of_the_pen(tmp_path):
    with refused(ConnectionError, tmp_path / "modell", "there is no folder"): from_pretrained(tmp_path / "modell")


# ---- forms in which files are found ----

@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_shards(name, saved, tmp_path):
    theirs(name, dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="9KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert same(from_pretrained(tmp_path), from_pretrained(saved(name)))


@pytest.mark.parametrize("zipped", [True, False], ids=["today's", "before PyTorch 1.6"])
@pytest.mark.parametrize("name", ["gpt2", "marian"])
def test_pickled_weights(name, zipped, saved, rewrite):
    "Much of the hub, Marian's models among it, was saved before 2020, in a format that cannot be mapped into memory"
    folder = rewrite(name)
    (folder / WEIGHTS).unlink()
    tensors = theirs(name, dtype=torch.float32).state_dict()       # tied ones under each of their names
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert same(from_pretrained(folder), from_pretrained(saved(name)))


@pytest.mark.parametrize("name", ["bert", "bert, classes", "gpt2"])
def test_norms_with_old_names(name, saved, rewrite):
    def old(name):
        name = re.sub(r"(LayerNorm|ln_\w)\.weight$", r"\1.gamma", name)
        return re.sub(r"(LayerNorm|ln_\w)\.bias$", r"\1.beta", name)
    tensors = {old(n): t for n, t in tensors_of(saved(name)).items()}
    assert sum(n.endswith((".gamma", ".beta")) for n in tensors) >= 10
    assert same(from_pretrained(rewrite(name, tensors)), from_pretrained(saved(name)))


def test_gpt2_without_the_prefix(saved, rewrite):
    "As it is on the hub: wte.weight, and masks as tensors"
    tensors = {n.removeprefix("transformer."): t for n, t in tensors_of(saved("gpt2")).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    tensors |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    assert "wte.weight" in tensors
    assert same(from_pretrained(rewrite("gpt2", tensors)), from_pretrained(saved("gpt2")))


def test_more_that_may_stand_in_a_file(saved, rewrite):
    "BERT's second task, and numbers of places, which were saved for a while; the output matrix, although it is tied"
    tensors = tensors_of(saved("bert"))
    tensors |= {"bert.pooler.dense.weight": torch.randn(24, 24), "bert.pooler.dense.bias": torch.randn(24),
        "cls.seq_relationship.weight": torch.randn(2, 24), "cls.seq_relationship.bias": torch.randn(2),
        "bert.embeddings.position_ids": torch.arange(20)[None],
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone()}
    assert same(from_pretrained(rewrite("bert", tensors)), from_pretrained(saved("bert")))


BASES = {"bert": ("BertModel", "cls.predictions."), "roberta": ("RobertaModel", "lm_head."),
    "marian": ("MarianModel", "model."), "t5": ("T5EncoderModel", "decoder."),
    "llama": ("LlamaModel", "lm_head.weight")}


@pytest.mark.parametrize("name", BASES)
def test_a_model_without_its_head(name, tmp_path):
    "What it would say of words is not in the file, and is not made up"
    base, lacking = BASES[name]
    _, config, fields = MODELS[name]
    getattr(transformers, base)(getattr(transformers, config)(**fields)).save_pretrained(tmp_path)
    with refused(ValueError, "lacks", lacking): from_pretrained(tmp_path)


def test_a_gpt2_without_its_head(saved, tmp_path):
    "lacks nothing: its head is the word table"
    theirs("gpt2", dtype=torch.float32).transformer.save_pretrained(tmp_path)
    assert "wte.weight" in tensors_of(tmp_path)
    assert same(from_pretrained(tmp_path), from_pretrained(saved("gpt2")))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_weights_of_16_bits(name, tmp_path):
    "are read exactly"
    theirs(name, dtype=torch.bfloat16).save_pretrained(tmp_path)
    ids, lengths = texts()
    types = torch.zeros_like(ids)
    ours = from_pretrained(tmp_path)
    model = getattr(transformers, MODELS[name][0]).from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation=MODELS[name][2]["attn_implementation"]).eval()
    their, our = their_logits(model, ids, lengths, types), our_logits(ours, ids, lengths, types)
    real = torch.arange(18) < lengths[:, None]
    assert_close(our[real], their[real], atol=1e-4, rtol=1e-4)


# ---- damaged descriptions ----

def test_no_description(saved, tmp_path):
    with refused(FileNotFoundError, tmp_path, "config.json"): from_pretrained(tmp_path)
    save_file(tensors_of(saved("gpt2")), tmp_path / WEIGHTS)
    with refused(FileNotFoundError, tmp_path, "config.json"): from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"model_type: gpt2", b"\xff\xfe\x00", b"<html>no such page</html>",
    b'["gpt2"]', b'"gpt2"', b"3", b"null"])
def test_a_description_that_is_none(content, rewrite):
    folder = rewrite("gpt2")
    (folder / "config.json").write_bytes(content)
    with refused(ValueError, folder / "config.json"): from_pretrained(folder)


@pytest.mark.parametrize("kind", ["mamba", "GPT2", None, 7, ["gpt2"], {"gpt2": 1}])
def test_a_model_that_we_have_not(kind, rewrite):
    with refused(ValueError, "gpt2, bert, roberta, t5, marian, llama", *[repr(kind)] * (kind is not None)):
        from_pretrained(rewrite("gpt2", model_type=kind))


@pytest.mark.parametrize("name, fields, words", [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx", "True"]),
    ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights", "False"]),
    ("gpt2", {"activation_function": "quick_gelu"}, ["quick_gelu"]),
    ("bert", {"position_embedding_type": "relative_key"}, ["position_embedding_type", "relative_key"]),
    ("bert", {"is_decoder": True}, ["is_decoder"]),
    ("roberta", {"pad_token_id": 0}, ["pad_token_id", "0"]),
    ("marian", {"normalize_before": True}, ["normalize_before"]),
    ("marian", {"share_encoder_decoder_embeddings": False}, ["share_encoder_decoder_embeddings"]),
    ("marian", {"decoder_ffn_dim": 50}, ["ffn_dim"]),
    ("marian", {"decoder_attention_heads": 2}, ["attention_heads"]),
    ("llama", {"attention_bias": True}, ["attention_bias"]),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, ["llama3"]),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, ["linear"]),
    ("t5", {"feed_forward_proj": "gated-tanh"}, ["tanh"]),
])
def test_what_we_would_compute_otherwise(name, fields, words, rewrite):
    with refused(ValueError, *words): from_pretrained(rewrite(name, **fields))


def described(name):
    "All fields of a model, as transformers writes them, and the class that reads them"
    _, config, fields = MODELS[name]
    config = getattr(transformers, config)
    return config(**fields).to_dict() | {"model_type": config.model_type}, config


def complaint(fields, name):
    "None if `to_config` raises a ValueError of one line that names the field; else what it did"
    try: to_config(fields)
    except ValueError as e: return None if name in str(e) and "\n" not in str(e) else f"{name}: {e!r}"
    except Exception as e: return f"{name} {fields.get(name, 'absent')!r}: {e!r}"
    return f"{name} {fields.get(name, 'absent')!r}: no complaint"


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_field_is_missing(name):
    "It is what transformers takes it for; or else the sentence names it"
    whole, config = described(name)
    wrong = []

    def read(fields):
        c = to_config(fields)                    # None is as many as heads, and d_model/heads
        return replace(c, kv_heads=c.kv_heads or c.heads, head_dim=c.head_dim or c.d_model // c.heads)
    for field in sorted(whole.keys() - {"model_type"}):
        rest = {key: value for key, value in whole.items() if key != field}
        try: right = read(config.from_dict(rest).to_dict() | {"model_type": whole["model_type"]})
        except Exception: right = None           # to transformers it is no model
        try: found = read(rest)
        except Exception: wrong.append(complaint(rest, field))
        else:
            if found != right:
                differ = right and {k: (v, vars(found)[k]) for k, v in vars(right).items() if v != vars(found)[k]}
                wrong.append(f"{field} absent, (transformers' value, ours): {differ}")
    wrong = list(filter(None, wrong))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_field_of_a_wrong_type(name):
    whole, _ = described(name)
    kind, wrong = whole["model_type"], []
    others = {int: ["twelve", [], ["x"], {}, 1.5], float: ["small", [0.1], {}], str: [3, ["gelu"], {}, 0.5],
              bool: ["no", [], {}]}
    fields = {*FAMILIES[kind].fields.values(), *{"t5": ["feed_forward_proj", "scale_decoder_outputs"]}.get(kind, [])}
    for field in sorted(fields):
        right = whole.get(field)
        if right is None: right = 0.5 if "drop" in field else 1          # transformers has no value: n_inner, head_dim
        if isinstance(right, list): right = right[0]
        wrong += [complaint(whole | {field: value}, field) for value in others[type(right)]]
    if kind == "llama":
        for value in ("plain", ["plain"], 3, {"rope_type": "default", "rope_theta": "fast"}, {"rope_type": "default"}):
            wrong.append(complaint(whole | {"rope_parameters": value}, "rope_"))
    wrong = list(filter(None, wrong))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("field, value, word", [("n_embd", -24, "-24"), ("n_head", 0, "0"), ("n_head", 5, "5"),
    ("n_layer", 0, "layer"), ("n_layer", -1, "-1"), ("vocab_size", 0, "0"), ("n_positions", -1, "-1"),
    ("resid_pdrop", 2.0, "2.0")])
def test_a_number_that_cannot_be(field, value, word, rewrite):
    with refused(ValueError, word): from_pretrained(rewrite("gpt2", **{field: value}))


@pytest.mark.parametrize("name, fields", [("gpt2", {"n_embd": None}), ("bert", {"hidden_size": None}),
    ("bert", {"hidden_size": "24"}), ("bert", {"num_hidden_layers": 2.5}), ("bert, classes", {"id2label": 5}),
    ("bert, classes", {"architectures": 5}), ("llama", {"eos_token_id": []}), ("t5", {"num_layers": None})])
def test_a_damaged_field_in_a_file(name, fields, rewrite):
    [field] = fields
    with refused(ValueError, field): from_pretrained(rewrite(name, **fields))


# ---- damaged weights ----

def test_no_weights(rewrite):
    folder = rewrite("gpt2")
    (folder / WEIGHTS).unlink()
    with refused(FileNotFoundError, folder, WEIGHTS, "pytorch_model.bin"): from_pretrained(folder)


@pytest.mark.parametrize("left", [0, 4, 100, -1, -5000], ids=lambda n: f"[:{n}]")
@pytest.mark.parametrize("file", [WEIGHTS, "pytorch_model.bin"])
def test_half_a_download(file, left, saved, rewrite):
    folder = rewrite("gpt2")
    if file != WEIGHTS:
        (folder / WEIGHTS).unlink()
        torch.save(tensors_of(saved("gpt2")), folder / file)
    (folder / file).write_bytes((folder / file).read_bytes()[:left])
    with refused(ValueError, folder / file): from_pretrained(folder)


@pytest.mark.parametrize("file", [WEIGHTS, "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", bytes(300)],
                         ids=["pointer", "zeros"])
def test_what_is_no_file_of_weights(content, file, rewrite):
    "git without its extension leaves a few lines of text in place of a large file"
    folder = rewrite("gpt2")
    (folder / WEIGHTS).unlink()
    (folder / file).write_bytes(content)
    with refused(ValueError, folder / file): from_pretrained(folder)


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "bert, classes", "gpt2, untied"])
def test_a_tensor_is_missing(name, saved, rewrite):
    whole, wrong = tensors_of(saved(name)), []
    right = from_pretrained(saved(name))
    for missing in whole:
        folder = rewrite(name, {n: t for n, t in whole.items() if n != missing})
        try: wrong += [] if same(from_pretrained(folder), right) else [f"without {missing} it is another model"]
        except ValueError as e: wrong += [] if missing in str(e) and "\n" not in str(e) else [f"{missing}: {e!r}"]
        except Exception as e: wrong.append(f"without {missing}: {e!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "bert, classes", "gpt2, untied"])
def test_a_tensor_of_a_wrong_shape(name, saved, rewrite):
    whole, wrong = tensors_of(saved(name)), []
    changes = {"[..., :-1]": lambda t: t[..., :-1].contiguous(), "[1:]": lambda t: t[1:].contiguous(),
        "repeated": lambda t: torch.cat([t, t]), "()": lambda t: t.sum(), "flat": lambda t: t.flatten()}
    right = from_pretrained(saved(name))
    for i, tensor in enumerate(whole):
        for change, do in ([*changes.items()] * 2)[i % 5:i % 5 + 2]:      # two of them in turn
            folder = rewrite(name, whole | {tensor: do(whole[tensor])})
            try: wrong += [] if same(from_pretrained(folder), right) else [f"{tensor} {change}: it is another model"]
            except ValueError as e: wrong += [] if tensor in str(e) and "\n" not in str(e) else [f"{tensor}: {e!r}"]
            except Exception as e: wrong.append(f"{tensor} {change}: {e!r}")
    assert not wrong, "\n".join(wrong)


def test_wrong_shapes_that_make_up_for_each_other(saved, rewrite):
    "A row less of the queries, and one more of the keys"
    whole, layer = tensors_of(saved("bert")), "bert.encoder.layer.0.attention.self."
    for leaf in "weight", "bias":
        queries, keys = whole[f"{layer}query.{leaf}"], whole[f"{layer}key.{leaf}"]
        folder = rewrite("bert", whole | {f"{layer}query.{leaf}": queries[:-1].contiguous(),
                                          f"{layer}key.{leaf}": torch.cat([queries[-1:], keys])})
        with refused(ValueError, f"{layer}query.{leaf}"): from_pretrained(folder)


@pytest.mark.parametrize("name, strange", [("gpt2", "transformer.h.0.attn.adapter.weight"),
    ("gpt2", "transformer.h.2.ln_1.weight"), ("bert", "bert.encoder.layer.7.output.dense.weight"),
    ("t5", "adapter.weight"), ("marian", "model.encoder.layernorm_embedding.weight"),
    ("llama", "model.layers.0.self_attn.q_proj.bias"),
    ("llama", "model.layers.1.self_attn.q_norm.weight"), ("bert, classes", "cls.predictions.bias"), ("gpt2", "x"),
    ("gpt2", "")])
def test_a_tensor_too_many(name, strange, saved, rewrite):
    folder = rewrite(name, tensors_of(saved(name)) | {strange: torch.zeros(24)})
    with refused(ValueError, strange or "transformer."): from_pretrained(folder)


@pytest.mark.parametrize("name, copy, of", [("marian", "model.decoder.embed_tokens.weight", "model.shared.weight"),
    ("t5", "encoder.embed_tokens.weight", "shared.weight"),
    ("bert", "cls.predictions.decoder.bias", "cls.predictions.bias"),
    ("roberta", "lm_head.decoder.bias", "lm_head.bias")])
def test_what_should_be_a_copy(name, copy, of, saved, rewrite):
    "Files hold some tensors under two names; if they differ, we have no place for the second one"
    whole = tensors_of(saved(name))
    again = from_pretrained(rewrite(name, whole | {copy: whole[of].clone()}))
    assert same(again, from_pretrained(saved(name)))
    with refused(ValueError, copy): from_pretrained(rewrite(name, whole | {copy: whole[of] + 1}))


def test_layers_that_the_description_lacks(rewrite):
    with refused(ValueError, "transformer.h.1."): from_pretrained(rewrite("gpt2", n_layer=1))
    with refused(ValueError, "transformer.h.2."): from_pretrained(rewrite("gpt2", n_layer=3))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": null}',
    b'{"weight_map": {"transformer.wte.weight": 3}}', b'{"weight_map": {"transformer.wte.weight": null}}'])
def test_a_damaged_list_of_shards(content, rewrite):
    folder = rewrite("gpt2")
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_bytes(content)
    with refused(ValueError, folder / f"{WEIGHTS}.index.json"): from_pretrained(folder)


def test_a_shard_is_missing(tmp_path):
    theirs("gpt2", dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="9KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    with refused(ValueError, shard): from_pretrained(tmp_path)
    shard.unlink()
    with refused(FileNotFoundError, shard): from_pretrained(tmp_path)


# ---- pickles ----

class Trap:
    "Whoever unpickles it makes a folder"
    def __init__(self, folder): self.folder = folder
    def __reduce__(self): return os.mkdir, (str(self.folder),)


def pickled(tensors, file): file.write_bytes(pickle.dumps(tensors, protocol=2))
def old_format(tensors, file): torch.save(tensors, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("file", ["pytorch_model.bin", WEIGHTS, "pytorch_model-00001-of-00001.bin", "weights.pkl"])
@pytest.mark.parametrize("write", [pickled, torch.save, old_format])
def test_a_pickle_is_not_obeyed(write, file, saved, rewrite, tmp_path):
    folder, sprung = rewrite("gpt2"), tmp_path / "sprung"
    (folder / WEIGHTS).unlink()
    write(tensors_of(saved("gpt2")) | {"transformer.wte.weight": Trap(sprung)}, folder / file)
    if file not in (WEIGHTS, "pytorch_model.bin"):
        index = {"weight_map": {"transformer.wte.weight": file}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with refused(ValueError, folder / file): from_pretrained(folder)
    assert not sprung.exists()
    # it is a trap: who trusts the file falls into it
    (folder / file).rename(folder / "trusted.bin")       # by the other ending, PyTorch knows safetensors
    if write is pickled: pickle.loads((folder / "trusted.bin").read_bytes())
    else: torch.load(folder / "trusted.bin", weights_only=False)
    assert sprung.exists()


@pytest.mark.parametrize("content", [[1, 2], 3, {"state_dict": {}}, {0: torch.zeros(2)}, torch.zeros(3), {},
    {"transformer.wte.weight": [1.0, 2.0]}, {"transformer.wte.weight": "words"}, {"transformer.wte.weight": None}],
    ids=repr)
def test_a_pickle_of_something_else(content, saved, rewrite):
    folder = rewrite("gpt2")
    (folder / WEIGHTS).unlink()
    if isinstance(content, dict) and "transformer.wte.weight" in content: content = tensors_of(saved("gpt2")) | content
    torch.save(content, folder / "pytorch_model.bin")
    with refused(ValueError): from_pretrained(folder)


# ---- saving ----

@pytest.mark.parametrize("name", [*ONE_OF_EACH, "bert, classes", "roberta, classes"])
def test_saving_as_what_it_is_not(name, saved, tmp_path):
    model, own = from_pretrained(saved(name)), MODELS[name][1].removesuffix("Config").lower()
    for kind in [*FAMILIES, "mamba"]:
        if kind == own or (own, kind) == ("roberta", "bert"): continue       # that one a BERT can be
        with refused(ValueError, kind): save_pretrained(model, tmp_path / "new" / kind, kind)
    assert not any(tmp_path.iterdir())


def small(kind, **changes):
    sizes = dict(d_model=24, heads=3, d_ff=40, target_vocab_size=61, dropout=0.0)
    if kind in ("t5", "marian"): sizes |= dict(source_vocab_size=61, encoder_layers=2, decoder_layers=2)
    else: sizes |= dict(decoder_layers=2)
    if kind == "gpt2": sizes |= dict(max_length=32)
    if kind == "llama": sizes |= dict(kv_heads=3)
    if kind == "marian": sizes |= dict(pad_id=60, bos_id=60, banned_id=60)
    if kind != "gpt2": sizes |= dict(attention_dropout=0.0)
    torch.manual_seed(0)
    model = build(TransformerConfig(**FAMILY[FAMILIES[kind].switches] | sizes | changes))
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize("kind, changes", [("gpt2", {"window": 5}), ("gpt2", {"positions": "alibi"}),
    ("gpt2", {"kv_heads": 1}), ("llama", {"normalization": "layer"}), ("llama", {"output_bias": True}),
    ("t5", {"bias": True}), ("t5", {"attention_scale": None}), ("marian", {"positions": "sinusoidal"}),
    # one table for both stacks is all that their files have room for
    ("t5", {"tie_embeddings": "target"}), ("t5", {"tie_embeddings": "none"}),
    ("marian", {"tie_embeddings": "target"}), ("marian", {"tie_embeddings": "none"}),
    # without tying, transformers takes none of Marian's tables for another
    ("marian", {"tie_embeddings": "inputs"})])
def test_saving_what_the_kind_has_not(kind, changes, tmp_path):
    with refused(ValueError, kind, *changes):
        save_pretrained(small(kind, **changes), tmp_path / "new", kind)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind, changes", [("gpt2", {}), ("gpt2", {"tie_embeddings": "none"}),
    ("marian", {}), ("t5", {}), ("t5", {"tie_embeddings": "inputs"}),
    ("t5", {"tie_embeddings": "inputs", "scale_embeddings": False}), ("t5", {"head_dim": 10}),
    ("llama", {}), ("llama", {"tie_embeddings": "none"}), ("llama", {"kv_heads": None})])
def test_saving_with_tables_tied_or_not(kind, changes, tmp_path):
    "Read by us and by them, it computes what it did"
    model = small(kind, **changes)
    save_pretrained(model, tmp_path, kind)
    again = from_pretrained(tmp_path)
    other = getattr(transformers, FAMILIES[kind].architectures[0]).from_pretrained(tmp_path, dtype=torch.float32,
        attn_implementation="sdpa" if kind == "llama" else "eager").eval()
    ids, lengths = texts()
    right = our_logits(model, ids, lengths, None)
    real = torch.arange(18) < lengths[:, None]
    assert_close(our_logits(again, ids, lengths, None)[real], right[real], atol=1e-4, rtol=1e-4)
    assert_close(their_logits(other, ids, lengths, None)[real], right[real], atol=1e-3, rtol=1e-3)


def half_a_file(tensors, path, *more):
    Path(path).write_bytes(bytes(1000))
    raise OSError(errno.ENOSPC, "No space left on device")


def half_a_text(path, text, *args, **more):
    Path(path).write_bytes(text.encode()[:40])
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["weights", "description"])
def test_a_full_disk(where, saved, tmp_path, monkeypatch):
    "What stood in the folder is still there, whole; and the next attempt succeeds"
    old = from_pretrained(saved("gpt2"))
    save_pretrained(old, tmp_path, "gpt2")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    new = small("gpt2", d_model=48)
    with monkeypatch.context() as patch:
        if where == "weights": patch.setattr(pretrained, "save_file", half_a_file)
        else: patch.setattr(Path, "write_text", half_a_text)
        with pytest.raises(OSError, match="No space left"): save_pretrained(new, tmp_path, "gpt2")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert same(from_pretrained(tmp_path), old)
    save_pretrained(new, tmp_path, "gpt2")
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", WEIGHTS}
    assert_close(dict(from_pretrained(tmp_path).named_parameters()), dict(new.named_parameters()))


def test_a_full_disk_and_a_new_folder(tmp_path, monkeypatch):
    "What was begun is not taken for a model"
    monkeypatch.setattr(pretrained, "save_file", half_a_file)
    with pytest.raises(OSError, match="No space left"): save_pretrained(small("gpt2"), tmp_path / "new", "gpt2")
    with refused(FileNotFoundError, "new"): from_pretrained(tmp_path / "new")


def test_saving_over_the_file_that_was_read(saved, rewrite):
    folder = rewrite("bert")
    model = from_pretrained(folder)
    save_pretrained(model, folder, "bert")
    assert same(model, from_pretrained(saved("bert"))) and same(from_pretrained(folder), model)


def test_saving_where_shards_lie(tmp_path):
    "Whoever reads the folder afterwards, we or transformers, finds the new weights, not the old ones"
    theirs("gpt2", dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="9KB")
    model = from_pretrained(tmp_path)
    with torch.no_grad():
        for p in model.parameters(): p.neg_()
    save_pretrained(model, tmp_path, "gpt2")
    other = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(other.transformer.wte.weight, model.output.weight)
    assert same(from_pretrained(tmp_path), model)


def test_a_head_of_other_size(rewrite):
    "The width of a head is a field of its own in some models, and follows from others in the rest"
    config = replace(from_pretrained(rewrite("llama")).config, head_dim=10)
    with refused(ValueError, "head_dim"): pretrained.from_config(replace(config, head_dim=10), "gpt2")
    assert to_config(pretrained.from_config(config, "llama")).head_dim == 10
