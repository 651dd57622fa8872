# make demo: the whole path on real data, in minutes.  make test: lint, types, tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lint types tests clean check-gpu

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/superblock/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[vision,tensorboard,dev]'
	touch $@

demo: install
	$(BIN)/superblock demo --output-dir demo

test: lint types tests

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install
	$(BIN)/mypy

tests: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

# All GPU tests and benchmarks from a bare checkout; PYTHON needs only torch, torchvision and Triton. FAST=1: shorter.
check-gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py $(if $(FAST),--fast)

clean:
	rm -rf $(VENV) build demo .mypy_cache .pytest_cache .ruff_cache
