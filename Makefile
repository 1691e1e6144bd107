# make sweep        a sweep file -> trials -> a report of accuracy against FLOPs   [SWEEP=sweeps/quickstart.yaml]
# make report       draw what is in ./runs again                                   [RUNS="id id ..."]
# make data         find CIFAR-10, or download it, and verify it
# make test         the tests (minutes)
# make check        lint, types, tests; CI also runs make docs and make test-slow
# make lint, types  ruff; mypy --strict
# make bench        what is timed, as far as this machine can; benchmarks/results   [ARGS="--only 4 5", "--list"]
# make docs         the documentation as HTML pages in docs/_build/html; warnings are errors
# make wheel        a wheel in dist/ that works from any folder
# make clean        remove .venv and caches; runs stay
#
# Options: PYTHON=/path/to/python uses an environment that has the packages already (no .venv is made);
#          ARGS="..." is passed on, for example: make sweep ARGS="--dry-run"

# Containers often set it. Without bytecode, each process compiles PyTorch's modules again: 4.4 s to start, not 2.1.
unexport PYTHONDONTWRITEBYTECODE

SWEEP ?= sweeps/quickstart.yaml
RUNS ?=
ARGS ?=
# One more than there are cores: tests often wait for processes that they have started.
TEST_WORKERS = $$($(PY) -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')

ifeq ($(strip $(PYTHON)),)
  PY := .venv/bin/python
  READY := .venv/.ready
else
  PY := $(PYTHON)
  READY :=
endif

.PHONY: help setup sweep report data test test-slow check lint types bench docs wheel clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^\#/!q; s/^\# \{0,1\}//p' Makefile

# The oldest Python that is new enough would do; the plain `python3` is tried first.
.venv/.ready: pyproject.toml constraints.txt
	@base=$$(for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done); \
	if [ -z "$$base" ]; then echo "error: no Python 3.11 or newer on the PATH; install one, or name it: make PYTHON=..." >&2; exit 2; fi; \
	echo "setting up .venv with $$($$base --version) (once; PyTorch is large) ..."; \
	$$base -m venv .venv || { echo "error: 'venv' is missing; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --no-compile -c constraints.txt -e '.[dev]'
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps 'sweeps==0.3.0' # its JSON schema, for tests
	@touch $@

setup: $(READY)

sweep: $(READY)
	@$(PY) -m cifar sweep $(SWEEP) $(ARGS)

report: $(READY)
	@$(PY) -m cifar report $(RUNS) $(ARGS)

data: $(READY)
	@$(PY) -m cifar data $(ARGS)

test: $(READY)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(TEST_WORKERS) --dist worksteal $(ARGS)

test-slow: $(READY)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m slow --timeout 900 -n 2 --dist worksteal $(ARGS)

lint: $(READY)
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

types: $(READY)
	@$(PY) -m mypy

check: lint types test

bench: $(READY)
	@$(PY) -m benchmarks $(ARGS)

docs: $(READY)
	@$(PY) -m sphinx -q -W --keep-going -b html docs docs/_build/html && echo "docs/_build/html/index.html"

wheel: $(READY)
	@$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist . && ls dist/*.whl

clean:
	rm -rf docs/_build .venv .mypy_cache .pytest_cache .ruff_cache build *.egg-info
