"""Compares every number in the sentences of report.md with the recomputed one.

None of the code that writes the report is used. A sentence is recognised by how it begins; the
numbers in it, in their order, and the words that turn its meaning have to be those that follow. A
sentence of the summary or the findings that holds a number and is not recognised is named, since
a reworded one would go unchecked. Sentences on verdicts are compared with recomputed verdicts.
"""

import re
from collections.abc import Callable, Iterator

import numpy as np

from helpers.report.checks.recomputed_graded_report import GRADED_SENTENCE_CHECKS
from helpers.report.checks.recomputed_tables import (
    DATASET_NAMES,
    ExpectedNumbers,
    RecomputedFigures,
    cell_differs,
    code_names,
    plain_text,
    rounds_to,
)
from helpers.statistics.checks.recomputed_statistics import clustered_mean
from helpers.statistics.checks.recomputed_verdicts import answer_of, declared_for
from helpers.study.schema import Variant

INFORMATIVE = ("worse", "better", "equivalent", "inconclusive")
BULLET_STARTS = {
    "**Worse**": "worse",
    "**Better**": "better",
    "**Equivalent within": "equivalent",
    "**Inconclusive**": "inconclusive",
    "**Uninformative**": "uninformative",
    "**Invalid**": "invalid",
}


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
