# Every target does the set-up it needs by itself; nothing has to be activated or installed by hand.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUFF := $(BIN)/ruff
PYTEST := $(BIN)/python -m pytest --quiet

# pyright comes whole from the package index; this keeps it from asking npm for a newer one.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help setup lint types stubs test test-all demo bench protos lock image format cli-docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## install everything into .venv, at the versions of constraints.txt

# The constraints also hold for the packages that build ours, which -c would not do.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: $(PYTHON) is not Python 3.11 or newer; name one that is: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "setup: installing into $(VENV), about 2.5 GB; the first time takes minutes, the last of them silent"
	@test -x $(BIN)/python || $(PYTHON) -m venv --clear $(VENV)
	@PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
		$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --editable '.[dev]' \
		| sed -un -e 's/^ *\(Downloading .*\)/  \1/p' -e 's/^\(Installing\) collected packages.*/  \1/p'
	@touch $@
	@echo "setup: done"

lint: $(INSTALLED) ## check style and formatting with ruff
	@echo "lint: ruff"
	@$(RUFF) check --quiet .
	@$(RUFF) format --check --quiet . || { echo "error: not formatted; run make format" >&2; $(RUFF) format --check .; }

types: $(INSTALLED) ## check types with mypy --strict and pyright strict
	@echo "types: mypy"
	@$(BIN)/mypy
	@echo "types: pyright"
	@$(BIN)/pyright

stubs: $(INSTALLED) ## check that the generated stubs are fresh
	@echo "stubs: regenerating and comparing"
	@$(BIN)/python protos/generate.py --check

# JOBS=2 runs two files at a time, which is faster where nobody else uses the cores: tests with callers want them.
JOBS ?= 0

test: stubs lint types ## all checks, and every test that is not slow
	@$(PYTEST) -m "not slow" --numprocesses $(JOBS) --dist loadfile

test-all: stubs lint types ## all checks and all tests
	@$(PYTEST) --numprocesses $(JOBS) --dist loadfile

demo: $(INSTALLED) ## train, publish, serve, predict and roll out, in a few minutes
	@$(BIN)/modelport demo

BENCH ?= serving

bench: $(INSTALLED) ## measure the server on this machine; BENCH=startup, loading, shadow, gates, peers, sdk, scaling, accurate or precisions measures more
	@$(BIN)/python -m bench $(BENCH)

protos: $(INSTALLED) ## write the stubs of protos/ anew
	@$(BIN)/python protos/generate.py

cli-docs: $(INSTALLED) ## write the reference of the command line anew
	@$(BIN)/python docs/make_cli.py

format: $(INSTALLED) ## format the code
	@$(RUFF) check --quiet --fix-only .
	@$(RUFF) format .

lock: ## resolve the newest versions into constraints.txt
	@echo "lock: resolving in .venv-lock"
	@$(PYTHON) -m venv --clear .venv-lock
	@.venv-lock/bin/python -m pip install --quiet --upgrade pip setuptools
	@.venv-lock/bin/python -m pip install --quiet --editable '.[dev]'
	@.venv-lock/bin/python -m pip check
	@{ sed -n '/^#/p' constraints.txt; .venv-lock/bin/python -m pip freeze --all --exclude pip --exclude-editable; } \
		> constraints.txt.new
	@mv constraints.txt.new constraints.txt
	@rm -rf .venv-lock

image: ## build the container image with Docker
	@command -v docker >/dev/null || { echo "error: docker is not installed; make image needs it" >&2; exit 1; }
	@docker info >/dev/null 2>&1 || { echo "error: no Docker engine answers; start one, then make image" >&2; exit 1; }
	@docker build --tag modelport .

clean: ## remove the environments and caches
	@rm -rf $(VENV) .venv-protos .venv-lock .mypy_cache .pytest_cache .ruff_cache .hypothesis dist build
