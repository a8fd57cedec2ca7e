# Two commands do everything on a fresh machine: `make demo` and `make test`.
export OMP_WAIT_POLICY := PASSIVE
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
LOG    := $(VENV)/install.log
EXTRAS := demo,dev,privacy,compressed,seg,onnx,dicomweb,raw,nufft
# Named apart: a comma between brackets of a $(call ...) would end its argument.
CARRIERS := hospitals,page
EVERYTHING := foundation,$(CARRIERS)

# Real images, where this machine has them. Empty or not set means none: no test that reads them runs then.
WARDROUND_DATA ?= $(wildcard $(abspath ../shared/data))
ifeq ($(strip $(WARDROUND_DATA)),)
unexport WARDROUND_DATA
else
export WARDROUND_DATA
endif

# A test worker has one thread; a worker for each core up to eight. Files in their order: sorted by how many tests they
# have, the few long ones would come last, and one worker would wait for the other.
JOBS   ?= auto
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off --constraint constraints.txt

# What pip says goes into a log, and to the terminal only where pip fails: $(call quietly,COMMAND).
quietly = { $(1); } >>$(LOG) 2>&1 || { cat $(LOG); echo "The packages could not be installed: see above."; exit 1; }

.PHONY: demo federation-demo test test-all test-faults lint types docs wheel clean

demo: $(STAMP)
	$(BIN)/wardround demo --out runs/demo

# Three made-up hospitals and their coordinator on this machine, each party a process with a folder of its own.
federation-demo: $(STAMP)
	$(BIN)/wardround federation demo --out runs/federation-demo

# All but the long matrices, with a few examples of each law.
test: $(STAMP)
	$(PYTEST) -m "not slow"

# Everything, the long matrices and many examples of each law as well, and what carries messages between hospitals. Where
# transformers is installed MONAI imports it, two seconds in each process, so `make test` does without.
test-all: $(STAMP)
	@$(call quietly,$(PIP) --editable '.[$(EVERYTHING)]')
	$(PYTEST) --hypothesis-profile=full -m "not processes"

# Federations of real processes on loopback, killed, halted and cut off: half an hour on 2 quiet cores.
test-faults: $(STAMP)
	@$(call quietly,$(PIP) --editable '.[$(CARRIERS)]')
	$(PYTEST) -m processes

lint: $(STAMP)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	@echo "Adding what the pages are made with to $(VENV)"
	@$(call quietly,$(PIP) --editable '.[docs]')
	$(BIN)/mkdocs build --strict

# What a release ships: built, installed into an empty environment, and asked from a folder with nothing beside it.
wheel:
	rm -rf dist build/wheel
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	build/wheel/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt dist/*.whl
	cd build/wheel && bin/wardround --version && bin/wardround demo --help >/dev/null && bin/python -c \
		'import wardround; wardround.run, wardround.evaluate, wardround.predict'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Wardround needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	@echo "Making $(VENV) with all packages in their pinned versions (a few minutes, once; the log is $(LOG))"
	@mkdir -p $(VENV) && : >$(LOG)
	@$(call quietly,$(PYTHON) -m venv $(VENV))
	@$(call quietly,$(PIP) torch)
	@$(call quietly,$(PIP) --editable '.[$(EXTRAS)]')
	@touch $@

clean:
	rm -rf $(VENV) runs site
