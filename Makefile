# make demo: train a C/M sweep, fold, serve from disk, report (about ten minutes on two cores)
# make test: the core of every guarantee (docs/testing-tiers.md). make test-all: that, then the rest. make lint: style and types
PYTHON := $(shell for p in python3.12 python3 python3.13 python3.14 python; do "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$p" && break; done)
BIN := .venv/bin
STAMP := .venv/installed
OUT ?= runs/demo

# a worker more than cores, as some tests wait for other processes; files stay whole, as their tests share fixtures
WORKERS = $(shell $(PYTHON) -c 'import os; print(os.cpu_count() + 1)')
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: setup demo test test-all lint clean
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "flexmemory needs Python 3.12 or newer on the PATH (found none); install one, e.g. 'uv python install 3.12' or 'pyenv install 3.12'" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: setup
	$(BIN)/python -m experiments.run cm_ratio --scale=quickstart --out=$(OUT)

test: setup
	$(PYTEST) -m 'not slow'

test-all: test
	$(PYTEST) -m slow

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs/demo
