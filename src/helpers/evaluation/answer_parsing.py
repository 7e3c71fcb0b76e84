"""An answer out of a model's text: the last box, or an abstention.

Nothing here knows the gold answer, and nothing is guessed: what does not parse is
`None`, which scores zero. Numbers are read in `helpers.sources.exact_numbers`.
"""

import re
import string

ABSTENTION = "unanswerable"

_BRACES = re.compile(r"\\boxed\{|[{}]")


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{…}`, braces balanced; None if there is none."""
    begin, end, opened = -1, -1, []
    for brace in _BRACES.finditer(text, max(0, text.find(r"\boxed{"))):
        if brace[0] != "}":
            opened.append(-1 if brace[0] == "{" else brace.end())
        elif opened and (start := opened.pop()) > begin:
            begin, end = start, brace.start()
    return text[begin:end] if begin >= 0 else None


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces.

    Rajpurkar et al., arXiv:1806.03822, official evaluation.
    """
    lowered = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", lowered).split())


def is_abstention(text: str) -> bool:
    """Whether a text says, and says only, that the question cannot be answered."""
    return normalize_answer(text) == ABSTENTION
