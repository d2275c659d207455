# make quickstart | test | test-all | test-newest | test-oldest | lock | check | coverage | release | clean
# VENV and PYTHON may be set: make test VENV=/tmp/venv PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
CONSTRAINTS = constraints.txt
BIN = $(VENV)/bin
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(WARNINGS)
# deprecations in other packages fail where the newest versions are tried, and there alone; what these packages do among
# themselves is out of our hands: PEFT 0.21 and jit.trace read the old name in transformers 5.24, torch 2.14 scripts jvp
DEPRECATIONS = -W error::DeprecationWarning -W error::PendingDeprecationWarning -W error::FutureWarning \
	-W "ignore:\`is_gradient_checkpointing\` is deprecated:FutureWarning" \
	-W "ignore:\`torch.jit.script\` is:FutureWarning"

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all test-newest test-oldest lock check coverage release clean

help:
	@echo 'make install     .venv with slabformer, for training and export'
	@echo 'make quickstart  the main job: train, fuse, verify, benchmark on handwritten digits; writes runs/quickstart'
	@echo 'make test        the test suite without its slow tests; make test-all runs those too'
	@echo 'make test-newest the same on the newest release of every package, where their deprecations fail too'
	@echo 'make test-oldest the same on the lowest versions that pyproject.toml allows'
	@echo 'make lock        constraints.txt: the newest versions, which all but these two install'
	@echo 'make check       formatting, lint, types'
	@echo 'make coverage    docs/coverage.md: convert and fuse a model of every family; about an hour, goes on where it stopped'
	@echo 'make release     dist: sdist and wheel, each installed in a fresh environment and tried'
	@echo 'make clean       remove caches and build products (.venv and runs stay)'

install: $(VENV)/installed.stamp

quickstart: install
	$(BIN)/slab quickstart

test: $(VENV)/installed-dev.stamp
	$(PYTEST) -m 'not slow'

test-all: $(VENV)/installed-dev.stamp
	$(PYTEST)

# each of the three in an environment of its own, made anew
test-newest:
	rm -rf $(VENV)-newest
	$(MAKE) test VENV=$(VENV)-newest CONSTRAINTS= WARNINGS='$(DEPRECATIONS)'

test-oldest:
	rm -rf $(VENV)-oldest && mkdir -p $(VENV)-oldest
	$(PYTHON) tools/pins.py oldest > $(VENV)-oldest/lowest.txt
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=$(VENV)-oldest/lowest.txt

lock:
	rm -rf $(VENV)-lock
	$(MAKE) $(VENV)-lock/installed-dev.stamp VENV=$(VENV)-lock CONSTRAINTS=
	$(VENV)-lock/bin/python tools/pins.py newest > $(VENV)-lock/constraints.txt
	mv $(VENV)-lock/constraints.txt constraints.txt
	rm -rf $(VENV)-lock

check: $(VENV)/installed-dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

coverage: $(VENV)/installed-dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/docs/coverage.py

# the constraints keep what is installed beside the package the same from day to day; CONSTRAINTS= takes the newest
release:
	rm -rf dist $(VENV)-release
	$(PYTHON) -m venv $(VENV)-release
	$(VENV)-release/bin/python -m pip install 'build==1.*' 'twine==7.*'
	$(VENV)-release/bin/python -m build
	$(VENV)-release/bin/python -m twine check --strict dist/*
	CONSTRAINTS=$(abspath $(CONSTRAINTS)) PYTHON=$(PYTHON) .ci/try-packages dist
	rm -rf $(VENV)-release

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "slabformer needs Python >= 3.11, $(PYTHON) is older; make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# the stamps make installing incremental: again only when pyproject.toml or the constraints have changed
INSTALL = $(BIN)/python -m pip install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable

$(VENV)/installed.stamp: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) '.[train,export]'
	@touch $@

$(VENV)/installed-dev.stamp: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) '.[dev]'
	@touch $(VENV)/installed.stamp $@
