"""Out of memory: half the batch from there on, once; then a line that says what to set."""

from types import SimpleNamespace

import pytest
import torch

from helpers.core.errors import StudyError
from helpers.evaluation.engine import with_halved_batch
from helpers.study.schema import Batch

LIMITS = Batch(tokens=4096, rows=64)
PROMPTS = [SimpleNamespace(item=SimpleNamespace(id=str(i))) for i in range(9)]


def asking(fits, calls):
    """Answers three prompts of any batch, and the rest of one that has at most `fits` rows."""

    def ask(prompts, limits):
        calls.append((len(prompts), limits))
        for count, prompt in enumerate(prompts):
            if count == 3 and limits.rows > fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield {"id": prompt.item.id}

    return ask


def test_a_batch_that_fits_is_left_alone(recwarn):
    calls = []
    assert len(list(with_halved_batch(asking(64, calls), PROMPTS, LIMITS))) == 9
    assert calls == [(9, LIMITS)]
    assert not recwarn


def test_the_rest_is_asked_with_half_a_batch():
    calls = []
    with pytest.warns(
        UserWarning, match=r"= \{tokens: 4096, rows: 64\}; .* \{tokens: 2048, rows: 32\}"
    ):
        found = list(with_halved_batch(asking(32, calls), PROMPTS, LIMITS))
    assert [made["id"] for made in found] == [str(i) for i in range(9)]
    assert calls == [(9, LIMITS), (6, Batch(tokens=2048, rows=32))]


def test_a_second_time_the_study_file_has_to_say_less():
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(
            StudyError, match=r"set evaluation.batch to \{tokens: 1024, rows: 16\}"
        ) as told,
    ):
        list(with_halved_batch(asking(16, []), PROMPTS, LIMITS))
    assert "\n" not in str(told.value)


def test_other_errors_are_not_caught():
    def ask(prompts, limits):
        yield {"id": "0"}
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        list(with_halved_batch(ask, PROMPTS, LIMITS))
