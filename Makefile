# Every target sets itself up on a machine that has Python, git and a package index.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint clean

# One thread each: nets this small gain nothing from more, and lose much where something else runs beside them.
demo test: export OMP_NUM_THREADS = 1

demo: $(READY)
	$(BIN)/fedlscl fit --config configs/digits/fedavg.yaml
	$(BIN)/fedlscl fit --config configs/digits.yaml
	$(BIN)/fedlscl report runs/digits

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet uv; }
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -r requirements.lock -e .
	touch $@

clean:
	rm -rf .venv dist build runs
