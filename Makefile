# make demo and make test install what they need into .venv; a second call starts at once.
#   PYTHON=python3.12 make test     another interpreter for a new .venv
#   ARGS="-k fma" make test         further arguments of pytest, or of farfield demo
#   JOBS=8 make test                test processes

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# what is installed is installed again when these change
PINS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train fma, window and full attention on real text, measure them, write a report"
	@echo "make test    ruff, pyright, import-linter, pytest"
	@echo "make lint    the first three of these"
	@echo "make format  ruff's formatting and safe fixes, applied"
	@echo "make docs    the documentation, in site/"
	@echo "make clean   remove .venv and everything that was built"

demo: $(VENV)/.run-time
	$(BIN)/python -m farfield demo $(ARGS)

# no compiled code of an earlier run; one thread a process, since the processes share the cores; who is done takes tests
# that another has not begun
test: export TORCHINDUCTOR_FORCE_DISABLE_CACHES = 1
test: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict

$(VENV)/.run-time: $(PINS) | $(BIN)/python
	$(PIP) install -qq --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(PINS) | $(BIN)/python
	$(PIP) install -qq --constraint constraints.txt --editable ".[dev]"
	@touch $(VENV)/.run-time $@

$(VENV)/.docs: $(PINS) | $(BIN)/python
	$(PIP) install -qq --constraint constraints.txt --editable ".[docs]"
	@touch $(VENV)/.run-time $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "farfield needs Python 3.11 or newer; '$(PYTHON)' was not found." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "farfield needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try PYTHON=python3.11 make ..." >&2; \
		exit 1; }
	@echo "Setting up $(VENV): a few minutes, once"
	@$(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); \
		echo "$(PYTHON) cannot make virtual environments here; on Debian and Ubuntu: apt install python3-venv" >&2; \
		exit 1; }

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
