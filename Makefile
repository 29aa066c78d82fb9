# Everything runs from .venv, that these targets make and fill on first use. Override: make train ARGS="norm=sync"
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# A worker a core, and at most four: each keeps warm ranks of its own. One process: make test ARGS="-n 0"
WORKERS := --numprocesses logical --maxprocesses 4 --dist loadfile
.DEFAULT_GOAL := help
.PHONY: help train test slow unit bench campaign check format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: .venv/.installed  ## train the digits on two CPU ranks; ARGS="..." are Hydra overrides
	$(BIN)/python train.py trainer=cpu_ddp $(ARGS)

test: .venv/.installed-dev  ## run all tests but the slow ones; ARGS="..." go to pytest, ARGS="-m unit" chooses others
	$(BIN)/python -m pytest -m "not slow" $(WORKERS) $(ARGS)

slow: .venv/.installed-dev  ## run the slow tests, which `make test` and CI leave out
	$(BIN)/python -m pytest -m slow $(WORKERS) $(ARGS)

unit: .venv/.installed-dev  ## run the quick tests
	$(BIN)/python -m pytest -m unit $(WORKERS) $(ARGS)

bench: .venv/.installed  ## time the synchronized layer against its limit, and the drift monitor; ARGS="--quick" to look
	$(BIN)/python -m bench.sync_batchnorm $(ARGS)
	$(BIN)/python -m bench.drift $(ARGS)

campaign: .venv/.installed-dev  ## interrupt trainings on a SLURM of its own, ten times each way; ARGS="--times 2" for fewer
	$(BIN)/python -m tests.campaign $(ARGS)

check: .venv/.installed-dev  ## lint, format check, types, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck slurm/*.sbatch .ci/run

format: .venv/.installed-dev  ## format, and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches; runs stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "distnorm needs Python 3.11 or newer; $(PYTHON) is older. Use: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
