"""Text of unknown origin, made safe to show: no character of it acts on what shows it.

Terminal escapes, NUL and carriage returns, characters that reorder or hide what stands
beside them, private and unassigned ones and halves of surrogate pairs become U+FFFD, so
that something is seen to have been there. What Markdown and HTML act on is another
matter (`helpers.report.markdown`).
"""

import unicodedata

REPLACEMENT = "\ufffd"
LONGEST_LINE = 800  # characters of one line of an error message


def printable(text: str, *, keep: str = "") -> str:
    """The text with every control, format, private and unassigned character replaced.

    Args:
        keep: characters that stay all the same, such as line ends.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_printable(c) or c in keep else REPLACEMENT for c in text)


def _is_printable(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def one_line(text: object) -> str:
    """The text as `printable` gives it, on one line, all white space as single spaces."""
    return printable(" ".join(str(text).split()))


def safe_message(text: object) -> str:
    """An error message without control characters, each line at most LONGEST_LINE long.

    A longer line loses its middle: the place stands first, the remedy last.
    """
    return "\n".join(map(_shortened, printable(str(text), keep="\n\t").split("\n")))


def _shortened(line: str) -> str:
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} … {line[-half:]}"


def valid_unicode(text: str) -> str:
    """The text as UTF-8 can encode it: an unpaired surrogate becomes U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
