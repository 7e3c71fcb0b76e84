"""The one exception that is the user's to mend, shown as one line without a traceback."""

from helpers.core.plain_text import safe_message

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
