# `make demo` and `make test` do all their own set-up: in the active environment where a torch >= 2.9 imports, else in .venv.
PYTHON ?= python3
HAVE_TORCH := $(shell $(PYTHON) -c "import torch; print(int(tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 9)))" 2>/dev/null)
ifeq ($(HAVE_TORCH),1)
BIN := $(dir $(shell $(PYTHON) -c "import sys; print(sys.executable)"))
else
BIN := $(CURDIR)/.venv/bin/
endif
EXTRAS := train,export,quant,hf,dev

.PHONY: demo test test-all check tables smoke site setup

setup: $(BIN).saccade-installed

$(BIN).saccade-installed: pyproject.toml
	@test -x $(BIN)python || $(PYTHON) -m venv .venv
	$(BIN)python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	@touch $@

demo: setup ## Compare five backbones on tiles of photographs; the report is at runs/demo/report.html
	$(BIN)saccade compare tiles --models swin_nano,convnext_nano,nat_nano,biformer_nano,poolformer_nano --seeds 2 --epochs 2 --out runs/demo

test: setup ## Everything light, within 25 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)python -m pytest -n 2 -m "not slow"

test-all: setup
	OMP_NUM_THREADS=1 $(BIN)python -m pytest -n 2

check: setup
	$(BIN)ruff check . && $(BIN)mypy

tables: setup ## Write the index, the table of systems and the README's counts from the cards
	$(BIN)python -m saccade.tools.catalog

smoke: setup ## The wheel, installed into an empty environment (torch apart, which it borrows) and tried there
	OMP_NUM_THREADS=1 $(BIN)python tests/wheel/build.py --borrow-torch

site: setup $(BIN).saccade-docs-installed ## The documentation, in site/; it needs no network to be read
	NO_MKDOCS_2_WARNING=1 $(BIN)python -m mkdocs build

$(BIN).saccade-docs-installed: pyproject.toml
	$(BIN)python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	@touch $@
