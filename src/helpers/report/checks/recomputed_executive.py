"""Verdicts of report.md in words, held to verdicts made again from the answers.

None of the code that writes the report is used.
"""

import re
from collections.abc import Iterator

from helpers.report.checks.published_numbers import rounds_to
from helpers.report.checks.recomputed_tables import DATASET_NAMES, RecomputedFigures

INFORMATIVE = ("worse", "better", "equivalent", "inconclusive")
BULLET_STARTS = {
    "**Worse**": "worse",
    "**Better**": "better",
    "**Equivalent within": "equivalent",
    "**Inconclusive**": "inconclusive",
    "**Uninformative**": "uninformative",
    "**Invalid**": "invalid",
}

ExpectedNumbers = tuple[str, list[float | None]]  # (text, its expected numbers)


def code_names(text: str) -> list[str]:
    """The names between backticks, in order."""
    return re.findall(r"`([^`]+)`", text)


def _declared_rows(figures: RecomputedFigures) -> list[dict]:
    return [row for row in figures.rows.values() if row["primary"]]


def _check_answer(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    """The number of informative declared comparisons, and of those worse or better."""
    names = code_names(text)
    group = [
        r
        for r in _declared_rows(figures)
        if names and r["variant"] == names[0] and r["verdict"] in INFORMATIVE
    ]
    if len(names) > 1:
        group = [r for r in group if r["baseline"] == names[1]]
    count_clause = re.search(r"in the (\d+|one) (?:of [\d,]+ declared )?comparisons?", text)
    if count_clause and (1 if count_clause[1] == "one" else int(count_clause[1])) != len(group):
        yield f"published {count_clause[1]} that could show one, recomputed {len(group)}"
    for word in ("worse", "better"):
        pattern = rf"(?:{word} than `[^`]+` in|and {word} in) (\d+)"
        published = [int(n) for n in re.findall(pattern, text)]
        expected = sum(row["verdict"] == word for row in group)
        if published and published != [expected]:
            yield f"published {published[0]} {word}, recomputed {expected}"
        if expected and not published:
            yield f"{expected} are {word}, which it does not say"
    if "is equivalent to" in text and {r["verdict"] for r in group} != {"equivalent"}:
        yield "not all that can tell are equivalent"


def _check_verdict_bullet(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    """A bullet of one kind of verdict: its places, and the smallest detectable losses."""
    kind = next(kind for begin, kind in BULLET_STARTS.items() if text.startswith(begin))
    rows = [r for r in _declared_rows(figures) if r["verdict"] == kind]
    places = {(DATASET_NAMES.get(r["dataset"], r["dataset"]), r["model"]) for r in rows}
    dataset_names = "|".join(
        re.escape(DATASET_NAMES.get(n, n)) for n in figures.study.evaluation.datasets
    )
    head = re.split(r"\. |\. ?$", text, maxsplit=1)[0] if kind in INFORMATIVE[2:] else text
    published_places = {
        (name, model)
        for name, models in re.findall(rf"({dataset_names}) of ((?:`[^`]+`(?:, | and )?)+)", head)
        for model in code_names(models)
    }
    if published_places != places:
        yield f"published {sorted(published_places)}, recomputed {sorted(places)}"
    detectable_range = re.search(
        r"power (?:is|ranges from) ([\d.]+) points(?: \(.*?\) to ([\d.]+) points)?", text
    )
    if detectable_range:
        detectable = [
            100 * r["smallest_detectable_loss"] for r in rows if r["smallest_detectable_loss"]
        ]
        ends = [e for e in detectable_range.groups() if e]
        expected = [min(detectable), max(detectable)] if detectable else []
        if not expected or not all(map(rounds_to, (ends[0], ends[-1]), expected)):
            yield f"published {' to '.join(ends)} points, recomputed {expected}"


def _check_nothing_shown(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    """A variant without an informative comparison: how many are invalid or uninformative."""
    group = [r for r in _declared_rows(figures) if r["variant"] == code_names(text)[0]]
    n, kinds = len(group), [r["verdict"] for r in group]
    counts = f"{kinds.count('invalid')} invalid, {kinds.count('uninformative')} uninformative"
    alike = re.search(r"(?:its one comparison is|all (\d+) comparisons are) (\w+)", text)
    mixed = re.search(r"of (\d+) comparisons, (\d+) (?:is|are) invalid and (\d+) ", text)
    if alike:
        correct = [alike[2]] * int(alike[1] or 1) == kinds
    else:
        stated = [int(number) for number in mixed.groups()] if mixed else []
        correct = stated == [n, kinds.count("invalid"), kinds.count("uninformative")]
    if not correct:
        yield f"of {n} comparisons: {counts}"


def _check_controls_bullet(
    text: str, figures: RecomputedFigures
) -> Iterator[ExpectedNumbers | str]:
    """No control failed, and the names in the sentence are controls."""
    failed = [key for key, outcome in figures.control_outcomes.items() if not outcome.ok]
    if failed:
        yield f"{len(failed)} controls failed"
    not_controls = set(code_names(text)) - {variant for _, variant in figures.control_outcomes}
    if not_controls:
        yield f"{sorted(not_controls)} are no controls"


def _check_controls_count(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    outcomes = figures.control_outcomes.values()
    yield text, [sum(outcome.ok for outcome in outcomes), len(outcomes)]


VERDICT_SENTENCE_CHECKS = (
    (r"^(?:\*\*Answer\.\*\* )?(?:No loss |`[^`]+` is (?:worse|better|equivalent))", _check_answer),
    (r"^(?:\*\*Answer\.\*\* )?No conclusion about `", _check_nothing_shown),
    ("^(?:" + "|".join(map(re.escape, BULLET_STARTS)) + ")", _check_verdict_bullet),
    (r"^\*\*All controls behaved as expected\*\*", _check_controls_bullet),
    (r"\d+ of \d+ controls? behaved", _check_controls_count),
)
