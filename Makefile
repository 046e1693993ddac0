# What a newcomer types: `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TOOLS  := $(VENV)/.test-tools

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long bench-ddp bench-gate bench-serve bench-train check format build clean

help: ## say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(READY) $(TOOLS) ## install Osteon into .venv, and the Debian packages that demo and tests use, where that is allowed

demo: $(READY) ## show the whole way on this machine: PACS, node, scheduled training, SR (some 4 minutes)
	@$(BIN)/osteon demo

test: $(READY) $(TOOLS) ## run the tests
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadgroup

test-long: $(READY) $(TOOLS) ## run chaos, soak, fuzzing and the demo from a clean clone
	$(BIN)/python -m pytest -m long

bench-gate: $(READY) ## simulate how often the gate errs: the tables of docs/gate.md (some minutes)
	$(BIN)/python tests/bench/gate_errors.py

check: $(READY) ## format, lint, types, imports, what the docs claim
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tests/docs/claims.py

bench-ddp: $(READY) ## time training in two processes beside one with two threads (some minutes)
	@$(BIN)/python tests/bench/ddp.py

bench-serve: $(READY) ## time the node's inference beside ONNX Runtime alone (about 2 minutes)
	@$(BIN)/python tests/bench/serve.py

bench-train: $(READY) ## time pretraining and fine-tuning beside a straightforward loop
	@$(BIN)/python tests/bench/train.py

format: $(READY) ## put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

build: $(READY) ## build the wheel and the source archive into dist/
	@rm -rf build dist *.egg-info
	$(BIN)/python -m build

clean: ## remove what was built here (not the environment)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt deploy/system-packages.sh
	@deploy/system-packages.sh demo
	@echo "Installing Osteon into $(VENV): some minutes the first time, most of them for PyTorch."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,demo,dev]'
	@touch $@

$(TOOLS): $(READY) deploy/system-packages.sh
	@deploy/system-packages.sh test
	@touch $@
