# Everything runs in a virtual environment of its own; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --constraint constraints.txt
PYTEST ?= --numprocesses auto --dist loadgroup
SOURCES = pyproject.toml constraints.txt Makefile

.PHONY: demo test lint format docs bench clean

demo: $(VENV)/.demo  ## install, then train, evaluate and sample a small model
	$(BIN)/llmkit quickstart --out demo

test: $(VENV)/.dev  ## the whole test suite
	$(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/.dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy llmkit trainers/* evals/* plugins/* tests benchmarks

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev  ## write the --help texts into docs/cli.md
	$(BIN)/python docs/update.py

bench: $(VENV)/.dev  ## ratios against peers, side by side; takes minutes
	for file in benchmarks/*.py; do $(BIN)/python $$file --json || exit 1; done

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch first and alone: its pinned release is the CPU build where an index offers one
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch
	touch $@

$(VENV)/.demo: $(SOURCES) $(VENV)/.torch
	$(PIP) --editable '.[torch,report]'
	touch $@

$(VENV)/.dev: $(SOURCES) $(VENV)/.torch
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build dist
