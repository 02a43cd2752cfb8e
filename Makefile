# make run · demo · test · lint · bench · screenshots: each sets up .venv by itself, once.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && echo $(p))))
PORT ?= 7860
BIN := .venv/bin

.PHONY: run demo test lint bench screenshots clean

run: .venv/.runtime  ## the page on http://localhost:$(PORT)
	$(BIN)/python app.py --port $(PORT)

demo: .venv/.runtime  ## the same comparison without a browser, into out/demo
	$(BIN)/python -m lab.demo out/demo

test: .venv/.tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: .venv/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python .venv lab app.py

bench: .venv/.runtime  ## ratios of every method to LoRA
	$(BIN)/python -m lab bench methods

screenshots: .venv/.tests
	$(BIN)/python -m tests.screenshots

clean:
	rm -rf .venv out

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "NoRA Lab needs Python 3.11 or newer: install one, or call make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.runtime: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@

.venv/.tests: tests/requirements.txt .venv/.runtime
	$(BIN)/python -m pip install --disable-pip-version-check -q -r tests/requirements.txt
	@touch $@
