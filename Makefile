# phi4 installs into .venv and writes nothing outside this directory. `make` lists the targets.
#   PYTHON=python3.12     the Python to build .venv with
#   TORCH=cpu             torch's CPU build, where pip would take the CUDA build
#   PIP_ARGS="..."        passed to pip, for example another package index
#   WORKERS=2             test processes
#   PARTS="numbers engine"  parts of make gpu; PARTS=--list names them
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint gpu bench bench-generation csrc budgets durations golden measured picture clean \
	references prove-checkpoints prove-fresh

export PYTHON ?= python3
export PIP_ARGS ?=
export TORCH ?=
WORKERS ?= 2
# A file's tests share fixtures, so a worker takes whole files, the most expensive ones first.
BY_FILE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest $(BY_FILE)
DEFAULT := -m "not slow and not slurm and not gpu" --cpu-budgets test
LONG := -m "(slow or slurm) and not gpu" --cpu-budgets test-all

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9%-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile

setup:  ## build .venv when it is missing or out of date; the targets below do so themselves
	@tools/setup.sh

demo: setup  ## train a small Phi-4 on four CPU processes, resume, generate, check parity
	@.venv/bin/phi4 demo

test: setup  ## CPU tests, at most 10 minutes on 2 cores
	@$(PYTEST) $(DEFAULT)

test-all: test  ## test, then the slow and Slurm tests, trl's losses, lm-eval's scores, and transformers 4.57
	@tools/setup_trl.sh
	@tools/setup_lm_eval.sh
	@$(PYTEST) $(LONG)
	@tools/setup_transformers4.sh
	@OMP_NUM_THREADS=1 .venv-tf4/bin/python -m pytest tests/convert -m "not gpu" $(BY_FILE)

prove-checkpoints: setup  ## fuzz checkpoints: no code is executed, each ends in a one-line error
	@.venv/bin/python -m tools.checkpoint_fuzz --mutants 500 --json benchmarks/checkpoint_fuzz.jsonl

prove-%: setup  ## long-running proofs; python -m tools.prove --help lists them
	@.venv/bin/python -m tools.prove $*

lint: setup  ## ruff, mypy, and clang-format where it is installed
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/python -m tools.check_types
	@sources=$$(find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' 2>/dev/null || true); \
	if [ -n "$$sources" ] && command -v clang-format >/dev/null; then \
		clang-format --dry-run -Werror $$sources; \
	fi

gpu:  ## on a machine with one GPU: kernels proven and timed, the engine against the CPU
	@bash tools/gpu_check.sh $(PARTS)

bench: setup  ## kernel benches against their floors: make bench ARGS="--op rms_norm"
	@.venv/bin/python -m phi4_kernels.bench $(ARGS)

bench-generation: setup  ## time generation against transformers, about 10 minutes on one thread
	@OMP_NUM_THREADS=1 .venv/bin/python -m tools.generation_time --json benchmarks/generation.jsonl

csrc: setup  ## build the CUDA ops for sm_90a where nvcc is installed
	@.venv/bin/python tools/build_csrc.py

budgets: setup  ## write the register and shared-memory budgets of the kernels
	@.venv/bin/python -m phi4_kernels.testing budgets
	@.venv/bin/python tools/build_csrc.py --budgets

durations: setup  ## record the CPU seconds of the test files, which order them
	@$(PYTEST) $(DEFAULT) --write-cpu-seconds
	@$(PYTEST) $(LONG) --write-cpu-seconds

measured: setup  ## BENCHMARKS.md and README's table from the rows in benchmarks/
	@.venv/bin/python -m tools.measured_table
	@.venv/bin/python -m tools.benchmark_page

picture: setup  ## generate the package diagrams in docs/architecture.md
	@.venv/bin/python -m tools.package_picture

references: setup  ## write docs/recipe.md and docs/cli.md from the schema and the commands
	@.venv/bin/python -m tools.references

golden: setup  ## write the golden losses of the recipes
	@.venv/bin/python tools/golden_losses.py

prove-fresh:  ## README's commands on bare Debian 12 and 13, as root; ARGS: tools/prove_fresh.py
	@python3 tools/prove_fresh.py $(ARGS)

clean:  ## remove .venv, builds and caches; runs/ stays
	@rm -rf .venv .venv-tf4 .venv-trl .venv-lm-eval build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
