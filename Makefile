# Every target sets itself up on a machine that has Python, git and a package index.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all publish-check coverage gpu lint docs lock clean

# One thread each: nets this small gain nothing from more, and lose much where something else runs beside them.
demo test test-all coverage: export OMP_NUM_THREADS = 1

# $(call had,RUN,TEXT without commas): what a run of the demo has, the MB that its clients sent, its seconds.
had = @awk -F'[ ,]+' '/^ *"up_bytes"/ { mb = $$3 / 1e6 } /^ "total_seconds"/ { s = $$3 } \
	END { printf "%-10s  $(2); %.2f MB up; %.0f s\n", "$(1)", mb, s }' \
	$$(ls -td runs/digits/$(1)/version_* | head -n 1 | sed 's|.*|&/results.json &/costs.json|')

DIGITS = $(BIN)/fedlscl fit --config configs/data/digits.yaml

demo: $(READY)
	$(DIGITS) --config configs/method/fedavg.yaml --config configs/digits/cnn.yaml
	$(DIGITS) --config configs/method/fedavg_vit.yaml --config configs/digits/fedavg_vit.yaml
	$(DIGITS) --config configs/method/fedridge.yaml --config configs/digits/training_free.yaml
	$(BIN)/fedlscl fit --config configs/digits.yaml
	$(BIN)/fedlscl report runs/digits
	@echo "Not the same in all runs (the ViT is pretrained and frozen; a CNN starts from scratch):"
	$(call had,FedRidge,ViT; closed-form head; nothing is trained)
	$(call had,FedAvg+ViT,ViT; trained linear head)
	$(call had,FedLSCL,ViT; trained CNN and generator and head; replays stored images)
	$(call had,FedAvg,no ViT; trained CNN with a linear head)

PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal -q

test: $(READY)
	$(PYTEST)

test-all: $(READY)
	$(PYTEST) -m ""

publish-check: $(READY)
	$(BIN)/python -m pytest -q -m publish

coverage: $(READY)
	$(PYTEST) -m "" --cov --cov-report=term --cov-report=html

# Call it again until it succeeds; DATA is the folder of CIFAR-100 and the ViT's weights.
gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py --data_root $(or $(DATA),data)

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
