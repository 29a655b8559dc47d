# Everything runs in .venv, made on first use. `make PYTHON=python3.12 demo` picks the interpreter.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-v2 test-slow test-cuda soak faults lint bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 18

setup: $(READY) ## make .venv and the models of the demonstration, unless they are there
	@$(BIN)/vllm-ssd models >/dev/null

# Only the files that decide what is installed: other changes need no new set-up.
$(READY): setup.py scripts/setup.sh
	@scripts/setup.sh $(VENV) $(PYTHON)
	@touch $@

demo: setup ## plain vLLM, draft_model and SSD answer the same prompts; SSD's text is checked
	@$(BIN)/vllm-ssd demo

test: setup ## all tests but the slow ones
	@echo "test: pytest"
	@$(BIN)/python -m pytest $(ARGS)
ifeq ($(ARGS),)
	@$(MAKE) --no-print-directory test-v2
endif

# vLLM looks for Triton once a process, so its V2 runner needs a run of its own.
test-v2: setup ## the tests of engines with vLLM's V2 model runner, which `make test` runs as well
	@echo "test-v2: pytest tests/v2/engines"
	@VLLM_USE_V2_MODEL_RUNNER=1 $(BIN)/python -m pytest tests/v2/engines $(ARGS)

test-slow: setup ## the tests that take minutes
	@echo "test-slow: pytest -m slow"
	@$(BIN)/python -m pytest -m slow $(ARGS)
ifeq ($(ARGS),)
	@$(MAKE) --no-print-directory test-v2 ARGS="-m slow"
endif

test-cuda: ## on a machine with a GPU: does it work there? ends with a report (docs/cuda.md)
	@scripts/test_cuda.sh $(PYTHON) $(ARGS)

MINUTES ?= 30

soak: setup ## two targets on one draft with faults, MINUTES=30; then what has grown
	@$(BIN)/python -m tests.soak.soak --minutes $(MINUTES)

faults: setup ## a server under load while one thing after the other breaks; what its clients see
	@$(BIN)/python -m tests.soak.faults

lint: $(READY) ## ruff and mypy
	@echo "lint: ruff check";  $(BIN)/ruff check .
	@echo "lint: ruff format"; $(BIN)/ruff format --check .
	@echo "lint: mypy";        $(BIN)/mypy

# benchmarks/forks.py needs recorded answers: docs/profiling.md shows its command.
bench: setup ## the measurements in benchmarks/ that need no data; an hour or two
	@set -e; for name in critical_path critical_path_v2 draft_vocab step_time end_to_end batch_sizes settings backups serving shared_draft; do \
		echo "bench: $$name"; $(BIN)/python -m vllm_ssd.cli.env -m benchmarks.$$name; done

clean: ## remove .venv and everything built (the models stay cached)
	rm -rf $(VENV) $(VENV)-cuda build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find vllm_ssd tests -name __pycache__ -type d -prune -exec rm -rf {} +
