# Everything runs in .venv, made from $(PYTHON) on the first call; later calls start at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MAIN := $(BIN)/python -m prism_jax.main
# A file to a worker, in the order of tests/conftest.py: the longest first.
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

# The compilers of GPUs and TPUs have an environment of their own, see pyproject.toml. What they are
# not needed for is among the other tests.
COMPILERS := .venv-compilers
TEST_ACCELERATORS := $(COMPILERS)/bin/python -m pytest -q -n 2 --dist=worksteal --durations=20 \
  tests/accelerators/test_compilers.py

# The runs behind docs/results/digits_demo.md: three seeds of everything but the teachers, which
# every run adopts from the demo's. A run that stopped continues; a finished one is only read.
TEACHERS := runs/digits_ipc10
RESULTS_SEEDS := 0 1 2
RESULTS_CONFIGS := digits_ipc1 digits_sre2l_ipc1 digits_ipc10 digits_sre2l_ipc10
RESULTS := $(foreach c,$(RESULTS_CONFIGS),$(foreach s,$(RESULTS_SEEDS),runs/results/$(c)/seed$(s)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo results test test-accelerators test-all compilers golden lint format clean

help:
	@echo "make demo      distil scikit-learn's digits on the CPU: PRISM, then SRe2L beside it"
	@echo "make results   the runs behind docs/results/digits_demo.md (resumable)"
	@echo "make results-cifar10 DATA=FOLDER|FILE.npz   a comparison of configs/compare/, from its data"
	@echo "make test      the fast tests"
	@echo "make test-accelerators  what GPUs' and TPUs' compilers make of the programs; no device"
	@echo "make test-all  every test"
	@echo "make golden    the resolved configs, written anew after a change that is meant"
	@echo "make lint      what CI checks; 'make format' repairs most of it"
	@echo "make clean     remove .venv, .venv-compilers and caches; runs/ is kept"

demo: $(VENV)/.installed
	$(MAIN) --config=configs/digits_ipc10.py
	$(MAIN) --config=configs/digits_sre2l_ipc10.py --from=$(TEACHERS)

results: $(VENV)/.installed
	$(MAIN) --config=configs/digits_ipc10.py
	set -e; for config in $(RESULTS_CONFIGS); do for seed in $(RESULTS_SEEDS); do \
	  $(MAIN) --config=configs/$$config.py --from=$(TEACHERS) \
	    --workdir=runs/results/$$config/seed$$seed \
	    --config.seed=$$seed --config.validate.seeds="($$seed,)"; \
	done; done
	$(BIN)/python -m prism_jax.tools.results $(RESULTS)

results-%: $(VENV)/.installed
	$(BIN)/python -m prism_jax.compare --config=configs/compare/$*.py \
	  $(if $(filter %.npz,$(DATA)),--config.dataset.source=npz) $(if $(DATA),--config.dataset.path=$(DATA))

test: $(VENV)/.installed-test
	$(PYTEST)

test-accelerators: compilers
	$(TEST_ACCELERATORS)

test-all: $(VENV)/.installed-test compilers
	$(PYTEST) -m ""
	$(TEST_ACCELERATORS) -m ""

compilers:
	@$(MAKE) --no-print-directory VENV=$(COMPILERS) $(COMPILERS)/.installed-test,compilers

golden: $(VENV)/.installed-test
	$(BIN)/python tests/config/make_golden.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(COMPILERS) .mypy_cache .pytest_cache .ruff_cache
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
