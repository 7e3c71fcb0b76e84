"""Whatever a model writes is read in linear time, without a crash, and never to its favour."""

import json
import string
import time
import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers.core.errors import valid_unicode
from helpers.core.records import canonical_json
from helpers.evaluation.predictions import (
    check_prediction_rows,
    read_predictions,
    write_predictions,
)
from helpers.evaluation.scoring import (
    best_fixed_answer,
    ends_in_loop,
    is_abstention,
    last_boxed,
    normalize_answer,
    score_text,
)
from helpers.sources.items import Item, parse_number

repeatable = settings(derandomize=True, deadline=None, max_examples=150)
ADAPTERS = ("arc", "boolq", "squad_v2", "openmath")
PIECES = [
    *(r"\boxed{", "{", "}", r"\frac{", r"\dfrac{1}{2}", r"\text{", r"\left(", r"\right", r"\!"),
    *(
        "7",
        "-7",
        "+7",
        "1,000",
        "1,00",
        ".5",
        "3/4",
        "0",
        "1e9",
        "٣",
        "५",
        "７",
        "²",
        "½",
        "Ⅷ",
        "₇",
    ),
    *("−", "–", "$", "%", "unanswerable", "A", "yes", " no", "the ", "\n", "\t", " ", "\u00a0"),
    *("\x00", "\x1b[31m", "\u202e", "\ud800", "\udfff", "\ufeff", "\u2028", "<script>", "|", "`"),
    *("e\u0301", "ß", "ſ", "\u212a", "İ", "🙂"),  # letters that change when their case does
]
hostile = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join)


def item(adapter: str, *golds: str) -> Item:
    labels = {"arc": tuple("ABCD"), "boolq": ("yes", "no")}.get(adapter, ())
    return Item("i", "q", golds or (labels[:1] or ("7",)), options=labels, labels=labels)


def said(asked: Item, adapter: str, text: str, *, answer: str = "text") -> dict:
    return score_text(asked, adapter, text, answer=answer, finish="stop")


@repeatable
@given(hostile, st.sampled_from(ADAPTERS), st.sampled_from(["text", "boxed"]))
def test_any_answer_is_a_row_that_can_be_stored_and_read_back(text, adapter, answer):
    row = said(item(adapter), adapter, text, answer=answer)
    row |= {"prompt_hash": "h", "prompt_tokens": 1, "output_tokens": 1}
    stored = json.loads(canonical_json(row).encode("utf-8"))
    check_prediction_rows([stored], kind=adapter, place="p")
    assert stored == row
    assert row["output"] == valid_unicode(text)
    assert best_fixed_answer(adapter, [row]).score <= 1
    assert ends_in_loop(row["output"]) in (True, False)


@repeatable
@given(hostile, st.sampled_from(ADAPTERS))
def test_scoring_the_stored_answer_again_gives_the_stored_row(text, adapter):
    first = said(item(adapter), adapter, text, answer="boxed")
    assert said(item(adapter), adapter, first["output"], answer="boxed") == first


@repeatable
@given(hostile, st.sampled_from(["squad_v2", "openmath"]))
def test_the_right_answer_is_right_whatever_it_is(gold, adapter):
    gold = valid_unicode(gold)
    assume(gold.strip() and not is_abstention(gold))
    assert said(item(adapter, gold), adapter, gold)["score"] == 1.0


@repeatable
@given(st.lists(hostile, min_size=2, max_size=5), st.integers(0, 4))
def test_every_label_is_read_as_itself(labels, which):
    labels = tuple(dict.fromkeys(valid_unicode(x).strip().rstrip(".").casefold() for x in labels))
    assume(all(x.strip() for x in labels))
    gold = labels[which % len(labels)]
    question = Item("i", "q", (gold,), options=labels, labels=labels)
    assert said(question, "arc", gold)["score"] == 1.0


@repeatable
@given(hostile, st.sampled_from(ADAPTERS), st.text(" \n\t\r\x0b\u00a0\u2003", max_size=4))
def test_white_space_around_an_answer_changes_nothing(text, adapter, space):
    before = said(item(adapter), adapter, text)
    after = said(item(adapter), adapter, f"{space}{text}{space}")
    keys = ("parsed", "status", "score")
    assert [after[k] for k in keys] == [before[k] for k in keys]


@repeatable
@given(st.text(string.ascii_letters + string.punctuation + " ", max_size=20))
def test_the_case_of_letters_changes_no_score_of_words(text):
    for adapter, golds in (("squad_v2", ("Red Fox", "a")), ("arc", ("A",)), ("boolq", ("yes",))):
        question = item(adapter, *golds)
        scores = {said(question, adapter, t)["score"] for t in (text, text.upper(), text.lower())}
        assert len(scores) == 1


whole = st.integers(-(10**15), 10**15)
DRESSES = ["{}", " {} ", "{} apples", "${}", "{}%", r"{} \text{{ km}}", r"\left({}\right)", "{}."]


@repeatable
@given(whole, whole, st.sampled_from(DRESSES), hostile, hostile)
def test_another_whole_number_is_wrong_in_any_company(gold, other, dress, before, after):
    """Unless the company spells the right one out, no text around a wrong number helps it."""
    assume(gold != other)
    text = valid_unicode(before + dress.format(other) + after)
    assume(str(gold).lstrip("-") not in text.replace(",", ""))
    prediction = said(item("openmath", str(gold)), "openmath", text)
    value = parse_number(text)
    assert value is None or abs(value - gold) > 0
    assert prediction["score"] == 0.0


LIKE_DIGITS = [
    chr(point)
    for point in range(0x80, 0x20000)
    if unicodedata.numeric(chr(point), None) is not None
]


@repeatable
@given(st.integers(0, 10**6), st.sampled_from(LIKE_DIGITS), st.booleans())
def test_a_digit_of_another_script_is_no_unit_and_no_space(gold, digit, first):
    """`7²`, `7٣` and `½7` are not 7, whatever digit it is."""
    text = f"{digit}{gold}" if first else f"{gold}{digit}"
    assert parse_number(text) is None
    assert said(item("openmath", str(gold)), "openmath", text)["score"] == 0.0


@pytest.mark.parametrize("mark", ["−", "–", "—", "‐", "˗", "﹣", "－", "¬", "~"])
def test_a_minus_of_any_kind_is_not_overlooked(mark):
    assert said(item("openmath", "7"), "openmath", f"{mark}7")["score"] == 0.0
    assert said(item("openmath", "7"), "openmath", f"{mark} 7 apples")["score"] == 0.0


CHANGED = ["million", "thousand", "hundred", "dozen", "squared", "factorial", "and a half", "k"]
CHANGED += ["x", "tenths", "or eight", "times two", "no wait eight", "over x", "quadrillion"]


@pytest.mark.parametrize("word", CHANGED)
def test_a_word_that_changes_the_number_is_no_unit(word):
    for text in (f"7 {word}", f"7{word}", rf"7 \text{{ {word}}}"):
        assert said(item("openmath", "7"), "openmath", text)["score"] == 0.0, text


@repeatable
@given(hostile)
def test_an_answer_without_words_matches_no_gold_but_itself(text):
    """Without this any article is the right answer to `A`, and any dash to `?`."""
    text = valid_unicode(text)
    question = item("squad_v2", "A", "?!")
    prediction = said(question, "squad_v2", text)
    right = text.strip().casefold() in ("a", "?!")
    assert prediction["score"] == float(right)


MEGABYTE = {
    "braces": "{",
    "boxes": r"\boxed{",
    "closed boxes": r"\boxed{}",
    "fractions": r"\frac{1}{2}",
    "texts": r"\text{",
    "groups": "1,234,",
    "signs": "+-",
    "articles": "the a an ",
    "words": "word ",
    "points": "..,!?",
    "other digits": "٣²½",
    "accents": "e\u0301\u0316",
    "escapes": "\x1b[31m\x00\u202e",
    "halves": "\ud800",
}


@pytest.mark.parametrize("name", MEGABYTE)
def test_twice_the_text_takes_at_most_about_twice_the_time(name):
    """Linear, up to a megabyte: what is quadratic takes four times as long."""
    unit = MEGABYTE[name]

    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        best = 9e9
        for _ in range(3):
            started = time.process_time()
            for adapter in ADAPTERS:
                for answer in ("text", "boxed"):
                    said(item(adapter, "7", "red fox"), adapter, text, answer=answer)
            said(item("squad_v2", text), "squad_v2", text)
            best = min(best, time.process_time() - started)
        return best

    half, whole_time = seconds(2**17), seconds(2**18)
    assert whole_time < 3 * half + 0.05, (half, whole_time)


def test_a_megabyte_is_read_in_a_second_or_so():
    text = r"\boxed{" + "{" * 500_000 + "7" + "}" * 500_000 + "}"
    started = time.process_time()
    assert last_boxed(text) is not None
    assert parse_number(text) is None
    assert normalize_answer(text) == "boxed7"
    assert time.process_time() - started < 5


def test_hostile_answers_survive_the_disk(study, tmp_path):
    """Every piece, as rows of a study, written and read as the stages do it."""
    rows = {}
    for name, evaluation_set in study.evaluation.datasets.items():
        rows[name] = [
            said(item(evaluation_set.adapter), evaluation_set.adapter, text, answer="text")
            | {"id": f"{i}", "prompt_hash": "h", "prompt_tokens": 1, "output_tokens": 1}
            for i, text in enumerate(PIECES)
        ]
    write_predictions(tmp_path, rows, [], model="base", variant="noquant")
    predictions = read_predictions(tmp_path, study)
    owner = {"model": "base", "variant": "noquant"}
    assert predictions == {name: [row | owner for row in of_set] for name, of_set in rows.items()}
