"""Compares recommendation.md with the answers, the report's tables and its own choice.

Differences, verdicts and checks are recomputed from the answers; sizes are those of summary.json;
the KL on judging items and the speeds are the cells of report.md that show them. The choice, the
Pareto front and every reason against a variant follow from the table. How much a choice by the
evaluation items would flatter is drawn again. None of the code that recommends is used.
"""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from helpers.report.checks.recomputed_graded_report import multiplying_as
from helpers.report.checks.recomputed_tables import (
    RecomputedFigures,
    Table,
    cell_differs,
    code_names,
    plain_text,
    read_tables,
    rounds_to,
    written_numbers,
)
from helpers.statistics.checks import recomputed_graded as again
from helpers.study.schema import FineTunedModel, Study

TITLE, MISSING = "# Which variant to use: ", "–"
KL, DIFFERENCE = "KL on judging items [nats]", "graded difference [points]"
HALVINGS, DRAWN_TWICE = 400, 0.15  # points; two programs halve the items in their own ways
OBJECTION = re.compile(r"Not `([^`]+)`: (.*?)\.(?= (?:Not|Unquantized)|$)")
Rows = dict[str, dict[str, str]]  # by variant, the cells of its row


def wrong_recommendation(markdown: str, report: str, figures: RecomputedFigures) -> list[str]:
    """Every cell, choice and reason that differs, by its model and variant."""
    shown, lines = read_tables(report), []
    if not markdown.startswith(f"{TITLE}{figures.study.title}\n"):
        lines.append(f"recommendation.md: its title is not {TITLE}{figures.study.title}")
    sections = re.split(r"^## `([^`]+)`$", markdown, flags=re.M)[1:]
    texts = dict(zip(sections[::2], sections[1::2], strict=True))
    if list(texts) != list(figures.study.models):
        lines.append(f"recommendation.md: has {', '.join(texts)}, the study other models")
    for model in set(texts) & set(figures.study.models):
        told = _wrong_model(model, texts[model], shown, figures)
        lines += [f"recommendation.md, {model}: {line}" for line in told]
    return lines


def _wrong_model(model, text, shown: list[Table], figures: RecomputedFigures) -> Iterator[str]:
    tables = [table for table in read_tables(text) if KL in table.columns]
    if not tables:
        yield "there is no table of variants"
        return
    rows = {plain_text(row["variant"]): row for row in map(tables[0].by_column, tables[0].rows)}
    expected = [v for v in figures.study.variants if v != figures.study.baseline]
    if list(rows) != expected:
        yield f"its variants are {', '.join(rows)}, the study's {', '.join(expected)}"
        return
    for variant, row in rows.items():
        yield from _wrong_row(model, variant, row, shown, figures)
    yield from _wrong_front(rows, figures.study)
    yield from _wrong_choice(model, text, rows, figures)
    yield from _wrong_flattery(model, text, figures)


def _wrong_row(model, variant, row, shown, figures: RecomputedFigures) -> Iterator[str]:
    pooled = _pooled(model, variant, figures)
    values = [100 * pooled[key] for key in ("delta", "low", "high")] if pooled else []
    if cell_differs(row[DIFFERENCE], values):
        yield f"{variant}, difference: {row[DIFFERENCE]}, recomputed {values}"
    verdict = _verdict(model, variant, figures)
    if row["verdict"] != verdict:
        yield f"{variant}, verdict: {row['verdict']}, recomputed {verdict}"
    share = 100 * _bytes_share(model, variant, figures)
    if cell_differs(row["bytes"], [share]):
        yield f"{variant}, bytes: {row['bytes']}, by summary.json {share:.3f} %"
    failing = len(figures.variants[model, variant].failed_gates)
    checks = f"{failing} fail" if failing else "pass"
    if row["checks"] != checks:
        yield f"{variant}, checks: {row['checks']}, recomputed {checks}"
    kl = _judged_kl(model, variant, shown, figures.study)
    if plain_text(row[KL]) != kl:
        yield f"{variant}, KL: {row[KL]}, in the report {kl}"
    speeds = _speeds(model, variant, shown, figures.study)
    written = plain_text(row["reading"]), plain_text(row["writing"])
    if written != speeds:
        yield f"{variant}, speeds: {' and '.join(written)}, in the report {' and '.join(speeds)}"


def _pooled(model: str, variant: str, figures: RecomputedFigures) -> Mapping | None:
    rows = figures.graded_blocks.get("pooled", ())
    return next(
        (r for r in rows if (r["model"], r["variant"]) == (model, variant) and "delta" in r), None
    )


def _verdict(model: str, variant: str, figures: RecomputedFigures) -> str:
    rows = figures.graded_blocks.get("pooled", ())
    at = model, variant
    return next((r["verdict"] for r in rows if (r["model"], r["variant"]) == at), MISSING)


def _bytes_share(model: str, variant: str, figures: RecomputedFigures) -> float:
    published = figures.summary["models"][model]["variants"][variant]
    if "bytes_after" in published:
        before, after = (sum(published[f"bytes_{x}"].values()) for x in ("before", "after"))
        return after / before
    narrow = figures.study.variants[variant].dtype == "bfloat16"
    wide = figures.study.variants[variant].dtype == "float32"
    return 0.5 if narrow else 2.0 if wide else 1.0


def _judged_kl(model: str, variant: str, shown: list[Table], study: Study) -> str:
    """As the report's table of Linears left in float has it; of a cache nothing is simulated."""
    if study.variants[variant].kv:
        return MISSING
    for table in shown:
        if table.columns[:2] == ("largest saving of KL", "model"):
            row = table.row(**{"largest saving of KL": variant, "model": model})
            return plain_text(row["KL as quantized"]) if row else MISSING
    return MISSING


def _speeds(model: str, variant: str, shown: list[Table], study: Study) -> tuple[str, str]:
    """(reading, writing) in the report's table of costs, of a configuration that does alike.

    A model that was trained here costs what its start does.
    """
    own, missing, source = study.variants[variant], (MISSING, MISSING), study.models[model]
    timed = source.finetune.start if isinstance(source, FineTunedModel) else model
    tables = [
        table
        for table in shown
        if table.columns[0] == "against float32" and table.section == f"Model {timed}"
    ]
    rows = {plain_text(row[0]): row for table in tables for row in table.rows}
    names = multiplying_as(study, variant)
    if names and not own.needs_checkpoint:
        names = [f"{study.baseline} {own.dtype or study.runtime.dtype}"]
    row = next((rows[name] for name in names if name in rows), None)
    if row is None:
        return missing
    reading, writing = (plain_text(cell).partition(" ")[0] for cell in row[2:4])
    return reading, writing


def _number(cell: str) -> float | None:
    written = written_numbers(plain_text(cell).replace("×", ""))
    return float(written[0]) if written else None


def _wrong_front(rows: Rows, study: Study) -> Iterator[str]:
    """Variants that are on the front and beaten by another row, or beaten by none and not on it.

    A row whose KL is written as another's is left out: it may be more or less.
    """
    judged = {v: kl for v, row in rows.items() if (kl := _number(row[KL])) is not None}
    points = {
        v: (judged[v], _number(rows[v]["bytes"]), -(_number(rows[v]["reading"]) or 1.0))
        for v in judged
    }
    for variant, point in points.items():
        others = [p for v, p in points.items() if v != variant]
        if any(p[0] == point[0] for p in others):
            continue
        beaten = any(all(x <= y for x, y in zip(p, point, strict=True)) for p in others)
        if (rows[variant]["Pareto front"] == "yes") == beaten:
            yield f"{variant}, Pareto front: {rows[variant]['Pareto front']}, by the table not so"
    for variant in rows.keys() - judged.keys():
        if rows[variant]["Pareto front"] != MISSING:
            yield f"{variant}, Pareto front: it has no KL on judging items"


def _wrong_choice(model, text: str, rows: Rows, figures: RecomputedFigures) -> Iterator[str]:
    study = figures.study
    quantized = [v for v in rows if study.variants[v].quantized]
    kls = {v: kl for v in quantized if (kl := _number(rows[v][KL])) is not None}
    sound = [v for v in kls if rows[v]["checks"] == "pass"]
    sentence = next((s for s in text.splitlines() if s.startswith(f"For `{model}`")), "")
    head = sentence.split(" Not `")[0].split(" Unquantized, ")[0]
    names = code_names(head)
    if len(names) < 2:
        if sound:
            yield f"recommends nothing, and {', '.join(sound)} pass every check"
        return
    chosen = names[1]
    if chosen not in sound:
        yield f"chooses {chosen}, which is not quantized, has no KL, or fails a check"
        return
    taken = f"take `{chosen}`" in head
    confirmed = _verdict(model, chosen, figures) in ("equivalent", "better")
    if taken != confirmed:
        yield f"{chosen} is {_verdict(model, chosen, figures)}, and it says {head!r}"
    yield from _wrong_claim(model, chosen, head, rows[chosen], figures)
    objections = dict(OBJECTION.findall(sentence))
    for variant in quantized:
        if variant != chosen:
            reason = objections.get(variant, "")
            yield from _wrong_objection(variant, chosen, reason, rows, kls)
    for variant in set(objections) - set(quantized):
        yield f"objects to {variant}, which is not quantized"


def _wrong_claim(model, chosen, head: str, row, figures: RecomputedFigures) -> Iterator[str]:
    """The numbers said of the chosen variant."""
    pooled = _pooled(model, chosen, figures)
    expected = [100 * max(0.0, -pooled["low"])] if pooled else []
    for column in ("reading", "writing"):
        if (speed := _number(row[column])) is not None:
            expected.append(speed)
    expected.append(100 * _bytes_share(model, chosen, figures))
    written = written_numbers(head.replace("×", ""))
    if len(written) != len(expected) or not all(map(rounds_to, written, expected)):
        yield f"{chosen}: says {', '.join(written)}, recomputed {expected}"


def _wrong_objection(variant, chosen, reason: str, rows: Rows, kls) -> Iterator[str]:
    row = rows[variant]
    written = written_numbers(reason.replace("×", ""))
    if row["checks"] != "pass":
        if not reason.startswith(f"{row['checks'].split()[0]} of its checks fail"):
            yield f"{variant}: {reason!r}, and {row['checks']}"
    elif row["verdict"] == "worse":
        expected = [n.lstrip("-") if not i else n for i, n in enumerate(_cells(row[DIFFERENCE]))]
        if not reason.startswith("it is worse by") or written != expected:
            yield f"{variant}: {reason!r}, and it is worse by {row[DIFFERENCE]}"
    elif variant not in kls:
        if reason:
            yield f"{variant}: {reason!r}, and it has no KL on judging items"
    elif "too many" in reason:
        if kls[variant] > kls[chosen] or _number(row["bytes"]) <= _number(rows[chosen]["bytes"]):
            yield f"{variant}: {reason!r}, and its bytes or KL are no reason"
    elif not (match := re.match(r"([\d.]+) times the KL", reason)):
        yield f"{variant}: {reason!r} is no reason that is known"
    else:
        half = 0.05 + 0.005 * kls[variant] / kls[chosen]  # of ratios, and of rounded KLs
        if abs(float(match[1]) - kls[variant] / kls[chosen]) > half:
            yield f"{variant}: {match[0]}, by the table {kls[variant] / kls[chosen]:.2f}"
        if "of the bytes" in reason and written[1:] != _cells(row["bytes"]):
            yield f"{variant}: {reason!r}, and {row['bytes']} of the bytes"


def _cells(cell: str) -> list[str]:
    return written_numbers(plain_text(cell).replace("×", ""))


def _wrong_flattery(model: str, text: str, figures: RecomputedFigures) -> Iterator[str]:
    """What the best variant of one half of the items loses on the other half, drawn again."""
    match = re.search(r"^Chosen by half .* would look ([\d.]+) points better", text, re.M)
    expected = _flattery(model, figures)
    if match is None:
        if expected is not None:
            yield "does not say how much a choice by the evaluation items would flatter"
        return
    if expected is None or abs(float(match[1]) - 100 * expected) > DRAWN_TWICE + 0.05:
        yield f"would look {match[1]} points better, drawn again {100 * (expected or 0):.2f}"


def _flattery(model: str, figures: RecomputedFigures) -> float | None:
    study, blocks = figures.study, figures.graded_blocks
    names = [
        v
        for v, recipe in study.variants.items()
        if recipe.quantized and not figures.variants[model, v].failed_gates
    ]
    pooled = [r for r in blocks.get("pooled", ()) if r["model"] == model and r["variant"] in names]
    if len(names) < 2 or not pooled:
        return None
    rng, gaps = np.random.default_rng(1), []
    tables = [_changes(model, name, names, figures) for name in pooled[0]["sets"]]
    for _ in range(HALVINGS):
        halves = np.zeros((2, len(names)))
        for changes, owners in tables:
            groups = owners.max() + 1
            first = np.isin(owners, rng.choice(groups, (groups + 1) // 2, replace=False))
            halves[0] += changes[:, first].mean(axis=1)
            halves[1] += changes[:, ~first].mean(axis=1)
        best = halves[0].argmax()
        gaps.append((halves[0, best] - halves[1, best]) / len(tables))
    return float(np.mean(gaps))


def _changes(
    model: str, name: str, variants: list[str], figures: RecomputedFigures
) -> tuple[np.ndarray, np.ndarray]:
    """((variants, items) changes of the graded score on a set, (items,) number of the cluster)."""
    study = figures.study
    normalize = getattr(study.evaluation.datasets[name].ask, "normalize", "none")
    rows = figures.variants[model, study.baseline].predictions[name]
    before = again.item_scores(rows, normalize)
    ids = sorted(before)
    changes = []
    for variant in variants:
        after = again.item_scores(figures.variants[model, variant].predictions[name], normalize)
        changes.append([after[i] - before[i] for i in ids])
    clusters = {row["id"]: row["cluster"] or row["id"] for row in rows}
    return np.array(changes), np.unique([clusters[i] for i in ids], return_inverse=True)[1]
