PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ABSBIN := $(CURDIR)/$(BIN)
EXTRAS := dev,cpu,hqq,eval,tensorrt,serve
BUILD_REQUIREMENTS := cmake ninja nanobind nanobind-backend nlohmann-json scikit-build-core

# Two stamps: what is installed, and what is compiled, so that an edited C++ file costs seconds.
PACKAGES := $(VENV)/.packages
BUILT := $(VENV)/.built
TENSORRT_HEADERS := build/tensorrt-headers/include/NvInferRuntime.h
CPP := $(shell find runtime -name '*.h' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.cu')

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(BUILT) $(TENSORRT_HEADERS)  ## create .venv with all that the other targets need; nothing to do if up to date

$(PACKAGES): pyproject.toml constraints.txt
	@missing=; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo 'make setup: $(PYTHON) is not Python 3.11 or later, which constraints.txt needs; name one with PYTHON=...' >&2; exit 1; }; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c 'import pathlib, sys, sysconfig; \
	  sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' || \
	  missing="$$missing python3-dev"; \
	command -v "$${CXX:-c++}" >/dev/null || missing="$$missing g++"; \
	[ -z "$$missing" ] || { echo "make setup: missing system packages; on Debian and Ubuntu:" \
	  "apt-get install$$missing" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt $(BUILD_REQUIREMENTS)
	DISABLE_CUDA=1 $(BIN)/pip install --quiet -c constraints.txt hqq
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

$(BUILT): $(PACKAGES) runtime/CMakeLists.txt mla_deploy/__init__.py $(CPP)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# The tests of the TensorRT plugin are compiled against them; where they cannot be had, they are
# skipped, and say why.
$(TENSORRT_HEADERS): tools/fetch_tensorrt_headers.py | $(PACKAGES)
	-$(BIN)/python tools/fetch_tensorrt_headers.py > /dev/null

demo: setup  ## run the main job on the shipped model
	PATH="$(ABSBIN):$$PATH" bash examples/demo.sh

test: setup  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

lint: setup types  ## check style, types, the directions of imports, C++ formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

# build/typing is a tree of links in the layout of the installed package, which mypy and
# import-linter need. -S leaves out site-packages' .pth files, and with them the hook of the
# editable install, through which import-linter would find the checkout and not this tree.
types: setup
	rm -rf build/typing
	mkdir -p build/typing
	cp -rs "$(CURDIR)/mla_deploy" build/typing/
	cp -rs "$(CURDIR)/exporters" "$(CURDIR)/quant" "$(CURDIR)/runtime" build/typing/mla_deploy/
	cd build/typing && "$(ABSBIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir ../mypy
	cd build/typing && PYTHONPATH="$$("$(ABSBIN)/python" -c \
	  'import sysconfig; print(sysconfig.get_path("purelib"))')" "$(ABSBIN)/python" -S \
	  "$(ABSBIN)/lint-imports" --config "$(CURDIR)/pyproject.toml" --no-cache --no-logo

bench: setup  ## run the benchmarks and print their figures
	$(BIN)/python benchmarks/run.py

clean:  ## remove what was built and cached; .venv stays
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -r {} +
