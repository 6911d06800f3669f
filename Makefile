# `make demo` and `make test` need nothing but python3 (3.10 or newer, with venv) and make.
#
#   make demo   install the CPU runtime (no torch) into .venv and run the demo
#   make test   install everything, then lint, types and tests
#   make lint   ruff and mypy only
#   make clean  remove .venv and build products
#
# PYTHON=python3.12       another interpreter
# TORCH_INDEX=URL         where to look for torch first, e.g. https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := edge_vlm export runtime training calibration tests benchmarks

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

# 141: whoever read the output is gone (make demo | head), which is no error.
demo: $(VENV)/.ort
	@$(BIN)/edge-vlm demo || { code=$$?; [ $$code -eq 141 ] || exit $$code; }

test: lint
	$(BIN)/python -m pytest -q

lint: $(VENV)/.dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is one finished install; it is older than pyproject.toml only when the requirements may have changed.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "edge-vlm needs Python 3.10 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "python3 -m venv failed: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.ort: $(VENV)/.made pyproject.toml
	@echo "Setting up .venv with the CPU runtime (a minute or two, once) ..."
	@$(PIP) -e '.[ort]'
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml
	@echo "Setting up .venv with everything the tests need (a few minutes, once) ..."
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.ort
