# make demo: train a C/M sweep, fold, serve from disk, report (about ten minutes on two cores). make test: the suite.
PYTHON := $(shell for p in python3.12 python3 python3.13 python3.14 python; do "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$p" && break; done)
BIN := .venv/bin
STAMP := .venv/installed
OUT ?= runs/demo

.PHONY: setup demo test clean
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "flexmemory needs Python 3.12 or newer on the PATH (found none); install one, e.g. 'uv python install 3.12' or 'pyenv install 3.12'" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: setup
	$(BIN)/python -m experiments.run cm_ratio --scale=quickstart --out=$(OUT)

# a worker more than cores, as some tests wait for other processes; the longest file starts early
test: setup
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

clean:
	rm -rf .venv runs/demo
