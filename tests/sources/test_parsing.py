"""Nothing is guessed: what parses is exactly what is written, all else is None."""

import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.evaluation.scoring import is_abstention, last_boxed, normalize_answer
from helpers.sources.items import LONGEST_NUMBER, parse_number

repeatable = settings(derandomize=True, deadline=None, max_examples=200)

BOXES = [
    (r"\boxed{7}", "7"),
    (r"The answer is \boxed{7}.", "7"),
    (r"\boxed{1} no, \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\frac{a_{1}}{b_{2}}} so", r"\frac{a_{1}}{b_{2}}"),
    (r"\boxed{\text{Rosa Field}}", r"\text{Rosa Field}"),
    (r"\boxed{}", ""),
    (r"\boxed{two" + "\n" + "lines}", "two\nlines"),
    (r"\boxed{1} and then \boxed{2", "1"),
    (r"\boxed{1 + \boxed{2}", "2"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"} } \boxed{3} }", "3"),
    (r"{ \boxed{3}", "3"),
    (r"\boxed{3", None),
    (r"\boxed{{3}", None),
    (r"boxed{3}", None),
    (r"\boxed 3", None),
    (r"\fbox{3}", None),
    ("the answer is 3", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "content"), BOXES)
def test_the_last_complete_box_is_taken(text, content):
    assert last_boxed(text) == content


def balanced():
    """Texts whose braces match."""
    plain = st.text(alphabet="ab1 \\+", max_size=6)
    return st.recursive(
        plain,
        lambda inner: st.tuples(plain, inner, plain).map(lambda t: f"{t[0]}{{{t[1]}}}{t[2]}"),
        max_leaves=5,
    ).filter(lambda text: "\\boxed" not in text)


@repeatable
@given(st.lists(balanced(), min_size=1, max_size=4))
def test_a_box_gives_back_what_was_put_in(contents):
    text = " then ".join(rf"\boxed{{{content}}}" for content in contents)
    assert last_boxed(text) == contents[-1]


@pytest.mark.parametrize(
    "text",
    ["{" * 10**6, "}" * 10**6, r"\boxed{" * 150_000, r"\boxed{" + "{" * 10**6 + "}" * 10**6],
    ids=["open", "close", "boxes", "deep"],
)
def test_a_megabyte_of_braces_is_no_trouble(text):
    """Linear time: quadratic would take hours, so the limit is generous."""
    started = time.process_time()
    assert last_boxed(text) is None
    assert parse_number(text) is None
    assert time.process_time() - started < 5


NUMBERS = [
    ("7", 7),
    (" 7 ", 7),
    ("7.", 7),
    ("+7", 7),
    ("-7", -7),
    ("- 7", -7),
    ("007", 7),
    ("2.50", Fraction(5, 2)),
    (".5", Fraction(1, 2)),
    ("-0.125", Fraction(-1, 8)),
    ("3/4", Fraction(3, 4)),
    ("-3/4", Fraction(-3, 4)),
    ("1.5/2", Fraction(3, 4)),
    (r"\frac{3}{4}", Fraction(3, 4)),
    (r"\dfrac{3}{4}", Fraction(3, 4)),
    (r"-\frac{3}{4}", Fraction(-3, 4)),
    (r"\frac{-3}{4}", Fraction(-3, 4)),
    ("1,000", 1000),
    ("1,234,567", 1234567),
    ("1,234.5", Fraction(2469, 2)),
    (r"1,\!000", 1000),
    ("1{,}000", 1000),
    ("200000000000000", 2 * 10**14),
    ("$5", 5),
    (r"\$5", 5),
    ("-$5", -5),
    ("$1,234.50", Fraction(2469, 2)),
    ("5 dollars", 5),
    ("5€", 5),
    ("25%", 25),
    (r"25\%", 25),
    ("12 apples", 12),
    ("12 km/h", 12),
    (r"12 \text{ km}", 12),
    (r"12\ \mathrm{kg}", 12),
    (r"3/4 \text{ cup}", Fraction(3, 4)),
]


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_a_number_is_exact(text, value):
    assert parse_number(text) == value


NOT_NUMBERS = [
    "",
    "   ",
    "apples",
    "x = 7",
    "about 7",
    "7 or 8",
    "7 8",
    "7, 8",
    "(7, 8)",
    "7-8",
    "7 to 8",
    "--7",
    "7-",
    "7+1",
    "7!",
    "7 and a half",
    "7 million",
    "2 dozen",
    "1 1/2",
    r"1\frac{1}{2}",
    r"\frac{1}{2}3",
    r"2\sqrt{3}",
    r"2\pi",
    "1/0",
    "1/2/3",
    "1e5",
    "0x10",
    "1,00",
    "1,0000",
    "0,123",
    "3,5",
    "1.000,5",
    "1.2.3",
    "nan",
    "inf",
    "٣",
    "५",
    "７",
    "5٣",
    "½",
    "Ⅷ",
    r"\boxed{7}",
    "9" * (LONGEST_NUMBER + 1),
]


@pytest.mark.parametrize("text", NOT_NUMBERS, ids=lambda text: text[:20])
def test_what_is_not_one_number_is_none(text):
    assert parse_number(text) is None


def written(value: Fraction) -> list[str]:
    """Ways to write an exact decimal that a reader takes for that number."""
    sign = "-" if value < 0 else ""
    whole, part = divmod(abs(value), 1)
    decimals = f"{float(part):.3f}"[1:] if part else ""  # at most three places
    plain, grouped = f"{sign}{whole}{decimals}", f"{sign}{whole:,}{decimals}"
    ratio = (value.numerator, value.denominator)
    return [
        plain,
        f" {plain} ",
        f"{plain} apples",
        rf"{plain} \text{{ km}}",
        f"{plain}%",
        grouped,
        f"{sign}${grouped.lstrip('-')}",
        grouped.replace(",", r",\!"),
        f"{ratio[0]}/{ratio[1]}",
        rf"\frac{{{ratio[0]}}}{{{ratio[1]}}}",
    ]


exact_decimals = st.integers(-(10**12), 10**12).map(lambda n: Fraction(n, 1000))


@repeatable
@given(exact_decimals)
def test_however_it_is_written_the_number_comes_back(value):
    assert {parse_number(text) for text in written(value)} == {value}


@repeatable
@given(exact_decimals, exact_decimals)
def test_two_numbers_are_none(first, second):
    for joint in (" ", ", ", " or ", "; ", " = "):
        assert parse_number(f"{written(first)[0]}{joint}{written(second)[0]}") is None


@repeatable
@given(st.text() | st.text(alphabet=r"0123456789.,/-+$% {}\fracboxedtext"))
@example("\\boxed{" * 3)
@example("1/" * 3)
@example("-" * 50 + "1")
def test_no_text_makes_parsing_raise(text):
    box, value = last_boxed(text), parse_number(text)
    assert box is None or box in text
    assert value is None or isinstance(value, Fraction)
    assert isinstance(normalize_answer(text), str)
    assert isinstance(is_abstention(text), bool)


@repeatable
@given(st.text(alphabet="0123456789.,/- ", min_size=1, max_size=12))
def test_where_python_reads_a_number_too_it_is_the_same(text):
    """Where Fraction and the parser both take a text, they agree on it."""
    value = parse_number(text)
    try:
        expected = Fraction(text.strip().rstrip(".").replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return
    assert value in (None, expected)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat", "cat"),
        ("a  cat, an owl; the end.", "cat owl end"),
        ("theatre", "theatre"),
        ("U.S.", "us"),
        ("the", ""),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_squad_does(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    "text", ["unanswerable", "Unanswerable.", " UNANSWERABLE ", '"unanswerable"']
)
def test_an_abstention_says_so(text):
    assert is_abstention(text)


@pytest.mark.parametrize(
    "text", ["", " ", "no", "none", "not unanswerable", "unanswerable or 1904", "answerable", "."]
)
def test_all_else_is_no_abstention(text):
    assert not is_abstention(text)
