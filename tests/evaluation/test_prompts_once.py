"""An evaluation job draws its items once, and renders and tokenizes each prompt once."""

from collections import Counter

import pytest

from helpers.evaluation import prompts
from helpers.evaluation.engine import ask_all
from helpers.evaluation.predictions import read_prompts
from helpers.evaluation.stage import evaluation_stage_operations
from helpers.quantization.variants import load_variant
from helpers.sources.sampling import evaluation_items


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often each set was drawn, and each item's prompt rendered and tokenized."""
    counts: Counter = Counter()

    def counted(name: str, key) -> None:
        function = getattr(prompts, name)

        def call(*args):
            counts[name, key(args)] += 1
            return function(*args)

        monkeypatch.setattr(prompts, name, call)

    counted("evaluation_items", lambda args: args[1])
    counted("render_prompt", lambda args: args[0].id)
    counted("model_inputs", lambda args: args[1].item.id)
    return counts


def test_a_job_draws_once_and_renders_each_prompt_once(sound_run, calls):
    """Prompts on record, counted operations and predictions are all made of the same prompts."""
    run = sound_run("llama", "noquant")
    with run.outputs():
        job = run.job
        model, tokenizer = load_variant(job)
        rendered = prompts.study_prompts(job.study, tokenizer)
        prompts.record_prompts(job, rendered)
        operations = evaluation_stage_operations(job, tokenizer, rendered)
        predictions = ask_all(model, tokenizer, job.study, prompts=rendered)
        recorded = {
            name: read_prompts(job.paths.evaluation(job.model, job.variant), name)
            for name in job.study.evaluation.datasets
        }
    ids = [item.id for name in recorded for item in evaluation_items(job.study, name)]
    expected = Counter({("evaluation_items", name): 1 for name in recorded})
    for function in ("render_prompt", "model_inputs"):
        expected.update((function, item_id) for item_id in ids)
    assert calls == expected
    assert operations["float32"] > 0
    for name, rows in predictions.items():
        hashes = {item_id: row["prompt_hash"] for item_id, row in recorded[name].items()}
        assert {row["id"]: row["prompt_hash"] for row in rows} == hashes
