# Each verb sets up what it needs (.venv, dependencies, the native build) and then does its job;
# a second run reuses what is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CORE_SOURCES := $(shell find csrc -type f)
CLANG_FORMAT_SOURCES := $(filter %.h %.cpp %.cu %.cuh %.inc,$(CORE_SOURCES) $(wildcard bench/kernels/* tests/gpu_on_host/*))

.PHONY: demo test gpu-test lint format bench core-test arm-test sanitize races clean

demo: $(INSTALLED)
	$(BIN)/fastmaml demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# The tests that need a GPU, on one that is the host, where convolutions take long; all: GPU_TESTS=
GPU_TESTS ?= -k "not (conv_net and (drop_in or batched))"
gpu-test: $(INSTALLED)
	PYTHONPATH=tests $(BIN)/python -m gpu_on_host $(BIN)/python -m pytest -n auto \
	    --maxprocesses 8 --dist worksteal -m gpu $(GPU_TESTS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CLANG_FORMAT_SOURCES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_FORMAT_SOURCES)

bench: $(INSTALLED)
	$(BIN)/python -m bench run --quick

# The core's own C++ tests; `sanitize` runs the same ones under the address and
# undefined-behaviour sanitizers.
core-test: $(INSTALLED)
	$(BIN)/cmake -S . -B build/core -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DCMAKE_BUILD_TYPE=Release -DFASTMAML_TESTS=ON -DFASTMAML_PYTHON=OFF -DFASTMAML_CUDA=0
	$(BIN)/cmake --build build/core
	$(BIN)/ctest --test-dir build/core --output-on-failure --parallel 2

# The same for 64-bit ARM, by a cross-compiler and QEMU (Debian: g++-aarch64-linux-gnu, qemu-user),
# which does not fork a process of several threads.
arm-test: $(INSTALLED)
	$(BIN)/cmake -S . -B build/arm -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DCMAKE_TOOLCHAIN_FILE=csrc/tests/aarch64-linux.cmake \
	    -DCMAKE_BUILD_TYPE=Release -DFASTMAML_TESTS=ON -DFASTMAML_PYTHON=OFF -DFASTMAML_CUDA=0
	$(BIN)/cmake --build build/arm
	FASTMAML_ISA=neon FASTMAML_FEW_CASES=1 $(BIN)/ctest --test-dir build/arm --output-on-failure --parallel 2 \
	    --exclude-regex '^thread_pool$$'

sanitize: $(INSTALLED)
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG='-O1 -g1' \
	    -DFASTMAML_TESTS=ON -DFASTMAML_PYTHON=OFF -DFASTMAML_CUDA=0 -DFASTMAML_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure --parallel 2

# The GPU's kernels on the host, teams of threads under the thread sanitizer.
races: $(INSTALLED)
	$(BIN)/cmake -S . -B build/races -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG='-O1 -g1' \
	    -DFASTMAML_TESTS=ON -DFASTMAML_PYTHON=OFF -DFASTMAML_CUDA=0 \
	    -DFASTMAML_PORTABLE=ON -DFASTMAML_SANITIZE=thread
	$(BIN)/cmake --build build/races --target cuda_tests
	$(BIN)/ctest --test-dir build/races --output-on-failure -R '^cuda_'

$(INSTALLED): pyproject.toml setup.py CMakeLists.txt $(CORE_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastmaml/_core*.so
