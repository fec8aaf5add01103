# make validate: set up and run every suite at quick size.   make test: set up and run the fast tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup validate test slow lint bench bench-gpu clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

validate: setup
	$(BIN)/valleydrift validate $(ARGS)

test: setup lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

slow: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	for each in diagonal sde relu collapse neurons curvature convolutional resnet roofline scaling sweep; do $(BIN)/python benchmarks/$$each.py || exit 1; done
	$(BIN)/python benchmarks/measure.py

bench-gpu: setup
	$(BIN)/python benchmarks/gpu.py $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info results
