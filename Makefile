# One verb, one command. `make help` lists them; each sets up .venv by itself when that is needed.
# ARGS goes to the command behind the verb: make test ARGS="-k tree", make serve ARGS="--port 9000".

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

# Which build of torch. `cpu` (default): PyTorch's CPU index, some 200 MB; where it cannot be reached, whatever
# the configured registry has. `cuda`: PyPI's own build for Linux, with CUDA, several gigabytes.
TORCH         ?= $(if $(wildcard $(VENV)/.setup-cuda),cuda,cpu)
TORCH_INDEX   ?= https://download.pytorch.org/whl/cpu
ifeq ($(filter $(TORCH),cpu cuda),)
$(error TORCH is cpu or cuda, not '$(TORCH)')
endif
# torchvision's transforms are all that is used of it, and they run over any build of torch (model/vision_ops.py).
TORCH_PINS    := $(shell grep -E '^(torch|torchvision)==' constraints.txt)

# Which builds of the native library are compiled (model/backends/native/builds.py): auto (the best that this machine runs), all,
# none, or names separated by commas. What was chosen last stays.
empty :=
space := $(empty) $(empty)
FLASH_BUILDS  ?= $(or $(patsubst $(VENV)/.builds-%,%,$(wildcard $(VENV)/.builds-*)),auto)
override FLASH_BUILDS := $(subst $(space),,$(FLASH_BUILDS))

BIN   := $(VENV)/bin
CPP   := $(wildcard model/backends/native/*.cpp model/backends/native/*.h tests/model/*.h)
# Twice quiet: errors only. Modules are compiled when they are first imported: most of them never are.
PIP   := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
INSTALL := $(PIP) install --no-compile
STAMP := $(VENV)/.setup-$(TORCH)
BUILT := $(VENV)/.builds-$(FLASH_BUILDS)
READY := $(STAMP) $(BUILT)

.DEFAULT_GOAL := help
.PHONY: help setup demo test sanitize serve bench check fmt lock clean distclean

help: ## list the verbs
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

setup: $(READY) ## create .venv with everything pinned (TORCH=cuda for a GPU machine)

demo: $(READY) ## start the service, caption an image and a video over HTTP, compare speeds
	$(BIN)/python -m service.demo $(ARGS)

test: $(READY) ## run the whole test suite; its slowest twenty tests are listed at the end
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal --durations=20 $(ARGS)

# The sanitizers' library comes first in every process, and the standard library with it, whose exceptions it watches.
SANITIZE_TESTS ?= tests/model/test_native.py tests/model/test_native_border.py tests/model/test_guided_native.py tests/model/test_drafters.py tests/model/test_equality.py
sanitize: $(READY) ## run the native library's tests with AddressSanitizer, UBSan and checks of indices (minutes)
	FLASH_SANITIZE=1 FLASH_BUILDS=avx2 $(BIN)/python -m model.backends.native.builds
	env FLASH_SANITIZE=1 FLASH_NATIVE=avx2 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so.6)" \
	  $(BIN)/python -m pytest --durations=5 $(SANITIZE_TESTS) $(ARGS)

serve: $(READY) ## run the service
	$(BIN)/flashserve serve $(ARGS)

bench: $(READY) ## run the benchmark
	$(BIN)/flashserve bench $(ARGS)

check: $(READY) ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

fmt: $(READY) ## format the code and repair what lint can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

lock: $(STAMP) ## pin today's newest versions within pyproject.toml's ranges
	FLASH_BUILDS=none $(PIP) install --dry-run --ignore-installed --report $(VENV)/lock.json '.[dev]'
	$(BIN)/python -c "$$WRITE_PINS" $(VENV)/lock.json > constraints.new
	mv constraints.new constraints.txt

clean: ## remove caches and build leftovers
	rm -rf build dist *.egg-info model/backends/native/*.so .pytest_cache .mypy_cache .ruff_cache
	@for choice in $(wildcard $(VENV)/.builds-*); do touch -t 200001010000 $$choice; done
	find service model tests loadtest -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "FlashServe needs Python 3.11 or newer; name one with PYTHON=..., e.g. make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Could not create $(VENV). On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(INSTALL_TORCH_$(TORCH))
	@echo 'Installing what pyproject.toml names, as pinned in constraints.txt (a minute or two)'
	@FLASH_BUILDS=none $(INSTALL) --constraint constraints.txt --editable '.[dev]'
	@rm -f $(VENV)/.setup-*
	@touch $@

$(BUILT): $(STAMP) setup.py $(wildcard model/backends/native/*.cpp model/backends/native/*.h model/backends/native/builds.py)
	@FLASH_BUILDS='$(FLASH_BUILDS)' $(BIN)/python -m model.backends.native.builds
	@$(BIN)/python -m model.backends.native
	@rm -f $(VENV)/.builds-*
	@touch $@

# torch and torchvision go in first and without their dependencies: so nothing but these two is ever asked of the extra
# index, and the step after finds them there. The index is asked once each, briefly; what is there at the right version is
# left as it is. Where pip knows another place (find-links), the index need not answer: so pip first asks once and without
# a word.
FOUND = $(BIN)/python -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' 2>/dev/null

define INSTALL_TORCH_cpu
set -e; for pin in $(TORCH_PINS); do \
  name=$${pin%%==*}; version=$${pin##*==}; \
  case "$$($(FOUND) $$name)" in $$version|$$version+*) continue;; esac; \
  if $(BIN)/python -m pip index versions $$name --index-url $(TORCH_INDEX) --timeout 5 --retries 0 2>/dev/null | grep -qF "$$version"; then \
    echo "$$name $$version: the CPU build"; \
    $(INSTALL) --no-deps --index-url $(TORCH_INDEX) --retries 0 $$pin 2>/dev/null || \
    $(INSTALL) --no-deps --index-url $(TORCH_INDEX) $$pin; \
  else \
    echo "$$name $$version: not found on $(TORCH_INDEX); taking the registry's own build (torch from public PyPI for Linux: gigabytes)"; \
    $(INSTALL) --no-deps $$pin; \
  fi; \
done
endef

define INSTALL_TORCH_cuda
set -e; for pin in $(TORCH_PINS); do \
  name=$${pin%%==*}; \
  case "$$($(FOUND) $$name)" in *+cpu) $(PIP) uninstall --yes $$name;; esac; \
  $(INSTALL) --no-deps $$pin; \
done
endef

# From pip's report to pins. Local parts (+cpu) and what only a CUDA build needs are left out: they depend on the machine.
define WRITE_PINS
import json, re, sys
print("# Exact versions of everything, as tested. Written by 'make lock'; used by 'make setup' and the Docker image.")
items = [i["metadata"] for i in json.load(open(sys.argv[1]))["install"]]
pins = {re.sub(r"[-_.]+", "-", m["name"]).lower(): m["version"].split("+")[0] for m in items}
for name in sorted(pins):
    if name != "flashserve" and not name.startswith(("nvidia-", "cuda-")):
        print(f"{name}=={pins[name]}")
endef
export WRITE_PINS
