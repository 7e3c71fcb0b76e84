"""Scores against references written here, and no way for a wrong answer to count as right."""

import math
import re
import string
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers.evaluation.scoring import score_options, score_text
from helpers.sources.items import Item

repeatable = settings(derandomize=True, deadline=None, max_examples=150)


def arc(labels="ABCD", gold="C") -> Item:
    return Item("a", "q", (gold,), options=tuple(f"o{x}" for x in labels), labels=tuple(labels))


def squad(*golds: str) -> Item:
    return Item("s", "q", golds, passage="p")


def boxed(item: Item, adapter: str, answer: str, finish: str = "stop") -> dict:
    return score_text(item, adapter, rf"So \boxed{{{answer}}}.", answer="boxed", finish=finish)


def reference_words(text: str) -> list[str]:
    """SQuAD's normalisation, written without looking: words, no punctuation, no articles."""
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [w for w in re.split(r"\s+", re.sub(r"\b(a|an|the)\b", " ", kept)) if w]


def reference_f1(answer: str, gold: str) -> float:
    said, expected = reference_words(answer), reference_words(gold)
    if not said or not expected:
        return float(said == expected)
    left, shared = Counter(expected), 0
    for word in said:
        if left[word] > 0:
            left[word] -= 1
            shared += 1
    if shared == 0:
        return 0.0
    precision, recall = shared / len(said), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


word = st.sampled_from(
    ["the", "a", "An", "cat", "Cat,", "cats", "sat", "mat.", "1904", "U.S.", "é"]
)
phrase = st.lists(word, min_size=1, max_size=6).map(" ".join)
gold_phrase = phrase.filter(lambda text: bool(reference_words(text)))


@repeatable
@given(phrase, st.lists(gold_phrase, min_size=1, max_size=3))
def test_squad_scores_are_the_official_ones(answer, golds):
    """The best over all golds, exact match on normalised words and token F1."""
    prediction = boxed(squad(*golds), "squad_v2", answer)
    exact = any(reference_words(answer) == reference_words(gold) for gold in golds)
    assert prediction["status"] == "answered"
    assert prediction["score"] == float(exact)
    assert prediction["f1"] == pytest.approx(max(reference_f1(answer, gold) for gold in golds))
    assert prediction["score"] <= prediction["f1"] <= 1.0


def test_a_half_right_span_counts_half():
    prediction = boxed(squad("Rosa Field"), "squad_v2", "Field of Rosa Elm")
    assert prediction["score"] == 0.0
    assert prediction["f1"] == pytest.approx(2 * (2 / 4) * (2 / 2) / (2 / 4 + 2 / 2))


@pytest.mark.parametrize(
    ("item", "answer", "status", "score"),
    [
        (squad(), "unanswerable", "abstained", 1.0),
        (squad(), "Unanswerable.", "abstained", 1.0),
        (squad(), "1904", "answered", 0.0),
        (squad("1904"), "unanswerable", "abstained", 0.0),
        (squad("1904"), "1904", "answered", 1.0),
        (squad("1904"), "", "unparsed", 0.0),
        (squad(), "", "unparsed", 0.0),
        (squad(), "   ", "unparsed", 0.0),
    ],
)
def test_only_an_explicit_abstention_is_one(item, answer, status, score):
    prediction = boxed(item, "squad_v2", answer)
    assert (prediction["status"], prediction["score"], prediction["f1"]) == (status, score, score)


@pytest.mark.parametrize(
    "text", ["", " ", "garbage garbage", r"\boxed{", r"\boxed{}", "unanswerable"]
)
def test_silence_and_garbage_score_zero_on_unanswerable_questions(text):
    """The mistake this project began with: empty output won half of SQuAD v2."""
    prediction = score_text(squad(), "squad_v2", text, answer="boxed", finish="length")
    assert (prediction["status"], prediction["score"], prediction["f1"]) == ("unparsed", 0.0, 0.0)
    assert prediction["parsed"] is None


@pytest.mark.parametrize("adapter", ["arc", "boolq", "squad_v2", "openmath"])
def test_a_broken_model_has_answered_nothing(adapter):
    """Even if the tokens before the breakdown hold the right answer."""
    item = {"arc": arc(gold="C"), "squad_v2": squad("C")}.get(
        adapter, Item("x", "q", ("C",), labels=("C",))
    )
    prediction = boxed(item, adapter, "C", finish="nonfinite")
    assert (prediction["status"], prediction["score"], prediction["parsed"]) == (
        "unparsed",
        0.0,
        None,
    )
    assert prediction["finish_reason"] == "nonfinite"


@pytest.mark.parametrize("answer", ["C", "c", " c ", "C."])
def test_labels_are_read_in_any_case(answer):
    prediction = boxed(arc(), "arc", answer)
    assert (prediction["parsed"], prediction["score"], prediction["status"]) == (
        "C",
        1.0,
        "answered",
    )


@pytest.mark.parametrize("answer", ["E", "AC", "A or C", "oC", "3", "", "the third", "C, not A"])
def test_what_is_no_label_is_unparsed(answer):
    prediction = boxed(arc(), "arc", answer)
    assert (prediction["parsed"], prediction["score"], prediction["status"]) == (
        None,
        0.0,
        "unparsed",
    )


def test_numbered_labels_are_labels():
    item = arc("12345", gold="5")
    assert boxed(item, "arc", "5")["score"] == 1.0
    assert boxed(item, "arc", "E")["status"] == "unparsed"


@pytest.mark.parametrize(
    ("answer", "score"), [("Yes", 1.0), ("yes.", 1.0), ("no", 0.0), ("true", 0.0)]
)
def test_boolq_is_answered_in_words(answer, score):
    item = Item("b", "q", ("yes",), options=("yes", "no"), labels=("yes", "no"))
    assert boxed(item, "boolq", answer)["score"] == score


RIGHT = [
    ("7", "7"),
    ("7", "7.0"),
    ("7", "7 apples"),
    ("1000", "1,000"),
    ("2.5", r"\frac{5}{2}"),
    ("2/3", r"\frac{2}{3}"),
    ("2/3", "4/6"),
    ("2/3", "0.6666667"),
    ("-3", "- 3"),
    ("0", "0.0"),
    (r"\frac{3}{4}", "0.75"),
    ("2.333333333", "2.3333333"),
    ("x+1", "x + 1"),
    ("3x", "3x"),
]
WRONG = [
    ("7", "8"),
    ("7", "-7"),
    ("7", "7.001"),
    ("2/3", "0.667"),
    ("2/3", "0.66"),
    ("2/3", "2"),
    ("2/3", "3/2"),
    ("0", "0.001"),
    ("0", "-1"),
    ("1000", "1.000"),
    ("1.234", "1,234"),
    ("15.5", r"3\frac{1}{2}1"),
    ("5", "5 and a half"),
    ("2", "2 million"),
    ("7", "7 or 8"),
    ("3x", "3"),
    ("3x", "3y"),
    ("x", "y"),
    ("200000000000000", "200000000000001"),
    ("1000000", "1000001"),
    ("3", "3k"),
    ("3", "3 squared"),
    ("2", "2 thirds"),
    ("7", r"7 \leftarrow x"),
]


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_equal_numbers_are_right_however_written(gold, answer):
    assert boxed(Item("m", "q", (gold,)), "openmath", answer)["score"] == 1.0


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_other_numbers_are_wrong_however_near(gold, answer):
    assert boxed(Item("m", "q", (gold,)), "openmath", answer)["score"] == 0.0


numbers = st.integers(-(10**9), 10**9).map(lambda n: Fraction(n, 1000))
dresses = st.sampled_from(["{}", " {} ", "{} apples", "{}%", r"{} \text{{ km}}", "{}."])


def decimal(value: Fraction) -> str:
    sign, (whole, part) = "-" if value < 0 else "", divmod(abs(value), 1)
    return f"{sign}{whole}.{int(part * 1000):03d}"


@repeatable
@given(numbers, numbers, dresses, dresses)
def test_a_wrong_number_never_becomes_right(gold, answer, dress, other):
    assume(abs(gold - answer) > abs(gold) / 10**5)
    item = Item("m", "q", (dress.format(decimal(gold)),))
    prediction = boxed(item, "openmath", other.format(decimal(answer)))
    assert prediction["score"] == 0.0
    assert prediction["absolute_difference"] == pytest.approx(float(abs(gold - answer)))


@repeatable
@given(numbers, dresses, dresses)
def test_a_right_number_is_right_in_any_dress(gold, dress, other):
    prediction = boxed(
        Item("m", "q", (dress.format(decimal(gold)),)), "openmath", other.format(decimal(gold))
    )
    assert (prediction["score"], prediction["absolute_difference"]) == (1.0, 0.0)


@repeatable
@given(st.text(), st.sampled_from(["arc", "boolq", "squad_v2", "openmath"]))
def test_no_output_breaks_scoring_and_every_score_is_earned(text, adapter):
    """Whatever the model writes, a score above zero comes with a parsed answer or an abstention."""
    item = {"arc": arc(), "squad_v2": squad()}.get(
        adapter, Item("x", "q", ("7",), labels=("yes", "no"))
    )
    for answer in ("boxed", "text"):
        prediction = score_text(item, adapter, text, answer=answer, finish="stop")
        assert prediction["score"] in (0.0, 1.0)
        assert prediction["status"] in ("answered", "abstained", "unparsed")
        assert (prediction["parsed"] is not None) == (prediction["status"] == "answered")
        assert prediction["score"] == 0.0 or prediction["status"] != "unparsed"
        assert prediction["output"] == text


def test_a_whole_text_is_an_answer_only_if_asked_for():
    item = squad("Rosa Field")
    assert score_text(item, "squad_v2", " Rosa Field\n", answer="text", finish="stop")["score"] == 1
    prediction = score_text(item, "squad_v2", "Rosa Field", answer="boxed", finish="stop")
    assert prediction["status"] == "unparsed"


@repeatable
@given(st.lists(st.floats(-500, -0.01), min_size=4, max_size=4, unique=True))
def test_the_likeliest_option_is_the_answer(logprobs):
    item = arc()
    prediction = score_options(item, logprobs, [f" {o}" for o in item.options], normalize="none")
    assert prediction["parsed"] == "ABCD"[logprobs.index(max(logprobs))]
    assert prediction["score"] == float(prediction["parsed"] == "C")
    assert prediction["status"] == "answered"


def test_normalising_divides_by_the_bytes_of_the_option():
    """-6 over 2 bytes against -8 over 4; `é` has two bytes, the leading space none."""
    item = Item("a", "q", ("A",), options=("é", "abcd"), labels=("A", "B"))
    said = {
        how: score_options(item, [-6.0, -8.0], [" é", " abcd"], normalize=how)["parsed"]
        for how in ("none", "bytes")
    }
    assert said == {"none": "A", "bytes": "B"}
    longer = score_options(item, [-3.9, -8.0], [" é", " abcd"], normalize="bytes")
    assert longer["parsed"] == "A"


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(4))
def test_one_broken_option_breaks_the_item(broken, place):
    """Python's max would let NaN win or lose by its place."""
    logprobs = [-3.0, -2.0, -1.0, -4.0]
    logprobs[place] = broken
    prediction = score_options(arc(), logprobs, [" o"] * 4, normalize="bytes")
    assert (prediction["status"], prediction["score"], prediction["parsed"]) == (
        "unparsed",
        0.0,
        None,
    )
    assert prediction["finish_reason"] == "nonfinite"
