"""Answers read and scored a second time: right scores agree, and wrong ones are seen."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.evaluation import scoring
from helpers.evaluation.checks.integrity import RenderedItem, rescored_gate
from helpers.evaluation.checks.recomputed_answers import box_of, rescored
from helpers.evaluation.scoring import score_options, score_text
from helpers.sources.items import Item
from helpers.sources.sampling import evaluation_items
from test_fuzz_answers import ADAPTERS, hostile, repeatable

NUMBERS = ("12", "-3.5", "1e-7", "3/4", "0.333333", "1/3", "1,000", "12 apples", "0")
GOLDS = {
    "arc": [("A",), ("C",)],
    "boolq": [("yes",), ("no",)],
    "squad_v2": [(), ("The Red Fox", "a fox"), ("A",), ("7",)],
    "openmath": [(n,) for n in NUMBERS],
}
LABELS = {"arc": tuple("ABCD"), "boolq": ("yes", "no")}


def wanted_of(study, adapter: str, protocol: str = "generate", **ask):
    """The study's set of a protocol, asked of another adapter."""
    name = "squad_v2" if protocol == "generate" else "arc"
    evaluation_set = study.evaluation.datasets[name]
    settings = {"adapter": adapter, "ask": evaluation_set.ask.model_copy(update=ask)}
    return evaluation_set.model_copy(update=settings)


def item_of(adapter: str, golds: tuple) -> Item:
    labels = LABELS.get(adapter, ())
    return Item("i", "q", golds, "p", options=labels, labels=labels, cluster="p")


def agree(again: dict, row: dict) -> None:
    assert again == {key: row[key] for key in again}
    assert {"score", "parsed", "status", "golds"} <= again.keys()


@pytest.mark.parametrize("answer", ["boxed", "text"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_two_ways_to_a_score_agree(study, adapter, answer):
    evaluation_set = wanted_of(study, adapter, answer=answer)
    plain = st.sampled_from([g for golds in GOLDS[adapter] for g in golds] + ["unanswerable"])

    @repeatable
    @given(hostile | plain, st.sampled_from(GOLDS[adapter]), st.sampled_from(["stop", "nonfinite"]))
    def check(text, golds, finish):
        item = item_of(adapter, golds)
        for said in (text, rf"so \boxed{{{text}}}", rf"\boxed{{3}} or \boxed{{{text}}} {{"):
            row = score_text(item, adapter, said, answer=answer, finish=finish)
            agree(rescored(evaluation_set, item, row), row)

    check()


@pytest.mark.parametrize("normalize", ["bytes", "none"])
def test_two_ways_to_the_best_option_agree(study, normalize):
    evaluation_set = wanted_of(study, "arc", "loglikelihood", normalize=normalize)
    options = ("a", "longer words", "ä ö ü", "four")

    @repeatable
    @given(st.lists(st.floats(-50, 0) | st.just(-1.0) | st.just(math.nan), min_size=4, max_size=4))
    def check(logprobs):
        item = Item("i", "q", ("B",), "", options=options, labels=tuple("ABCD"))
        row = score_options(item, logprobs, [f" {o}" for o in options], normalize=normalize)
        agree(rescored(evaluation_set, item, row), row)

    check()


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"} \boxed{}", ""),
        ("boxed{1}", None),
    ],
)
def test_the_last_box_by_hand(text, content):
    assert box_of(text) == content


# Failures of scoring: all variants are scored alike, and the gate used to score so too.


def the_first_box_read(patch):
    def first(text):
        boxes = text.split(r"\boxed{")[1:]
        return boxes[0].split("}")[0] if boxes else None

    patch.setattr(scoring, "last_boxed", first)


def silence_taken_for_an_abstention(patch):
    true = scoring._parse
    patch.setattr(scoring, "_parse", lambda *a: (None, "abstained") if not a[2] else true(*a))


def articles_and_case_kept(patch):
    patch.setattr(scoring, "normalize_answer", lambda text: text.strip())


def any_gold_word_counts_as_right(patch):
    true = scoring.squad_scores

    def generous(parsed, status, golds):
        _, f1 = true(parsed, status, golds)
        return float(f1 > 0), f1

    patch.setattr(scoring, "squad_scores", generous)


def recall_instead_of_f1(patch):
    def recall(answer, gold):
        said, expected = set(answer.lower().split()), gold.lower().split()
        return sum(word in said for word in expected) / len(expected)

    patch.setattr(scoring, "token_f1", recall)


def numbers_within_a_tenth_are_right(patch):
    patch.setattr(
        scoring,
        "number_scores",
        lambda said, gold: (float(abs(float(said) / float(gold) - 1) < 0.1), 0.0),
    )


TEXTS = {
    the_first_box_read: r"\boxed{nothing} or rather \boxed{%s}",
    silence_taken_for_an_abstention: "no box",
    articles_and_case_kept: r"\boxed{The %s}",
    any_gold_word_counts_as_right: r"\boxed{%s and so on}",
    recall_instead_of_f1: r"\boxed{%s and so on}",
}


@pytest.mark.bank("answers", "scoring: {break_}", "scores recomputed")
@pytest.mark.parametrize("break_", TEXTS, ids=lambda f: f.__name__)
def test_wrong_scoring_of_every_variant_alike(study, monkeypatch, break_):
    evaluation_set, items = (
        study.evaluation.datasets["squad_v2"],
        evaluation_items(study, "squad_v2"),
    )
    asked = [RenderedItem(item, "", 0) for item in items]
    texts = [TEXTS[break_].replace("%s", next(iter(i.golds), "unanswerable")) for i in items]

    def gate():
        rows = [
            score_text(item, "squad_v2", text, answer="boxed", finish="stop")
            for item, text in zip(items, texts, strict=True)
        ]
        return rescored_gate(evaluation_set, rows, asked)

    assert gate().passed
    break_(monkeypatch)
    assert not gate().passed


@pytest.mark.bank("answers", "scoring: {break_}", "scores recomputed")
@pytest.mark.parametrize("break_", [numbers_within_a_tenth_are_right])
def test_wrong_scoring_of_numbers(study, monkeypatch, break_):
    break_(monkeypatch)
    item = item_of("openmath", ("100",))
    row = score_text(item, "openmath", r"\boxed{105}", answer="boxed", finish="stop")
    assert row["score"] == 1.0
    gate = rescored_gate(wanted_of(study, "openmath"), [row], [RenderedItem(item, "", 0)])
    assert not gate.passed


@pytest.mark.bank(
    "answers", "scoring: options divided by nothing", at="evaluation.scoring.score_options"
)
def test_options_scored_by_another_length(study):
    item = Item("i", "q", ("B",), "", options=("a", "longer words"), labels=("A", "B"))
    row = score_options(item, [-2.0, -8.0], (" a", " longer words"), normalize="none")
    evaluation_set = wanted_of(study, "arc", "loglikelihood", normalize="bytes")
    assert row["score"] == 0.0
    assert rescored(evaluation_set, item, row)["score"] == 1.0
    assert not rescored_gate(evaluation_set, [row], [RenderedItem(item, "", 0)]).passed
