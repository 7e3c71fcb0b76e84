"""Every kind of task gives the very metrics of lm-evaluation-harness's own run, item by item."""

import pytest
from benchmarks.lm_eval_tasks import ROWS

from helpers.sources.models import random_model

pytestmark = pytest.mark.long

CLOSE = 1e-4  # nats


@pytest.fixture
def parities(tmp_path, tokenizer, monkeypatch):
    """parities(kinds, positions): a tiny model, asked by both."""
    import datasets.config
    import torch
    from benchmarks.lm_eval_parity import HFLM, run

    torch.set_num_threads(1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def compare(kinds=tuple(ROWS), positions=None):
        model = random_model("llama", seed=11)
        if positions:
            model.config.max_position_embeddings = positions
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        options = {"dtype": "float32", "batch_size": 4, "device": "cpu"}
        options["softmax_dtype"] = "float64"  # a step of float32 at 3,000 nats is 2e-4
        harness = HFLM(pretrained=str(tmp_path / "model"), **options)
        sizes = {"items": 12, "rounds": 1, "kinds": kinds}
        return run(model, tokenizer, harness, tmp_path / "tasks", **sizes)

    return compare


def test_metrics_texts_and_log_probabilities_are_the_harnesss(parities):
    compared = parities()
    assert {p.kind: (p.differing, p.other_texts) for p in compared} == dict.fromkeys(ROWS, (0, 0))
    for parity in compared:
        assert parity.metrics >= parity.items
        assert parity.largest <= CLOSE


def test_a_text_longer_than_the_context_is_read_in_the_harnesss_windows(parities):
    [parity] = parities(["wikitext"], positions=128)
    assert parity.differing == 0
    assert parity.largest <= CLOSE
