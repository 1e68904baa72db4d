# What a developer and CI both run. Needs Python 3.11 or newer, git and make; everything else goes into .venv.

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# An edited C source is compiled again by the next `make`.
C_SOURCES := $(wildcard arqsearch/integer/native/csrc/*.[ch])
JOBS ?= 2

# One thread a process: results do not depend on it, and two busy workers do not fight for cores.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive
# Where the data sets that are not in the repository lie; tests that need an absent one say so and skip.
export ARQSEARCH_DATA ?= ../shared

.PHONY: help install demo check format test test-all results-digits results-resnet20 results-integer-speed results-certify-speed results-policies results-verify results-qaibp clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

install: $(STAMP)  ## create .venv with the pinned versions and arqsearch itself, editable

$(STAMP): pyproject.toml constraints.txt $(C_SOURCES)
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found; install one or give it: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## the whole job on the embedded digits; prints where the report is
	$(BIN)/arqsearch run arqsearch/recipes/digits.yaml

check: $(STAMP)  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy arqsearch

format: $(STAMP)  ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(STAMP)  ## the tests, without the slow ones
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-all: $(STAMP)  ## all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m 'slow or not slow'

results-digits: $(STAMP)  ## run the demo, keep its figures in results/ and fill the tables of README and docs
	$(BIN)/arqsearch run arqsearch/recipes/digits.yaml
	$(BIN)/python -m arqsearch.benchmarks.results collect runs/digits
	$(BIN)/python -m arqsearch.benchmarks.results render

results-resnet20: $(STAMP)  ## the same for ResNet-20 on CIFAR-10 at σ=0.25 (about an hour on 2 cores)
	$(BIN)/arqsearch run arqsearch/recipes/resnet20_cifar10.yaml
	$(BIN)/python -m arqsearch.benchmarks.results collect runs/resnet20_cifar10
	$(BIN)/python -m arqsearch.benchmarks.results render

results-integer-speed: $(STAMP)  ## time the integer engine and its peers, keep the figures in results/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/arqsearch bench integer-speed --output results
	$(BIN)/python -m arqsearch.benchmarks.results render

results-certify-speed: $(STAMP)  ## time certificates by each rule, keep the figures in results/ (half an hour)
	$(BIN)/arqsearch bench certify-speed --output results
	$(BIN)/arqsearch bench certify-speed --sigma 0.25 --quick --output results
	$(BIN)/python -m arqsearch.benchmarks.results render

results-verify: $(STAMP)  ## the public verification benchmark and the speed of boxes, kept in results/ (two minutes)
	$(BIN)/arqsearch bench verify-mnist --output results
	$(BIN)/arqsearch bench verify-speed --output results
	$(BIN)/python -m arqsearch.benchmarks.results render

results-qaibp: $(STAMP)  ## train and bound the Fashion-MNIST networks, keep their figures in results/ (half an hour)
	$(BIN)/arqsearch run qaibp_fashion
	$(BIN)/arqsearch run qaibp_fashion_mixed
	$(BIN)/python -m arqsearch.benchmarks.results collect runs/qaibp_fashion
	$(BIN)/python -m arqsearch.benchmarks.results collect runs/qaibp_fashion_mixed
	$(BIN)/python -m arqsearch.benchmarks.results render

results-policies: $(STAMP)  ## every policy on the tabular benchmark, 50 seeds (about 40 processor minutes)
	$(BIN)/arqsearch bench policies --policies all --tasks bops-0.9-both,bops-0.7-radius --seeds 50 --evaluations 100 \
		--output runs/policies-tabular --table results
	$(BIN)/python -m arqsearch.benchmarks.results render

clean:  ## remove what the tools leave behind; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
