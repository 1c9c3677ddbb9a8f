# make demo: a small model teaches itself to use a long context, from nothing, in minutes. make test: every claim.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: help demo test check bench clean
.DEFAULT_GOAL := help
export OMP_NUM_THREADS ?= 1

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python >= 3.11 is needed, found {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: $(READY) ## install, then OPSDL on two ranks from a small model to a better one; prints and plots accuracy
	$(BIN)/python examples/opsdl_demo.py

test: $(READY) ## install, then all tests of the default run
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY) ## format, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

clean: ## remove the environment and all runs
	rm -rf $(VENV) runs
