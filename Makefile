# `make demo` and `make test` each do everything a fresh clone needs: a virtual environment in $(VENV), the packages,
# the run. The stamps make the second call fast: packages are installed again only when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
# The version everything was run with. The package index decides whether it is a CPU or a CUDA build.
TORCH ?= torch==2.13.0
DEMO_ARGS ?=
TEST_ARGS ?=
COMPARE_ARGS ?=
BENCH_ARGS ?=
SOAK_ARGS ?=
# A folder with valid.txt and test.txt of WikiText-2's raw words.
TEXT ?=
LINT_PATHS := sketch_plugins integrations examples tests docs/tools $(wildcard benchmarks)

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif

# The tests' tensors are small: a process for each core serves them better than threads. A file's tests stay together:
# what its fixtures start (ranks of a process group, engines) is started once.
TEST_THREADS := $(or $(OMP_NUM_THREADS),1)
TEST_PROCESSES ?= 2
# In the order of tests/longest.txt, which xdist would give up for one by the number of tests.
DIST := --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo quick test slow compare restricted matrix clients soak benchmarks-quick gpu sanitizer docs lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  DEMO_ARGS, TEST_ARGS, COMPARE_ARGS, SOAK_ARGS and BENCH_ARGS (gpu) are handed on: make test TEST_ARGS='tests/optim -x'"

demo: $(VENV)/.demo ## memory, largest batch and loss of a language model, with AdamW and ours (6 to 10 minutes on 2 cores)
	$(BIN)/python examples/demo_lm.py $(DEMO_ARGS)

quick: $(VENV)/.dev ## for every change: mathematics, stores, options, one process of each framework
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -n $(TEST_PROCESSES) $(DIST) $(TEST_ARGS) @tests/quick.txt

test: $(VENV)/.dev ## run the whole test suite
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -n $(TEST_PROCESSES) $(DIST) $(TEST_ARGS)

slow: $(VENV)/.dev ## the tests that start many processes, again and again (tests/slow.txt)
	SLOW=1 OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -n $(TEST_PROCESSES) $(DIST) $(TEST_ARGS) @tests/slow.txt

compare: $(VENV)/.dev ## kernels against the eager definition in 6,000 generated cases (COMPARE_CASES sets another number)
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python tests/compare/run.py $(COMPARE_ARGS)

soak: $(VENV)/.dev ## 10,000 steps of every optimizer with saves, schedules and skipped steps: no growth, no drift
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python benchmarks/soak.py $(SOAK_ARGS)

benchmarks-quick: $(VENV)/.demo ## repeat a part of the quality figures, in ten minutes: TEXT=folder of WikiText-2
	@test -n "$(TEXT)" || { echo "benchmarks-quick needs TEXT=FOLDER, with valid.txt and test.txt of WikiText-2 (raw words)"; exit 2; }
	$(BIN)/python benchmarks/quality_check.py --text "$(TEXT)" --jobs $(TEST_PROCESSES)

restricted: $(VENV)/.dev ## the test suite as other processors see it, and without Numba or Triton: ROWS=mkl,no-numba
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python tests/restricted/run.py $(if $(ROWS),--rows $(ROWS)) \
	  -- -n $(TEST_PROCESSES) $(DIST) $(TEST_ARGS)

# These two make environments of their own, with any Python that has venv.
matrix: ## the quick tests on every Python here, with the oldest and the newest versions promised: ROWS=oldest,py3.12
	OMP_NUM_THREADS=$(TEST_THREADS) $(PYTHON) tests/matrix/run.py $(if $(ROWS),--rows $(ROWS)) \
	  -- -n $(TEST_PROCESSES) --dist loadfile $(TEST_ARGS)

clients: ## other people's programs (TRL, PEFT, sentence-transformers, torchtune, LLaMA-Factory): ROWS=torchtune
	OMP_NUM_THREADS=$(TEST_THREADS) TORCH="$(TORCH)" $(PYTHON) tests/clients/run.py $(if $(ROWS),--rows $(ROWS)) \
	  -- $(TEST_ARGS)

# Nothing is installed for it: with the environment if that is there, else with any Python that has torch and Triton.
gpu: ## with a GPU, in ten minutes: its kernels and their tests, steps and training steps beside fused AdamW
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(BENCH_ARGS)

sanitizer: $(VENV)/.dev ## with a GPU and compute-sanitizer: the kernels' tests under it
	compute-sanitizer --error-exitcode 1 $(BIN)/python -m pytest -m gpu tests/kernels -k "eager_definition or row_sparse"

docs: $(VENV)/.docs ## the documentation site, in site/, strictly; and its tests: links, search, code, the notebook
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	SITE=site $(BIN)/python -m pytest $(TEST_ARGS) tests/docs/site

lint: $(VENV)/.dev ## ruff, ruff format and mypy, nothing changed
	$(BIN)/ruff check $(LINT_PATHS)
	$(BIN)/ruff format --check $(LINT_PATHS)
	$(BIN)/mypy

format: $(VENV)/.dev ## let ruff fix and format the sources
	$(BIN)/ruff check --fix $(LINT_PATHS)
	$(BIN)/ruff format $(LINT_PATHS)

clean: ## remove the environment and everything that was made
	rm -rf $(VENV) .venv-matrix .venv-clients build dist site demo_out bert_out accelerate_out extreme_out larger_batch_out .pytest_cache .mypy_cache .ruff_cache
	find sketch_plugins integrations examples tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: it is pinned here, while the package itself accepts a range.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version) if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -e ".[demo]"
	@touch $@

# The development packages hold the demo's.
$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $(VENV)/.demo $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -e ".[docs]"
	@touch $@
