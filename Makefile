# Two commands set everything up on a fresh machine with Python 3.11+: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all test-oldest lint gpu soak clean

# A stamp inside the environment: installed again only when the dependencies change.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	touch $@

# Shards, a small model, logs and pictures under runs/demo, from photographs that come with scikit-image and scikit-learn.
demo: $(VENV)/.installed
	$(BIN)/fastmae demo --out runs/demo

PYTEST = $(BIN)/python -m pytest -m
# Two processes, whatever the number of cores: many tests start processes of their own. A file is one process's, with what its
# tests share. What measures time comes afterwards and alone.
BESIDE := --numprocesses 2 --dist loadfile --no-loadscope-reorder

# What every change must pass, in less than ten minutes on two cores: every kind of test that needs no GPU, each kind of case once.
test: $(VENV)/.installed
	$(PYTEST) "not gpu and not timing and not all" $(BESIDE)
	$(PYTEST) "not gpu and timing and not all"

# Every test that needs no GPU: all fuzzing, all cases in Triton's interpreter, every scene of a kill, and the soak.
test-all: $(VENV)/.installed
	$(PYTEST) "not gpu and not timing" $(BESIDE)
	$(PYTEST) "not gpu and timing"
	$(MAKE) soak

# The oldest pair of torch and triton that is supported, torch's CUDA build, in an environment of its own (5 GB): everything can
# be imported, every kernel compiles for sm_80, 90 and 100 as it is launched, ops and models are what they are, tests that need a
# GPU are collected, and what `make gpu` runs says in one line that there is none.
OLDEST ?= .venv-oldest
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[demo,dev]"
	touch $@

OLDEST_TESTS := $(addsuffix .py,$(addprefix tests/test_,layers ahead_of_time masked_mse patches take_rows decoder_input \
	random_masking resized_crop philox compile gradients linear mae step parallel device loader))
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
	$(OLDEST)/bin/python -m pytest -m "not gpu and not timing" $(OLDEST_TESTS)
	$(OLDEST)/bin/python -m pytest tests/test_benchmarks.py -k gpu_that_is_not_there
	$(OLDEST)/bin/python -m pytest -m gpu

# Also with Python 3.12's rules, but for those that ask for syntax that 3.11 does not have.
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff check --target-version py312 --ignore UP040,UP046,UP047 .
	$(BIN)/ruff format --check .

# A report of this machine's GPU: every test that needs one, then every benchmark, written to benchmarks/results. Each command
# takes less than ten minutes and can be run alone. Uses PYTHON's own torch, triton, numpy and pytest, and installs nothing but
# this checkout. QUICK=1 takes a few minutes in all; REFERENCE=CLONE runs a clone of facebookresearch/mae (needs timm);
# DATA=SHARDS, a folder of `fastmae shards build`, adds the loader and the step fed from it.
RESULTS ?= $(if $(QUICK),runs/gpu,benchmarks/results)
BENCH := $(PYTHON) -m fastmae.benchmarks
GPU := --device cuda --out $(RESULTS)
STEP := $(GPU) $(if $(REFERENCE),--reference $(REFERENCE)) $(if $(QUICK),--batches 256 --rounds 3)
# Without the packages that read and write data, the tests of kernels and models alone.
GPU_TESTS = $(if $(shell $(PYTHON) -c "import PIL, safetensors, simplejpeg, tyro, webdataset, xxhash" 2>&1),$(addsuffix \
	.py,$(addprefix tests/test_,attention choice compile decoder_input kernel_speed linear mae masked_mse masking patches \
	philox random_masking step take_rows)),tests)
gpu:
	$(PYTHON) -c "import fastmae.kernels" 2>/dev/null || \
		$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@failed=0; run() { echo "$$@"; "$$@" || failed=1; }; \
	run $(PYTHON) -m pytest -m gpu $(GPU_TESTS); \
	run $(BENCH) attention $(GPU); \
	run $(BENCH) kernels $(GPU) $(if $(QUICK),--models base); \
	for model in base $(if $(QUICK),,large huge); do run $(BENCH) step --models $$model $(STEP); done; \
	run $(BENCH) waterfall $(GPU) $(if $(QUICK),--rounds 3); \
	$(if $(DATA),run $(BENCH) loader --gpu --data $(DATA) $(GPU) $(if $(QUICK),--rounds 2);) \
	exit $$failed

# A hundred faults of all kinds in one run, whose end must have the bits of a run without any: about ten minutes on two cores.
soak: $(VENV)/.installed
	$(BIN)/python -m tests.soak --faults 100 --out runs/soak

clean:
	rm -rf $(VENV) $(OLDEST) runs *.egg-info
