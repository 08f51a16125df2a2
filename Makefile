# Everything runs in a virtual environment of its own under $(VENV), made from the first Python >= 3.11 found.
#   make demo      install, then build a model end to end on the embedded default text
#   make test      install with the development tools, lint, run all tests, two files of them at a time (WORKERS=1: one)
#   make soak      10,000 requests of every kind on each runner, each compared with what it gets alone
#   make kill-test kill training again and again, also inside a checkpoint, and compare with a run that was never stopped
# Variables:  PYTHON=/path/to/python3   VENV=.venv   OUT=runs/demo   BUDGET=3m   ARGS='more options of plinth build'
#             LLAMA_SERVER=/path/to/llama-server  (for make bench-inference: times to first token are compared with it)
#             SHAKESPEARE=tinyshakespeare.txt  (for make bench: the text of the character benchmark, left out without it)
#             TORCH_INDEX=https://download.pytorch.org/whl/cpu  (where the registry's own torch is a CUDA build that you do not want)

SHELL := /bin/bash
VENV ?= .venv
OUT ?= runs/demo
WORKERS ?= 2
BIN := $(VENV)/bin
TORCH_INDEX ?=
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v $$p; break; }; done)
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --prefer-binary -c constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo install test lint oracle soak kill-test bench bench-training bench-inference bench-ppo bench-posttraining clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	$(BIN)/plinth build --out $(OUT) $(if $(BUDGET),--budget $(BUDGET)) $(ARGS)

install: $(VENV)/.installed

# Test processes share the cores: a thread that spins while it waits for the others would take theirs.
test: export OMP_WAIT_POLICY ?= passive
test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests benchmarks
	PYTHONPATH=src $(BIN)/lint-imports
	$(BIN)/mypy

oracle: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m oracle $(ARGS)

soak: $(VENV)/.installed-dev
	SOAK_REQUESTS=10000 $(BIN)/python -m pytest tests/inference/test_soak.py $(ARGS)

kill-test: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/kill_resume.py $(ARGS)

bench: bench-training
	$(BIN)/python benchmarks/inference_throughput.py
	$(BIN)/python benchmarks/build_default.py
	$(BIN)/python benchmarks/cluster_plan.py
	$(BIN)/python benchmarks/tables.py

# LitGPT wants libraries of its own ages, so it lives in an environment of its own.
bench-training: $(VENV)/.installed-dev $(VENV)-litgpt/.installed
	$(BIN)/python benchmarks/train_throughput.py --litgpt $(VENV)-litgpt/bin/python
	$(BIN)/python benchmarks/step_budget.py
	$(BIN)/python benchmarks/optimizer_share.py
	$(BIN)/python benchmarks/loader_throughput.py
	$(BIN)/python benchmarks/checkpoint_stall.py
	$(BIN)/python benchmarks/kill_resume.py
	$(if $(SHAKESPEARE),$(BIN)/python benchmarks/shakespeare_char.py --data $(SHAKESPEARE))
	$(if $(SHAKESPEARE),$(BIN)/python benchmarks/shakespeare_char.py --data $(SHAKESPEARE) --contest three-minutes)
	$(BIN)/python benchmarks/tables.py

# llama.cpp is compiled here for this processor: it needs CMake and a C++ compiler.
bench-inference: $(VENV)/.installed-dev $(VENV)-llama/.installed
	$(BIN)/python benchmarks/inference_peers.py --llama $(VENV)-llama/bin/python
	$(BIN)/python benchmarks/inference_ttft.py $(if $(LLAMA_SERVER),--llama-server $(LLAMA_SERVER))
	$(BIN)/python benchmarks/inference_start.py
	$(BIN)/python benchmarks/tables.py

bench-ppo: $(VENV)/.installed-dev
	for part in gold frontier astray mix; do $(BIN)/python benchmarks/ppo_gold.py $$part || exit 1; done
	$(BIN)/python benchmarks/ppo_ablations.py
	$(BIN)/python benchmarks/tables.py

# PAIRS=file.jsonl trains on a file of chosen and rejected answers instead of made-up ones.
bench-posttraining: $(VENV)/.installed-dev $(VENV)-trl/.installed
	$(BIN)/python benchmarks/posttraining_peers.py --trl $(VENV)-trl/bin/python $(if $(PAIRS),--data $(PAIRS)) $(ARGS)
	$(BIN)/python benchmarks/chat_templates.py --trl $(VENV)-trl/bin/python
	$(BIN)/python benchmarks/sft_packing.py
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf $(VENV) $(VENV)-litgpt $(VENV)-llama $(VENV)-trl build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo "Plinth needs Python 3.11 or newer, and none is on the PATH." \
		"Install one (https://www.python.org/downloads/), or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Plinth needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another one: make PYTHON=/path/to/python3.11" % v[:2])'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment." \
		"Install its venv module (Debian, Ubuntu: apt install python3-venv), or name another: make PYTHON=/path/to/python3" >&2; exit 1; }

# A stamp is written only after a complete install, so an interrupted one is taken up again.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)-litgpt/.installed: constraints.txt | $(BIN)/python
	$(BIN)/python -m venv $(VENV)-litgpt
	$(VENV)-litgpt/bin/python -m pip install --disable-pip-version-check --prefer-binary -c constraints.txt litgpt
	@touch $@

$(VENV)-trl/.installed: constraints.txt | $(BIN)/python
	$(BIN)/python -m venv $(VENV)-trl
	$(VENV)-trl/bin/python -m pip install --disable-pip-version-check --prefer-binary -c constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) trl==1.16.0
	@touch $@

$(VENV)-llama/.installed: constraints.txt | $(BIN)/python
	$(BIN)/python -m venv $(VENV)-llama
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(VENV)-llama/bin/python -m pip install --disable-pip-version-check -c constraints.txt llama-cpp-python
	@touch $@
