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
# Two processes, whatever the number of cores: many tests start processes of their own. The tests of a file share a process.
# Timing tests run afterwards, alone.
BESIDE := --numprocesses 2 --dist loadfile --no-loadscope-reorder

# What every change must pass, in less than ten minutes on two cores: every kind of test that needs no GPU, each kind of case once.
test: $(VENV)/.installed
	$(PYTEST) "not gpu and not timing and not all" $(BESIDE)
	$(PYTEST) "not gpu and timing and not all"

# Every test that needs no GPU: all fuzzing, all cases in Triton's interpreter, every kill test, and the soak.
test-all: $(VENV)/.installed
	$(PYTEST) "not gpu and not timing" $(BESIDE)
	$(PYTEST) "not gpu and timing"
	$(MAKE) soak

# The oldest pair of torch and triton that is supported, torch's CUDA build, in an environment of its own (5 GB): everything can
# be imported, every kernel compiles for sm_80, 90 and 100 as it is launched, ops and models match their references, tests that need a
# GPU are collected, and `make gpu` reports in one line that there is none.
OLDEST ?= .venv-oldest
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[demo,dev]"
	touch $@

OLDEST_TESTS := tests/test_layers.py $(addsuffix .py,$(addprefix tests/kernels/test_,ahead_of_time add_norm gelu masked_mse patches short_attention \
	take_rows decoder_input random_masking resized_crop philox compile) tests/benchmarks/test_gradients tests/model/test_linear \
	tests/model/test_fused tests/model/test_block_measured tests/model/test_mae tests/step/test_step tests/step/test_parallelize \
	tests/data/test_to_device tests/data/test_loader)
test-oldest: export CUDA_VISIBLE_DEVICES :=
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
	$(OLDEST)/bin/python -m pytest -m "not gpu and not timing" $(OLDEST_TESTS)
	$(OLDEST)/bin/python -m pytest tests/benchmarks/test_benchmarks.py -k gpu_that_is_not_there
	$(OLDEST)/bin/python -m pytest -m gpu
	$(MAKE) gpu PYTHON=$(OLDEST)/bin/python RESULTS=runs/oldest

# Also with Python 3.12's rules, but for those that ask for syntax that 3.11 does not have.
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff check --target-version py312 --ignore UP040,UP046,UP047 .
	$(BIN)/ruff format --check .

# A time-limited report of this machine's GPU, the most informative items first: PART=1 takes at most 8 minutes, PART=2 at most 4 and finds
# what part 1 compiled and chose; without PART both run, and MINUTES=N gives each part N. Uses PYTHON's own torch, triton, numpy
# and pytest, and installs nothing. RESULTS: the folder to write; ARCHIVE: that of the archive; DATA: shards (default: generated);
# REFERENCE: a clone of facebookresearch/mae (needs timm). DEVICE=cpu TINY=1 is a dry run.
RESULTS ?= runs/gpu
DEVICE ?= cuda
gpu:
	$(PYTHON) -m pytest benchmarks/gpu --device $(DEVICE) --results $(RESULTS) $(if $(PART),--part $(PART)) \
		$(if $(MINUTES),--minutes $(MINUTES)) $(if $(ARCHIVE),--archive $(ARCHIVE)) $(if $(TINY),--tiny) \
		$(if $(DATA),--data $(DATA)) $(if $(REFERENCE),--reference $(REFERENCE))

# A hundred faults of all kinds in one run, which must end bitwise identical to a run without any: ten minutes on two cores.
soak: $(VENV)/.installed
	$(BIN)/python -m tests.soak --faults 100 --out runs/soak

clean:
	rm -rf $(VENV) $(OLDEST) runs *.egg-info
