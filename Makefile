# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The lock: gpu where an NVIDIA device is visible, cpu elsewhere; `make LOCK=requirements/cpu.txt demo` overrides.
LOCK ?= requirements/$(if $(wildcard /dev/nvidiactl),gpu,cpu).txt
# Two threads at most unless told otherwise: more than there are cores is many times slower.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-long quick lint fuzz mutation install clean-demo

demo: install  ## Teach a small model to reason, start to finish, in about ten minutes
	$(BIN)/python scripts/run_pipeline.py --config recipes/tiny/pipeline.yaml

test: install lint  ## All tests but those that CI alone has the time for
	$(BIN)/python tests/lanes.py -m "not long"

test-long: install  ## Those: whole pipelines, comparisons with TRL, DeepSpeed's offload
	$(BIN)/python tests/lanes.py -m long

quick: install  ## The tests that take seconds
	$(BIN)/pytest -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/basedpyright

fuzz: install  ## Ten minutes of coverage-guided fuzzing of the grader
	$(BIN)/pip install --no-deps atheris==3.0.0
	cd /tmp && $(CURDIR)/$(BIN)/python $(CURDIR)/tests/fuzz/fuzz_grading.py -max_total_time=$(or $(SECONDS),600) -dict=$(CURDIR)/tests/fuzz/words.dict -max_len=4096

mutation: install  ## Which small faults, put into the mathematics one at a time, no test notices; a quarter of an hour on one core
	$(BIN)/mutmut run --max-children $(or $(JOBS),1)
	$(BIN)/mutmut results

clean-demo:  ## Forget the demo's outputs
	rm -rf outputs/demo

install: $(VENV)/.installed

$(VENV)/.installed: $(LOCK) pyproject.toml
	@command -v gcc >/dev/null || { echo "error: gcc is missing; install a C compiler (DeepSpeed and vLLM build small extensions)"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old; Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --no-deps -r $(LOCK)
	$(BIN)/pip install --no-deps --no-build-isolation -e .
	touch $@
