"""Verdicts of report.md in words, held to verdicts made again from the answers.

None of the code that writes the report is used.
"""

import re
from collections.abc import Iterator

from helpers.report.checks.published_numbers import shows
from helpers.report.checks.recomputed_tables import NAMES, Recomputed

ABLE = ("worse", "better", "equivalent", "inconclusive")
KINDS = {
    "**Worse**": "worse",
    "**Better**": "better",
    "**Equivalent within": "equivalent",
    "**Inconclusive**": "inconclusive",
    "**Uninformative**": "uninformative",
    "**Invalid**": "invalid",
}

Due = tuple[str, list[float | None]]  # a part of the text, and the numbers it must show


def _codes(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def _declared(figures: Recomputed) -> list[dict]:
    return [row for row in figures.rows.values() if row["primary"]]


def _answer(text: str, figures: Recomputed) -> Iterator[Due | str]:
    """How many declared comparisons can tell, and how many are worse or better."""
    names = _codes(text)
    group = [
        r for r in _declared(figures) if names and r["variant"] == names[0] and r["verdict"] in ABLE
    ]
    if len(names) > 1:
        group = [r for r in group if r["baseline"] == names[1]]
    found = re.search(r"in the (\d+|one) (?:of [\d,]+ declared )?comparisons?", text)
    if found and (1 if found[1] == "one" else int(found[1])) != len(group):
        yield f"published {found[1]} that can show one, recomputed {len(group)}"
    for word in ("worse", "better"):
        pattern = rf"(?:{word} than `[^`]+` in|and {word} in) (\d+)"
        said = [int(n) for n in re.findall(pattern, text)]
        due = sum(row["verdict"] == word for row in group)
        if said and said != [due]:
            yield f"published {said[0]} {word}, recomputed {due}"
        if due and not said:
            yield f"{due} are {word}, which it does not say"
    if "is equivalent to" in text and {r["verdict"] for r in group} != {"equivalent"}:
        yield "not all that can tell are equivalent"


def _kind(text: str, figures: Recomputed) -> Iterator[Due | str]:
    """A bullet of one kind of verdict: its places, and from which loss on one would be seen."""
    kind = next(kind for begin, kind in KINDS.items() if text.startswith(begin))
    rows = [r for r in _declared(figures) if r["verdict"] == kind]
    places = {(NAMES.get(r["dataset"], r["dataset"]), r["model"]) for r in rows}
    named = "|".join(re.escape(NAMES.get(n, n)) for n in figures.study.evaluation.datasets)
    head = re.split(r"\. |\. ?$", text, maxsplit=1)[0] if kind in ABLE[2:] else text
    said = {
        (name, model)
        for name, models in re.findall(rf"({named}) of ((?:`[^`]+`(?:, | and )?)+)", head)
        for model in _codes(models)
    }
    if said != places:
        yield f"published {sorted(said)}, recomputed {sorted(places)}"
    found = re.search(r"only from ([\d.]+) points (?:\(.*?\) to ([\d.]+) points )?", text)
    if found:
        seen = [100 * r["smallest_detectable_loss"] for r in rows if r["smallest_detectable_loss"]]
        ends = [e for e in found.groups() if e]
        due = [min(seen), max(seen)] if seen else []
        if not due or not all(map(shows, (ends[0], ends[-1]), due)):
            yield f"published {' to '.join(ends)} points, recomputed {due}"


def _nothing(text: str, figures: Recomputed) -> Iterator[Due | str]:
    """A variant of which no declared comparison can tell: how many, and how many are invalid."""
    group = [r for r in _declared(figures) if r["variant"] == _codes(text)[0]]
    invalid = sum(r["verdict"] == "invalid" for r in group)
    if able := [r for r in group if r["verdict"] in ABLE]:
        yield f"{len(able)} of {len(group)} comparisons can tell"
    if "comparisons are invalid" in text or "comparison is invalid" in text:
        due = (["1"] if "its one" in text else [str(len(group))], len(group))
        said = re.findall(r"all (\d+) comparisons", text) or ["1"]
        if (said, invalid) != due:
            yield f"{invalid} of {len(group)} are invalid"
    elif said := re.search(r"of (\d+) comparisons (\d+) (?:is|are) invalid", text):
        if [int(n) for n in said.groups()] != [len(group), invalid]:
            yield f"{invalid} of {len(group)} are invalid"
    elif invalid:
        yield f"{invalid} of {len(group)} are invalid, which it does not say"


def _controls_kept(text: str, figures: Recomputed) -> Iterator[Due | str]:
    """All controls did what they must, and the ones it names are among them."""
    failed = [key for key, duty in figures.duties.items() if not duty.done]
    if failed:
        yield f"{len(failed)} controls failed"
    strange = set(_codes(text)) - {variant for _, variant in figures.duties}
    if strange:
        yield f"{sorted(strange)} are no controls"


def _controls(text: str, figures: Recomputed) -> Iterator[Due | str]:
    duties = figures.duties.values()
    yield text, [sum(duty.done for duty in duties), len(duties)]


TELLERS = (
    (r"^(?:\*\*Answer\.\*\* )?(?:No loss |`[^`]+` is (?:worse|better|equivalent))", _answer),
    (r"^(?:\*\*Answer\.\*\* )?Nothing can be said of `", _nothing),
    ("^(?:" + "|".join(map(re.escape, KINDS)) + ")", _kind),
    (r"^\*\*Controls\*\* did what they must", _controls_kept),
    (r"\d+ of \d+ controls? did what", _controls),
)
