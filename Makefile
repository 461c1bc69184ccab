# Two commands matter: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm check format bench bench-micro bench-peers clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "picker needs Python 3.11 or newer; set PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## simulated vLLM pods behind a real Envoy: cache-unaware routing against picker
	$(BIN)/picker demo

test: $(STAMP) ## every test; no GPU, no Kubernetes, no network (a real vLLM once test-vllm has installed it)
	$(BIN)/python -m pytest

test-vllm: $(STAMP) ## the tests against a real vLLM on the CPU; installs it into .venv-vllm (3.4 GB)
	@if $(BIN)/python tests/real_vllm/install.py; \
	then $(BIN)/python -m pytest tests/real_vllm; \
	elif [ $$? -eq 3 ]; then echo "the tests against a real vLLM are skipped"; \
	else exit 1; fi

check: $(STAMP) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## this machine's figures: one decision, ext-proc, proxy
	$(BIN)/picker bench pick
	$(BIN)/picker bench extproc
	$(BIN)/picker bench proxy

bench-micro: $(STAMP) ## micro-benchmarks of single parts
	$(BIN)/python -m pytest bench/micro -o python_files='bench_*.py' --benchmark-columns=min,median,iqr,rounds --benchmark-sort=name -s

bench-peers: $(STAMP) ## the routers that `picker bench proxy` compares with, into .venv-peers (350 MB)
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --requirement bench/peers.txt

clean: ## remove everything that make made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks build dist
