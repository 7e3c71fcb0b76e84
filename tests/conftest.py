"""What the tests share: a folder of their own, one thread, tiny models, one valid study."""

import copy
import gc
import json
import os
import sys
import types
from pathlib import Path

# Before any library reads them; torch and tokenizers are imported only by tests that need them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import yaml

SEED = 20260419
STUDY = """
title: A study for the tests
seed: 7
runtime: {device: cpu, dtype: float32, threads: 1, quantized: int8}
models:
  base: {random: llama}
  tuned:
    finetune:
      start: base
      dataset: {shipped: openmath_train}
      items: 8
      heldout_items: 4
      epochs: 1
      learning_rate: 1.0e-3
      warmup_fraction: 0.1
      batch_items: 4
      max_tokens: 1024
      autocast: none
calibration:
  adapter: openmath
  dataset: {shipped: openmath_train}
  items: 6
  max_tokens: 1024
  batch_tokens: 2048
variants:
  noquant: {}
  rtn_w8a8: {preset: w8a8}
  smoothquant_w8a8:
    preset: w8a8
    smooth: {alpha: 0.5, targets: [attention_input, mlp_input]}
baseline: noquant
evaluation:
  batch: {tokens: 512, rows: 16}
  datasets:
    arc:
      adapter: arc
      source: {shipped: arc}
      items: 6
      ask: {protocol: loglikelihood, normalize: bytes}
    squad_v2:
      adapter: squad_v2
      source: {shipped: squad_v2}
      items: 6
      ask: {protocol: generate, answer: boxed, stop: answer, shots: 1, max_new_tokens: 8}
  shared_text: {dataset: {shipped: squad_v2}, passages: 3, max_tokens: 64}
statistics:
  confidence: 0.95
  power: 0.8
  margin: 0.05
  resamples: 200
  primary:
    - {model: base, dataset: arc, baseline: noquant, variant: smoothquant_w8a8}
"""


def pytest_collection_finish(session):
    """What was imported lives on: a collection that looks for freed models may skip it."""
    gc.collect()
    gc.freeze()
    if corrections := sys.modules.get("statsmodels.stats.multitest"):
        # It collects at every call: a third of a second among all that is loaded here.
        corrections.gc = types.SimpleNamespace(collect=lambda: 0)


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory):
    """No test writes to the project's outputs or to its cache."""
    root = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUDY_OUTPUTS", str(root / "outputs"))
        patch.setenv("STUDY_CACHE", str(root / "cache"))
        yield root


@pytest.fixture
def study_settings() -> dict:
    """A valid study as plain data, the test's own to edit."""
    return copy.deepcopy(yaml.safe_load(STUDY))


@pytest.fixture
def write_study(tmp_path):
    """Write settings as a study file and return its path."""

    def write(settings, name: str = "study.yaml"):
        path = tmp_path / name
        text = settings if isinstance(settings, str) else yaml.safe_dump(settings, sort_keys=False)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def study_path(write_study, study_settings):
    """A valid study file."""
    return write_study(study_settings)


@pytest.fixture
def study(study_path):
    """A valid study, loaded."""
    from helpers.study.loading import load_study

    return load_study(study_path)


@pytest.fixture
def write_rows(tmp_path):
    """Write rows as a JSONL file and return its path as a study file gives it."""

    def write(rows, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(params=["llama", "qwen3"])
def family(request) -> str:
    """The two architectures the project knows."""
    return request.param


@pytest.fixture
def model(family):
    """A tiny seeded model in float32, the test's own to break."""
    import torch

    from helpers.sources.models import random_model

    torch.set_num_threads(1)
    return random_model(family, seed=SEED)


@pytest.fixture
def exact_model(model):
    """The same in float64, so that parities are not about rounding."""
    return model.double()


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, three special tokens, a chat template."""
    from helpers.sources.models import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(scope="session")
def studies_once(tmp_path_factory):
    """The folder of studies that are run once for all who need them.

    SMOKE_STUDIES names it where several runs of pytest share it, as in `make longtest`.
    """
    if given := os.environ.get("SMOKE_STUDIES"):
        return Path(given)
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "studies"


@pytest.fixture(scope="session")
def undisturbed(studies_once):
    """The smoke study, run once and never touched: what all other runs must equal.

    Its jobs are forks, and none of its processes reaches more than this machine.
    """
    from smoke_study import Smoke, run_once

    return run_once(studies_once / "undisturbed", lambda p: Smoke(p).run_guarded(STUDY_FORKS="yes"))


@pytest.fixture(scope="session")
def undisturbed_part(undisturbed, studies_once):
    """The undisturbed study with the variants PART alone: what other runs of those must equal."""
    from smoke_study import PART, run_once

    def run(place):
        part = undisturbed.copy(place).keep_variants(*PART)
        part.done()
        return part

    return run_once(studies_once / "part", run)


@pytest.fixture(scope="session")
def without_forks(studies_once):
    """The same run by make, each job a process of its own."""
    from smoke_study import PART, Smoke, run_once

    def run(place):
        return Smoke(place).keep_variants(*PART).run(STUDY_FORKS="no")

    return run_once(studies_once / "without_forks", run)


@pytest.fixture(scope="session")
def sound_runs(tmp_path_factory):
    """make(family, variant, **changes of the tiny model): a sound run, made once a session."""
    from quantized_run import QuantizedRun

    made = {}

    def make(family: str, variant: str, **changes):
        key = (family, variant, *changes.items())
        if key not in made:
            import torch

            torch.set_num_threads(1)
            root = tmp_path_factory.mktemp(f"{family}-{variant}")
            run = QuantizedRun(root, yaml.safe_load(STUDY), variant)
            run.save_source(family, **changes)
            run.calibrate()
            run.quantize()
            run.note_verified()
            made[key] = run
        return made[key]

    return make


@pytest.fixture
def sound_run(sound_runs, tmp_path):
    """run(family, variant): a copy of a sound run, the test's own to break."""
    return lambda family, variant: sound_runs(family, variant).copy(tmp_path / "run")
