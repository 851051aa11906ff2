# One target per habit; continuous integration calls the same ones.
# Everything lives in .venv. It is built on first use and again only when
# pyproject.toml or constraints.txt changes.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := core service training clients tests hatch_build.py $(wildcard demo bench examples deploy)
# Progress bars on a terminal, silence in a log.
QUIET := $(if $(MAKE_TERMOUT),,--quiet)

.PHONY: help install demo test lint type audit format bench openapi clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## build .venv with everything needed (all other targets do this first)

$(STAMP): pyproject.toml constraints.txt hatch_build.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "text2weight needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@[ -x $(BIN)/python ] || { echo "==> creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@[ -x $(BIN)/uv ] || { echo "==> installing uv"; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv; }
	@echo "==> installing text2weight and its dependencies (a first download is about 3 GB, mostly torch)"
	@$(BIN)/uv pip install $(QUIET) --python $(BIN)/python -c constraints.txt -b constraints.txt \
		-e '.[service,training,distributed,ray,tracing]' --group dev
	@touch $@

demo: $(STAMP) ## run the main job end to end on real pictures, into out/demo (options: DEMO_ARGS="--images DIR")
	@echo "==> demo"
	@$(BIN)/python demo/run_demo.py $(DEMO_ARGS)

# All tests are run by two processes, with one thread each: with more they would wait for each other.
test: $(STAMP) ## run the tests (options: TEST_ARGS="tests/core -k sampler")
	@echo "==> pytest"
	@$(if $(TEST_ARGS),$(BIN)/pytest -q $(TEST_ARGS),OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses 2 --dist loadfile)

lint: $(STAMP) ## check style, formatting, types, secrets and dependencies
	@echo "==> ruff"
	@$(BIN)/ruff check --quiet $(CODE)
	@$(BIN)/ruff format --check --quiet $(CODE) || \
		{ echo "some files are not formatted; run: make format" >&2; exit 1; }
	@$(MAKE) type
	@$(MAKE) audit

type: $(STAMP) ## check types with mypy --strict
	@echo "==> mypy"
	@$(BIN)/mypy

audit: $(STAMP) ## look for secrets in the files and for known vulnerabilities in the pinned dependencies
	@echo "==> secrets"
	@.ci/secrets $(BIN)
	@echo "==> audit of dependencies"
	@.ci/audit $(BIN)

format: $(STAMP) ## rewrite the code in the house format
	@echo "==> ruff format"
	@$(BIN)/ruff check --quiet --fix-only $(CODE)
	@$(BIN)/ruff format --quiet $(CODE)

bench: $(STAMP) ## run the benchmarks; they print JSON lines (options: BENCH_ARGS)
	@echo "==> bench" >&2
	@$(BIN)/python bench/run.py $(BENCH_ARGS)

openapi: $(STAMP) ## write docs/openapi.json from the service's routes
	@echo "==> docs/openapi.json"
	@$(BIN)/python -m text2weight_service.openapi docs/openapi.json

clean: ## remove caches and the demo's output; .venv and trained runs stay
	@echo "==> removing caches and out/"
	@rm -rf out dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find core service training clients tests -name __pycache__ -type d -prune -exec rm -rf {} +
