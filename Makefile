# Two commands: `make run` and `make test`. Everything else is for developers.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help run test check format proto bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("headrace needs Python 3.11 or newer, found " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[cpu,native,dev]'
	@touch $@

# At a terminal the server gets a process group of its own (set -m), so that Ctrl-C reaches it alone: a make that is interrupted
# itself ends with an error, however cleanly the server stopped. The exit keeps bash from replacing itself by the server, ungrouped.
run: $(STAMP) ## install and serve the example models; Ctrl-C stops
	@if [ -t 0 ]; then set -m; fi; $(BIN)/headrace serve --models examples/models; exit $$?

test: $(STAMP) ## install and run the tests
	$(BIN)/python -m pytest

check: $(STAMP) ## lint, types, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/proto.py --check
	$(BIN)/python scripts/config_docs.py --check

format: $(STAMP) ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(STAMP) ## regenerate the descriptor set from protos/
	$(BIN)/python scripts/proto.py

bench: $(STAMP) ## requests per second of a tiny model at 1, 16 and 64 concurrent (needs h2load); see loadtests/README.md
	$(BIN)/python -m loadtests.compare --model mlp --rounds 3

clean: ## remove what was built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
