# Small Doge from a checkout. Everything is installed into .venv, by itself and once; `make` alone prints help.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# A stamp says that its extra is installed as pyproject.toml and constraints.txt ask now: `align`, which holds all of
# `train`, and `dev`, which holds all of both.
TRAIN := $(VENV)/.installed-align
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
# Which checkout the environment was made for: one that was copied or moved still runs the code of the old place.
PLACE := $(VENV)/.checkout

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint docs clean moved

help:
	@echo "make demo   train, teach, evaluate and report on a tiny Doge on this machine, into runs/demo"
	@echo "make test   check the code with ruff and run the tests"
	@echo "make lint   ruff check, ruff format --check, mypy"
	@echo "make docs   build the documentation into site/"
	@echo "make clean  remove caches and build products (keeps .venv and runs/)"
	@echo
	@echo "The first run installs what it needs into .venv. Another Python: make demo PYTHON=python3.12"

demo: $(TRAIN)
	$(BIN)/doge demo --output_dir runs/demo

test: $(DEV)
	$(BIN)/python -m ruff check
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(DEV)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

# The variable silences a notice of the theme's; the build asks nothing of any network.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf build dist site src/*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.*' -not -path './runs/*' -prune -exec rm -rf {} +

# $(call install,EXTRA): the environment if there is none that works, then the package with an extra. The old stamps go
# first and the caller writes the new one last, so an install that fails or is interrupted leaves none.
define install
@rm -f $(TRAIN) $(DEV)
@if [ -f $(PLACE) ] && [ "$$(cat $(PLACE))" != "$(CURDIR)" ]; then \
	echo "$(VENV) was made for $$(cat $(PLACE)): making a new one"; rm -rf $(VENV); \
fi
@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	found=$$("$(PYTHON)" -c 'import platform; print(platform.python_version())' 2>/dev/null) || found="not there"; \
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "Small Doge needs Python 3.10 or newer, and $(PYTHON) is $$found." \
			"Name another one: make PYTHON=/path/to/python3" >&2; \
		exit 1; \
	}; \
	echo "Making $(VENV) with Python $$found"; \
	"$(PYTHON)" -m venv --clear $(VENV); \
fi
@echo "Installing Small Doge with [$(1)] into $(VENV): some minutes the first time, seconds later;" \
	"pip downloads, and says nothing until it is done"
@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$(1)]"
@echo "$(CURDIR)" > $(PLACE)
endef

$(TRAIN): pyproject.toml constraints.txt
	$(call install,align)
	@touch $@

$(DEV): pyproject.toml constraints.txt
	$(call install,dev)
	@touch $(TRAIN) $@

$(DOCS): pyproject.toml constraints.txt
	$(call install,docs)
	@touch $(TRAIN) $@

ifneq ($(wildcard $(PLACE)),)
ifneq ($(shell cat $(PLACE)),$(CURDIR))
$(TRAIN) $(DEV) $(DOCS): moved
endif
endif
