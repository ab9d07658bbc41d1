# make demo: train a C/M sweep, fold, serve from disk, report (about ten minutes on two cores)
# make test: the core of every guarantee (CONTRIBUTING.md). make test-all: that, then the rest. make lint: style and types
PYTHON := $(shell for p in python3.12 python3 python3.13 python3.14 python; do "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$p" && break; done)
BIN := .venv/bin
STAMP := .venv/installed
OUT ?= runs/demo
# or tests/constraints-oldest.txt, or /dev/null for the newest versions
CONSTRAINTS ?= constraints.txt

# a worker more than cores, as some tests wait for other processes; files stay whole, as their tests share fixtures
WORKERS = $(shell $(PYTHON) -c 'import os; print(os.cpu_count() + 1)')
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: setup demo test test-slow test-all lint clean
setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "flexmemory needs Python 3.12 or newer on the PATH (found none); install one, e.g. 'uv python install 3.12' or 'pyenv install 3.12'" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[test,dev]'
	@touch $@

demo: setup
	$(BIN)/python -m experiments.run cm_ratio --scale=quickstart --out=$(OUT)

test: setup
	$(PYTEST) -m 'not slow'

test-slow: setup
	$(PYTEST) -m slow

test-all: test
	$(MAKE) test-slow

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# the site, in site/; fails on a link that leads nowhere
.PHONY: docs
docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo site/index.html

clean:
	rm -rf .venv runs/demo site
