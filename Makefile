PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
# Tests run in three processes for every two cores, since some of them wait for ranks; WORKERS=0 runs all in one.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(3 * (os.cpu_count() or 1) // 2)')
# Compiled modules are kept whatever the shell says: without them every process compiles all libraries anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup train prune test test-all test-models check audit options sweep study study-prune bench bench-outer bench-prune soak lock clean

help:  ## print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## install the locked packages into .venv (the other targets do this when it is needed)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "permlab needs Python 3.11 or newer")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

train: $(STAMP)  ## learn a patch order on handwritten digits, with its controls (ARGS="model=vim_nano" for others)
	@$(BIN)/python train.py $(ARGS)

prune: $(STAMP)  ## prune a small ViT to 2:4 in a learned channel order, in about 2 minutes (ARGS="method=hybrid" for others)
	@$(BIN)/python train.py task=prune $(ARGS)

test: $(STAMP)  ## run the tests (ARGS="tests/ops -k sinkhorn" for some)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: $(STAMP)  ## run the tests with all of what is long by nature: mutated inputs, kills, every combination
	@PERMLAB_TESTS=all $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --timeout 1800 $(ARGS)

test-models: $(STAMP)  ## fetch the published models into data/models, and run the tests that need them
	@$(BIN)/python -m permlab.model get smollm2_135m dinov2_s
	@$(BIN)/python -m pytest -m models $(ARGS)

sweep: $(STAMP)  ## run the grid of sweeps/NAME.yaml, or go on with it; without NAME, list them
	@$(BIN)/python -m permlab.sweep $(NAME) $(ARGS)

study: $(STAMP)  ## all sweeps of the study NAME: run what is missing, write results/NAME.md; without NAME, list them
	@$(BIN)/python -m permlab.sweep --study $(NAME) $(ARGS)

study-prune:  ## the miniature study of N:M pruning
	@$(MAKE) --no-print-directory study NAME=prune

bench: $(STAMP)  ## our operations against other libraries and published formulas, then what surrounds them (ARGS=--quick)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python POT pygmtools mambapy || echo "bench: some libraries to compare with could not be installed; their rows are left out"
	@$(BIN)/python benchmarks/ops.py --json results/bench.json --figure docs/images/bench.png $(ARGS)

bench-outer: $(STAMP)  ## methods in a step, the harness, start-up, two ranks, a block of a 7B model (ARGS=startup for one)
	@$(BIN)/python benchmarks/outer.py --json results/bench_outer.json $(ARGS)

bench-prune: $(STAMP)  ## time the searches for channel orders against published figures (ARGS=--quick)
	@$(BIN)/python benchmarks/prune.py $(ARGS)

soak: $(STAMP)  ## kill runs fifty times at random and compare them with uninterrupted ones (ARGS="--kills 10")
	@$(BIN)/python benchmarks/soak.py $(ARGS)

check: $(STAMP)  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@$(MAKE) --no-print-directory test

audit: $(STAMP)  ## look up the locked packages in an advisory database (needs the network)
	@$(BIN)/uvx --quiet pip-audit --requirement requirements.lock --require-hashes --disable-pip --strict \
		--progress-spinner off || { echo "make audit: failed, or no advisory database in reach: nothing is certified" >&2; \
		exit 1; }

options: $(STAMP)  ## write docs/options.md anew from the sources and conf/
	@$(BIN)/python -m permlab.config.reference

lock: $(STAMP)  ## resolve pyproject.toml anew into requirements.lock
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --upgrade \
		--python-version 3.11 --extra dev --extra models pyproject.toml --output-file requirements.lock

clean:  ## remove .venv and caches; runs stay
	rm -rf $(VENV) build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +
