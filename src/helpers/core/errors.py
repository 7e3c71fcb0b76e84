"""StudyError, an error that the user can fix, in one line; and foreign text made safe to print.

A StudyError is shown without a traceback. Text that came with a model, a data set or a study file
may hold terminal escapes, NUL, carriage returns, characters that reorder or hide their neighbours,
private or unassigned ones, and halves of surrogate pairs. Each becomes U+FFFD, so that a reader
sees that something was there. What Markdown and HTML act on is escaped in
`helpers.report.markdown`.
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


DISK_FULL = "free some space and run again; finished jobs are kept"
UNWRITABLE = "make it writable, or name another place with STUDY_OUTPUTS and STUDY_CACHE"
NO_MEMORY = "give the jobs more memory, or run fewer at once (CORES=1), or lower batch_tokens"
REMEDIES = {
    "No space left on device": DISK_FULL,
    "Disk quota exceeded": DISK_FULL,
    "File too large": DISK_FULL,
    "Read-only file system": UNWRITABLE,
    "Permission denied": UNWRITABLE,
    "Operation not permitted": UNWRITABLE,
    "Not a directory": UNWRITABLE,
    "File exists": UNWRITABLE,
    "MemoryError": NO_MEMORY,
    "allocate memory": NO_MEMORY,
    "bad_alloc": NO_MEMORY,
}


class StudyError(ValueError):
    """An input of the study is wrong.

    The message is one line: the place, the value, the limit and the remedy. Values come from
    files of any origin, so control characters are replaced before the message is shown.
    """

    def __init__(self, text: object):
        super().__init__(safe_message(text))


def remedy_for(text: str) -> str:
    """The remedy for an error message of the operating system; empty if unknown."""
    return next((remedy for pattern, remedy in REMEDIES.items() if pattern in text), "")


def one_line_error(text: str) -> str:
    """A program's error output in one line, of a traceback the last; with the remedy if known."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    message = lines[-1] if "Traceback" in text else " ".join(lines)
    return "; ".join(filter(None, (message, remedy_for(text))))
