"""The items written for this project: well formed, balanced, and about nothing twice."""

from collections import Counter
from itertools import combinations

import pytest

from helpers.sources.items import load_rows, normalized_text
from helpers.sources.sampling import load_items
from helpers.study.schema import ShippedDataset

ADAPTER = {
    "arc": "arc",
    "boolq": "boolq",
    "boolq_stated": "boolq",
    "squad_v2": "squad_v2",
    "openmath_eval": "openmath",
    "openmath_train": "openmath",
}
EVALUATION = ["arc", "boolq", "squad_v2", "openmath_eval"]
QUESTION = {"openmath_eval": "problem", "openmath_train": "problem"}


def rows(name: str) -> list[dict]:
    return load_rows(ShippedDataset(shipped=name))


def questions(name: str) -> list[str]:
    return [normalized_text(row[QUESTION.get(name, "question")]) for row in rows(name)]


@pytest.mark.parametrize("name", ADAPTER)
def test_there_are_enough_and_none_twice(name):
    items = load_items(ShippedDataset(shipped=name), adapter=ADAPTER[name])
    assert len(items) == len(rows(name)) >= 100
    assert len({item.id for item in items}) == len(items)
    if name != "squad_v2":  # where two passages may be asked the same
        assert len(set(questions(name))) == len(items)


APART = [pair for pair in combinations(ADAPTER, 2) if set(pair) != {"boolq", "boolq_stated"}]


@pytest.mark.parametrize(("first", "second"), APART)
def test_no_two_sets_share_a_question(first, second):
    assert not set(questions(first)) & set(questions(second))


def test_no_two_sets_share_a_passage():
    boolq = {normalized_text(row["passage"]) for row in rows("boolq")}
    squad = {normalized_text(row["context"]) for row in rows("squad_v2")}
    assert not boolq & squad


def test_arc_items_are_well_formed():
    for row in rows("arc"):
        labels, options = row["choices"]["label"], row["choices"]["text"]
        assert labels in (list("ABCDE"[: len(options)]), list("12345"[: len(options)])), row["id"]
        assert 3 <= len(options) <= 5, row["id"]
        assert row["answerKey"] in labels, row["id"]
        assert len(set(map(normalized_text, options))) == len(options), row["id"]


def test_arc_has_every_number_of_options():
    assert {len(row["choices"]["text"]) for row in rows("arc")} == {3, 4, 5}


def test_arc_answers_stand_anywhere():
    """No letter pays: of the items with four options, each place holds 15 to 35 %."""
    four = [row["choices"] | row for row in rows("arc") if len(row["choices"]["text"]) == 4]
    places = Counter(row["label"].index(row["answerKey"]) for row in four)
    assert set(places) == {0, 1, 2, 3}
    assert all(0.15 <= n / len(four) <= 0.35 for n in places.values())


def test_every_span_stands_where_it_says():
    for row in rows("squad_v2"):
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        for text, start in zip(texts, starts, strict=True):
            assert text, row["id"]
            assert row["context"][start : start + len(text)] == text, row["id"]


def test_about_half_of_squad_has_no_answer():
    shares = [not row["answers"]["text"] for row in rows("squad_v2")]
    assert 0.4 <= sum(shares) / len(shares) <= 0.6


def test_unanswerable_questions_do_not_stand_apart():
    """Title and passage do not give away whether there is an answer."""
    kinds: dict[str, set[bool]] = {}
    for row in rows("squad_v2"):
        kinds.setdefault(row["context"], set()).add(bool(row["answers"]["text"]))
    assert sum(len(kind) == 2 for kind in kinds.values()) > len(kinds) / 2


def test_some_squad_items_have_several_golds():
    counts = Counter(len(set(row["answers"]["text"])) for row in rows("squad_v2"))
    assert sum(n for golds, n in counts.items() if golds >= 2) >= 10


def test_squad_has_titles_to_draw_across():
    titles = Counter(row["title"] for row in rows("squad_v2"))
    assert len(titles) >= 10
    assert max(titles.values()) <= 0.2 * sum(titles.values())


def test_boolq_is_as_unbalanced_as_the_real_one():
    """BoolQ's validation split is 62.17 % yes."""
    answers = [row["answer"] for row in rows("boolq")]
    assert 0.58 <= sum(answers) / len(answers) <= 0.66


def test_the_stated_passages_answer_the_questions_of_boolq_in_words():
    """Question by question; a "no" is a negation, and a "yes" has none."""
    for asked, stated in zip(rows("boolq"), rows("boolq_stated"), strict=True):
        assert (stated["question"], stated["answer"]) == (asked["question"], asked["answer"])
        words = set(normalized_text(stated["passage"]).split())
        assert bool(words & {"no", "not", "cannot"}) != stated["answer"], stated
        shared = words & set(normalized_text(stated["question"]).split())
        assert len(shared) >= 2, stated


def test_boolq_questions_are_asked_as_in_boolq():
    for row in rows("boolq"):
        assert row["question"] == row["question"].lower().rstrip("?")
        assert isinstance(row["answer"], bool)
        assert len(row["passage"].split()) >= 20
