# The two commands: `make demo` and `make test`. Everything they need is set up in .venv first.
#
#   PYTHON=python3.12 make test     another interpreter (3.11 or newer)
#   TORCH===2.11.0 make test        another torch than the newest (2.11 or newer)
#   FORCE_CUDA=1 make test          a missing CUDA toolkit is an error
#   FORCE_CPU=1 make test           leaves the CUDA part out

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
TORCH ?= >=2.11
VENV ?= .venv
BIN := $(VENV)/bin
CSRC := $(shell find csrc -type f)
FORMATTED := $(filter %.h %.cpp %.inl %.cu %.cuh,$(CSRC))
# Of a line of ninja's, which is a whole compiler command, how far it is and the file.
PROGRESS := sed -uE 's,^(\[[0-9]+/[0-9]+[^]]*\]).* -c ([^ ]*/)?csrc/([^ ]+) -o .*,\1 csrc/\3,'

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format coverage coverage-cpp coverage-python sanitize \
  sanitize-threads docs sdist wheel matrix cuda-toolkit clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(VENV)/.installed ## virtual environment with everything in it, and the built extension

$(VENV)/.packages: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}: set PYTHON")'
	@echo "wus_ext: downloading packages, some 3 GB, nearly all of it torch with its CUDA libraries"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install "torch$(TORCH)" torchvision --group dev
	@touch $@

$(VENV)/.built: $(VENV)/.packages setup.py $(CSRC)
	$(BIN)/python setup.py -q build_ext --inplace 2>&1 | $(PROGRESS)
	@touch $@

$(VENV)/.installed: $(VENV)/.built pyproject.toml
	@echo "wus_ext: installing what the command line, the callbacks and the tests use"
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[test,integrations]"
	@$(BIN)/python -c 'import wus_ext; print("wus_ext is built:", wus_ext.build_info())'
	@touch $@

demo: setup ## WUS and WUS+LR against stock PyTorch on real images: table and plot in runs/demo
	$(BIN)/wus-ext compare --dataset digits --models vgg11_bn --methods baseline fused wus wus+lr --full fused \
	  --epochs 12 --batch-size 64 --lr 0.02 --limit-train 640 --limit-test 600 \
	  --warmup 3 --threshold 3 --patience 1 --max-window 2 --out runs/demo \
	  $(if $(wildcard runs/demo/compare.json),--resume)

test: setup ## all tests
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: $(VENV)/.packages ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/.packages ## ruff and clang-format, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# The C++ built apart, with $(1) = address, thread or coverage in it, and its tests. Without the safe
# path they would import the package that lies here, whose C++ has nothing in it. Reports are in
# build/$(1)/report.*: pytest keeps what a test prints.
NATIVE_TESTS := tests/cpu tests/engine tests/test_functional.py tests/test_nn.py tests/test_types.py
define instrumented
	WUS_INSTRUMENT=$(1) FORCE_CPU=1 $(BIN)/python setup.py -q build \
	  --build-base build/$(1) --build-lib build/$(1)/lib 2>&1 | $(PROGRESS)
endef
define preloaded
LD_PRELOAD="$(foreach library,$(2) libstdc++.so,$$(g++ -print-file-name=$(library)))" \
	  WUS_INSTRUMENT=$(1) PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/$(1)/lib \
	  $(BIN)/python -m pytest -q -p wus_ext -p no:cacheprovider
endef

sanitize: setup ## the C++ under AddressSanitizer and UndefinedBehaviorSanitizer, on its tests
	$(call instrumented,address)
	ASAN_OPTIONS=detect_leaks=0:log_path=build/address/report \
	  UBSAN_OPTIONS=log_path=build/address/report $(call preloaded,address,libasan.so libubsan.so) \
	  $(NATIVE_TESTS) tests/cuda $(PYTEST_ARGS)

sanitize-threads: setup ## the C++ under ThreadSanitizer, on its tests
	$(call instrumented,thread)
	TSAN_OPTIONS=ignore_noninstrumented_modules=1:report_signal_unsafe=0:log_path=build/thread/report:suppressions=tests/threads.supp OMP_NUM_THREADS=3 \
	  $(call preloaded,thread,libtsan.so) $(NATIVE_TESTS) $(PYTEST_ARGS)

coverage: coverage-cpp coverage-python ## which lines the tests run

coverage-cpp: setup ## which lines of the C++ its tests run
	$(call instrumented,coverage)
	find build -name '*.gcda' -delete
	$(call preloaded,coverage,) $(NATIVE_TESTS) tests/cuda $(PYTEST_ARGS)
	$(BIN)/gcovr

coverage-python: setup ## which lines of the Python package all tests run
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q $(PYTEST_ARGS)
	$(BIN)/coverage combine
	$(BIN)/coverage report

docs: setup ## the API reference, in build/docs
	$(BIN)/python docs/reference.py build/docs

sdist: setup ## the sources, in dist/
	$(BIN)/python -m build --sdist --no-isolation

wheel: sdist ## a wheel for the CPU, made from the sources in dist/ and tried in an environment of its own
	PYTHON=$(abspath $(BIN)/python) tests/wheel.sh

matrix: ## builds and tests with PYTHON and TORCH in a temporary environment
	tests/matrix.sh $(PYTHON) $(TORCH)

cuda-toolkit: $(VENV)/.packages ## pip's CUDA compiler, of the version that torch was built with
	$(BIN)/python -c 'from importlib.metadata import version; print("cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]==" + version("cuda-toolkit"))' | xargs $(BIN)/pip install --quiet

clean: ## removes the virtual environment and everything built
	rm -rf $(VENV) build dist *.egg-info wus_ext/*.so .*_cache .coverage*
