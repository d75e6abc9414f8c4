# make demo: from a clone to a translation. make test: everything that must hold. make help: the rest.
# On Linux, plain PyTorch comes with several GB of CUDA libraries. For a machine without a GPU:
#   make demo PIP_EXTRA="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON    ?= python3
VENV      ?= .venv
FLASH     ?= .venv-flash
RUN       ?= runs/demo
PIP_EXTRA ?=
BIN       := $(VENV)/bin
PIP       := $(BIN)/python -m pip --disable-pip-version-check --no-input
PACKAGING := settings.ini setup.py pyproject.toml constraints.txt

# the flash-attn package without its CUDA kernels, which would take nvcc and an hour: its Triton backend, interpreted.
# Newer Triton (3.6) and NumPy (2.3) break that. PyTorch's CUDA build asks for a newer Triton, hence --no-deps below.
FLASH_ATTN := flash-attn==2.8.3.post2 triton==3.5.1
FLASH_DEPS := torch==2.13.0 "numpy<2.3" einops "setuptools<81" wheel packaging ninja pytest hypothesis
FLASH_SET  := FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE \
	FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE TRITON_INTERPRET=1
FLASH_PIP  := $(FLASH)/bin/python -m pip --disable-pip-version-check --no-input install -q $(PIP_EXTRA)

# $(call step,name,command): says what runs and how long it took; stops at a failure
step = @start=$$(date +%s); echo "== $(1)"; { $(2); } || { echo "== $(1): FAILED"; exit 1; }; \
	echo "== $(1): $$(( $$(date +%s) - start )) s"

.PHONY: help demo test test-flash-attn docs prepare install dev clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /  make \1@/' | \
		awk -F@ '{ printf "%-22s %s\n", $$1, $$2 }'
	@echo 'No GPU? Add PIP_EXTRA="--extra-index-url https://download.pytorch.org/whl/cpu" for a small PyTorch.'

demo: install ## install, train a small translator (about 5 minutes on 2 cores), translate, draw; leaves runs/demo
	$(BIN)/flash-transformer train --config configs/toy.yaml --run $(RUN) --overwrite
	$(BIN)/flash-transformer evaluate $(RUN)
	$(BIN)/flash-transformer plot $(RUN)
	@echo; echo "== five sentences it has never seen"
	$(BIN)/flash-transformer translate $(RUN) < configs/toy.en | paste -d '\n' configs/toy.en - | sed -e 'n;s/^/  -> /'
	@echo; echo "== all of it is in $(RUN): weights, checkpoints, metrics.jsonl, evaluation.json, plots/"

test: dev ## install the tools, then every check: notebooks in step, lint, links, chapters, pytest
	$(call step,chapters clean and exported,$(BIN)/python tools/in_step.py)
	$(call step,lint,$(BIN)/ruff check --quiet .)
	$(call step,stamps and README,$(BIN)/python tools/stamp.py --check && $(BIN)/python tools/readme.py --check)
	$(call step,site: pages and sidebar and links,$(BIN)/python tools/check_docs.py)
	$(call step,chapters run,OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print --timing)
	$(call step,pytest,$(BIN)/python -m pytest -q)

test-flash-attn: $(FLASH)/.installed ## our backends against the flash-attn package, on the CPU, in .venv-flash
	$(call step,against flash-attn,OMP_NUM_THREADS=1 PYTHONPATH=. $(FLASH_SET) \
		$(FLASH)/bin/python -m pytest -q tests/test_flash_attn.py)

docs: ## render the site into _docs (needs Quarto)
	@command -v quarto >/dev/null || { \
		echo 'make docs needs Quarto, which is not on the PATH: see https://quarto.org/docs/get-started/' >&2; exit 1; }
	@$(MAKE) --no-print-directory dev
	rm -rf _proc _docs
	$(BIN)/nbdev_docs --n_workers 2

prepare: dev ## after editing a chapter: stamp, make the README, clean, export
	$(BIN)/python tools/stamp.py
	$(BIN)/python tools/readme.py
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo 'This needs Python 3.10 or later: make PYTHON=python3.11 ...' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo 'Could not make $(VENV). On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@touch $@

$(FLASH)/.installed: Makefile
	@$(PYTHON) -m venv $(FLASH)
	$(call step,installing into $(FLASH) (some minutes),$(FLASH_PIP) $(FLASH_DEPS) && \
		$(FLASH_SET) $(FLASH_PIP) --no-build-isolation --no-deps $(FLASH_ATTN))
	@touch $@

$(VENV)/.installed: $(VENV)/.made $(PACKAGING)
	$(call step,installing into $(VENV) (PyTorch is large: some minutes),$(PIP) install -q $(PIP_EXTRA) -c constraints.txt -e .)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.made $(PACKAGING)
	$(call step,installing into $(VENV) with the dev extra (some minutes),$(PIP) install -q $(PIP_EXTRA) -c constraints.txt -e ".[dev]")
	@touch $(VENV)/.installed $@

clean: ## remove the environment and everything built; runs/ stays
	rm -rf $(VENV) $(FLASH) _proc _docs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
