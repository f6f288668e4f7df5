# Everything runs in .venv, which is made on first use from constraints.txt.
#
# Variables: PYTHON          interpreter to make .venv with, 3.11 or newer (python3)
#            PYTEST_WORKERS  parallel pytest processes (2)
#            PYTEST_FLAGS    more arguments, e.g. PYTEST_FLAGS="tests/hdl -x"
#            BOARD           board of make bitstream (ulx3s)
#            SEED, SEEDS     first seed of its placement, and how many to try (1, 1)
#            CLOCK           its clock in MHz (the board's own)
# pip's own settings work as usual: for torch without CUDA set PIP_EXTRA_INDEX_URL to the CPU index
# that https://pytorch.org names.

PYTHON ?= python3
PYTEST_WORKERS ?= 2
PYTEST_FLAGS ?=
BOARD ?= ulx3s
SEED ?= 1
SEEDS ?= 1
CLOCK ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST = $(BIN)/python -m pytest -n $(PYTEST_WORKERS)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-slow lint synth synth-blocks bitstream clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## make .venv and install everything into it

# torch first and alone: everything else then finds it satisfied, whichever build of it was chosen.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "moeaccel needs Python 3.11 or newer; '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/pip install -qq -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(STAMP) ## run a small MoE language model on the simulated accelerator
	$(BIN)/moeaccel run --demo

test: lint ## lint, types and the default tests
	$(PYTEST) -m "not slow and not board" $(PYTEST_FLAGS)

test-slow: $(STAMP) ## the slow tests: full-size simulation and synthesis
	$(PYTEST) -m "slow and not board" $(PYTEST_FLAGS)

# Pyright checks the tree under its import names (see [tool.pyright] in pyproject.toml): a folder of
# links to every file. The last sed turns the names of the links back into those of the files.
PYRIGHT_TREE := build/pyright
lint: $(STAMP) ## ruff and pyright
	$(BIN)/ruff check --output-format=concise
	@rm -rf $(PYRIGHT_TREE)
	@find moeaccel hdl host sim fpga -name '*.py' | while read -r file; do \
	  link=$(PYRIGHT_TREE)/moeaccel/$${file#moeaccel/}; \
	  mkdir -p "$${link%/*}"; ln -s "$(CURDIR)/$$file" "$$link"; done
	$(BIN)/pyright | sed -e "s,$(PYRIGHT_TREE)/moeaccel/\(hdl\|host\|sim\|fpga\)/,\1/," -e "s,$(PYRIGHT_TREE)/,,"

synth: $(STAMP) ## place and route the accelerator core on an ECP5-85F; report area and clock rate
	$(BIN)/python -m moeaccel.fpga.synth --core --save

synth-blocks: $(STAMP) ## the same for every block alone, and what each feature costs; all in fpga/reports
	$(BIN)/python -m moeaccel.fpga.synth --all --save
	$(BIN)/python -m moeaccel.fpga.features --save

bitstream: $(STAMP) ## build the bitstream of BOARD, with resources and routed clock
	$(BIN)/moeaccel bitstream --board "$(BOARD)" --seed $(SEED) --seeds $(SEEDS) \
	  $(if $(CLOCK),--clock $(CLOCK))

clean: ## remove build products and caches
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## the same, and .venv
	rm -rf $(VENV)
