"""Compares graded scores, draws, cards and the KL by token in the report with recomputed ones.

Blocks of summary.json value by value; tables of report.md and the cards cell by cell; and the
sentences on graded scores and recipes. None of the code that writes the report is used.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from helpers.report.checks.recomputed_tables import (
    DATASET_NAMES,
    ExpectedNumbers,
    RecomputedFigures,
    Table,
    cell_differs,
    code_names,
    equal_values,
    plain_text,
    read_tables,
    written_numbers,
)
from helpers.study.schema import Study

# Blocks of costs: the key of the model in a row of summary.json, and its column in report.md.
COSTS = {
    "finetuning_cost": ("finetuned", "fine-tuned − start"),
    "rotation_cost": ("rotated", "rotated − start"),
}
BLOCKS = ("graded", "pooled", *COSTS)
DRAWS, CALIBRATIONS, PARTS = "draws", "calibrations", "decompositions"
PLACE_KEYS = ("model", "start", "finetuned", "rotated", "dataset", "measure", "baseline", "variant")
COST_WORDS = {"worse": "higher cost", "better": "lower cost"}
COST_CLAUSES = {
    "worse": "higher cost",
    "better": "lower cost",
    "equivalent": "the same cost within the margin",
    "inconclusive": "no difference detected",
}


def wrong_graded_blocks(published: dict, figures: RecomputedFigures) -> list[str]:
    """Values of the blocks that differ; a block that the answers give has to be there."""
    names = (*BLOCKS, DRAWS, CALIBRATIONS, PARTS)
    stored = {name: published[name] for name in names if name in published}
    if figures.graded_blocks and not stored:
        return ["summary.json has no graded scores, and the answers have"]
    return list(_differing("summary.json", figures.graded_blocks, stored))


def _differing(place: str, expected, stored) -> Iterator[str]:
    """Every nested value that differs, by its path; list entries by the names they hold."""
    if isinstance(expected, list) and expected and isinstance(expected[0], Mapping):
        expected = {_entry_name(row): row for row in expected}
        if isinstance(stored, list) and all(isinstance(row, Mapping) for row in stored):
            stored = {_entry_name(row): row for row in stored}
    if isinstance(expected, Mapping) and isinstance(stored, Mapping):
        for key in dict.fromkeys([*expected, *stored]):
            yield from _differing(f"{place}, {key}", expected.get(key), stored.get(key))
    elif isinstance(expected, list) and isinstance(stored, list) and len(expected) == len(stored):
        for number, pair in enumerate(zip(expected, stored, strict=True), start=1):
            yield from _differing(f"{place} {number}", *pair)
    elif not equal_values(expected, stored):
        yield f"{place}: published {stored!r}, recomputed {expected!r}"


def _entry_name(row: Mapping) -> str:
    return " / ".join(str(row[key]) for key in PLACE_KEYS if key in row)


def wrong_graded_cells(markdown: str, figures: RecomputedFigures) -> list[str]:
    """Cells of the chapter's tables whose numbers or verdict differ."""
    lines = []
    for table in read_tables(markdown):
        first = table.columns[0]
        if (rows_of := TABLES.get(first)) is None:
            continue
        for row in map(table.by_column, table.rows):
            names = [plain_text(row[c]) for c in (first, "variant", "model") if c in row]
            place = " / ".join(names)
            expected = rows_of(table, row, figures)
            if expected is None:
                lines.append(f"report.md, {table.heading}: row {place} is none of the study's")
                continue
            for column, (values, word) in expected.items():
                cell = plain_text(row.get(column, ""))
                if cell_differs(row.get(column, ""), values) or word not in cell:
                    numbers = ", ".join(f"{v:.6g}" for v in values) or "no number"
                    lines.append(
                        f"report.md, {table.heading}, row {place}, column {column}: "
                        f"published {cell!r}, recomputed {numbers} {word}"
                    )
    return lines


Expected = dict[str, tuple[list[float], str]]  # by column: numbers, and a word


def _expected_cell(row: Mapping | None, words: Mapping = COST_WORDS) -> tuple[list[float], str]:
    if row is None:
        return [], "–"
    numbers = [100 * row[key] for key in ("delta", "low", "high")] if "delta" in row else []
    return numbers, words.get(row["verdict"], row["verdict"])


def _dataset_columns(table: Table, figures: RecomputedFigures) -> dict[str, str]:
    """Evaluation set by column, `ARC [points]`."""
    titles = {DATASET_NAMES.get(n, n): n for n in figures.study.evaluation.datasets}
    names = {column: titles.get(column.rpartition(" [")[0]) for column in table.columns}
    return {column: name for column, name in names.items() if name}


def _variant_and_baseline(row: Mapping[str, str], figures: RecomputedFigures) -> tuple[str, str]:
    variant, _, against = plain_text(row["variant"]).partition(" vs ")
    return variant.partition(" (")[0], against or figures.study.baseline


def _comparison_cells(table: Table, row: dict, figures: RecomputedFigures) -> Expected | None:
    model, (variant, baseline) = (
        plain_text(row["graded scores"]),
        _variant_and_baseline(row, figures),
    )
    by_set = {
        c["dataset"]: c
        for c in figures.graded_blocks.get("graded", {}).get("comparisons", ())
        if (c["model"], c["variant"], c["baseline"]) == (model, variant, baseline)
    }
    if not by_set:
        return None
    columns = _dataset_columns(table, figures).items()
    return {column: _expected_cell(by_set.get(name), {}) for column, name in columns}


def _comparison_row_cells(table: Table, row: dict, figures: RecomputedFigures) -> Expected | None:
    """A row about one set, variant and model, with right and wrong beside the graded score."""
    del table
    title = plain_text(row["graded score"]).rpartition(" [")[0]
    variant, baseline = _variant_and_baseline(row, figures)
    at = (plain_text(row["model"]), variant, baseline)
    for c, right in figures.rows.items():
        name = DATASET_NAMES.get(c.dataset, c.dataset)
        if (c.model, c.variant, c.baseline, name) == (*at, title):
            judged = figures.graded_blocks.get("graded", {}).get("comparisons", ())
            own = (*at, c.dataset)
            keys = ("model", "variant", "baseline", "dataset")
            graded = next((r for r in judged if tuple(r[k] for k in keys) == own), None)
            values, word = _expected_cell(graded, {})
            counted = [100 * right[key] for key in ("delta", "low", "high")]
            cells = {"Δ": (values, "" if values else "–"), "verdict": ([], word)}
            return cells | {"Δ right or wrong [points]": (counted, "")}
    return None


def _pooled_cells(table: Table, row: dict, figures: RecomputedFigures) -> Expected | None:
    del table
    at = plain_text(row["pooled"]), _variant_and_baseline(row, figures)[0]
    pooled = (
        r for r in figures.graded_blocks.get("pooled", ()) if (r["model"], r["variant"]) == at
    )
    if (difference := next(pooled, None)) is None:
        return None
    share = difference["recovery"]
    recovery = [100 * share[k] for k in ("value", "low", "high")] if share else []
    sets = ", ".join(DATASET_NAMES.get(n, n) for n in difference["sets"])
    cells = {"difference [points]": _expected_cell(difference, {})}
    cells["recovery"] = (recovery, "%" if share else "–")
    return cells | {"informative sets": ([], sets)}


def _cost_cells(table: Table, row: dict, figures: RecomputedFigures) -> Expected | None:
    block, title = next((block, title) for block, (_, title) in COSTS.items() if title in row)
    model, variant = plain_text(row[title]), _variant_and_baseline(row, figures)[0]
    if (cost := _cost(figures, block, model, variant)) is None:
        return None
    columns = _dataset_columns(table, figures).items()
    cells = {column: _expected_cell(cost["sets"].get(name)) for column, name in columns}
    cells["pooled [points]"] = _expected_cell(cost["pooled"])
    return cells | {"KL [0.01 nats]": _expected_cell(cost["kl"])}


def _cost(figures: RecomputedFigures, block: str, model: str, variant: str) -> Mapping | None:
    rows = figures.graded_blocks.get(block, ())
    made, _ = COSTS[block]
    return next((r for r in rows if (r[made], r["variant"]) == (model, variant)), None)


def _draws_cells(table: Table, row: dict, figures: RecomputedFigures) -> Expected | None:
    del table
    model, _, start = plain_text(row["recipe of"]).partition(" − ")
    place, _, measure = plain_text(row["figure"]).rpartition(", ")
    recipe = _recipe(figures, model, _variant_and_baseline(row, figures)[0], start)
    for figure in recipe["figures"] if recipe else ():
        name = figure["dataset"]
        shown = "shared text" if name == "shared_text" else DATASET_NAMES.get(name, name)
        if (shown, figure["measure"]) == (place, measure):
            return _draws_figure_cells(figure)
    return None


def _draws_figure_cells(figure: Mapping) -> Expected:
    word = figure.get("verdict") or ("invalid" if figure["reason"] else "–")
    if "draw_deltas" not in figure:
        columns = ("all draws", "first draw alone", "lowest and highest draw", "between draws")
        return dict.fromkeys(columns, ([], "–")) | {"verdict": ([], word)}
    deltas = figure["draw_deltas"]
    first = [deltas[0], figure["first_low"], figure["first_high"]]
    numbers = {
        "all draws": _with_limits([figure[key] for key in ("delta", "low", "high")]),
        "first draw alone": _with_limits(first),
        "lowest and highest draw": [min(deltas), max(deltas)],
        "between draws": [figure["between_draws"]],
    }
    cells = {column: ([100 * x for x in values], "") for column, values in numbers.items()}
    return cells | {"verdict": ([], word)}


def _with_limits(numbers: list[float]) -> list[float]:
    """A value and its limits; without these where they are the value, since nothing varies."""
    return numbers[:1] if numbers[1] == numbers[2] else numbers


def _recipe(
    figures: RecomputedFigures, model: str, variant: str, start: str = ""
) -> Mapping | None:
    recipes = figures.graded_blocks.get(DRAWS, ())
    at = model, variant, start
    return next((r for r in recipes if (r["model"], r["variant"], r["start"]) == at), None)


def _calibration_cells(table: Table, row: dict, figures: RecomputedFigures) -> Expected | None:
    del table
    model, variant = plain_text(row["calibration of"]), _variant_and_baseline(row, figures)[0]
    effects = figures.graded_blocks.get(CALIBRATIONS, ())
    effect = next((e for e in effects if (e["model"], e["variant"]) == (model, variant)), None)
    if effect is None:
        return None
    settings = figures.study.calibrations[figures.study.variants[variant].calibration]
    limits = [x for x in (effect["low"], effect["high"]) if x is not None]
    return {
        "items": ([settings.items], ""),
        "of": ([], DATASET_NAMES.get(settings.adapter, settings.adapter)),
        "KL [0.01 nats]": ([100 * effect["kl"]], "") if effect["kl"] is not None else ([], "–"),
        "another draw of": ([], effect["reference"]),
        "would have": ([100 * x for x in limits], "" if limits else "–"),
        "so it lies": ([], effect["place"]),
    }


PLACES = (
    ("higher KL than another draw", "above"),
    ("lower KL than another draw", "below"),
    ("no difference beyond the draws", "within"),
    ("no conclusion (fewer than three draws, or a failed check)", "unknown"),
)


def _check_calibration_sentence(text: str, figures: RecomputedFigures):
    """Which calibrations of one model give a KL beyond that of another draw."""
    model, reference = code_names(text)[:2]
    mine = [
        e
        for e in figures.graded_blocks.get(CALIBRATIONS, ())
        if (e["model"], e["reference"]) == (model, reference)
    ]
    clauses, expected = text.rstrip(".").split("`: ", 1)[1].split("; "), []
    for words, place in PLACES:
        names = [e["variant"] for e in mine if e["place"] == place]
        found = [clause for clause in clauses if clause.startswith(f"{words}: ")]
        if [name for clause in found for name in code_names(clause)] != names:
            yield f"recomputed {words}: {', '.join(names) or 'none'}"
        calibrations = [figures.study.variants[name].calibration for name in names]
        expected += [float(figures.study.calibrations[c].items) for c in calibrations]
    yield text.split("`: ", 1)[1], expected


def _check_calibration_reading(text: str, figures: RecomputedFigures):
    yield text, [100 * figures.study.statistics.confidence]


PART_COLUMNS = {
    "both": "both",
    "weights alone": "weights",
    "activations alone": "activations",
    "not additive": "not_additive",
}


def _part_cells(table: Table, row: dict, figures: RecomputedFigures) -> Expected | None:
    """Parts of a loss in points or hundredths of a nat, each with its limits."""
    del table
    model, variant = plain_text(row["parts of"]), _variant_and_baseline(row, figures)[0]
    measure = "KL" if plain_text(row["measure"]).startswith("KL") else "graded score"
    at = (model, variant, measure)
    blocks = figures.graded_blocks.get(PARTS, ())
    block = next((b for b in blocks if (b["model"], b["variant"], b["measure"]) == at), None)
    if block is None:
        return None
    parts, rest = block["parts"], "remainder of every draw"
    if not parts:
        return dict.fromkeys((*PART_COLUMNS, rest), ([], "–"))
    cells: Expected = {}
    for column, name in PART_COLUMNS.items():
        part = parts[name]
        numbers = [part["draws"][0], part["low"], part["high"]]
        cells[column] = ([100 * x for x in numbers], "")
    remainders = parts["not_additive"]["draws"]
    many = len(remainders) > 1
    return cells | {rest: ([100 * x for x in remainders if many], "" if many else "–")}


def _check_parts_reading(text: str, figures: RecomputedFigures):
    yield text, [100 * figures.study.statistics.confidence]


TABLES = {
    "recipe of": _draws_cells,
    "parts of": _part_cells,
    "calibration of": _calibration_cells,
    "graded score": _comparison_row_cells,
    "graded scores": _comparison_cells,  # of older reports
    "pooled": _pooled_cells,
} | {title: _cost_cells for _, title in COSTS.values()}


def _check_score_bullet(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    """Where the variant is worse, by set and pooled, how much, which pooled losses are excluded."""
    variant, blocks = code_names(text)[0], figures.graded_blocks
    mine = [
        c
        for c in blocks.get("graded", {}).get("comparisons", ())
        if (c["variant"], c["baseline"]) == (variant, figures.study.baseline)
    ]
    worse = [c for c in mine if c["verdict"] == "worse"]
    telling = [c["verdict"] for c in mine if c["verdict"] not in ("invalid", "uninformative")]
    places = [f"{DATASET_NAMES.get(c['dataset'], c['dataset'])} of `{c['model']}`" for c in worse]
    published = text.partition(" Pooled")[0].partition(" No set can")[0]
    counts = [len(worse) if worse else len(telling), len(mine)]
    if worse:
        expected = "worse in "
    elif not telling:
        expected, counts = "no conclusion is possible", []
    elif all(kind == "equivalent" for kind in telling):
        expected = "equivalent within "
        counts = [100 * figures.study.statistics.graded_margins.probability, *counts]
    else:
        expected = "no loss detected in the "
    start = f"by graded scores (the right answer's probability): {expected}"
    if start not in published or not all(place in published for place in places):
        yield f"recomputed {expected}{', '.join(places)}"
    pooled = [r for r in blocks.get("pooled", ()) if r["variant"] == variant and "delta" in r]
    lower = [row for row in pooled if row["verdict"] == "worse"]
    clause, _, limits = text.partition(" Pooled")[2].partition("losses above ")
    if code_names(clause) != [row["model"] for row in lower]:
        yield f"recomputed as worse, pooled: {[row['model'] for row in lower]}"
    models = code_names(limits)
    if models != [row["model"] for row in pooled]:
        yield f"recomputed pooled differences of {[row['model'] for row in pooled]}"
    excluded = [100 * max(0.0, -row["low"]) for row in pooled]
    yield text, [*counts, *(100 * c["delta"] for c in [*worse, *lower]), *excluded]


def _check_cost_bullet(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    """The words and numbers on a model made here, of the pooled score and of the KL."""
    variant, made, start = code_names(text)[:3]
    asked = re.match(r"\*\*Does (fine-tuning raise|rotation lower) the cost\?\*\* ([^.]+)\.", text)
    lowers = asked is not None and asked[1] == "rotation lower"
    cost = _cost(figures, "rotation_cost" if lowers else "finetuning_cost", made, variant)
    if cost is None or cost["start"] != start:
        yield f"no such cost of `{variant}` was computed"
        return
    rows = [("score pooled", cost["pooled"]), ("KL", cost["kl"])]
    rows = [(what, row) for what, row in rows if row and "delta" in row]
    kinds = [row["verdict"] for _, row in rows]
    expected = _lower_answer(kinds) if lowers else _higher_answer(kinds)
    if asked and asked[2] != expected:
        yield f"recomputed {expected!r}"
    for what, row in rows:
        clause = f"by {what}, {COST_CLAUSES[row['verdict']]} ("
        if clause not in text:
            yield f"recomputed {clause[:-2]!r}"
    yield text, [100 * row[key] for _, row in rows for key in ("delta", "low", "high")]


def _lower_answer(kinds: list[str]) -> str:
    """Yes only if every measure finds a lower cost, no only if none could have."""
    if "better" in kinds:
        return "By one of two measures" if set(kinds) - {"better"} else "Yes"
    if kinds:
        return "No decrease was detected" if "inconclusive" in kinds else "No"
    return "Nothing can be said"


def _higher_answer(kinds: list[str]) -> str:
    """Yes only if every measure finds a higher cost, no only if none could have."""
    higher = kinds.count("worse")
    if higher:
        return "Yes" if higher == len(kinds) else "By one of two measures"
    if not kinds:
        return "Nothing can be said"
    return "No increase was detected" if "inconclusive" in kinds else "No"


def _check_reading(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    margins = figures.study.statistics.graded_margins
    confidence = figures.study.statistics.confidence
    inside = 100 - 180 * (1 - confidence)  # two tests, each at nine tenths of alpha
    yield text, [100 * confidence, inside, 100 * margins.probability, 100 * margins.nats]


def _check_recipe_sentence(text: str, figures: RecomputedFigures):
    """A recipe's pooled score and KL, each with its limits and the spread between draws."""
    variant, model, start = [*code_names(text.partition(" draws: ")[0]), ""][:3]
    if (recipe := _recipe(figures, model, variant, start)) is None:
        yield f"`{variant}` of `{model}` was made once"
        return
    expected = [float(recipe["draws"])]
    for place, measure in (("pooled", "graded score"), ("shared_text", "KL")):
        for figure in recipe["figures"]:
            if (figure["dataset"], figure["measure"]) == (place, measure) and "delta" in figure:
                keys = ("delta", "low", "high", "between_draws")
                expected += [100 * figure[key] for key in keys]
    yield text, expected


def _check_made_once(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    """The quantized or smoothed variants of which there is one checkpoint."""
    once = [
        name
        for name, recipe in figures.study.variants.items()
        if recipe.needs_checkpoint and recipe.repeats == 1
    ]
    if code_names(text) != once:
        yield f"made once are {', '.join(once) or 'none'}"


def _check_draws_reading(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    yield text, [100 * figures.study.statistics.confidence]


PICTURED = re.compile(r"([^,:]+?) ([−+]?[\d.]+) points \(([^)]*)\)")
PICTURED_KL = re.compile(r"([\w.-]+) ([\d.,e−-]+) \(([\w.-]+)\)")
TITLES = (
    ("worse", re.compile(r"(.*) found worse in (\d+|one) comparisons?(?: of pooled sets)?")),
    ("nothing", re.compile(r"nothing can be said about (.*)")),
    ("no loss", re.compile(r"no loss of (.*) found")),
)


def _check_picture(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    """The figure at a glance in words: its title, the differences with their limits, the KL."""
    title, *parts = text[len("![Graded scores: ") : text.rindex("](")].rstrip(".").split(". ")
    yield from _wrong_title(title, figures)
    blocks = figures.graded_blocks
    for part in parts:
        if part.startswith("KL in nats a token: "):
            for variant, value, model in PICTURED_KL.findall(part.partition(": ")[2]):
                yield value, [figures.shared[model, variant]["kl"][0]]
            continue
        head, _, differences = part.partition(": ")
        at = tuple(head.split(", ", 1))
        for name, delta, limits in PICTURED.findall(differences):
            name = re.sub(r"^(?:,| and) ", "", name).strip()
            rows = blocks["pooled"] if name == "pooled" else blocks["graded"]["comparisons"]
            row = next((r for r in rows if _is_pictured(r, at, name, figures)), None)
            if row is None or "delta" not in row:
                yield f"{name} of {head}: the answers give no such difference"
            else:
                expected = [100 * row[key] for key in ("delta", "low", "high")]
                yield f"{delta} {limits}", expected


COUNTED = re.compile(r"(\d+) (worse|better|equivalent|inconclusive|uninformative|invalid)")


def _check_right_or_wrong(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    """The figure of right and wrong in words: declared verdicts, and differences with limits."""
    title, *parts = text[len("![") : text.rindex("](")].rstrip(".").split(". ")
    kinds = Counter(row["verdict"] for row in figures.rows.values() if row["primary"])
    if {word: int(n) for n, word in COUNTED.findall(title)} != kinds:
        yield f"the title says {title!r}; recomputed: {dict(kinds)}"
    for head, _, differences in (part.partition(": ") for part in parts):
        at = tuple(head.split(", ", 1))
        for name, delta, limits in PICTURED.findall(differences):
            name = re.sub(r"^(?:,| and) ", "", name).strip()
            rows = (c.model_dump() | row for c, row in figures.rows.items())
            row = next((r for r in rows if _is_pictured(r, at, name, figures)), None)
            if row is None:
                yield f"{name} of {head}: the answers give no such difference"
            else:
                yield f"{delta} {limits}", [100 * row[key] for key in ("delta", "low", "high")]


def _is_pictured(row: Mapping, at: tuple, name: str, figures: RecomputedFigures) -> bool:
    if (row["model"], row["variant"]) != at:
        return False
    if name == "pooled":
        return True
    shown = DATASET_NAMES.get(row["dataset"], row["dataset"])
    return shown == name and row["baseline"] == figures.study.baseline


def _wrong_title(title: str, figures: RecomputedFigures) -> Iterator[str]:
    """What a title says of the declared variants that their verdicts do not, or leaves out.

    In a study that declares nothing, of the variants that the title names.
    """
    kind, match = next(
        ((kind, m) for kind, pattern in TITLES if (m := pattern.fullmatch(title))), ("", None)
    )
    if match is None:
        yield f"no check knows the title {title!r}"
        return
    named, baseline = re.split(r", | and ", match[1]), figures.study.baseline
    studied = [c.variant for c in figures.study.statistics.primary if c.variant != baseline]
    studied = list(dict.fromkeys(studied)) or named
    blocks = figures.graded_blocks
    comparisons = [c for c in blocks["graded"]["comparisons"] if c["baseline"] == baseline]
    expected, variants, count = _expected_title(studied, comparisons, blocks["pooled"])
    if (kind, named) != (expected, variants):
        yield f"the title says {title!r}; recomputed: {expected} ({', '.join(variants)})"
    elif kind == "worse" and count != (1 if match[2] == "one" else int(match[2])):
        yield f"the title says {title!r}; recomputed: {count}"


def _expected_title(
    studied: list[str], comparisons: list[Mapping], pooled: list[Mapping]
) -> tuple[str, list[str], int]:
    """(kind of title, the variants that it has to name, the number of verdicts that are worse)."""
    for rows in (comparisons, pooled):
        worse = [r["variant"] for r in rows if r["verdict"] == "worse" and r["variant"] in studied]
        if worse:
            return "worse", [v for v in studied if v in worse], len(worse)
    blind = ("invalid", "uninformative")
    telling = {row["variant"] for row in comparisons if row["verdict"] not in blind}
    if able := [v for v in studied if v in telling]:
        return "no loss", able, 0
    return "nothing", studied, 0


GRADED_SENTENCE_CHECKS = (
    (r"^!\[Graded scores: ", _check_picture),
    (r"^!\[Right or wrong, ", _check_right_or_wrong),
    (r"^\*\*Recipe\*\* `", _check_recipe_sentence),
    (r"^Made once: `", _check_made_once),
    (r"^\*\*Calibration\*\* of `", _check_calibration_sentence),
    (r"^Variants of one recipe that differ in their calibration", _check_calibration_reading),
    (r"^What rounding the weights alone", _check_parts_reading),
    (r"^A checkpoint is one draw of its recipe\.", _check_draws_reading),
    (r"^\*\*Answer\.\*\* `[^`]+` against `[^`]+`, by graded scores \(", _check_score_bullet),
    (r"^\*\*Fine-tuning\*\* and the cost of `", _check_cost_bullet),
    (r"^\*\*Does fine-tuning raise the cost\?\*\* [^`]*`[^`]+`, `", _check_cost_bullet),
    (r"^\*\*Does rotation lower the cost\?\*\* [^`]*`[^`]+`, `", _check_cost_bullet),
    (r"^Option sets: the right option's probability among the options", _check_reading),
)


def wrong_cards(markdown: str, figures: RecomputedFigures) -> Iterator[str]:
    """Numbers and words of the cards, the columns of the tables "at a glance", that differ."""
    tables = read_tables(markdown)
    for table in tables:
        title, _, variant = table.columns[0].partition(": ")
        if title != "at a glance":
            continue
        for row in map(table.by_column, table.rows):
            name = plain_text(row[table.columns[0]])
            for model in table.columns[1:]:
                place = f"report.md, card of {model}, {variant}, {name}"
                if (check := CARD_ROWS.get(name)) is None:
                    yield f"{place}: no check knows this row"
                elif (model, variant) not in figures.variants:
                    yield f"{place}: the study has no such variant"
                else:
                    values, words = check(figures, (model, variant), tables)
                    cell = plain_text(row[model])
                    if cell_differs(row[model], values) or not all(w in cell for w in words):
                        numbers = ", ".join(f"{v:.6g}" for v in values) or "no number"
                        expected = " ".join([numbers, *words])
                        yield f"{place}: published {cell!r}, recomputed {expected}"


CardCell = tuple[list[float], list[str]]  # numbers in their order, and words
Subject = tuple[str, str]  # model, variant


def _pooled_row(figures: RecomputedFigures, at: Subject) -> dict | None:
    rows = figures.graded_blocks.get("pooled", ())
    return next((row for row in rows if (row["model"], row["variant"]) == at), None)


def _card_verdict(figures: RecomputedFigures, at: Subject, tables: list[Table]) -> CardCell:
    """The pooled verdict with its margin."""
    del tables
    if (row := _pooled_row(figures, at)) is None:
        return [], ["–"]
    margin = [100 * row["margin"]]
    if "inside the margin" in row["reason"]:
        return margin, [f"{row['verdict']}, but inside ±"]
    if row["verdict"] == "equivalent":
        return margin, ["equivalent within ±"]
    return [], [row["verdict"]]


def _card_declared(figures: RecomputedFigures, at: Subject, tables: list[Table]) -> CardCell:
    del tables
    kinds = [
        row["verdict"]
        for c, row in figures.rows.items()
        if row["primary"] and (c.model, c.variant, c.baseline) == (*at, figures.study.baseline)
    ]
    if not kinds:
        return [], ["–"]
    order = ("worse", "better", "equivalent", "inconclusive", "uninformative", "invalid")
    counts = [(kinds.count(kind), kind) for kind in order if kind in kinds]
    return [float(n) for n, _ in counts], [f"{n} {kind}" for n, kind in counts]


def _card_recovery(figures: RecomputedFigures, at: Subject, tables: list[Table]) -> CardCell:
    del tables
    row = _pooled_row(figures, at) or {}
    if (share := row.get("recovery")) is None:
        return [], ["–"]
    return [100 * share[key] for key in ("value", "low", "high")], ["%"]


def _card_loss(figures: RecomputedFigures, at: Subject, tables: list[Table]) -> CardCell:
    del tables
    row = _pooled_row(figures, at) or {}
    return ([100 * max(0.0, -row["low"])], ["points"]) if "low" in row else ([], ["–"])


def _card_noise(figures: RecomputedFigures, at: Subject, tables: list[Table]) -> CardCell:
    del tables
    kl, floor = (
        figures.shared[model, variant]["kl"][0]
        for model, variant in (at, (at[0], figures.noise_floor))
    )
    return ([kl / floor], ["×"]) if floor and kl is not None else ([], ["–"])


def _card_speed(figures: RecomputedFigures, at: Subject, tables: list[Table]) -> CardCell:
    """No answer tells a speed: the ratios are those of the chapter on cost."""
    source = figures.study.models[at[0]]
    timed = source.finetune.start if hasattr(source, "finetune") else at[0]
    alike = multiplying_as(figures.study, at[1])
    for table in tables:
        for row in map(table.by_column, table.rows):
            if plain_text(row.get("against float32", "")) not in alike:
                continue
            if table.section in (f"Model {at[0]}", f"Model {timed}"):
                return [float(written_numbers(row[c])[0]) for c in ("reading", "writing")], ["×"]
    return [], ["–"]


def multiplying_as(study: Study, variant: str) -> list[str]:
    """A variant, and those with the same granularities and Linears left float; none if simulated.

    Linears that `protect` leaves float follow from smoothing and calibration items too.
    """
    own = study.variants[variant]
    if own.kv or own.preset in ("w8a16", "w4a16", "a8", "fp8"):
        return []
    keys = ("scheme", "ignore", "protect", *(("smooth", "calibration") if own.protect else ()))
    alike = [
        name
        for name, other in study.variants.items()
        if all(getattr(other, key) == getattr(own, key) for key in keys)
    ]
    return [variant, *alike]


def _card_bytes(figures: RecomputedFigures, at: Subject, tables: list[Table]) -> CardCell:
    del tables
    recorded = figures.summary["models"][at[0]]["variants"][at[1]]
    if "bytes_after" not in recorded:
        return [], ["–"]
    after, before = (sum(recorded[key].values()) for key in ("bytes_after", "bytes_before"))
    return [100 * after / before], ["%"]


def _card_checks(figures: RecomputedFigures, at: Subject, tables: list[Table]) -> CardCell:
    del tables
    gates = figures.variants[at].gates
    passed = sum(gate["passed"] for gate in gates)
    failed = len(gates) - passed
    counts = [float(passed), *([float(failed)] if failed else [])]
    return counts, ["passed", f"{failed or 'none'} failed"]


CARD_ROWS = {
    "verdict by graded scores": _card_verdict,
    "recovery": _card_recovery,
    "largest loss not excluded": _card_loss,
    "verdicts on right or wrong": _card_declared,
    "KL, against rounding alone": _card_noise,
    "reads / writes, against float32": _card_speed,
    "bytes, against the float model": _card_bytes,
    "checks": _card_checks,
}


def missing_chapter(markdown: str, published: dict) -> Iterator[str]:
    """A report without the chapter whose numbers the summary holds."""
    if any(name in published for name in BLOCKS) and not re.search(
        r"^## (?:4\. )?Graded scores$", markdown, re.M
    ):
        yield "report.md has no chapter on graded scores, and summary.json has their numbers"
    if DRAWS in published and not re.search(r"^## Draws of a recipe$", markdown, re.M):
        yield "report.md has no chapter on draws, and summary.json has their numbers"
    if CALIBRATIONS in published and not re.search(r"^## Calibration items$", markdown, re.M):
        yield "report.md has no chapter on calibration items, and summary.json has their numbers"
    if PARTS in published and not re.search(r"^## Weights or activations$", markdown, re.M):
        yield "report.md has no chapter on weights and activations, and summary.json has numbers"


KL_COLUMNS = {
    "mean KL [nats]": "kl",
    "median": "kl_median",
    "99th percentile": "kl_percentile_99",
    "99.9th percentile": "kl_percentile_99_9",
    "largest": "kl_largest",
}
KL_SHARE = "in the largest 1 %"
KL_TAIL = 5  # tokens that are named of each variant
KL_TEXTS = ("text before", "its text", "text after")
TokenKl = tuple[str, int, float | None]  # passage, place in it, KL in nats


def ordered_token_kls(passages: list[dict]) -> list[TokenKl]:
    """Every token: first those without a finite KL, then the largest KL, then as in the text.

    Empty if the KL of tokens was not kept.
    """
    if any("token_kl" not in row for row in passages):
        return []
    tokens = [(row["id"], i, kl) for row in passages for i, kl in enumerate(row["token_kl"])]
    return sorted(tokens, key=lambda t: (t[2] is not None, -(t[2] or 0.0), t[0], t[1]))


def wrong_kl_tables(markdown: str, figures: RecomputedFigures) -> Iterator[str]:
    """Cells on the KL by token that differ, and rows that are missing or others."""
    report_tables = read_tables(markdown)
    for model in figures.study.models:
        heading = f"KL by token, model {model}"
        quantiles, tail = (
            [row for t in report_tables if t.section == heading for row in _rows_with(t, columns)]
            for columns in ({*KL_COLUMNS, KL_SHARE}, {*KL_TEXTS, "KL [nats]"})
        )
        tokens = {
            variant: ordered_token_kls(figures.variants[model, variant].passages)
            for variant in figures.study.variants
            if variant != figures.study.baseline
        }
        tokens = {variant: ordered for variant, ordered in tokens.items() if ordered}
        expected = [(v, at) for v, ordered in tokens.items() for at in ordered[:KL_TAIL]]
        variants = [_variant_and_baseline(row, figures)[0] for row in quantiles]
        if variants != list(tokens) or len(tail) != len(expected):
            yield f"report.md, {heading}: the tables of the KL by token are others"
            continue
        place = f"report.md, {heading}, "
        for variant, row in zip(variants, quantiles, strict=True):
            shared = figures.shared[model, variant]
            for line in _wrong_quantiles(row, shared):
                yield f"{place}row {variant}, {line}"
        for row, (variant, token) in zip(tail, expected, strict=True):
            passages = {r["id"]: r for r in figures.variants[model, variant].passages}
            same_variant = variant == _variant_and_baseline(row, figures)[0]
            for line in _wrong_tail(row, token, passages[token[0]].get("token_texts", [])):
                yield f"{place}tail of {variant}, {line}"
            if not same_variant:
                yield f"{place}tail of {variant}: published as {plain_text(row['variant'])}"


def _rows_with(table: Table, columns: set[str]) -> list[dict[str, str]]:
    return list(map(table.by_column, table.rows)) if columns <= set(table.columns) else []


def _wrong_quantiles(row: Mapping[str, str], shared: Mapping) -> Iterator[str]:
    values = {column: shared[key][0] for column, key in KL_COLUMNS.items()}
    share = shared["kl_tail_share"][0]
    values[KL_SHARE] = None if share is None else 100 * share
    for column, value in values.items():
        if cell_differs(row[column], [value]):
            yield f"column {column}: published {plain_text(row[column])!r}, recomputed {value}"


def _wrong_tail(row: Mapping[str, str], token: TokenKl, texts: list[str]) -> Iterator[str]:
    """One of the largest tokens: its KL, its place, the text around it as far as it is shown."""
    passage, place, kl = token
    name = f"token {place} of {passage}"
    if (plain_text(row["passage"]), plain_text(row["token"])) != (passage, str(place)):
        yield f"{name}: published as {plain_text(row['token'])} of {plain_text(row['passage'])}"
    shown = plain_text(row["KL [nats]"])
    if cell_differs(row["KL [nats]"], [kl]) or (kl is None) != (shown == "not finite"):
        yield f"{name}: published {shown!r}, recomputed {kl}"
    before, own, after = (_letters(plain_text(row[column])) for column in KL_TEXTS)
    agrees = _letters("".join(texts[:place])).endswith(before)
    agrees &= _letters("".join(texts[place : place + 1])).startswith(own)
    if not agrees or not _letters("".join(texts[place + 1 :])).startswith(after):
        yield f"{name}: the text around it is another"


def _letters(text: str) -> str:
    return "".join(c for c in text.removeprefix("(empty)") if c.isalnum())
