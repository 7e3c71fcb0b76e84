"""Fine-tuning: the loss is on the answer only, the run is seeded, and it learns."""

import pytest
import torch

from helpers.core.errors import StudyError
from helpers.sources import models
from helpers.study.schema import FineTuning, Runtime

SETTINGS = {
    "start": "base",
    "dataset": {"shipped": "openmath_train"},
    "items": 12,
    "heldout_items": 4,
    "epochs": 3,
    "learning_rate": 3e-3,
    "warmup_fraction": 0.1,
    "batch_items": 4,
    "max_tokens": 64,
    "autocast": "none",
}


@pytest.fixture
def examples():
    generator = torch.Generator().manual_seed(5)
    lengths = [(6, 3), (9, 5), (4, 2), (12, 4)] * 3
    drawn = [torch.randint(3, 259, (p + a,), generator=generator).tolist() for p, a in lengths]
    return [(d[:p], d[p:]) for d, (p, _) in zip(drawn, lengths, strict=True)]


def test_the_loss_is_that_of_the_answers_read_one_by_one(exact_model, examples):
    """Plain cross-entropy over every answer token, each example alone, no padding."""
    total, count = 0.0, 0
    for prompt, answer in examples[:4]:
        logprobs = exact_model(torch.tensor([prompt + answer])).logits.log_softmax(-1)[0]
        for place, token in enumerate(answer, start=len(prompt) - 1):
            total -= logprobs[place, token].item()
            count += 1
    loss = models.answer_loss(exact_model, examples[:4], autocast="none")
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_it_learns_and_the_run_repeats(model, examples):
    from copy import deepcopy

    twin, settings = deepcopy(model), FineTuning(**SETTINGS)
    before = models.heldout_loss(model, examples, batch_items=4)
    steps = models.fine_tune_(model, examples, settings, seed=1)
    after = models.heldout_loss(model, examples, batch_items=4)
    assert after < before
    assert len(steps) == 9
    again = models.fine_tune_(twin, examples, settings, seed=1)
    assert [s.loss for s in again] == [s.loss for s in steps]
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_bfloat16_weights_are_not_trained(model, examples):
    """At a usual rate most of them would stay where they are; in float32 all can move."""
    settings = FineTuning(**SETTINGS | {"learning_rate": 1e-5})
    with pytest.raises(ValueError, match="would hardly move; load them in float32"):
        models.fine_tune_(model.bfloat16(), examples, settings, seed=1)
    runtime = Runtime(device="cpu", dtype="bfloat16", threads=1, quantized="int8")
    assert models.float32_runtime(runtime).dtype == "float32"
    trained = model.float()
    models.fine_tune_(trained, examples, settings, seed=1)
    assert models.cast_to_study_dtype(trained, runtime).dtype == torch.bfloat16


def test_every_example_is_seen_once_an_epoch(examples):
    settings = FineTuning(**SETTINGS)
    batches = models._epoch(examples, settings, seed=3)
    seen = [example for batch in batches for example in batch]
    assert sorted(seen) == sorted(examples)


def test_a_long_example_is_refused_before_training(model, examples):
    before = model.lm_head.weight.clone()
    settings = FineTuning(**SETTINGS | {"max_tokens": 16})
    long = [([1] * 20, [2, 3])]
    with pytest.raises(StudyError, match="max_tokens = 16 but an example has 22"):
        models.fine_tune_(model, long + examples, settings, seed=1)
    assert torch.equal(model.lm_head.weight, before)


def test_a_broken_loss_stops_the_training(model, examples):
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(StudyError, match=r"the loss is .* lower learning_rate"):
        models.fine_tune_(model, examples, FineTuning(**SETTINGS), seed=1)


@pytest.mark.parametrize(
    ("losses", "title"),
    [
        ([2.0, 1.9, 1.8, 1.7, 1.5, 1.2, 1.0, 0.9], "falls from 1.95 to 0.95"),
        ([1.0, 1.1, 1.2, 1.4, 1.6, 1.7, 1.9, 2.0], "rises from 1.05 to 1.95"),
        ([1.0, 1.4, 0.8, 1.2, 1.1, 0.9, 1.3, 1.0], "does not change clearly"),
        ([1.0] * 8, "does not change clearly"),
        ([1.0, float("nan"), 1.0, 1.0], "is not a number"),
    ],
)
def test_the_title_of_the_loss_says_what_it_did(losses, title):
    assert models.describe_loss(losses).startswith(f"The loss on the answers {title}")


@pytest.mark.parametrize("losses", [[1.0], [2.0, 1.0], [4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0]])
def test_of_a_few_steps_nothing_is_claimed(losses):
    assert models.describe_loss(losses) == "The loss on the answers, by step"
