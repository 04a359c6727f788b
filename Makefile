# Both commands work from a fresh clone: they create .venv and install on first use.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart quickstart-short bench-quick test lint types clean

## quickstart: train and evaluate every run of experiments/shapes.toml and write reports/shapes/ (7 to 17 minutes on two cores)
quickstart: $(STAMP)
	$(BIN)/semiseg run shapes --jobs 2 --reproduce

## quickstart-short: the same code on a two-minute cut; writes reports/shapes_short/
quickstart-short: $(STAMP)
	$(BIN)/semiseg run shapes_short --jobs 2 --reproduce

## bench-quick: speed and memory beside straightforward formulations, about a minute; fails on a wrong result only
bench-quick: $(STAMP)
	$(BIN)/python -m benchmarks --quick

## test: the tests, two at a time, of one thread each: threads that wait for each other's cores take many times as long
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

## lint, types: what CI checks beside the tests
lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "semiseg needs Python 3.11, 3.12 or 3.13 on the PATH"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
