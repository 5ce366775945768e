# make demo   set up, adapt a foundation model to real images, say where the results are
# make test   set up, run the tests (make test-full adds the slow ones)
# make lint   set up, check style

PYTHON ?= python3.11
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

# One thread per worker: more of them fight for the same cores.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help demo test test-full lint
help:
	@sed -n '1,3s/^# //p' Makefile

demo: $(VENV)/.demo-installed
	$(BIN)/python demo/digits.py

test: $(VENV)/.dev-installed
	$(PYTEST)

test-full: $(VENV)/.dev-installed
	$(PYTEST) -m ""

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The empty files say that a step has ended well: one that was cut short is run again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "visadapt needs Python 3.11 or newer, and '$(PYTHON)' is not that:" \
	    "install Python 3.11, or name another one with 'make PYTHON=/path/to/python $(MAKECMDGOALS)'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo-installed: setup.py $(VENV)/.created
	@echo "installing visadapt and what it needs into $(VENV); the first time takes some minutes"
	$(BIN)/python -m pip install -qq --editable '.[demo]'
	touch $@

# The extras of `dev` hold those of `demo`.
$(VENV)/.dev-installed: setup.py $(VENV)/.created
	@echo "installing visadapt and its test tools into $(VENV); the first time takes some minutes"
	$(BIN)/python -m pip install -qq --editable '.[dev]'
	touch $@ $(VENV)/.demo-installed
