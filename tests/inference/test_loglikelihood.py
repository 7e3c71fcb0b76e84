"""The packed rows score what one plain forward pass per option would."""

import math

import pytest
import torch

from helpers.evaluation.scoring import score_options
from helpers.inference.packed_attention import Segment
from helpers.inference.protocols import (
    OptionTokens,
    option_loglikelihoods,
    option_segment,
    scored_tokens,
)
from helpers.sources.items import Item


def made(seed: int, context: int, *options: int) -> OptionTokens:
    """Seeded tokens: a context of one length, options of the others."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 259, (count,), generator=generator).tolist()

    return OptionTokens(tokens(context), [tokens(count) for count in options])


ITEMS = [
    made(1, 12, 3, 5, 4, 2),
    made(2, 40, 1, 1),
    made(3, 1, 6, 1, 9),
    made(4, 7, 1),
    made(5, 25, 20, 1, 2, 2, 13),
    made(6, 12, 4, 4, 4),
]


@torch.inference_mode()
def plain(model, item: OptionTokens) -> list[float]:
    """One forward pass per option, the whole vocabulary at every position, float64."""
    sums = []
    for option in item.options:
        logits = model(torch.tensor([item.context + option])).logits[0]
        logprobs = logits.double().log_softmax(-1)
        start = len(item.context) - 1
        sums.append(sum(logprobs[start + i, token].item() for i, token in enumerate(option)))
    return sums


def scored(model, items, batch_tokens: int = 4096) -> list[list[float]]:
    scores = dict(option_loglikelihoods(model, items, batch_tokens=batch_tokens))
    assert sorted(scores) == list(range(len(items)))
    return [scores[i] for i in range(len(items))]


def assert_close(found, expected, tolerance: float):
    assert [len(sums) for sums in found] == [len(sums) for sums in expected]
    for sums, due in zip(found, expected, strict=True):
        assert sums == pytest.approx(due, abs=tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_scores_are_those_of_plain_passes(exact_model, attention):
    """Shared context, options that do not see each other, positions as if alone."""
    exact_model.set_attn_implementation(attention)
    expected = [plain(exact_model, item) for item in ITEMS]
    assert_close(scored(exact_model, ITEMS), expected, 1e-5)


def test_float32_scores_are_near_the_exact_ones(model):
    scores = scored(model, ITEMS)
    assert_close(scores, [plain(model.double(), item) for item in ITEMS], 1e-3)


def sharing(begin: int, *lengths: int) -> list[OptionTokens]:
    """Items whose contexts begin with the same tokens, some of them with more in common."""
    first = made(11, begin, 1).context
    more = made(12, 9, 1).context
    items = []
    for i, length in enumerate(lengths):
        item = made(20 + i, length, 2, 3)
        start = first + more * (i % 2)
        items.append(OptionTokens(start + item.context, item.options, (begin, len(start))))
    return items


def test_shared_beginnings_change_nothing(exact_model):
    """Read once for all that have them, they are worth what they are in each item alone."""
    items = sharing(17, 4, 6, 1, 9)
    for batch_tokens in (1, 40, 10**6):
        expected = [plain(exact_model, item) for item in items]
        assert_close(scored(exact_model, items, batch_tokens), expected, 1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 30, 64, 200, 10**6])
def test_the_batch_changes_nothing(model, batch_tokens):
    """From one item a row to all in one, with beginnings in common or without."""
    items = [*ITEMS, *sharing(17, 4, 6, 1, 9)]
    alone = [scored(model, [item])[0] for item in items]
    assert_close(scored(model, items, batch_tokens), alone, 1e-5)


def test_the_order_of_items_changes_nothing(model):
    order = [3, 0, 5, 2, 4, 1]
    scores = scored(model, [ITEMS[i] for i in order])
    expected = scored(model, ITEMS)
    assert_close(scores, [expected[i] for i in order], 1e-4)


def test_the_order_of_options_changes_nothing(exact_model):
    for item in ITEMS:
        turned = OptionTokens(item.context, item.options[::-1])
        assert_close(scored(exact_model, [turned]), [scored(exact_model, [item])[0][::-1]], 1e-5)


def test_an_option_does_not_see_its_neighbours(exact_model):
    item, other = ITEMS[0], made(9, 1, 30, 30)
    for k, option in enumerate(item.options):
        among = OptionTokens(item.context, [other.options[0], option, other.options[1]])
        alone = OptionTokens(item.context, [option])
        (_, result, _), (expected,) = (
            scored(exact_model, [among])[0],
            scored(exact_model, [alone])[0],
        )
        assert result == pytest.approx(expected, abs=1e-5), k


def test_equal_options_score_equally(exact_model):
    option = made(8, 1, 6).options[0]
    (scores,) = scored(exact_model, [OptionTokens(ITEMS[0].context, [option] * 3)])
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-9)


def test_the_probabilities_of_all_next_tokens_sum_to_one(exact_model):
    item = OptionTokens(ITEMS[0].context, [[token] for token in range(259)])
    (scores,) = scored(exact_model, [item])
    assert math.fsum(map(math.exp, scores)) == pytest.approx(1.0, abs=1e-5)


def test_each_token_is_read_once_and_every_one_scored():
    item = ITEMS[4]
    leaf = option_segment(item, ())
    assert len(leaf.tokens) == len(item.context) + sum(len(o) - 1 for o in item.options)
    assert len(leaf.tokens) == len(leaf.positions) == len(leaf.branches)
    token_ids = [token for _, token, _ in scored_tokens(item, leaf.branches)]
    assert token_ids == [token for option in item.options for token in option]
    for place, _, option in scored_tokens(item, leaf.branches):
        assert leaf.branches[place] in (0, option + 1)


def test_the_mask_lets_each_token_see_what_it_may():
    """After two earlier tokens: a trunk of one, then branches of one and of two."""
    leaf = Segment([5] * 4, (Segment([5, 5]),), [0, 1, 2, 2], [2, 3, 3, 4])
    assert leaf.allowed(None).int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 1],
    ]
    assert leaf.allowed(2).int().tolist() == [  # no further back than two positions
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize(("context", "options"), [([], [[1]]), ([1], []), ([1], [[1], []])])
def test_an_item_with_nothing_to_score_is_refused(context, options):
    with pytest.raises(ValueError, match="at least one token"):
        OptionTokens(context, options)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_weight_shows_in_every_score(model, broken):
    """And such an item counts as unparsed, not as answered by whichever option came first."""
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = broken
    for sums in scored(model, ITEMS):
        assert not any(map(math.isfinite, sums))
        labels = tuple(str(k) for k in range(len(sums)))
        item = Item("i", "q", ("0",), options=labels, labels=labels)
        prediction = score_options(item, sums, [" x"] * len(sums), normalize="none")
        assert (prediction["status"], prediction["score"]) == ("unparsed", 0.0)


def test_scoring_leaves_the_model_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scored(model, ITEMS)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
