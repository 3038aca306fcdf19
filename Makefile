# demo, test, bench, check (lint and test): each sets up everything it needs by itself, in $(VENV).
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test bench lint check format clean

demo: $(VENV)/.installed
	$(BIN)/python -m refconv_kernels demo --output demo

# Threads that wait must sleep: the workers' teams share the cores.
test: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

bench: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks/ --benchmark-only --benchmark-json=benchmarks/.last.json --benchmark-quiet -q
	$(BIN)/python -m benchmarks.report benchmarks/.last.json

lint: $(VENV)/.installed
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')
	$(BIN)/mypy

check: lint test

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h')

clean:
	rm -rf $(VENV) build demo *.egg-info refconv_kernels/*.so refconv_kernels/_build.json

# torch first: the native build uses the headers of the torch that is installed.
$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
