# Each target is complete from a fresh clone: it makes .venv, installs what is missing, then runs.
# Needs make and Python 3.11 or newer; `make PYTHON=python3.12 ...` names another interpreter, and `CONSTRAINTS=` (empty)
# leaves the tested versions of constraints.txt for the ranges of pyproject.toml.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: setup demo test lint type bench

setup: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/rebroadcast demo

test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(INSTALLED)
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/extract.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/memory.py

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, and $(PYTHON) is " + sys.version.split()[0] + ". Name another with: make PYTHON=python3.12")'
	@echo 'Installing into .venv (PyTorch is large: some minutes the first time)'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) torch torchvision -e '.[ray,demo,dev]'
	@touch $@
