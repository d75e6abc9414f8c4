"What several files need: one tiny run, trained once, and the command line called in this process."
import atexit
import io
import json
import os
import shutil
import sys
import tempfile

import pytest
import torch  # and the package where it is needed: it takes seconds, and half of the files do without

# Without a GPU our Triton kernels run in Triton's interpreter. Triton asks for this once, when it is imported, which
# PyTorch may do at any time: so it is said here, before any test begins.
if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")

# What corpora are read into, in this process and those it starts, is not left in the user's home.
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

RECIPE = """
data: {{train: {text}/train, validation: {text}/validation, test: {text}/test, vocab_size: 400}}
model: {{d_model: 16, d_ff: 32, heads: 2, encoder_layers: 1, decoder_layers: 1, norm: pre}}
train: {{max_steps: 20, tokens_per_batch: 500, learning_rate: 0.003, warmup_steps: 10, precision: float32,
        log_every: 2, checkpoint_every: 5, keep_checkpoints: 3, average: 1}}
decode: {{beam: 2, extra_length: 5}}
"""


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    "A folder of aligned text, train.en, train.de and so on, and the recipe tiny.yaml that reads it"
    from flash_transformer.data import toy_corpus
    folder = tmp_path_factory.mktemp("text")
    for split, pairs in toy_corpus(300, 12, 12).items():
        for side, language in (("source", "en"), ("target", "de")):
            (folder / f"{split}.{language}").write_text("".join(f"{line}\n" for line in pairs[side]), encoding="utf-8")
    (folder / "tiny.yaml").write_text(RECIPE.format(text=folder))
    return folder


@pytest.fixture(scope="session")
def finished(text, tmp_path_factory):
    "A run folder as training leaves it; nobody writes into it"
    from flash_transformer.cli import main
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", "--config", str(text / "tiny.yaml"), "--run", str(run)]) == 0
    return run


@pytest.fixture(scope="session")
def prepared(text, tmp_path_factory):
    "A run folder with its corpus prepared, for the tests that stop and kill; beside it recipe.yaml"
    import children
    return children.prepare(text, tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def run(finished, tmp_path):
    "A copy of it, to be damaged"
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def command(capsys, monkeypatch):
    "Call the command line: exit status, standard output, lines of standard error"
    from flash_transformer.cli import main

    def call(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        try: status = main([str(argument) for argument in arguments])
        except SystemExit as stopped: status = stopped.code
        said = capsys.readouterr()
        return status, said.out, said.err.splitlines()
    return call


@pytest.fixture(scope="session")
def contents():
    "All files of a folder, to be compared"
    def read(folder): return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in folder.rglob("*")}
    return read


@pytest.fixture(scope="session")
def metrics():
    "The lines of a run's metrics.jsonl"
    def read(run): return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return read
