"""Marks, counts and sample answers of report.md held to the answers.

None of the code that writes the report is used.
"""

import html
import re
from collections.abc import Iterator

from helpers.core.gates import WHOLE_VARIANT
from helpers.report.checks.published_numbers import Table, differs, plain, tables
from helpers.report.checks.recomputed_tables import NAMES, Recomputed
from helpers.statistics.checks.recomputed_scores import best_fixed_score
from helpers.statistics.checks.recomputed_verdicts import informative

DIFFERING = re.compile(r"^Items of `(.*?)`.*\((\d+) of (\d+) are\)", re.M)
SAMPLES = re.compile(r"^Items of `(.*?)`.*?$(.*?)(?=^Items of|\Z)", re.M | re.S)
COMPARED = 40  # characters of an answer; what is shown may be cut after them


def wrong_chapters(markdown: str, figures: Recomputed) -> list[str]:
    """Every mark, count and sample that does not agree, with its place."""
    found = tables(markdown)
    told = [*_marks(found, figures), *_counts(markdown, figures), *_samples(markdown, figures)]
    told += [*_gate_rows(found, figures), *_blind(markdown, figures), *_fixed(figures)]
    return [f"report.md, {line}" for line in told]


def _failing(figures: Recomputed, at: tuple[str, str], guarded: tuple[str, ...]) -> bool:
    failed = figures.asked[at].failed
    return any(gate.get("invalidates", WHOLE_VARIANT) in guarded for gate in failed)


def _due_mark(figures: Recomputed, at: tuple[str, str], name: str) -> str:
    """✗ where a variant is invalid on a set, ○ where the set tells nothing."""
    for c, row in figures.rows.items():
        if (c.model, c.variant, c.dataset, c.baseline) == (*at, name, figures.study.baseline):
            return {"invalid": "✗", "uninformative": "○"}.get(row["verdict"], "")
    adapter = figures.study.evaluation.datasets[name].adapter
    rows = figures.asked[at].predictions[name]
    if not informative(adapter, rows, figures.drawing):
        return "○"
    return "✗" if _failing(figures, at, (WHOLE_VARIANT, name)) else ""


def _marks(found: list[Table], figures: Recomputed) -> Iterator[str]:
    for table in found:
        if not {"checks", "perplexity", "top-1"} <= set(table.columns):
            continue
        for row in map(table.by_column, table.rows):
            at = plain(row["model"]), plain(row["variant"]).partition(" (")[0]
            if at not in figures.asked:
                continue
            due = "✗" if figures.asked[at].failed else ""
            if ("✗" in row["checks"]) != bool(due):
                yield f"headline, {'/'.join(at)}: checks marked {plain(row['checks'])!r}"
            for name in figures.study.evaluation.datasets:
                cell = plain(row[NAMES.get(name, name)])
                said = cell[-1] if cell[-1] in "✗○" else ""
                if said != (due := _due_mark(figures, at, name)):
                    yield f"headline, {'/'.join(at)}, {name}: marked {said!r}, due is {due!r}"


def _chapters(markdown: str, figures: Recomputed) -> Iterator[tuple[str, str]]:
    """(evaluation set, text of its chapter)."""
    for name in figures.study.evaluation.datasets:
        title = re.escape(NAMES.get(name, name))
        if part := re.search(rf"^### 5\.\d+ {title}$(.*?)(?=^#)", markdown + "\n#", re.M | re.S):
            yield name, part[1]


def _side_by_side(figures: Recomputed) -> list[str]:
    """The variants whose answers are shown beside each other: no repetition, no rounding alone."""
    study = figures.study
    return [
        v
        for v, recipe in study.variants.items()
        if v == study.baseline or recipe.recipe == "seed" or (recipe.quantized and not recipe.dtype)
    ]


def _answers(figures: Recomputed, model: str, name: str) -> dict[str, dict[str, dict]]:
    """Item id → variant → row."""
    found: dict[str, dict[str, dict]] = {}
    for variant in _side_by_side(figures):
        for row in figures.asked[model, variant].predictions[name]:
            found.setdefault(row["id"], {})[variant] = row
    return found


def _counts(markdown: str, figures: Recomputed) -> Iterator[str]:
    first = next(iter(figures.study.models)), figures.study.baseline
    for name, text in _chapters(markdown, figures):
        rows = figures.asked[first].predictions[name]
        passages = len({row["cluster"] or row["id"] for row in rows})
        line = next(line for line in text.splitlines() if " best fixed answer" in line)
        values = [len(rows), *([passages] if passages < len(rows) else [])]
        values.append(100 * figures.fixed[name][1])
        if differs(re.sub(r"“.*”", "", html.unescape(line)), values):
            yield f"{name}: {plain(line)[:80]!r}, recomputed {values}"
        for model, said, total in DIFFERING.findall(text):
            each = _answers(figures, model, name).values()
            due = sum(
                len({(r["status"], r["parsed"], r["score"] > 0) for r in of.values()}) > 1
                for of in each
            )
            if (int(said), int(total)) != (due, len(each)):
                yield f"{name}, items of {model}: {said} of {total} differ, recomputed {due}"


def _squeezed(text: str) -> str:
    return "".join(c for c in text if c.isalnum())[:COMPARED]


def _shown(row: dict) -> str:
    said = {"abstained": "abstained", "unparsed": f"unparsed{row['output'] or 'empty'}"}
    return _squeezed(said.get(row["status"], row["parsed"] or ""))


def _samples(markdown: str, figures: Recomputed) -> Iterator[str]:
    """Rows of sample answers that no item has: its golds, and every answer with its mark."""
    for name, text in _chapters(markdown, figures):
        for model, part in SAMPLES.findall(text):
            items = _answers(figures, model, name)
            for table in tables(part):
                variants = [v for v in table.columns if v in _side_by_side(figures)]
                known = {
                    (
                        _squeezed("; ".join(of[variants[0]]["golds"]) or "none"),
                        *(("✓" if of[v]["score"] else "✗", _shown(of[v])) for v in variants),
                    )
                    for of in items.values()
                }
                for row in map(table.by_column, table.rows):
                    cells = [plain(row[v]) for v in variants]
                    said = tuple((cell[0], _squeezed(cell[1:])) for cell in cells)
                    key = (_squeezed(plain(row["right answer"])), *said)
                    if not any(_same(key, one) for one in known):
                        told = plain(row["item"])
                        yield f"{name}, items of {model}: no item has the row {told!r}"


def _same(shown: tuple, known: tuple) -> bool:
    """Equal, where what is shown may have been cut."""
    pairs = zip(shown[1:], known[1:], strict=True)
    if not known[0].startswith(shown[0][: len(known[0])]):
        return False
    return all(a[0] == b[0] and b[1].startswith(a[1]) for a, b in pairs)


def _gate_rows(found: list[Table], figures: Recomputed) -> Iterator[str]:
    """Rows that say a gate holds where it fails, or the other way round."""
    for table in found:
        if table.columns != ("gate", "variants", "result"):
            continue
        model = re.search(r" of (\S+?)\.?$", table.heading)[1]
        for row in map(table.by_column, table.rows):
            named = [plain(v) for v in row["variants"].split(",")]
            who = list(figures.study.variants) if named == ["all"] else named
            asked = [figures.asked[model, v] for v in who if (model, v) in figures.asked]
            failed = any(g["name"] == plain(row["gate"]) for a in asked for g in a.failed)
            if failed != ("FAILS" in row["result"]):
                yield f"{table.heading}, {plain(row['gate'])}: {plain(row['result'])[:60]!r}"


def _blind(markdown: str, figures: Recomputed) -> Iterator[str]:
    """The sets of which the conclusions say that nothing can be read from them."""
    if not (said := re.search(r"Nothing about ability can be read from (.*?): there", markdown)):
        return
    due = {
        (NAMES.get(c.dataset, c.dataset), c.model)
        for c, row in figures.rows.items()
        if row["verdict"] == "uninformative" and c.baseline == figures.study.baseline
    }
    listed = {
        (name, model)
        for name, models in re.findall(r"([^`,]+?) of ((?:`[^`]+`(?:, | and )?)+)", said[1])
        for name, model in ((name.strip(), m) for m in re.findall(r"`([^`]+)`", models))
    }
    if listed != due:
        yield f"conclusions: nothing can be read from {sorted(listed)}, recomputed {sorted(due)}"


def _fixed(figures: Recomputed) -> Iterator[str]:
    first = figures.asked[next(iter(figures.study.models)), figures.study.baseline]
    for name, wanted in figures.study.evaluation.datasets.items():
        due = best_fixed_score(wanted.adapter, first.predictions[name])
        if abs((said := figures.fixed[name][1]) - due) > 1e-9:
            yield f"{name}: the best fixed answer scores {said:.4g}, again {due:.4g}"
