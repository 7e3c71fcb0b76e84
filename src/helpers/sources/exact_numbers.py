r"""The exact value of a text that is one number, as word problems write their answers.

Used twice: to read what a model answered, and to tell which gold answers are numbers.
"""

import re
from fractions import Fraction

LONGEST_NUMBER = 400  # characters; a longer text is no answer to a word problem
LONGEST_UNIT = 6  # words; more of them form a sentence, which may negate the number

_FRACTION = re.compile(r"\\[dt]?frac\{(-?[0-9.,]+)\}\{(-?[0-9.,]+)\}")
_DECORATION = re.compile(
    r"\\(?:text|mathrm|mbox)\{([^{}]*)\}|\\[,;!: ]|\\(?:left|right)(?![A-Za-z])|\\?[$€£]|\\?%"
)
_NO_UNIT = re.compile(  # "2 million", "5 and a half" and "7 squared" are not 2, 5 and 7
    r"\b(?:and|or|to|plus|minus|times|over|half|halves|third|fifth|sixth|eighth|tenth|dozen|gross"
    r"|hundred(?:th)?|thousand(?:th)?|[a-z]*illion(?:th)?|squared|cubed|factorial|choose|mod|root"
    r"|sqrt|pi|not|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)s?\b",
    re.IGNORECASE,
)
_NO_LETTER = re.compile(r"(?:[xyznie]|[kKMB]|bn|mn|mil)\b")  # unknowns, constants, "3k" for 3000
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:/[0-9]+(?:\.[0-9]+)?)?")
_GROUPED = re.compile(r"(?<![0-9.,])([1-9][0-9]{0,2}(?:,[0-9]{3})+)(?![0-9,])")


def parse_number(text: str) -> Fraction | None:
    r"""The exact value of a text that is one number, with its unit or dollar sign.

    Understands signs, decimals, thousands separators, `3/4`, `\frac{3}{4}` and units
    after the number (`12 \text{ km}`, `12 apples`); anything else is None, as is a word or
    letter after it that may change its value (`2 million`, `7 squared`, `3k`, `3x`).
    """
    if len(text) > LONGEST_NUMBER:
        return None
    plain = re.sub(r",\\!|\{,\}", ",", text)
    plain = _FRACTION.sub(lambda m: f" {m[1]}/{m[2]} ", plain)  # apart from a number beside it
    plain = _DECORATION.sub(lambda m: f" {m[1]}" if m[1] else " ", plain)
    plain = _GROUPED.sub(lambda m: m[1].replace(",", ""), plain)
    plain = re.sub(r"^\s*([+-])\s+", r"\1", plain.strip().rstrip("."))
    numbers = _NUMBER.findall(plain)
    if len(numbers) != 1 or not plain.startswith(numbers[0]):
        return None
    unit = plain[len(numbers[0]) :].strip()
    if unit and not _is_unit(unit):
        return None
    try:
        return Fraction(numbers[0]) if "/" not in numbers[0] else _ratio(numbers[0])
    except (ValueError, ZeroDivisionError):
        return None


def _is_unit(rest: str) -> bool:
    """Whether the text after a number is its unit and does not change its value."""
    if _NO_UNIT.search(rest) or _NO_LETTER.match(rest) or len(rest.split()) > LONGEST_UNIT:
        return False
    return re.fullmatch(r"[A-Za-z][A-Za-z ./^]*", rest) is not None


def _ratio(text: str) -> Fraction:
    above, below = text.split("/")
    return Fraction(above) / Fraction(below)


def gold_number(text: str) -> Fraction | None:
    """As `parse_number` for a gold answer, in which `3x` is an expression and not a unit."""
    return None if re.search(r"[0-9][A-Za-z]+$", text) else parse_number(text)
