# Two commands on a fresh machine: `make tour` and `make test`. Both make .venv if it is missing.

PYTHON ?= python3
BIN := .venv/bin
JOBS ?= auto

.PHONY: tour test lint bench clean

.venv/.core: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.dev: .venv/.core
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

tour: .venv/.core            ## the whole story in about eight minutes
	$(BIN)/lapis tour

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint                   ## types, style, and every test
	$(BIN)/python -m pytest -q -n $(JOBS)

clean:
	rm -rf .venv build runs
