# Two commands on a fresh machine: `make tour` and `make test`. Both make .venv if it is missing.

PYTHON ?= python3
BIN := .venv/bin
JOBS ?= auto

.PHONY: tour test lint bench-merge bench-kill bench-faults clean

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

bench-merge: .venv/.dev       ## graft and merge beside mergekit; PEER=/path/to/python with mergekit 0.1.5
	$(BIN)/python benchmarks/merge.py --size 0.5b --table benchmarks/results/merge.md $(if $(PEER),--peer-python $(PEER))
	$(BIN)/python benchmarks/merge.py --size 1.1b --table benchmarks/results/merge.md \
		--methods task_arithmetic,slerp,dare_ties,ties $(if $(PEER),--peer-python $(PEER))

bench-kill: .venv/.dev        ## 200 kills at random moments, each run again
	$(BIN)/python benchmarks/kill.py --rounds 200 --seed 0

bench-faults: .venv/.dev      ## damaged checkpoints given to lapis, mergekit and transformers
	$(BIN)/python benchmarks/faults.py --table benchmarks/results/faults.md $(if $(PEER),--peer-python $(PEER))

clean:
	rm -rf .venv build runs
