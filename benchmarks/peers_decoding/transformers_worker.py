"""`generate` of transformers as a worker of benchmarks/decoding.py, which starts it in an environment of its own.

    python transformers_worker.py REQUEST

Two models. "m2m100": `M2M100ForConditionalGeneration` is pre-norm with a norm at the end, ReLU, scaled embeddings and
fixed sines, as ours is, so that it takes our trained weights and must write our translations; its table of sines is a
buffer and is overwritten (ours alternates sines and cosines). "marian": `MarianMTModel` is post-norm and cannot; it
gets random weights and, batch by batch, is made to write as many tokens as the trained model does.
REQUEST is what ctranslate2_worker.py is given, and "written", the number of tokens of each translation. A job of
`serve` names besides:

type    model and precision, as "m2m100 bf16"
batch   sentences at once; they are sorted by length
threads of PyTorch
"""
import torch
import transformers
from safetensors.torch import load_file
from serve import request, serve
from torch.nn.utils.rnn import pad_sequence
from transformers import M2M100Config, M2M100ForConditionalGeneration, MarianConfig, MarianMTModel

PAD, BOS, EOS = 0, 2, 3


def shape(s):
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             dict(layers=s[f"{side}_layers"], ffn_dim=s["d_ff"], attention_heads=s["heads"], layerdrop=0.0).items()}
    return dict(vocab_size=s["target_vocab_size"], d_model=s["d_model"], activation_function="relu", dropout=0.0,
        scale_embedding=True, max_position_embeddings=512, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        decoder_start_token_id=BOS, forced_eos_token_id=None, use_cache=True, **sides)


def renamed(weights, layers):
    "Our names → M2M100's"
    yield "model.shared.weight", weights["encoder.embedding.tokens.weight"]
    for side, n in layers.items():
        own = "attention" if side == "encoder" else "self_attention"
        norms = ["self_attn_layer_norm", "final_layer_norm"]
        if side == "decoder": norms.insert(1, "encoder_attn_layer_norm")
        for part in ("weight", "bias"):
            yield f"model.{side}.layer_norm.{part}", weights[f"{side}.norm.{part}"]
            for i in range(n):
                old, new = f"{side}.blocks.{i}", f"model.{side}.layers.{i}"
                for k, name in enumerate(norms):
                    yield f"{new}.{name}.{part}", weights[f"{old}.residuals.{k}.norm.{part}"]
                for k, name in ((0, "fc1"), (2, "fc2")):
                    yield f"{new}.{name}.{part}", weights[f"{old}.feed_forward.{k}.{part}"]
                for ours, theirs in ((own, "self_attn"), ("cross_attention", "encoder_attn")):
                    if f"{old}.{ours}.in_proj.{part}" not in weights: continue
                    three = weights[f"{old}.{ours}.in_proj.{part}"].chunk(3)
                    for name, value in zip("qkv", three): yield f"{new}.{theirs}.{name}_proj.{part}", value
                    yield f"{new}.{theirs}.out_proj.{part}", weights[f"{old}.{ours}.out_proj.{part}"]


def sinusoids(length, d_model):
    frequency = 10000 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


def m2m100(asked):
    s = asked["shape"]
    model = M2M100ForConditionalGeneration(M2M100Config(**shape(s)))
    layers = {side: s[f"{side}_layers"] for side in ("encoder", "decoder")}
    missing, unknown = model.load_state_dict(dict(renamed(load_file(asked["weights"]), layers)), strict=False)
    left = [name for name in missing if "embed_tokens" not in name and name != "lm_head.weight"]
    if left or unknown: raise ValueError(f"weights that do not fit: {left}, {unknown}")
    model.tie_weights()
    for side in (model.model.encoder, model.model.decoder):
        table = side.embed_positions.weights                  # row of the first word: the one after padding's
        table[PAD + 1:] = sinusoids(len(table) - PAD - 1, s["d_model"])
    return model


def marian(asked): return MarianMTModel(MarianConfig(**shape(asked["shape"])))


def generate(model, rows, **options): # lists of ids → lists of ids, without <s> and </s>
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)
    with torch.inference_mode():
        found = model.generate(input_ids=ids, attention_mask=(ids != PAD).long(), do_sample=False, **options)
    return [row[1:row.index(EOS, 1)] if EOS in row[1:] else row[1:] for row in found.tolist()]


def main():
    asked = request()
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    sources, written, models = asked["sources"], asked["written"], {}

    def model(name):
        if name not in models:
            maker, precision = name.split()
            models[name] = MAKERS[maker](asked).eval().to(PRECISIONS[precision])
        return models[name]

    def run(job, numbers):
        torch.set_num_threads(job["threads"])
        order, found = sorted(numbers, key=lambda i: len(sources[i])), {}
        for at in range(0, len(order), job["batch"]):
            batch = order[at:at + job["batch"]]
            lengths = {"max_new_tokens": asked["longest"]}
            if job["type"].startswith("marian"):
                lengths = dict.fromkeys(("min_new_tokens", "max_new_tokens"), 1 + max(written[i] for i in batch))
            rows = generate(model(job["type"]), [sources[i] for i in batch], num_beams=job["beam"], **lengths)
            found |= zip(batch, rows)
        return [found[i] for i in numbers]

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    types = [f"{maker} {precision}" for maker in MAKERS for precision in PRECISIONS]
    serve({"versions": versions, "types": types}, run)


MAKERS, PRECISIONS = {"m2m100": m2m100, "marian": marian}, {"float32": torch.float32, "bf16": torch.bfloat16}

if __name__ == "__main__": main()
