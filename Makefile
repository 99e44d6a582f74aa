# Two commands for a stranger, each in a fresh virtual environment of its own:
#   make demo   install, draw pictures at full precision and at 4 and 3 bits into demo_out/
#   make test   install with the test extras, then ruff, mypy and the CPU tests
# A second run reuses the environment until pyproject.toml or this file changes.
#
# TORCH is installed first and by itself, so that a requirement such as diffusers cannot choose a
# build. On Linux, PyPI's torch carries CUDA (several GB); for a machine without an NVIDIA GPU:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= demo_out
# One process a core, one thread a process: the tests are many and small.
PYTEST_ARGS ?= -n auto --dist worksteal

# The repository has a folder kernels/, and Hugging Face libraries look for a package of that name:
# keep the working directory off sys.path (pq_fx itself is found through its editable install).
export PYTHONSAFEPATH = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Nothing here needs a model hub; a test or a demo that asks for one should fail at once.
export HF_HUB_OFFLINE = 1

.PHONY: demo test lint types pytest clean

demo: .venv/installed
	.venv/bin/pq-fx demo --out $(OUT)

test: lint types pytest

lint: .venv-test/installed
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .

# mypy cannot see setuptools' package-dir (passes/ is pq_fx.passes), so give it a tree that has it.
types: .venv-test/installed
	rm -rf build/types && mkdir -p build/types/pq_fx
	ln -s "$(CURDIR)"/pq_fx/* "$(CURDIR)/passes" "$(CURDIR)/kernels" build/types/pq_fx/
	cd build/types && "$(CURDIR)"/.venv-test/bin/mypy --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" -p pq_fx

pytest: .venv-test/installed
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 .venv-test/bin/pytest $(PYTEST_ARGS)

.venv/installed: EXTRAS =
.venv-test/installed: EXTRAS = [test]
.venv/installed .venv-test/installed: pyproject.toml Makefile
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q $(TORCH)
	$(@D)/bin/pip install -q -e '.$(EXTRAS)'
	touch $@

clean:
	rm -rf .venv .venv-test build demo_out .mypy_cache .ruff_cache .pytest_cache
