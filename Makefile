# Two commands do everything on a fresh machine: `make demo` and `make test`.
export OMP_WAIT_POLICY := PASSIVE
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Real images, where this machine has them: tests that need them are skipped otherwise.
WARDROUND_DATA ?= $(wildcard $(abspath ../shared/data))
export WARDROUND_DATA

.PHONY: demo test lint types docs clean

demo: $(STAMP)
	$(BIN)/wardround demo --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Wardround needs Python 3.11 or newer: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,dev,privacy,compressed]'
	touch $@

clean:
	rm -rf $(VENV) runs site
