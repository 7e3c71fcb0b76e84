"""Metrics against hand computation, and no way to gain by answering less."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.evaluation.scoring import macro_f1, score_text, set_metrics, shared_text_metrics
from helpers.sources.items import Item

repeatable = settings(derandomize=True, deadline=None, max_examples=120)


def choice(index: int, gold: str, parsed: str | None) -> dict:
    return {
        "id": f"i{index}",
        "golds": [gold],
        "parsed": parsed,
        "status": "unparsed" if parsed is None else "answered",
        "score": float(parsed == gold),
        "finish_reason": "stop" if parsed else "length",
        "prompt_tokens": 10,
        "output_tokens": 2,
    }


def choices(pairs) -> list[dict]:
    return [choice(i, gold, parsed) for i, (gold, parsed) in enumerate(pairs)]


def answered(items: list[Item], adapter: str, texts: list[str]) -> list[dict]:
    made = [
        score_text(item, adapter, text, answer="boxed", finish="stop")
        for item, text in zip(items, texts, strict=True)
    ]
    return [m | {"prompt_tokens": 1, "output_tokens": 1} for m in made]


def test_macro_f1_by_hand():
    """A: P 1, R 1/2; B: P 1/2, R 1; C: never said."""
    score = macro_f1(choices([("A", "A"), ("A", "B"), ("B", "B"), ("C", None)]))
    assert score == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


@repeatable
@given(
    st.lists(
        st.tuples(st.sampled_from("ABC"), st.sampled_from(["A", "B", "C", "D", None])),
        min_size=1,
        max_size=20,
    )
)
def test_macro_f1_is_the_mean_of_each_class(pairs):
    """Precision and recall counted class by class over the classes that occur."""
    scores = []
    for label in {gold for gold, _ in pairs}:
        hits = sum(gold == parsed == label for gold, parsed in pairs)
        precision = hits / max(1, sum(parsed == label for _, parsed in pairs))
        recall = hits / sum(gold == label for gold, _ in pairs)
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert macro_f1(choices(pairs)) == pytest.approx(sum(scores) / len(scores))


def test_a_constant_answer_has_the_accuracy_of_its_class_and_a_low_macro_f1():
    """62 % yes, always yes: accuracy 0.62, F1 2·0.62/1.62 for yes and 0 for no."""
    values = set_metrics("boolq", choices([("yes", "yes")] * 62 + [("no", "yes")] * 38))
    assert values["accuracy"] == pytest.approx(0.62)
    assert values["macro_f1"] == pytest.approx((2 * 0.62 / 1.62 + 0) / 2)


@repeatable
@given(
    st.lists(st.tuples(st.sampled_from("AB"), st.sampled_from("AB")), min_size=1, max_size=15),
    st.data(),
)
def test_answering_less_never_raises_accuracy(pairs, data):
    hushed = [
        (gold, data.draw(st.sampled_from([parsed, None]), label="said")) for gold, parsed in pairs
    ]
    full, less = set_metrics("arc", choices(pairs)), set_metrics("arc", choices(hushed))
    assert less["accuracy"] <= full["accuracy"]
    assert less["items"] == full["items"]
    assert less["format_success"] == pytest.approx(
        sum(parsed is not None for _, parsed in hushed) / len(hushed)
    )


def test_every_item_has_one_status():
    values = set_metrics("arc", choices([("A", "A"), ("A", None), ("B", "A"), ("B", None)]))
    assert values["answered"] + values["abstained"] + values["unparsed"] == values["items"] == 4
    assert values["unparsed"] == 2
    assert values["finish_reasons"] == {"length": 2, "stop": 2}
    assert (values["prompt_tokens"], values["output_tokens"]) == (40, 8)


SQUAD = [Item(f"s{i}", "q", ("Rosa Field",) if i < 6 else ()) for i in range(10)]


def test_silence_wins_nothing_on_squad():
    """Empty and truncated outputs on 4 unanswerable items of 10: 0, where the seed said 0.4."""
    for text in ("", r"\boxed{", "the the the"):
        values = set_metrics("squad_v2", answered(SQUAD, "squad_v2", [text] * 10))
        assert values["exact_match"] == values["f1"] == 0.0
        assert values["format_success"] == 0.0


def test_abstaining_always_wins_the_unanswerable_and_nothing_else():
    texts = [r"\boxed{unanswerable}"] * 10
    values = set_metrics("squad_v2", answered(SQUAD, "squad_v2", texts))
    assert values["exact_match"] == values["f1"] == pytest.approx(0.4)
    assert (values["has_answer_exact_match"], values["no_answer_exact_match"]) == (0.0, 1.0)
    assert (values["abstained"], values["unparsed"]) == (10, 0)


@repeatable
@given(
    st.lists(
        st.sampled_from(["", r"\boxed{unanswerable}", r"\boxed{Rosa Field}", r"\boxed{Rosa Elm}"]),
        min_size=10,
        max_size=10,
    )
)
def test_the_parts_of_squad_make_up_the_whole(texts):
    values = set_metrics("squad_v2", answered(SQUAD, "squad_v2", texts))
    assert (values["has_answer_items"], values["no_answer_items"]) == (6, 4)
    for name in ("exact_match", "f1"):
        parts = 6 * values[f"has_answer_{name}"] + 4 * values[f"no_answer_{name}"]
        assert values[name] == pytest.approx(parts / 10)
    assert values["no_answer_exact_match"] == pytest.approx(
        sum("unanswerable" in text for text in texts[6:]) / 4
    )


def test_a_part_of_squad_without_items_has_no_score():
    values = set_metrics("squad_v2", answered(SQUAD[:6], "squad_v2", [""] * 6))
    assert (values["no_answer_items"], values["no_answer_exact_match"]) == (0, None)


MATH = [Item(f"m{i}", "q", (str(i),)) for i in range(10)]


def test_the_median_difference_carries_its_coverage():
    """Off by 0, 1 and 9 where it answers: median 1 at 30 %; the rest counts against accuracy."""
    texts = [r"\boxed{0}", r"\boxed{2}", r"\boxed{11}"] + ["no idea"] * 7
    values = set_metrics("openmath", answered(MATH, "openmath", texts))
    assert values["median_absolute_difference"] == 1.0
    assert values["median_absolute_difference_coverage"] == pytest.approx(0.3)
    assert values["accuracy"] == pytest.approx(0.1)


def test_without_a_number_there_is_no_difference():
    values = set_metrics("openmath", answered(MATH, "openmath", ["no idea"] * 10))
    assert values["median_absolute_difference"] is None
    assert values["median_absolute_difference_coverage"] == 0.0


def test_one_absurd_answer_does_not_decide_the_difference():
    texts = [rf"\boxed{{{i}}}" for i in range(9)] + [r"\boxed{" + "9" * 300 + "}"]
    values = set_metrics("openmath", answered(MATH, "openmath", texts))
    assert values["median_absolute_difference"] == 0.0
    assert values["accuracy"] == pytest.approx(0.9)


@pytest.mark.parametrize("adapter", ["arc", "boolq", "squad_v2", "openmath"])
def test_nothing_and_twice_are_refused(adapter):
    with pytest.raises(ValueError, match="no predictions"):
        set_metrics(adapter, [])
    with pytest.raises(ValueError, match="item i0 is predicted more than once"):
        set_metrics(adapter, choices([("A", "A")]) * 2)


@repeatable
@given(
    st.lists(st.tuples(st.sampled_from("AB"), st.sampled_from(["A", "B", None])), min_size=1),
    st.randoms(use_true_random=False),
)
def test_the_order_of_predictions_does_not_matter(pairs, shuffler):
    made = choices(pairs)
    mixed = made.copy()
    shuffler.shuffle(mixed)
    assert set_metrics("arc", mixed) == set_metrics("arc", made)


def passage(index: int, tokens: int, nll: float, kl: float = 0.0, same: int = 0) -> dict:
    return {"id": f"p{index}", "tokens": tokens, "nll": nll, "kl": kl, "top1_agreements": same}


@pytest.mark.parametrize("vocabulary", [2, 259, 49152])
def test_guessing_evenly_has_the_perplexity_of_the_vocabulary(vocabulary):
    rows = [passage(i, n, n * math.log(vocabulary)) for i, n in enumerate([3, 50, 128])]
    assert shared_text_metrics(rows)["perplexity"] == pytest.approx(vocabulary)


def test_tokens_count_alike_whatever_passage_they_are_in():
    """One passage or its two parts: the same totals give the same metrics."""
    whole = shared_text_metrics([passage(0, 30, 60.0, 3.0, 24)])
    parts = shared_text_metrics([passage(0, 10, 35.0, 2.5, 5), passage(1, 20, 25.0, 0.5, 19)])
    assert Counter(whole | {"passages": 2}) == Counter(parts)
    assert whole["kl"] == pytest.approx(0.1)
    assert whole["top1_agreement"] == pytest.approx(0.8)
