# `make demo` and `make test` need Python 3.11+ and a package index; everything goes into a local virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo quick learner test full lint docs results bench clean

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[all,dev,docs]'
	touch $@

demo: $(STAMP)
	$(BIN)/metaprior demo --out demo

# A minute: no training, command line or data, and four learners' contract. tests/conftest.py has the rule.
quick: $(STAMP)
	$(BIN)/python -m pytest --quick -n 2 --dist worksteal

# What is asked of every learner, and of this one: make learner NAME=cavia
learner: $(STAMP)
	$(BIN)/python -m pytest --learner $(NAME) tests/test_contract.py tests/test_bad_inputs.py

# Everything.
test: lint docs full

full: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=15

lint: $(STAMP)
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/pyright --project pyproject.toml

# Not --quiet: --strict would then count no warnings.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

results: $(STAMP)
	$(BIN)/metaprior results --headlines RESULTS.md --learners .

bench: $(STAMP)
	bash benchmarks/install_peers.sh
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf $(VENV) .venv-peers runs demo site .pytest_cache .ruff_cache .hypothesis
