# Two commands: `make run` and `make test`. Everything else is for developers.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Of `bench` and `locust`.
BENCHMARKS := docs/benchmarks
ROUNDS ?= 5
GRPC ?= 127.0.0.1:8001
UI ?=
USERS ?= PacedUser
LOCUST_ARGS ?=

.PHONY: help run test check format proto bench locust clean

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

bench: $(STAMP) ## measure a tiny model and write docs/benchmarks (needs h2load; HEADRACE_TRITON_PEER=loadtests/peers/triton.sh adds Triton)
	mkdir -p $(BENCHMARKS)
	$(BIN)/python -m loadtests.compare --model mlp --transport native --transport grpcio --echo native --echo grpcio \
	  --rounds $(ROUNDS) --budget 3600 --start-timeout 300 --json $(BENCHMARKS)/results.json
	$(BIN)/python -m loadtests.scenarios rates --model mlp \
	  --transport native --transport grpcio --rounds $(ROUNDS) --json $(BENCHMARKS)/scenarios.json
	$(BIN)/python -m loadtests.report $(BENCHMARKS)/results.json $(BENCHMARKS)/scenarios*.json \
	  --out $(BENCHMARKS)/report.html --pictures $(BENCHMARKS) --table $(BENCHMARKS)/table.md

locust: $(STAMP) ## users against the server that runs; LOCUST_ARGS for more, UI=1 for the web page on loopback, HEADRACE_SHAPE=ramp|spike
	$(if $(UI),HEADRACE_SHAPE=all )$(BIN)/python -m locust -f loadtests/locustfile.py --host $(GRPC) \
	  $(if $(UI),--class-picker --web-host 127.0.0.1,--headless $(if $(HEADRACE_SHAPE),,--users 20 --spawn-rate 20 --run-time 30s) $(USERS)) $(LOCUST_ARGS)

clean: ## remove what was built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
