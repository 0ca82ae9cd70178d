# Everything runs in .venv, made from $(PYTHON) on the first call; later calls start at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MAIN := $(BIN)/python -m prism_jax.main
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses=4 --dist=loadfile

# The commands behind the tables of the README. A run that stopped continues; a finished one
# only prints its table. Every run but the first adopts the teachers of the first.
RESULTS_SEEDS := (0, 1, 2, 3, 4)
RESULTS_COMMAND = $(MAIN) --config.validate.seeds="$(RESULTS_SEEDS)"
RESULTS_FROM := --from=runs/digits_ipc10

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo results test test-all lint format clean

help:
	@echo "make demo      distil scikit-learn's digits on the CPU: PRISM, then SRe2L beside it"
	@echo "make results   the runs behind the README's tables (resumable)"
	@echo "make test      the fast tests"
	@echo "make test-all  every test"
	@echo "make lint      what CI checks; 'make format' repairs most of it"
	@echo "make clean     remove .venv and caches; runs/ is kept"

demo: $(VENV)/.installed
	$(MAIN) --config=configs/digits_ipc10.py
	$(MAIN) --config=configs/digits_sre2l_ipc10.py $(RESULTS_FROM)

results: $(VENV)/.installed
	$(RESULTS_COMMAND) --config=configs/digits_ipc10.py
	$(RESULTS_COMMAND) --config=configs/digits_sre2l_ipc10.py $(RESULTS_FROM)
	$(RESULTS_COMMAND) --config=configs/digits_ipc1.py $(RESULTS_FROM)
	$(RESULTS_COMMAND) --config=configs/digits_sre2l_ipc1.py $(RESULTS_FROM)

test: $(VENV)/.installed-test
	$(PYTEST)

test-all: $(VENV)/.installed-test
	$(PYTEST) -m ""

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "prism_jax needs Python 3.11 or newer, and $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment." \
	    "On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $(VENV)/.installed $@
