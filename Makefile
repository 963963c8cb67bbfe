# `make demo` and `make test` need Python 3.11+ and a package index; everything goes into a local virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types docs results bench clean

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[all,dev,docs]'
	touch $@

demo: $(STAMP)
	$(BIN)/metaprior demo --out demo

test: $(STAMP) lint docs
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/pyright --project pyproject.toml

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

results: $(STAMP)
	$(BIN)/metaprior results --headlines RESULTS.md

bench: $(STAMP)
	bash benchmarks/install_peers.sh
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf $(VENV) .venv-peers runs demo site .pytest_cache .ruff_cache .hypothesis
