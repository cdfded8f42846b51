# Two commands set everything up on a fresh machine with Python 3.11+: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint gpu soak clean

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

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A report of this machine's GPU under a clock, what tells most first: PART=1 takes at most 6 minutes, PART=2 at most 4 and finds
# what part 1 compiled and chose; without PART both run, and MINUTES=N gives each part N. Uses PYTHON's own torch, triton, numpy
# and pytest, and installs nothing. RESULTS: the folder to write; ARCHIVE: that of the archive; DATA: shards, or some are made;
# REFERENCE: a clone of facebookresearch/mae (needs timm). DEVICE=cpu TINY=1 is a dry run.
RESULTS ?= runs/gpu
DEVICE ?= cuda
gpu:
	$(PYTHON) -m pytest benchmarks/gpu --device $(DEVICE) --results $(RESULTS) $(if $(PART),--part $(PART)) \
		$(if $(MINUTES),--minutes $(MINUTES)) $(if $(ARCHIVE),--archive $(ARCHIVE)) $(if $(TINY),--tiny) \
		$(if $(DATA),--data $(DATA)) $(if $(REFERENCE),--reference $(REFERENCE))

# A hundred faults of all kinds in one run, whose end must have the bits of a run without any: about ten minutes on two cores.
soak: $(VENV)/.installed
	$(BIN)/python -m tests.soak --faults 100 --out runs/soak

clean:
	rm -rf $(VENV) runs *.egg-info
