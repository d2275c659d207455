# make quickstart | test | test-all | check | coverage | clean; VENV and PYTHON may be set: make test VENV=/tmp/venv PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN = $(VENV)/bin
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all check coverage clean

help:
	@echo 'make install     .venv with slabformer, for training and export'
	@echo 'make quickstart  the main job: train, fuse, verify, benchmark on handwritten digits; writes runs/quickstart'
	@echo 'make test        the test suite without its slow tests; make test-all runs those too'
	@echo 'make check       formatting, lint, types'
	@echo 'make coverage    docs/coverage.md: convert and fuse a model of every family; about an hour, goes on where it stopped'
	@echo 'make clean       remove caches and build products (.venv and runs stay)'

install: $(VENV)/installed.stamp

quickstart: install
	$(BIN)/slab quickstart

test: $(VENV)/installed-dev.stamp
	$(PYTEST) -m 'not slow'

test-all: $(VENV)/installed-dev.stamp
	$(PYTEST)

check: $(VENV)/installed-dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

coverage: $(VENV)/installed-dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore docs/coverage.py

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "slabformer needs Python >= 3.11, $(PYTHON) is older; make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# the stamps make installing incremental: again only when pyproject.toml has changed
$(VENV)/installed.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[train,export]'
	@touch $@

$(VENV)/installed-dev.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $(VENV)/installed.stamp $@
