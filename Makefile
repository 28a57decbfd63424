# Everything runs from .venv; `make setup` builds it and does nothing when it is up to date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# Small tensor operations on a shared machine run best with one thread per process.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test slow lint docs bench peers clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Weightsmith needs Python 3.11 or newer, found " + sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute or two, once)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[hf,search,dev,docs]" 2>$(VENV)/setup.log \
		|| { cat $(VENV)/setup.log >&2; exit 1; }
	@touch $@

demo: setup
	@$(BIN)/weightsmith run recipes/quickstart.yaml

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyrefly check

test: lint
	@$(BIN)/pytest -n 2 --dist worksteal

slow: lint
	@$(BIN)/pytest -m slow --timeout 7200

docs: setup
	@$(BIN)/sphinx-build -n -W -q -b html docs docs/_build/html && echo docs/_build/html/index.html

# The programs we are measured against, in an environment of their own.
peers: .venv-peers/.ready

.venv-peers/.ready: constraints.txt
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 mergekit==0.1.5 \
		pytorch_optimizer==4.1.0 weightwatcher==0.7.7 fusion-bench==0.2.33 2>.venv-peers/setup.log \
		|| { cat .venv-peers/setup.log >&2; exit 1; }
	@touch $@

bench: setup peers
	@$(BIN)/python benchmarks/merge.py
	@$(BIN)/python benchmarks/merge_fusion_bench.py
	@$(BIN)/python benchmarks/mediator.py
	@$(BIN)/python benchmarks/spectral.py
	@$(BIN)/python benchmarks/training_parts.py
	@$(BIN)/python benchmarks/averaging.py
	@$(BIN)/python benchmarks/tezo.py
	@$(BIN)/python benchmarks/meap.py
	@$(BIN)/python benchmarks/ztt.py
	@$(BIN)/python benchmarks/hrp.py
	@$(BIN)/python benchmarks/maskpro.py
	@$(BIN)/python benchmarks/tailoring.py

clean:
	rm -rf runs docs/_build .pytest_cache .ruff_cache
