# Needs Python 3.11, make and a package index; everything else is fetched into .venv.
#
#   make demo       two servers, one picture, 1 bit beside 16 bits (under 3 minutes on 2 cores)
#   make test       linters, types and all tests that run without a GPU
#   make capacity   how many requests fit into a KV pool
#   make accuracy   what codes cost a small model, in exact match (5 minutes)
#   make kernel-summary   the newest kernel records, as ratios to FlashAttention 3
#   make serving-summary  the newest serving records, as ratios to stock vLLM

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# PyTorch's CPU builds are not on PyPI: take them from a directory of wheels where pip is given one,
# from PyTorch's own index elsewhere.
WHEELS := $(wildcard $(addsuffix /torch-*+cpu*.whl,$(PIP_FIND_LINKS)))
TORCH  := $(addprefix --find-links ,$(PIP_FIND_LINKS)) $(if $(WHEELS),,--torch-backend=cpu)

export HF_HUB_OFFLINE := 1
export UV_HTTP_TIMEOUT ?= 180
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint types profiles capacity accuracy kernel-summary serving-summary lock clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	@$(BIN)/python -m deploy.demo

# Two processes, which take one file after the other: its tests share engines.  By name, as it
# happens, the files that take long come before the last ones.
test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Profiles of the small model: run it when its weights have changed.
profiles: $(STAMP)
	$(BIN)/python -m tests.tinyvlm.profiles

capacity: $(STAMP)
	$(BIN)/python -m benchmarks.capacity

accuracy: $(STAMP)
	$(BIN)/python -m benchmarks.accuracy --quick

kernel-summary: $(STAMP)
	@$(BIN)/python -m benchmarks.kernels --summary

serving-summary: $(STAMP)
	@$(BIN)/python -m benchmarks.serving --summary

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(STAMP): setup.py $(wildcard deploy/cpu/*.txt deploy/cpu/vllm_shim/*.py deploy/cpu/vllm_shim/*.pth) | $(BIN)/uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode $(TORCH) \
	    --override deploy/cpu/overrides.txt --constraint deploy/cpu/constraints.txt \
	    --requirement deploy/cpu/requirements.txt --editable '.[test]'
	@touch $@

# The versions that the tests have seen; run it after a change of vLLM's version.
lock: $(BIN)/uv
	$(BIN)/uv pip compile --quiet --python $(BIN)/python $(TORCH) --no-header --no-annotate \
	    --override deploy/cpu/overrides.txt --no-emit-package vllm --upgrade \
	    deploy/cpu/requirements.txt --extra test setup.py --output-file deploy/cpu/constraints.txt

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	rm -rf deploy/cpu/vllm_shim/build deploy/cpu/vllm_shim/*.egg-info
