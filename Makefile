# The two commands: `make demo` and `make test`. Everything they need is set up in .venv first.
#
#   PYTHON=python3.12 make test     another interpreter (3.11 to 3.13)
#   FORCE_CUDA=1 make test          a missing CUDA toolkit is an error
#   FORCE_CPU=1 make test           leaves the CUDA part out

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CSRC := $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format cuda-toolkit sanitize clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.built ## virtual environment with everything in it, and the built extension

$(VENV)/.packages: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}: set PYTHON")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch>=2.11" torchvision ninja numpy "setuptools>=77"
	@touch $@

$(VENV)/.built: $(VENV)/.packages setup.py $(CSRC)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	@$(BIN)/python -c 'import wus_ext; print("wus_ext:", wus_ext.build_info())'
	@touch $@

demo: setup ## WUS and WUS+LR against stock PyTorch on real images: table and plot in runs/demo
	$(BIN)/wus-ext compare --dataset digits --models vgg11_bn --methods baseline fused wus wus+lr --full fused \
	  --epochs 12 --batch-size 64 --lr 0.02 --limit-train 640 --limit-test 600 \
	  --warmup 3 --threshold 3 --patience 1 --max-window 2 --out runs/demo \
	  $(if $(wildcard runs/demo/compare.json),--resume)

test: setup ## all tests
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: setup ## ruff and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.inl %.cu %.cuh,$(CSRC))

format: setup ## ruff and clang-format, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.inl %.cu %.cuh,$(CSRC))

SANITIZED := build/sanitized/lib
sanitize: setup ## the C++ under AddressSanitizer and UndefinedBehaviorSanitizer, on its tests
	WUS_SANITIZE=1 FORCE_CPU=1 $(BIN)/python setup.py -q build --build-base build/sanitized --build-lib $(SANITIZED)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) \
	  WUS_SANITIZE=1 $(BIN)/pytest -q -p wus_ext -p no:cacheprovider tests/cpu tests/cuda tests/engine tests/engine $(PYTEST_ARGS)

cuda-toolkit: $(VENV)/.packages ## pip's CUDA compiler, of the version that torch was built with, and cudnn-frontend's headers
	$(BIN)/python -c 'from importlib.metadata import version; print("cuda-toolkit[nvcc,cccl,cudart]==" + version("cuda-toolkit"))' | xargs $(BIN)/pip install --quiet
	$(BIN)/pip install --quiet --no-deps "nvidia-cudnn-frontend>=1.32" || echo "cuDNN's graphs will be left out"

clean: ## removes the virtual environment and everything built
	rm -rf $(VENV) build *.egg-info wus_ext/*.so .pytest_cache .ruff_cache
