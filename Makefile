# Two commands on a fresh machine: `make demo` and `make test`. Each does all the set-up it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# one torch build everywhere; elsewhere than on a GPU machine a CPU build is enough
TORCH ?= torch==2.13.0

.PHONY: demo test test-browser lint clean

demo: $(VENV)/.ready
	$(BIN)/beagle demo

test: $(VENV)/.ready-dev lint
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

# needs a Chromium on the machine (apt-get install chromium)
test-browser: $(VENV)/.ready-dev
	$(BIN)/python -m pip install --quiet "playwright>=1.50,<2"
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m browser tests/test_page.py

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

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
