# Needs Python 3.11 or newer, git and make; everything else goes into .venv.
#
#   make quickstart [HOST=pyro]   train on real digits and draw the figures (NumPyro by default)
#   make test                     lint, types and every test
#   make lint                     lint and types only
#   make bench                    time, memory and gradient noise, as ratios within one run
#   make snr [FIGURE=plots.png]   signal-to-noise ratio and variance against the number of particles
#   make table                    exact bias and variance, into docs/bias_and_variance.md
#   make tutorials                run the notebooks at full length and keep their outputs

PYTHON ?= python3
# Some shells export HOST as the machine's name, so from the environment only the two hosts count.
ifeq ($(origin HOST)$(filter numpyro pyro,$(HOST)),environment)
HOST := numpyro
endif
HOST ?= numpyro

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
IS_RECENT := -c 'import sys; sys.exit(sys.version_info < (3, 11))'

# The pinned versions. An unpinned torch would bring gigabytes of CUDA libraries.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

# Two pytest workers share the cores: one thread each.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
	XLA_FLAGS=--xla_cpu_multi_thread_eigen=false

# The environment is .venv alone, whatever the caller's shell has on its path.
unexport PYTHONPATH PYTHONHOME

.PHONY: quickstart test lint bench snr table tutorials

quickstart: $(STAMP)
	$(BIN)/python tutorials/quickstart.py --host $(HOST)

test: lint
	GRADEST_REQUIRE=both $(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks

snr: $(STAMP)
	$(BIN)/python -m tests.benchmarks.snr_gaussian_toy $(if $(FIGURE),--figure "$(FIGURE)")

table: $(STAMP)
	$(BIN)/python -m tests.benchmarks.bias_and_variance

tutorials: $(STAMP)
	$(BIN)/python tutorials/execute.py

# Stamped last, so an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python $(IS_RECENT) 2>/dev/null || { \
	  $(PYTHON) $(IS_RECENT) || { \
	    echo "gradest needs Python 3.11 or newer, got '$(PYTHON)' ($$($(PYTHON) --version 2>&1))." \
	      "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }; \
	  $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing into $(VENV), which takes some minutes the first time"
	$(INSTALL) torch
	$(INSTALL) --editable '.[dev]'
	@touch $@
