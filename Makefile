# make validate: set up and run every suite at quick size.   make test: set up and run the fast tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

LOOPS := $(shell grep -lE "numba|OPERATION" theory/*.py nets/*.py simulators/*.py)

.PHONY: setup validate test slow lint bench bench-gpu clean

setup: $(VENV)/.ready $(VENV)/.loops

# A compiled loop is kept until its own file changes; what it calls may lie in another.
$(VENV)/.loops: $(VENV)/.ready $(LOOPS)
	rm -f theory/__pycache__/*.nb? nets/__pycache__/*.nb? simulators/__pycache__/*.nb?
	touch $@

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
	for each in diagonal sde relu collapse neurons curvature gradients resnet roofline scaling sweep; do $(BIN)/python benchmarks/$$each.py || exit 1; done
	$(BIN)/python benchmarks/measure.py

bench-gpu: setup
	$(BIN)/python benchmarks/gpu.py $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info results
