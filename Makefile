# Everything a person or CI runs. A machine needs python3 (3.11 or later) and make.
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROJECT ?= examples/customer_onboarding
EXTRAS := intake orchestrator connector notifier quarantine embedded cli sandbox

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format verify bench bench-growth bench-peers up lock wheel proof clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Create .venv and install everything, by hash
# The stamp hangs on what decides the environment's content, so that a second call does nothing.
$(STAMP): lock/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Factmesh needs Python 3.11 or later, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the locked packages (about 300 MB, most of it Java and PostgreSQL) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r lock/dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $(STAMP)

demo: setup  ## Run 1,000 facts through a fresh mesh, triage the DLQs, reconcile
	@$(BIN)/factmesh demo --project $(PROJECT)

up: setup  ## Run the mesh on the embedded stack until Ctrl-C, durable in .factmesh
	@$(BIN)/factmesh up --project $(PROJECT)

test: setup  ## Run every test, on the real broker and database
	@$(BIN)/python -m pytest

check: setup  ## Lint, formats of imports, types, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/lint-imports --no-cache

format: setup  ## Rewrite the code in the house's format
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format --quiet .

verify: setup  ## Fail when something generated drifted from its source
	@$(BIN)/python .ci/verify.py

bench: setup  ## Measure W3 against a hand-written loop, 5 minutes; FULL=1: everything, an hour
	@PYTHONPATH=. $(BIN)/python -m tests.bench.w3 $(if $(FULL),--full)

bench-growth: setup  ## Measure W3 as ledger, payload, steps, replicas, partitions grow, 20 minutes
	@PYTHONPATH=. $(BIN)/python -m tests.bench.w3 --parts growth,plans

bench-peers: setup  ## Measure W3 on DBOS and Restate beside ours, 9 minutes; needs npm
	@PYTHONPATH=. $(BIN)/python -m tests.bench.w3 --parts peers

wheel: setup  ## Build the wheel into dist/
	@rm -rf dist && $(BIN)/python -m hatchling build -t wheel

proof: wheel  ## Install each extra alone from the wheel and start its command
	@$(BIN)/python .ci/extras.py dist/*.whl

lock: setup  ## Resolve the locks anew, one a service and one for development (needs review)
	@$(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
		--custom-compile-command "make lock" --extra dev -o lock/dev.txt
	@for extra in $(EXTRAS); do \
		$(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
			--custom-compile-command "make lock" --extra $$extra -c lock/dev.txt -o lock/$$extra.txt || exit 1; \
	done

clean:  ## Remove what was built and the data of `make up`
	@rm -rf dist build .factmesh .mypy_cache .ruff_cache .pytest_cache .hypothesis
