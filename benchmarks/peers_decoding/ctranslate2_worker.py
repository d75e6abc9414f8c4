"""CTranslate2 as a worker of benchmarks/decoding.py, which starts it in an environment of its own.

    python ctranslate2_worker.py REQUEST

REQUEST is a JSON file: "weights" (safetensors of a pre-norm `flash_transformer.model.Transformer`), the model's
"shape", "sources" (lists of ids, </s> last), "longest" (tokens of a translation), "threads", "folder" (takes the
converted model). A job of `serve` names besides:

type    what CTranslate2 computes in, as float32 or int8
batch   sentences at once, or tokens if negative; CTranslate2 sorts by length by itself
spread  False: all threads work on one batch; True: each on a batch of its own
"""
import shutil
from pathlib import Path

import ctranslate2
import numpy as np
from ctranslate2.specs import common_spec, transformer_spec
from safetensors.numpy import load_file
from serve import request, serve


def vocabulary(size): return ["<pad>", "<unk>", "<s>", "</s>", *(str(i) for i in range(4, size))]


def sinusoids(length, d_model):
    "Sines in the even columns, cosines in the odd"
    angle = np.arange(length)[:, None] * 10000 ** (-np.arange(0, d_model, 2) / d_model)
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(length, d_model).astype("float32")


def linear(spec, weights, name, rows=slice(None)):
    spec.weight, spec.bias = (np.ascontiguousarray(weights[f"{name}.{part}"][rows]) for part in ("weight", "bias"))


def norm(spec, weights, name): spec.gamma, spec.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]


def attention(spec, weights, name, before, cross=False):
    "Rows of in_proj: all queries, all keys, all values, the order that CTranslate2 wants, too"
    d = weights[f"{name}.out_proj.weight"].shape[0]
    parts = [slice(0, d), slice(d, None)] if cross else [slice(None)]
    for to, rows in zip(spec.linear, parts): linear(to, weights, f"{name}.in_proj", rows)
    linear(spec.linear[-1], weights, f"{name}.out_proj")
    norm(spec.layer_norm, weights, before)


def convert(weights, shape, folder, positions=1024):
    "Our weights as a CTranslate2 model"
    spec = transformer_spec.TransformerSpec.from_config((shape["encoder_layers"], shape["decoder_layers"]),
        shape["heads"], pre_norm=True, activation=common_spec.Activation.RELU)
    shared = weights["encoder.embedding.tokens.weight"]                   # the file holds tied tables once
    target = weights.get("decoder.embedding.tokens.weight", weights.get("output.weight", shared))
    for name, side, table in ("encoder", spec.encoder, shared), ("decoder", spec.decoder, target):
        embeddings = side.embeddings[0] if isinstance(side.embeddings, list) else side.embeddings
        embeddings.weight, side.scale_embeddings = table, True
        side.position_encodings.encodings = sinusoids(positions, shape["d_model"])
        norm(side.layer_norm, weights, f"{name}.norm")
        for i, layer in enumerate(side.layer):
            block = f"{name}.blocks.{i}"
            own = "attention" if side is spec.encoder else "self_attention"
            attention(layer.self_attention, weights, f"{block}.{own}", f"{block}.residuals.0.norm")
            if side is spec.decoder:
                attention(layer.attention, weights, f"{block}.cross_attention", f"{block}.residuals.1.norm", cross=True)
            norm(layer.ffn.layer_norm, weights, f"{block}.residuals.{1 if side is spec.encoder else 2}.norm")
            linear(layer.ffn.linear_0, weights, f"{block}.feed_forward.0")
            linear(layer.ffn.linear_1, weights, f"{block}.feed_forward.2")
    spec.decoder.projection.weight = weights.get("output.weight", target)
    spec.config.layer_norm_epsilon = 1e-5                                 # as torch.nn.LayerNorm
    for register, table in ((spec.register_source_vocabulary, shared), (spec.register_target_vocabulary, target)):
        register(vocabulary(len(table)))
    spec.validate()
    spec.optimize()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spec.save(str(folder))


def main():
    asked = request()
    folder, threads, size = Path(asked["folder"]), asked["threads"], asked["shape"]["target_vocab_size"]
    convert(load_file(asked["weights"]), asked["shape"], folder)
    names = vocabulary(max(size, asked["shape"]["source_vocab_size"]))
    ids = {name: i for i, name in enumerate(names)}
    sources, translators = [[names[i] for i in row] for row in asked["sources"]], {}

    def translator(kind, spread):
        if (kind, spread) not in translators:
            across = dict(inter_threads=threads, intra_threads=1) if spread else dict(intra_threads=threads)
            translators[kind, spread] = ctranslate2.Translator(str(folder), compute_type=kind, **across)
        return translators[kind, spread]

    def run(job, numbers):
        found = translator(job["type"], job["spread"]).translate_batch([sources[i] for i in numbers],
            beam_size=job["beam"], max_decoding_length=asked["longest"], max_batch_size=abs(job["batch"]),
            batch_type="examples" if job["batch"] > 0 else "tokens")
        return [[ids[name] for name in result.hypotheses[0]] for result in found]

    types = sorted(ctranslate2.get_supported_compute_types("cpu"))
    serve({"versions": {"ctranslate2": ctranslate2.__version__}, "types": types}, run)


if __name__ == "__main__": main()
