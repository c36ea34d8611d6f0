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
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)

BIN   := $(VENV)/bin
# Twice quiet: errors only.
PIP   := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
STAMP := $(VENV)/.setup-$(TORCH)

.DEFAULT_GOAL := help
.PHONY: help setup demo test serve bench check fmt lock clean distclean

help: ## list the verbs
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv with everything pinned (TORCH=cuda for a GPU machine)

demo: $(STAMP) ## start the service, caption an image and a video over HTTP, compare speeds
	$(BIN)/python -m service.demo $(ARGS)

test: $(STAMP) ## run the whole test suite
	$(BIN)/python -m pytest $(ARGS)

serve: $(STAMP) ## run the service
	$(BIN)/flashserve serve $(ARGS)

bench: $(STAMP) ## run the benchmark
	$(BIN)/flashserve bench $(ARGS)

check: $(STAMP) ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fmt: $(STAMP) ## format the code and repair what lint can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(STAMP) ## pin today's newest versions within pyproject.toml's ranges
	$(PIP) install --dry-run --ignore-installed --report $(VENV)/lock.json '.[dev]'
	$(BIN)/python -c "$$WRITE_PINS" $(VENV)/lock.json > constraints.new
	mv constraints.new constraints.txt

clean: ## remove caches and build leftovers
	rm -rf build dist *.egg-info model/native/*.so .pytest_cache .mypy_cache .ruff_cache
	find service model tests loadtest -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)

$(STAMP): pyproject.toml constraints.txt $(wildcard model/native/*.cpp model/native/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "FlashServe needs Python 3.11 or newer; name one with PYTHON=..., e.g. make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Could not create $(VENV). On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(INSTALL_TORCH_$(TORCH))
	@echo 'Installing what pyproject.toml names, as pinned in constraints.txt (a minute or two)'
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m model.native
	@rm -f $(VENV)/.setup-*
	@touch $@

# torch goes in first and without its dependencies: so nothing but torch is ever asked of the extra index, and the
# step after finds it there. The index is asked once, briefly; a torch of the right version is left as it is.
TORCH_FOUND = $$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null)

define INSTALL_TORCH_cpu
case "$(TORCH_FOUND)" in $(TORCH_VERSION)|$(TORCH_VERSION)+*) exit 0;; esac; \
if $(BIN)/python -m pip index versions torch --index-url $(TORCH_INDEX) --timeout 5 --retries 0 2>/dev/null | grep -qF '$(TORCH_VERSION)'; then \
  echo "torch $(TORCH_VERSION): the CPU build"; \
  $(PIP) install --no-deps --index-url $(TORCH_INDEX) torch==$(TORCH_VERSION); \
else \
  echo "torch $(TORCH_VERSION): $(TORCH_INDEX) does not answer; taking the registry's own build (public PyPI's for Linux: gigabytes)"; \
  $(PIP) install --no-deps torch==$(TORCH_VERSION); \
fi
endef

define INSTALL_TORCH_cuda
case "$(TORCH_FOUND)" in *+cpu) $(PIP) uninstall --yes torch;; esac; \
$(PIP) install --no-deps torch==$(TORCH_VERSION)
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
