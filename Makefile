# `make demo` exports a small disk; `make test` runs the tests; `make check` is what CI runs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow check format docs soak clean

help:
	@echo "make demo       export a small demo disk to an embedded S3 store, verified"
	@echo "make test       the tests (make test-slow: the long ones)"
	@echo "make soak       as many random kills of exports as asked, each resumed: KILLS=1000 SEED=7"
	@echo "make check      format, lint, types, tests: what CI runs"
	@echo "make docs       write docs/stages.md, docs/formats.md and docs/export.schema.json from the catalog"
	@echo "make fuzz       fuzz every image reader, guided by coverage, for SECONDS=60 each (FORMAT=qcow2: only that one)"

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/pip install --quiet --disable-pip-version-check --editable . --group dev
	touch $(STAMP)

env: $(STAMP)

demo: env
	@test -e demo/disk.raw || $(BIN)/python -m tests.disks.demo demo/disk.raw
	$(BIN)/python -m tests.stores.demo --folder demo/store -- $(BIN)/pipeline run configs/demo.toml

# What the tests need beyond Python: qemu-img, e2fsprogs, a browser and two real S3 servers.
tools: env
	$(BIN)/python -m tests.tools
.PHONY: tools

test: tools
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: tools
	$(BIN)/pytest -m slow --timeout 1800

# Not in CI: what it finds becomes a test. atheris needs clang's libraries only where it has no wheel.
SECONDS ?= 60
FORMAT ?= all
fuzz: tools
	$(BIN)/pip install --quiet --disable-pip-version-check --group fuzz
	$(BIN)/python -m tests.decode.fuzz --seconds $(SECONDS) --format $(FORMAT)
.PHONY: fuzz

# KILLS random kills of exports to two S3 servers and a file, each resumed: make soak KILLS=1000 SEED=7
KILLS ?= 300
SEED ?= 1
soak: tools
	KILLS=$(KILLS) SEED=$(SEED) $(BIN)/pytest tests/end_to_end/test_kills.py -m slow -k random --timeout 36000

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pipeline stages --markdown | diff -u docs/stages.md - || (echo "docs/stages.md is stale: make docs" && exit 1)
	$(BIN)/python -m pipeline stages --formats | diff -u docs/formats.md - || (echo "docs/formats.md is stale: make docs" && exit 1)
	$(BIN)/python -m pipeline stages --schema | diff -u docs/export.schema.json - || (echo "docs/export.schema.json is stale: make docs" && exit 1)
	$(MAKE) test

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: env
	$(BIN)/python -m pipeline stages --markdown > docs/stages.md
	$(BIN)/python -m pipeline stages --formats > docs/formats.md
	$(BIN)/python -m pipeline stages --schema > docs/export.schema.json

clean:
	rm -rf $(VENV) .cache demo
