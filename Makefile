# Every target does its own set-up: a virtual environment in .venv, PyTorch, the build.
#   PYTHON  the interpreter; where it imports a PyTorch of 2.11 or newer, that one is used
#   TORCH   what is installed where it does not
# Both are read when .venv is made: remove it to change them.
#   RELEASE the PyTorch of `make test-torch`, which gets an environment of its own in .venv-torch-RELEASE
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
RELEASE ?= 2.15.0
TORCH_VENV ?= .venv-torch-$(RELEASE)
FUZZ_SECONDS ?= 600

venv_python := $(VENV)/bin/python
sources := $(shell find csrc include -type f) setup.py pyproject.toml
cxx_files = $(shell find csrc include benchmarks fuzz tests -name '*.cpp' -o -name '*.h' \
  -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')
python_files := setup.py python tests scripts benchmarks examples

.NOTPARALLEL:
.PHONY: help demo test test-torch bench build fuzz sanitize-cpu test-gpu test-vllm \
  test-adopters vllm-engine sanitize format lint sdist wheel wheel-test clean

help:  ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 24

demo: $(VENV)/extra-demo $(VENV)/built  ## merge attention states of a real model and of real shapes
	$(venv_python) -m examples.demo $(DEMO)

test: $(VENV)/extra-test $(VENV)/extra-demo $(VENV)/built  ## run every test; JOBS=2: in two parts at once
	scripts/pytest_parts.sh $(venv_python) $(PYTEST)

test-torch: $(VENV)/built  ## run every test on another PyTorch, with the op library of .venv; RELEASE=2.15.0
	@$(PYTHON) scripts/environment.py $(TORCH_VENV) --release $(RELEASE) \
	  --extra test --extra demo
	scripts/test_torch.sh "$(abspath $(TORCH_VENV))/bin/python" $(RELEASE) \
	  python/merge_attn_states/libmerge_attn_states.so $(PYTEST)

bench: $(VENV)/built  ## measure on this machine; BENCH="--only cold --output FILE"
	$(venv_python) -m benchmarks $(BENCH)

build: $(VENV)/built  ## build in place and install the package into .venv as editable

$(VENV)/ready: pyproject.toml scripts/environment.py
	@command -v $(PYTHON) > /dev/null || \
	  { echo "merge_attn_states: no $(PYTHON): install the package python3." >&2; exit 1; }
	@$(PYTHON) scripts/environment.py $(VENV) --torch "$(TORCH)"
	@touch $@

$(VENV)/extra-%: $(VENV)/ready
	@$(PYTHON) scripts/environment.py $(VENV) --torch "$(TORCH)" --extra $*
	@touch $@

$(VENV)/built: $(VENV)/ready $(sources)
	@scripts/build.sh $(venv_python)
	@$(venv_python) -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

fuzz:  ## fuzz the C entry for FUZZ_SECONDS (clang and its libFuzzer are needed)
	FUZZ_SECONDS=$(FUZZ_SECONDS) fuzz/run.sh

sanitize-cpu: $(VENV)/extra-test  ## layout, alias and error tests under ASan and UBSan
	scripts/sanitize_cpu.sh $(venv_python)

test-gpu:  ## run the suite on a GPU with PYTHON itself, installing nothing; JOBS=8: in parts
	scripts/test_gpu.sh $(PYTHON)

test-vllm: $(VENV)/extra-test $(VENV)/built  ## test the plugin in the real vLLM 0.33.0 and 0.26.0
	scripts/test_vllm.sh $(venv_python)

test-adopters: $(VENV)/extra-test $(VENV)/extra-demo $(VENV)/built  ## call other projects' own merges beside ours
	PYTHONPATH=tests $(venv_python) -m adopters.packages
	$(venv_python) -m pytest $(PYTEST) tests/adopters

vllm-engine:  ## run the whole vLLM 0.26.0 with the plugin on a GPU, with PYTHON's PyTorch 2.11
	@scripts/build.sh $(PYTHON)
	PYTHONPATH=python:tests $(PYTHON) -m in_vllm.engine $(ENGINE)

sanitize:  ## memcheck and racecheck on a GPU with PYTHON itself; SHARD=k/n: a part; JOBS=n: n at once
	scripts/sanitize_gpu.sh $(PYTHON)

format: $(VENV)/extra-dev  ## format the C++, CUDA and Python sources
	$(VENV)/bin/clang-format -i $(cxx_files)
	$(venv_python) -m ruff check --fix $(python_files)
	$(venv_python) -m ruff format $(python_files)

lint: $(VENV)/extra-dev  ## check format, style and types
	$(VENV)/bin/clang-format --dry-run -Werror $(cxx_files)
	$(venv_python) -m ruff check $(python_files)
	$(venv_python) -m ruff format --check $(python_files)
	$(venv_python) -m mypy

sdist: $(VENV)/extra-release  ## build the source distribution into dist/
	$(venv_python) -m build --no-isolation --sdist

wheel: $(VENV)/extra-release  ## build what a release publishes, checked, into dist/: sdist and wheel
	@$(venv_python) scripts/release_wheel.py

wheel-test: $(VENV)/extra-release  ## build the wheel from the sdist and test it in a fresh environment
	TORCH="$(TORCH)" scripts/wheel_test.sh $(venv_python) $(PYTHON)

clean:  ## remove what was built; .venv stays
	rm -rf build dist python/*.egg-info python/merge_attn_states/*.so
	rm -f $(VENV)/built
