# Everything runs in virtual environments of its own: .venv for python3, .venv-latest for the newest interpreter found.
PYTHON ?= python3
LATEST := $(shell ./scripts/latest_python)
# Two processes: the tests' time is the compiler's, and each process simulates eight devices already.
PYTEST := -m pytest -n 2 --dist worksteal -q

.PHONY: demo test test-latest lint check clean

demo: .venv/.ready
	.venv/bin/python examples/demo.py

test: .venv/.ready
	.venv/bin/python $(PYTEST)

test-latest:
	@test -n "$(LATEST)" || { echo "no Python 3.12 or newer was found: install one, or put it on PATH"; exit 1; }
	$(MAKE) .venv-latest/.ready
	.venv-latest/bin/python $(PYTEST)

lint: .venv/.ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

check: lint test

clean:
	rm -rf .venv .venv-latest .cache demo

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "zerojax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -e '.[dev]'
	@touch $@

.venv-latest/.ready: pyproject.toml
	$(LATEST) -m venv .venv-latest
	.venv-latest/bin/python -m pip install -q -e '.[dev]'
	@touch $@
