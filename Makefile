# Every target sets itself up on a machine that has Python, git and a package index.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test coverage lint docs lock clean

# One thread each: nets this small gain nothing from more, and lose much where something else runs beside them.
demo test coverage: export OMP_NUM_THREADS = 1

demo: $(READY)
	$(BIN)/fedlscl fit --config configs/digits/fedavg.yaml
	$(BIN)/fedlscl fit --config configs/digits.yaml
	$(BIN)/fedlscl report runs/digits

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

coverage: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q --cov --cov-report=term --cov-report=html

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(READY)
	$(BIN)/mkdocs build --strict
	@echo open site/index.html

lock: $(READY)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
		--all-extras --group test --group lint --group docs pyproject.toml -o requirements.lock

$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet uv; }
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -r requirements.lock -e .
	touch $@

clean:
	rm -rf .venv dist build runs site htmlcov .coverage*
