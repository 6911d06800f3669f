# `make demo`, `make serve` and `make test` need nothing but python3 (3.10 or newer, with venv) and make.
#
# PYTHON=python3.12       another interpreter
# TORCH_INDEX=URL         where to look for torch first, e.g. https://download.pytorch.org/whl/cpu
# JOBS=2                  processes that test side by side (3: some tests wait more than they work)
# ARGS="..."              more arguments of `edge-vlm serve`, or of pytest

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
JOBS ?= 3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := edge_vlm export runtime training calibration tests benchmarks examples
# A file's tests share what they set up, so a file stays in one process; those that take longest begin.
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart=0

# Images of containers often forbid bytecode: each process would compile each module again, and each
# of those that test rewrite each test again.
unexport PYTHONDONTWRITEBYTECODE

# Tests make and drop many arrays. On huge pages that is a fraction of the page faults, which in a
# virtual machine can take more time than the tests themselves. Other systems than glibc's ignore it.
quick test: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help demo serve quick test tests docs lint style types unit clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# 141: whoever read the output is gone (make demo | head), which is no error.
demo: $(VENV)/.ort  ## stream a clip and a street through the demo model (installs the CPU runtime, no torch)
	@$(BIN)/edge-vlm demo --street 20 $(ARGS) || { code=$$?; [ $$code -eq 141 ] || exit $$code; }

serve: $(VENV)/.ort  ## serve the demo model, with a browser page at http://127.0.0.1:8765
	@$(BIN)/edge-vlm serve $(ARGS)

quick: $(VENV)/.dev  ## lint, types and the tests that take no second: the lane to work by
	@$(MAKE) --no-print-directory -j2 --output-sync lint unit JOBS=$(JOBS)

test: $(VENV)/.dev  ## everything: lint, types, all tests and how much of the code the quick ones reach
	@$(MAKE) --no-print-directory -j2 lint tests JOBS=$(JOBS)

# Before Python 3.12, whose sys.monitoring measures for next to nothing, coverage costs about a third, so
# slow tests go without (tests/conftest.py).
tests: $(VENV)/.dev
	@COVERAGE_CORE=$$($(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")') \
		$(PYTEST) --cov --cov-report= $(ARGS)
	@echo "covered: $$($(BIN)/coverage report)%"

docs: $(VENV)/.dev  ## the commands of README and docs as written, the long ones too (an hour and more)
	EDGE_VLM_LONG_DOCS=1 $(PYTEST) tests/docs $(ARGS)

lint: style types  ## ruff and mypy

style: $(VENV)/.dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	$(PYTEST) -m "not slow" $(ARGS)

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) build dist .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
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
