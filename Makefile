# `make demo` and `make test` need Python >= 3.11 and nothing else; they make .venv on first use (about 7 GB with the standard torch build).
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
PY := $(VENV)/bin/python
# Written last: a .venv without it is unfinished, and one older than the two files is brought up to date.
STAMP := $(VENV)/.complete
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: help venv demo gallery test test-all lint gpu gpu-kit
help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 16

venv: $(STAMP) ## make .venv with everything that the demo and the tests need

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "diffusers 0.42 needs Python >= 3.11 and none was found. Install one and name it: make venv PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "diffusers 0.42 needs Python >= 3.11, and $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make venv PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: its ensurepip or venv module is missing. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -e '.[train,eval,dev]' -c constraints.txt
	@touch $@

demo: $(STAMP) ## draw one page (demo.png) with every bundled family, and count what is right
	$(PY) benchmarks/quality_demo.py --out demo.png

gallery: $(STAMP) ## draw the pictures of docs/gallery.md from the bundled checkpoints
	$(PY) docs/gallery.py

test: $(STAMP) ## the test suite without the long matrices, on two cores (ARGS="-k name" for pytest)
	$(ONE_THREAD) $(PY) -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-all: $(STAMP) ## the long matrices too
	$(ONE_THREAD) $(PY) -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(STAMP) ## ruff and pyright
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

# `make gpu PY=python3` touches no .venv, and needs no network.
gpu: $(if $(filter $(VENV)/bin/python,$(PY)),$(STAMP)) ## with a GPU: tests and speed of everything, at most 8 minutes
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PY) is missing or older than Python 3.11. Name another: make gpu PY=python3.12"; exit 1; }
	$(PY) tests/gpu/run.py $(ARGS)

gpu-kit: $(STAMP) ## pack what `make gpu PY=python3` needs on a machine without network (gpu-kit.tar)
	$(PY) tests/gpu/pack.py $(ARGS)
