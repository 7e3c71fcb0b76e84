"""Recomputes every number of a study from its answers and compares it with the published one.

    python -m helpers.report.checks.recomputation demo

reads params/demo.yaml and of outputs/demo the answers, summary.json, summary.csv and report.md: no
model, no tokenizer, no torch. Every answer is read and scored again from its raw text (where its
items are at hand), every figure, comparison and correction computed by statistics of its own
(`helpers.statistics.checks`), every control looked at again, and the numbers in the report's
tables and sentences compared. A table line that the executed analysis does not have was edited.
Whatever differs is named with its place, what was published and what came out, and the exit code is
1. None of the code that makes the report is used.

A sentence is recognised by how it begins; the numbers in it, in their order, and the words that
turn its meaning have to be those that follow. A sentence of the summary or the findings that holds
a number and is not recognised is named, since a reworded one would go unchecked. Sentences on
verdicts are compared with recomputed verdicts.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unicodedata import normalize

import numpy as np

from helpers.core.errors import StudyError
from helpers.core.files import StudyPaths
from helpers.core.records import read_json, sha256_file, sha256_text
from helpers.evaluation.checks.recomputed_answers import misread_part, rescored
from helpers.report.checks.recomputed_chapters import wrong_chapters, wrong_costs, wrong_records
from helpers.report.checks.recomputed_graded_report import (
    GRADED_SENTENCE_CHECKS,
    KL_TAIL,
    missing_chapter,
    ordered_token_kls,
    wrong_cards,
    wrong_graded_blocks,
    wrong_graded_cells,
    wrong_kl_tables,
)
from helpers.report.checks.recomputed_recommendation import wrong_recommendation
from helpers.report.checks.recomputed_tables import (
    DATASET_NAMES,
    ExpectedNumbers,
    RecomputedFigures,
    cell_differs,
    code_names,
    equal_values,
    failed_gate_names,
    plain_text,
    read_tables,
    rounds_to,
    wrong_cells,
    wrong_verdict_words,
)
from helpers.sources.items import load_rows
from helpers.sources.sampling import cluster_near_duplicates, set_items
from helpers.statistics.checks.recomputed_statistics import clustered_mean
from helpers.statistics.checks.recomputed_verdicts import (
    PublishedAnswers,
    answer_of,
    comparison_rows,
    declared_for,
    read_answers,
)
from helpers.statistics.verdicts import ControlOutcome
from helpers.study.loading import load_study, study_file
from helpers.study.schema import Comparison, HubDataset, Study, Variant

INFORMATIVE = ("worse", "better", "equivalent", "inconclusive")
BULLET_STARTS = {
    "**Worse**": "worse",
    "**Better**": "better",
    "**Equivalent within": "equivalent",
    "**Inconclusive**": "inconclusive",
    "**Uninformative**": "uninformative",
    "**Invalid**": "invalid",
}
SHARED = "shared_text"
FIGURE_FIELDS = ("value", "low", "high", "n")


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


ANSWER = r"(?:\*\*(?:Answer|By right or wrong)\.\*\* )?"
VERDICT_SENTENCE_CHECKS = (
    (rf"^{ANSWER}(?:No loss |`[^`]+` is (?:worse|better|equivalent))", _check_answer),
    (rf"^{ANSWER}No conclusion about `", _check_nothing_shown),
    ("^(?:" + "|".join(map(re.escape, BULLET_STARTS)) + ")", _check_verdict_bullet),
    (r"^\*\*All controls behaved as expected\*\*", _check_controls_bullet),
    (r"\d+ of \d+ controls? behaved", _check_controls_count),
)


SIGN_DRAWS = 20_000
P_TOLERANCE = 0.015  # of a p that two programs draw: six standard errors of either at 0.05

SUMMARY = re.compile(
    r"^## Executive summary\n(.*?)(?=^## |^### (?!Scores|Key findings))", re.M | re.S
)
ONE_SCALE = re.compile(r"`([^`]+)`, with one activation scale per tensor, (.*? against [\d.,]+)")
SCALED_PERPLEXITY = re.compile(r"([\d.,]+) in `([^`]+)` \(against ([\d.,]+)\)")
DOMINATED = re.compile(r"(none|\d+) of [\d,]+ Linear inputs? of `([^`]+)`")
NOT_PROSE = ("|", "#", "![", "<")
SentenceCheck = Callable[[str, RecomputedFigures], Iterator[ExpectedNumbers | str]]


def wrong_sentences(markdown: str, figures: RecomputedFigures) -> list[str]:
    """Every known sentence whose numbers or words contradict the answers."""
    lines = []
    for line in markdown.splitlines():
        text = line.removeprefix("- ")
        for pattern, check in SENTENCE_CHECKS:
            if not (match := re.search(pattern, text)):
                continue
            for expected in check(text[match.start() :], figures):
                published, values = expected if isinstance(expected, tuple) else (expected, None)
                if values is None:
                    lines.append(f"report.md, “{plain_text(text)[:70]}…”: {published}")
                elif cell_differs(published, values):
                    recomputed = ", ".join(f"{v:.6g}" for v in values if v is not None)
                    place = f"report.md, “{plain_text(text)[:70]}…”"
                    shown = plain_text(published)[:200]
                    lines.append(f"{place}: published {shown!r}, recomputed {recomputed}")
    return [*dict.fromkeys(lines), *_unknown_sentences(markdown)]


def _unknown_sentences(markdown: str) -> Iterator[str]:
    """Sentences of summary and findings with a number that no check here reads."""
    summary = SUMMARY.search(markdown)
    for line in summary[1].splitlines() if summary else ():
        text = line.removeprefix("- ")
        known = any(re.search(pattern, text) for pattern, _ in SENTENCE_CHECKS)
        if not known and not text.startswith(NOT_PROSE) and re.search(r"\d", _without_code(text)):
            yield f"report.md, “{plain_text(text)[:70]}…”: no check knows this sentence"


def _without_code(text: str) -> str:
    return re.sub(r"`[^`]*`", "", text)


def _token_change(
    figures: RecomputedFigures, before: tuple, after: tuple, key: str
) -> list[float | None]:
    """Change of `nll` or `kl` per token with its interval, its p and the number of passages."""
    first = {row["id"]: row for row in figures.variants[before].passages}
    rows = sorted(figures.variants[after].passages, key=lambda row: row["id"])
    lengths = [r["tokens"] for r in rows]
    sums = [r[key] - first[r["id"]][key] for r in rows]
    means = [s / n for s, n in zip(sums, lengths, strict=True)]
    names = [r["id"] for r in rows]
    mean = clustered_mean(means, names, figures.bootstrap, weights=lengths, interval=True)
    return [mean.mean, mean.low, mean.high, _flip_p(sums), len(rows)]


def _flip_p(sums: list[float]) -> float:
    """Two-sided p of the sum by random sign flips of passages; its error is below P_TOLERANCE."""
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (SIGN_DRAWS, len(sums)))
    far = np.abs(signs @ np.array(sums)) >= abs(sum(sums)) * (1 - 1e-12)
    return float((far.sum() + 1) / (SIGN_DRAWS + 1))


def _is_effect(change: list[float | None], figures: RecomputedFigures) -> bool | None:
    """Whether a change is significant; None if the p is too close to the level to tell."""
    alpha = 1 - figures.bootstrap.confidence
    return None if abs(change[3] - alpha) < P_TOLERANCE else change[3] < alpha


def _check_noise(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    sentence = text.partition(" A difference no larger")[0]
    floor = figures.noise_floor
    models = code_names(sentence.partition(" In ")[2])
    changed, total = [], 0
    for model in models:
        sides = [figures.variants[model, v].predictions for v in (figures.study.baseline, floor)]
        pairs = [
            (row, next(r for r in sides[1][name] if r["id"] == row["id"]))
            for name, rows in sides[0].items()
            for row in rows
        ]
        changed.append(float(sum(answer_of(a) != answer_of(b) for a, b in pairs)))
        total = len(pairs)
    shared = [figures.shared[model, floor] for model in models]
    tops = [100 * s["top1_agreement"][0] for s in shared]
    yield sentence, [*(s["kl"][0] for s in shared), *tops, *changed, total]


def _check_tokens(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    variant, *models = code_names(text.partition(" by a KL")[0])
    shared = [figures.shared[model, variant] for model in models]
    values = [s["kl"][0] for s in shared]
    if "times the effect of rounding" in text:
        floors = [figures.shared[model, figures.noise_floor]["kl"][0] for model in models]
        values += [kl / floor for kl, floor in zip(list(values), floors, strict=True)]
    values += [100 * s["top1_agreement"][0] for s in shared]
    for model, of_variant in zip(models, shared, strict=True):
        baseline = (model, figures.study.baseline)
        values += [figures.shared[baseline]["perplexity"][0], of_variant["perplexity"][0]]
        values += _token_change(figures, baseline, (model, variant), "nll")[:3]
    yield text, values


def _check_smoothing(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    model, plain_one, smooth = code_names(text)[:3]
    at = (model, plain_one), (model, smooth)
    change = _token_change(figures, *at, "kl")
    sure, none = _is_effect(change, figures), "no effect of smoothing itself is detectable"
    effect = f"smoothing itself {'helps' if change[0] < 0 else 'hurts'}"
    possible = [none, effect] if sure is None else [effect if sure else none]
    if not any(words in text for words in possible):
        yield f"recomputed {possible[0]!r}"
    before, p, after = re.split(r"(, p (?:= |< )[\d.]+)", text)
    yield before, [*(figures.shared[x]["kl"][0] for x in at), *change[:3]]
    yield after, [change[4]]
    if abs(float(p.split()[-1]) - change[3]) > P_TOLERANCE:
        yield f"published {p[2:]}, recomputed {change[3]:.3g}"


def _check_smoothing_of_models(
    text: str, figures: RecomputedFigures
) -> Iterator[ExpectedNumbers | str]:
    """One sentence on all models: in each the effect, the KLs, their change and its p."""
    head, _, clauses = text.partition(": ")
    smooth, plain = code_names(head)
    passages = 0
    for clause in re.findall(r"in `[^`]+` it .*?\)(?=;|\.)", clauses):
        model = code_names(clause)[0]
        change = _token_change(figures, (model, plain), (model, smooth), "kl")
        sure, passages = _is_effect(change, figures), change[4]
        effect = f"it {'helps' if change[0] < 0 else 'hurts'}"
        none = "it has no detectable effect"
        possible = [none, effect] if sure is None else [effect if sure else none]
        if not any(words in clause for words in possible):
            yield f"recomputed in `{model}` {possible[0]!r}"
        numbers, p = re.split(r", p (?=[=<] )", clause)
        kls = [figures.shared[model, v]["kl"][0] for v in (smooth, plain)]
        yield numbers, [*kls, *change[:3]]
        if abs(float(p.rstrip(")").split()[-1]) - change[3]) > P_TOLERANCE:
            yield f"published p {p.rstrip(')')} of `{model}`, recomputed {change[3]:.3g}"
    yield text.rpartition(" Exploratory")[2], [passages]


def _check_between_models(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    for part in re.findall(r"`[^`]+` changes `[^`]+` .*?exploratory\)", text):
        variant, model, start = code_names(part)[:3]
        change = _token_change(figures, (start, variant), (model, variant), "kl")
        sure, word = _is_effect(change, figures), "more than" if change[0] > 0 else "less than"
        words = ["and", word] if sure is None else [word if sure else "and"]
        if not any(f"`{model}` {word} `{start}`" in part for word in words):
            yield f"recomputed `{model}` {words[0]} `{start}`"
        kls = [figures.shared[x, variant]["kl"][0] for x in (model, start)]
        yield part, [*kls, *change[:3]]


def _check_sizes(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    pattern = r"`([^`]+)` is ([\d.,]+) % of the float model's size, with ([\d,]+) Linear"
    for variant, share, linears in re.findall(pattern, text):
        recorded = [m["variants"].get(variant, {}) for m in figures.summary["models"].values()]
        recorded = [m for m in recorded if "bytes_after" in m]
        shares = [
            100 * sum(m["bytes_after"].values()) / sum(m["bytes_before"].values()) for m in recorded
        ]
        if not any(rounds_to(share, s) for s in shares):
            yield f"published {share} % of `{variant}`, recomputed {shares}"
        if int(linears.replace(",", "")) not in [m["quantized_linears"] for m in recorded]:
            yield f"published {linears} Linears of `{variant}`"


def _check_one_scale(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    """Perplexities of variants with one scale per tensor."""
    model, baseline = code_names(text)[0], figures.study.baseline
    for variant, published in ONE_SCALE.findall(text):
        sides = ((model, v) for v in (variant, baseline))
        yield published, [figures.shared[side]["perplexity"][0] for side in sides]


def _check_scales_per_tensor(
    text: str, figures: RecomputedFigures
) -> Iterator[ExpectedNumbers | str]:
    """How many inputs one channel dominates, and the perplexities with one scale per tensor."""
    for published, model in DOMINATED.findall(text):
        inputs = figures.summary["models"][model]["largest_outliers"]
        expected = sum(i["rounded_away"] > 0.5 for i in inputs)
        if published != (str(expected) if expected else "none") and expected < len(inputs):
            yield f"published {published} Linear inputs of `{model}`, recomputed {expected}"
    for sentence in re.findall(r"`[^`]+`, with one activation scale per tensor, .*?\)\.", text):
        variant = code_names(sentence)[0]
        for level, model, before in SCALED_PERPLEXITY.findall(sentence):
            sides = ((model, v) for v in (variant, figures.study.baseline))
            perplexities = [figures.shared[side]["perplexity"][0] for side in sides]
            yield f"{level} against {before}", perplexities


def _check_training(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    start, model = code_names(text)[:2]
    training = figures.summary["models"][model]["finetuning"]
    loss = text.partition(" nats per answer")[0]
    yield loss, [training["heldout_loss_before"], training["heldout_loss_after"]]
    baseline = figures.study.baseline
    for name in figures.study.evaluation.datasets:
        published = re.search(
            rf"{re.escape(DATASET_NAMES.get(name, name))} from ([^(]*)\(([^ ]*)", text
        )
        if published:
            scores = [100 * figures.sets[m, baseline, name]["accuracy"][0] for m in (start, model)]
            yield published[1], scores
            yield published[2], [scores[1] - scores[0]]


def _check_method(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    s, family = figures.study.statistics, len(declared_for(figures.study, "accuracy"))
    alpha = 1 - s.confidence
    values = [0, 1, family, 1, alpha, 100 * (1 - 2 * alpha), 100 * s.margin]
    yield text, [*values, 100 * s.power, 100 * s.confidence]


def _check_gate_count(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    recipes: dict[str, Variant] = dict(figures.study.variants)
    variants = [a for (_, v), a in figures.variants.items() if recipes[v].recipe != "seed"]
    failed = sum(len(a.failed_gates) for a in variants)
    counts = re.match(r"(?:(\d[\d,]*) of|All) (\d[\d,]*) checks", text)
    published = [int(n.replace(",", "")) for n in (counts[1] or "0", counts[2])]
    if published != [failed, sum(len(a.gates) for a in variants)]:
        yield f"recomputed {failed} of {sum(len(a.gates) for a in variants)}"


def _check_legend(text: str, figures: RecomputedFigures) -> Iterator[ExpectedNumbers | str]:
    rows = figures.variants[next(iter(figures.study.models)), figures.study.baseline].passages
    level = 100 * figures.study.statistics.confidence
    text = text.replace("top-1", "")
    yield text, [level, sum(r["tokens"] for r in rows), len(rows)]


SENTENCE_CHECKS: tuple[tuple[str, SentenceCheck], ...] = (
    (r"^Rounding alone changes answers", _check_noise),
    (r"^Token by token, ", _check_tokens),
    (r"^In `[^`]+`, (?:no effect of )?smoothing itself", _check_smoothing),
    (r"^Smoothing, by `", _check_smoothing_of_models),
    (r"^One outlier channel dominates in ", _check_scales_per_tensor),
    (r"`[^`]+` changes `[^`]+` (?:more|less|and) ", _check_between_models),
    (r"^`[^`]+` is [\d.,]+ % of the float model's size", _check_sizes),
    (r"^In `[^`]+`, (?:no|one) outlier channel dominates", _check_one_scale),
    (r"Fine-tuning `[^`]+` into `", _check_training),
    (r"^\*\*Comparisons\.\*\* Every variant", _check_method),
    (r"^(?:All [\d,]+ checks on|[\d,]+ of [\d,]+ checks fail)", _check_gate_count),
    (r"^Brackets: ", _check_legend),
    *VERDICT_SENTENCE_CHECKS,
    *GRADED_SENTENCE_CHECKS,
)


def wrong_comparisons(rows: dict[Comparison, dict], published: list[dict]) -> list[str]:
    """Comparisons of summary.json that differ from the recomputed ones, value by value."""
    before = {comparison_place(row): row for row in published}
    after = {comparison_place(row): row for row in rows.values()}
    lines = [f"{name} was published and is none of the study's" for name in before - after.keys()]
    lines += [f"{name} was not published" for name in after - before.keys()]
    for name in (n for n in after if n in before):
        recomputed = {k: v for k, v in after[name].items() if k not in ("p_tolerance", "family_p")}
        recomputed["p"] = after[name]["family_p"]
        for key in dict.fromkeys([*recomputed, *before[name]]):
            now, then = recomputed.get(key), before[name].get(key)
            if not equal_values(now, then):
                lines.append(f"summary.json, {name}: {key} is {now!r}, published {then!r}")
    return lines


def comparison_place(row: dict) -> str:
    """A comparison's name in messages."""
    against = f"{row['variant']} against {row['baseline']}"
    return f"{row['model']}: {DATASET_NAMES.get(row['dataset'], row['dataset'])}, {against}"


def wrong_headlines(published: dict, figures: RecomputedFigures) -> list[str]:
    """Values of summary.json on the study, the constant answers and every variant that differ."""
    study, s = figures.study, figures.study.statistics
    expected = {"title": study.title, "seed": study.seed, "baseline": study.baseline}
    expected["statistics"] = {
        "confidence": s.confidence,
        "power": s.power,
        "margin": s.margin,
        "resamples": s.resamples,
        "primary_comparisons": len(s.primary),
    }
    expected["best_fixed_answers"] = {
        name: {"answer": answer, "score": score} for name, (answer, score) in figures.fixed.items()
    }
    lines = _differing_values(
        "summary.json", expected, {key: published.get(key) for key in expected}
    )
    for model, variant in figures.variants:
        stored = published.get("models", {}).get(model, {}).get("variants", {}).get(variant, {})
        recomputed = _variant_fields(figures, (model, variant))
        place = f"summary.json, {model}/{variant}"
        lines += _differing_values(place, recomputed, {key: stored.get(key) for key in recomputed})
    return lines


def _variant_fields(figures: RecomputedFigures, at: tuple[str, str]) -> dict:
    passed, failed = failed_gate_names(figures.variants[at].gates)
    sets = {
        name: _figure_fields(figures.sets[*at, name]) for name in figures.study.evaluation.datasets
    }
    shared = _figure_fields(figures.shared[at])
    fields = {"passed": passed, "failed_gates": failed, SHARED: shared, "datasets": sets}
    if not (tokens := ordered_token_kls(figures.variants[at].passages)):
        return fields | {"kl_by_token": None}
    names = ("passage", "token", "kl")
    tail = [dict(zip(names, token, strict=True)) for token in tokens[:KL_TAIL]]
    nonfinite = sum(kl is None for _, _, kl in tokens)
    return fields | {"kl_by_token": {"nonfinite": nonfinite, "tail": tail}}


def _figure_fields(figures: dict) -> dict:
    return {name: dict(zip(FIGURE_FIELDS, figure, strict=True)) for name, figure in figures.items()}


def _differing_values(place: str, expected, stored) -> list[str]:
    """Every nested value that differs, by its path."""
    if isinstance(expected, dict) and isinstance(stored, dict):
        keys = dict.fromkeys([*expected, *stored])
        return [
            line
            for key in keys
            for line in _differing_values(f"{place}, {key}", expected.get(key), stored.get(key))
        ]
    return (
        []
        if equal_values(expected, stored)
        else [f"{place}: published {stored!r}, recomputed {expected!r}"]
    )


def wrong_csv_lines(path: Path, figures: RecomputedFigures) -> list[str]:
    """Lines of summary.csv that differ from the recomputed ones."""
    if not path.is_file():
        return [f"{path.name} is missing; run make report again"]
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    stored = {tuple(row[:4]): row[4:] for row in rows[1:]}
    expected = {}
    for at in figures.variants:
        figures_by_set = {SHARED: figures.shared[at]}
        figures_by_set |= {
            name: figures.sets[*at, name] for name in figures.study.evaluation.datasets
        }
        expected |= {
            (*at, part, key): f
            for part, named_figures in figures_by_set.items()
            for key, f in named_figures.items()
        }
    lines = [f"summary.csv has no row {' / '.join(key)}" for key in expected if key not in stored]
    lines += [
        f"summary.csv: row {' / '.join(k)} is none of the study's" for k in stored.keys() - expected
    ]
    if len(stored) != len(rows) - 1:
        lines.append("summary.csv has a row twice")
    for key, figure in expected.items():
        for column, value, text in zip(FIGURE_FIELDS, figure, stored.get(key, ()), strict=False):
            if not equal_values(value, _parsed_number(text)):
                where = f"summary.csv, row {' / '.join(key)}, column {column}"
                lines.append(f"{where}: published {text!r}, recomputed {value!r}")
    return lines


def _parsed_number(text: str):
    if text == "":
        return None
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text


def edited_tables(markdown: str, notebook: Path) -> list[str]:
    """Cells of report.md that differ from the executed analysis; none if it is not there."""
    if not notebook.is_file():
        return []
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    displayed = [
        "".join(output["data"].get("text/markdown", ""))
        for cell in cells
        for output in cell.get("outputs", ())
        if "data" in output
    ]
    before, after = read_tables("\n\n".join(displayed)), read_tables(markdown)
    if len(before) != len(after):
        return [f"report.md has {len(after)} tables, the executed analysis {len(before)}"]
    lines = []
    for executed, published in zip(before, after, strict=True):
        place = f"report.md, {published.heading}"
        if executed.columns != published.columns or len(executed.rows) != len(published.rows):
            lines.append(f"{place}: columns or rows are not those of the executed analysis")
            continue
        for was, now in zip(executed.rows, published.rows, strict=True):
            lines += [
                f"{place}, row {plain_text(was[0])}, column {column}: published {plain_text(b)!r}, "
                f"in the executed analysis {plain_text(a)!r}"
                for column, a, b in zip(executed.columns, was, now, strict=False)
                if a != b
            ]
    return lines


ANSWERS = "answers"  # the folder, and the key of summary.json


def recompute(study: str) -> tuple[str, list[str]]:
    """(the verdicts as a text table, every difference from the published values).

    Raises:
        StudyError: the study, its answers or its summary cannot be read.
    """
    loaded, paths = load_study(study), StudyPaths(study_file(study).stem)
    folder = paths.root
    published = read_json(folder / "summary.json", made_by="04_analysis")
    differing = _changed_files(folder / ANSWERS, published.get(ANSWERS, {}))
    answers = read_answers(folder / ANSWERS, loaded)
    joined = "clusters" in published  # before, near-duplicates counted as independent items
    for name in loaded.evaluation.datasets:
        differing += _misread_answers(answers, name, joined)
    differing += _misread_passages(answers)
    rows = comparison_rows(loaded, answers.answers, _published_p_values(published["comparisons"]))
    figures = RecomputedFigures(answers, rows, published)
    differing += wrong_comparisons(rows, published["comparisons"])
    differing += _wrong_controls(answers, published["controls"])
    differing += wrong_headlines(published, figures)
    differing += wrong_graded_blocks(published, figures)
    differing += wrong_csv_lines(folder / "summary.csv", figures)
    differing += _wrong_report(paths, figures)
    recommended, report = folder / "recommendation.md", folder / "report.md"
    if recommended.is_file() and report.is_file():
        texts = recommended.read_text("utf-8"), report.read_text("utf-8")
        differing += wrong_recommendation(*texts, figures)
    return _verdict_table(loaded, list(rows.values())), differing


def _published_p_values(comparisons: list[dict]) -> dict[Comparison, float | None]:
    keys = Comparison.model_fields
    return {Comparison(**{k: row[k] for k in keys}): row["p"] for row in comparisons}


def _wrong_report(paths: StudyPaths, figures: RecomputedFigures) -> list[str]:
    """Cells and sentences of report.md that differ; none if there is no report.md."""
    path = paths.root / "report.md"
    if not path.is_file():
        return []
    text = path.read_text("utf-8")
    lines = wrong_cells(text, figures) + wrong_verdict_words(text, figures)
    lines += wrong_sentences(text, figures) + wrong_chapters(text, figures) + wrong_costs(text)
    lines += [*wrong_cards(text, figures), *wrong_graded_cells(text, figures)]
    lines += [*missing_chapter(text, figures.summary), *wrong_kl_tables(text, figures)]
    lines += wrong_records(text, figures, paths.notebooks)
    return lines + edited_tables(text, paths.notebooks / "04_analysis.ipynb")


def _control_fields(outcome: ControlOutcome) -> dict:
    """A control's outcome under the names of summary.json."""
    fields = {"role": outcome.role, "must": outcome.expected}
    return fields | {"found": outcome.observed, "done": outcome.ok}


def _wrong_controls(answers: PublishedAnswers, published: list[dict]) -> list[str]:
    """Controls of summary.json whose recomputed outcome differs."""
    after = {
        f"{m}: control {v}": _control_fields(outcome)
        for (m, v), outcome in answers.control_outcomes.items()
    }
    before = {f"{row['model']}: control {row['variant']}": row for row in published}
    lines = [f"{name} was published and is none of the study's" for name in before - after.keys()]
    lines += [f"{name} was not published" for name in after - before.keys()]
    for name in (n for n in after if n in before):
        lines += [
            f"summary.json, {name}: {key} is {value!r}, published {before[name].get(key)!r}"
            for key, value in after[name].items()
            if before[name].get(key) != value
        ]
    return lines


def _changed_files(folder: Path, hashes: dict[str, str]) -> list[str]:
    """Files of answers whose hash differs from that in summary.json."""
    if not hashes:
        return ["summary.json names no files of answers; run make report again"]
    return [
        f"{folder.name}/{name} is not the file the summary was made with"
        for name, digest in hashes.items()
        if not (folder / name).is_file() or sha256_file(folder / name) != digest
    ]


def _misread_answers(published: PublishedAnswers, dataset: str, joined: bool) -> list[str]:
    """Answers whose text does not give the stored score; none if the items are on a Hub.

    Args:
        joined: whether near-duplicates have one cluster.
    """
    evaluation_set = published.study.evaluation.datasets[dataset]
    if isinstance(evaluation_set.source, HubDataset):
        return []
    items = {item.id: item for item in set_items(evaluation_set)[0]}
    lines = []
    first = next(iter(published.variants.values())).predictions[dataset]
    answered = [items[row["id"]] for row in first if row["id"] in items]
    items |= {item.id: item for item in cluster_near_duplicates(answered)} if joined else {}
    for (model, variant), variant_answers in published.every_draw.items():
        at = f"{model}/{variant}: {DATASET_NAMES.get(dataset, dataset)} item"
        for row in variant_answers.predictions.get(dataset, ()):  # a further draw lacks some sets
            if (item := items.get(row["id"])) is None:
                lines.append(f"{at} {row['id']} is none of the set's")
                continue
            rescored_row = rescored(evaluation_set, item, row)
            wrong_keys = [key for key, value in rescored_row.items() if row.get(key) != value]
            if not wrong_keys and (reason := misread_part(evaluation_set, row)):
                wrong_keys = [reason]
            lines += [
                f"{at} {row['id']}: {key} does not follow from the answer" for key in wrong_keys
            ]
    return lines


def _misread_passages(published: PublishedAnswers) -> list[str]:
    """Passages whose published tokens are not in their text; none if the texts are on a Hub."""
    source = published.study.evaluation.shared_text.dataset
    if isinstance(source, HubDataset):
        return []
    texts = {sha256_text(row["context"])[:16]: row["context"] for row in load_rows(source)}
    return [
        f"{model}/{variant}: the tokens of passage {row['id']} are not its text"
        for (model, variant), variant_answers in published.variants.items()
        for row in variant_answers.passages
        if "token_texts" in row
        and _letters("".join(row["token_texts"])) not in _letters(texts.get(row["id"], ""))
    ]


def _letters(text: str) -> str:
    """Letters and digits alone: a tokenizer may normalize a text and change its white space."""
    return "".join(c for c in normalize("NFKC", text).casefold() if c.isalnum())


def _verdict_table(study: Study, rows: list[dict]) -> str:
    """One line per comparison, the declared ones first, in the order of the summary."""
    cells = [("model", "dataset", "variant", "lost", "gained", "points", "Holm p", "verdict")]
    for row in rows:
        against = "" if row["baseline"] == study.baseline else f" vs {row['baseline']}"
        place = (
            row["model"],
            DATASET_NAMES.get(row["dataset"], row["dataset"]),
            f"{row['variant']}{against}",
        )
        counts = str(row["losses"]), str(row["gains"]), f"{100 * row['delta']:+.1f}"
        p = "–" if row["holm_p"] is None else f"{row['holm_p']:.3f}"
        cells.append((*place, *counts, p, row["verdict"]))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.report.checks.recomputation", description=__doc__
    )
    parser.add_argument("study", help="a study's name in params/, or the path of its YAML file")
    arguments = parser.parse_args(argv)
    try:
        table, differing = recompute(arguments.study)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    print(table)
    if differing:
        print(f"\nNOT AS PUBLISHED, in {len(differing)} places:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in differing), file=sys.stderr)
        return 1
    recomputed = f"{table.count(chr(10))} verdicts and every table recomputed from the answers"
    print(f"\n{recomputed}: all as published")
    return 0


if __name__ == "__main__":
    sys.exit(main())
