# Every target makes the environment it needs: .venv, and .venv-colab for test-colab. PYTHON=python3.12 picks another
# interpreter, ARGS="-p NAME=VALUE" hands parameters to the run. `make help` lists the targets with the texts after ##.
PYTHON ?= python3
BIN := .venv/bin
COLAB := .venv-colab/bin
NOTEBOOKS := git ls-files -z '*.ipynb'
# A process of one thread for each core, each takes whole files. One after the other, with what a test prints:
# WORKERS="-n 0 -s".
WORKERS ?= -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# bitsandbytes hands functions to torch.compile when it is imported, which loads torch's compiler: 1.5 s of every process.
# The tests of compilation switch TorchDynamo on again.
TESTS := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1
PYTEST := python -m pytest -q $(WORKERS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run help test test-more test-gguf fuzz check rehearse bench tables test-colab soak jupyter format gguf

run: .venv/ready ## the whole loop on the sample: no GPU, minutes
	$(BIN)/python -m llm_finetuning run --profile sample $(ARGS)

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1 \2/p' $(MAKEFILE_LIST) | \
	  while read -r target text; do printf 'make %-11s %s\n' "$$target" "$$text"; done

rehearse: .venv/ready ## the same at Phi-2's true size, random weights
	$(BIN)/python -m llm_finetuning run --profile rehearsal $(ARGS)

test: .venv/ready ## the tests; one room: ARGS="tests/data"
	$(TESTS) $(BIN)/$(PYTEST) -m "not more" $(ARGS)

# The slow matrices: kills at random moments, sharded training, other model families, many visitors, every benchmark.
test-more: .venv/ready .venv/tasks .venv/search ## the slow tests
	$(TESTS) $(BIN)/$(PYTEST) -m more --kills 6 $(ARGS)

check: .venv/ready ## ruff, arrows between the rooms, clean notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(NOTEBOOKS) | xargs -0 -r $(BIN)/nbstripout --verify

format: .venv/ready ## brings the files into that form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(NOTEBOOKS) | xargs -0 -r $(BIN)/nbstripout

# A million mutated records of a user's own data, in every shape and form; another number: ARGS=10000.
fuzz: .venv/ready ## mutated records of a user's own data
	PYTHONPATH=. $(BIN)/python tests/support/fuzz_own_data.py $(or $(ARGS),1000000)

# A run killed twenty times at random moments of its training, and twenty times in all its stages; resumed each time.
soak: .venv/ready ## forty kills of a run, resumed each time
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/training/test_trainer.py tests/training/test_stages.py -k "killed and (many or stage)" --kills 20 $(ARGS)

# Measures on this machine (about forty minutes on two idle cores), writes benchmarks/results/<machine>.json and prints its tables.
# One part: ARGS="--part merge"; merge and inference at Phi-2's true size: ARGS="--size true".
bench: .venv/ready ## measures this machine
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/bench.py $(ARGS)

# The README's table, docs/benchmarks.md, docs/scaling.md and the pictures of growth, from benchmarks/results.
tables: .venv/ready ## README's table and docs/ from the results
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/tables.py

jupyter: .venv/ready ## JupyterLab, to play with the notebooks
	$(BIN)/jupyter lab

# Optional: llama.cpp and its converters; then make gguf MODEL=path/to/finetuned_phi2 writes GGUF files and a Modelfile to
# path/to/finetuned_phi2-gguf. Other types: TYPES=f16,Q8_0,Q5_K_M,Q4_0; the LoRA adapter too: ADAPTER=path/to/adapter.
gguf: .venv/gguf ## MODEL=folder as GGUF files for llama.cpp
	@test -n "$(MODEL)" || { echo "llama.cpp is installed. Now say which model: make gguf MODEL=path/to/finetuned_phi2"; exit 2; }
	$(BIN)/python -m llm_finetuning.release.gguf "$(MODEL)" $(if $(TYPES),--types "$(TYPES)") $(if $(ADAPTER),--adapter "$(ADAPTER)")

# All tests of GGUF files, with llama.cpp's own llama-server and llama-cli: both are built here, which needs cmake.
test-gguf: .venv/gguf .readers/llama.cpp/bin/llama-cli ## the tests of GGUF files, with llama.cpp
	$(TESTS) $(BIN)/$(PYTEST) tests/release/test_gguf.py tests/release/test_gguf_readers.py \
		tests/release/test_preferred.py::test_as_a_gguf_file_it_computes_and_answers_alike \
		tests/data/test_generation_servers.py $(ARGS)

.readers/llama.cpp/bin/llama-cli: .venv/gguf tests/support/llama_programs.py
	PYTHONPATH=. $(BIN)/python tests/support/llama_programs.py
	@touch $@

.venv/gguf: .venv/ready requirements-gguf.txt
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m llm_finetuning.release.llama_cpp_tools
	@touch $@

# The versions of Google Colab, and whether pip would leave its torch and numpy alone there (needs the registry). Left out
# is what does not stand on them: headless runs (what runs and shows them is not installed on Colab), make, benchmarks and
# house rules, and files that are copied, locked and replaced by the standard library alone. Slow tests and a browser too.
NOT_ON_COLAB := runner files test_benchmarks.py test_first_minutes.py test_house.py test_make.py test_peers.py \
  $(addprefix release/test_,llama_cpp_build.py lock.py replace.py replace_drive.py replace_faults.py) \
  $(addprefix data/test_generation_,kills.py texts.py) inference/test_ballots.py
test-colab: .venv/ready .venv-colab/ready ## the tests with Colab's versions
	$(BIN)/python tests/support/colab_resolve.py
	$(TESTS) $(COLAB)/$(PYTEST) -m "not slow and not browser and not more" $(NOT_ON_COLAB:%=--ignore=tests/%) $(ARGS)

# lm-evaluation-harness, which the evaluation notebook installs where tasks are set.
.venv/tasks: .venv/ready llm_finetuning/evaluation/tasks.py
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -c "from llm_finetuning.evaluation import tasks; tasks.install()"
	@touch $@

# Optuna, for the search command.
.venv/search: .venv/ready requirements-search.txt
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet -r requirements-search.txt
	@touch $@

.venv/ready: requirements.txt requirements-run.txt requirements-dev.txt constraints.txt pyproject.toml
	$(call environment,.venv,constraints.txt,-r requirements-dev.txt)

.venv-colab/ready: requirements.txt requirements-run.txt requirements-dev.txt constraints-colab.txt pyproject.toml
	$(call environment,.venv-colab,constraints-colab.txt,-r requirements-dev.txt)

# environment(folder, constraints, requirements): afresh; torch first. Where there is no GPU its CPU build is taken, of
# PyTorch's own index, or of pip's where that cannot be reached. The stamp `ready` comes last, so that an interrupted
# installation is begun again.
CPU_BUILD := --no-deps --retries 0 --timeout 10 --index-url https://download.pytorch.org/whl/cpu torch
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, %s is %s. Say for example: make PYTHON=python3.12 $(MAKECMDGOALS)" % (sys.executable, sys.version.split()[0]))'
	@$(PYTHON) -c 'import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, ("venv", "ensurepip"))) and "%s cannot make environments: on Debian and Ubuntu apt-get install python3-venv, or say for example: make PYTHON=python3.12 $(MAKECMDGOALS)" % sys.executable)'
	@echo "Installing into $(1): 2.4 GB, more with CUDA; a few minutes,"
	@echo "again only when the requirements change."
	$(PYTHON) -m venv --clear $(1)
	@command -v nvidia-smi >/dev/null || { echo "No GPU here: the CPU build of torch."; \
	  $(1)/bin/python -m pip install --quiet --constraint $(2) $(CPU_BUILD) 2>/dev/null || true; }
	$(1)/bin/python -m pip install --quiet --constraint $(2) torch numpy
	$(1)/bin/python -m pip install --quiet --constraint $(2) $(3)
	$(1)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@
endef
