# Everything runs in .venv, made on first use with the tested versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Torch spins its threads: one each keeps parallel test workers and runs from slowing each other down.
export OMP_NUM_THREADS ?= 1
SELECT ?= not slow and not gpu and not faults
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install extras quickstart compare test test-slow faults check format docs clean

help:
	@echo "make quickstart   train the packaged policy with partial rollouts (about two minutes on two cores)"
	@echo "make compare      the same recipe with and without waiting for the longest, 3 seeds each"
	@echo "make extras       install vLLM's CPU build and Ray, too"
	@echo "make test         the tests"
	@echo "make test-slow    the slow ones too"
	@echo "make faults       every fault of every part under three schedules"
	@echo "make check        what CI runs: format, lint, types, tests"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; got $$($(PYTHON) --version). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "-- making $(VENV) with the versions of constraints.txt (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# What the slow tests need: vLLM's CPU build and Ray; and away with three packages that vLLM brings for another torch.
extras: $(VENV)/.extras

$(VENV)/.extras: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,vllm,ray]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $(VENV)/.extras

quickstart: $(STAMP)
	@$(BIN)/april train quickstart --overwrite

compare: $(STAMP)
	@$(BIN)/april compare quickstart --seeds 3

test: $(STAMP)
	$(BIN)/python -m pytest -q -m "$(SELECT)"

test-slow:
	@$(MAKE) test SELECT="slow and not gpu"

faults: extras
	@$(MAKE) test SELECT="faults and not gpu"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
