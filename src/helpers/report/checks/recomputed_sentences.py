"""The sentences of report.md held to figures made again from the answers, number by number.

None of the code that writes the report is used. A sentence is known by how it begins; the
numbers in it, in their order, and the words that turn its meaning have to be those that
follow. A sentence of the summary or the findings that holds a number and is not known is named:
reworded, it would otherwise go unchecked. Sentences on verdicts are in `recomputed_executive`.
"""

import re
from collections.abc import Callable, Iterator

import numpy as np

from helpers.evaluation.trivial_answers import status_and_answer
from helpers.report.checks.published_numbers import differs, plain, shows
from helpers.report.checks.recomputed_executive import TELLERS as ON_VERDICTS
from helpers.report.checks.recomputed_executive import Due
from helpers.report.checks.recomputed_tables import NAMES, Recomputed
from helpers.statistics.checks.recomputed_statistics import clustered_mean
from helpers.study.schema_variants import Variant

FLIPS = 20_000
ROOM = 0.015  # of a p that two programs draw: six standard errors of either at 0.05

SUMMARY = re.compile(r"^## Executive summary\n(.*?)(?=^### (?!Scores|Key findings))", re.M | re.S)
ONE_SCALE = re.compile(r"`([^`]+)`, with one activation scale a tensor, (.*? against [\d.,]+)")
NOT_PROSE = ("|", "#", "![", "<")
Teller = Callable[[str, Recomputed], Iterator[Due | str]]


def wrong_sentences(markdown: str, figures: Recomputed) -> list[str]:
    """Every known sentence that does not say what follows from the answers."""
    told = []
    for line in markdown.splitlines():
        text = line.removeprefix("- ")
        for begin, teller in TELLERS:
            if not (found := re.search(begin, text)):
                continue
            for due in teller(text[found.start() :], figures):
                said, values = due if isinstance(due, tuple) else (due, None)
                if values is None:
                    told.append(f"report.md, “{plain(text)[:70]}…”: {said}")
                elif differs(said, values):
                    again = ", ".join(f"{v:.6g}" for v in values if v is not None)
                    told.append(
                        f"report.md, “{plain(text)[:70]}…”: published {plain(said)[:200]!r}, "
                        f"recomputed {again}"
                    )
    return [*dict.fromkeys(told), *_unknown(markdown)]


def _unknown(markdown: str) -> Iterator[str]:
    """Sentences of summary and findings that hold a number which nothing here looks at."""
    summary = SUMMARY.search(markdown)
    for line in summary[1].splitlines() if summary else ():
        text = line.removeprefix("- ")
        known = any(re.search(begin, text) for begin, _ in TELLERS)
        if not known and not text.startswith(NOT_PROSE) and re.search(r"\d", _uncoded(text)):
            yield f"report.md, “{plain(text)[:70]}…”: no check knows this sentence"


def _uncoded(text: str) -> str:
    return re.sub(r"`[^`]*`", "", text)


def _codes(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def _change(figures: Recomputed, before: tuple, after: tuple, key: str) -> list[float | None]:
    """Change a token of `nll` or `kl` with its interval, its p and the number of passages."""
    first = {row["id"]: row for row in figures.asked[before].passages}
    rows = sorted(figures.asked[after].passages, key=lambda row: row["id"])
    lengths = [r["tokens"] for r in rows]
    sums = [r[key] - first[r["id"]][key] for r in rows]
    each = [s / n for s, n in zip(sums, lengths, strict=True)]
    names = [r["id"] for r in rows]
    found = clustered_mean(each, names, figures.drawing, weights=lengths, interval=True)
    return [found.mean, found.low, found.high, _flip_p(sums), len(rows)]


def _flip_p(sums: list[float]) -> float:
    """Two-sided p of the sum, the signs of the passages drawn; about ± ROOM at the most."""
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (FLIPS, len(sums)))
    far = np.abs(signs @ np.array(sums)) >= abs(sum(sums)) * (1 - 1e-12)
    return float((far.sum() + 1) / (FLIPS + 1))


def _effect(change: list[float | None], figures: Recomputed) -> bool | None:
    """Whether a change is more than chance; None where drawn signs do not decide it."""
    level = 1 - figures.drawing.confidence
    return None if abs(change[3] - level) < ROOM else change[3] < level


def _noise(text: str, figures: Recomputed) -> Iterator[Due | str]:
    sentence = text.partition(" A difference no larger")[0]
    floor = figures.noise_floor
    models = _codes(sentence.partition(" In ")[2])
    changed, total = [], 0
    for model in models:
        sides = [figures.asked[model, v].predictions for v in (figures.study.baseline, floor)]
        pairs = [
            (row, next(r for r in sides[1][name] if r["id"] == row["id"]))
            for name, rows in sides[0].items()
            for row in rows
        ]
        changed.append(float(sum(status_and_answer(a) != status_and_answer(b) for a, b in pairs)))
        total = len(pairs)
    shared = [figures.shared[model, floor] for model in models]
    tops = [100 * s["top1_agreement"][0] for s in shared]
    yield sentence, [*(s["kl"][0] for s in shared), *tops, *changed, total]


def _tokens(text: str, figures: Recomputed) -> Iterator[Due | str]:
    variant, *models = _codes(text.partition(" by a KL")[0])
    shared = [figures.shared[model, variant] for model in models]
    values = [s["kl"][0] for s in shared]
    if "times what rounding" in text:
        floors = [figures.shared[model, figures.noise_floor]["kl"][0] for model in models]
        values += [kl / floor for kl, floor in zip(list(values), floors, strict=True)]
    values += [100 * s["top1_agreement"][0] for s in shared]
    for model, own in zip(models, shared, strict=True):
        baseline = (model, figures.study.baseline)
        values += [figures.shared[baseline]["perplexity"][0], own["perplexity"][0]]
        values += _change(figures, baseline, (model, variant), "nll")[:3]
    yield text, values


def _smoothing(text: str, figures: Recomputed) -> Iterator[Due | str]:
    model, plain_one, smooth = _codes(text)[:3]
    at = (model, plain_one), (model, smooth)
    change = _change(figures, *at, "kl")
    sure, none = _effect(change, figures), "no effect of smoothing itself is detectable"
    effect = f"smoothing itself {'helps' if change[0] < 0 else 'hurts'}"
    possible = [none, effect] if sure is None else [effect if sure else none]
    if not any(words in text for words in possible):
        yield f"recomputed {possible[0]!r}"
    before, p, after = re.split(r"(, p (?:= |< )[\d.]+)", text)
    yield before, [*(figures.shared[x]["kl"][0] for x in at), *change[:3]]
    yield after, [change[4]]
    if abs(float(p.split()[-1]) - change[3]) > ROOM:
        yield f"published {p[2:]}, recomputed {change[3]:.3g}"


def _between_models(text: str, figures: Recomputed) -> Iterator[Due | str]:
    for part in re.findall(r"`[^`]+` moves `[^`]+` .*?exploratory\)", text):
        variant, model, start = _codes(part)[:3]
        change = _change(figures, (start, variant), (model, variant), "kl")
        sure, word = _effect(change, figures), "more than" if change[0] > 0 else "less than"
        words = ["and", word] if sure is None else [word if sure else "and"]
        if not any(f"`{model}` {word} `{start}`" in part for word in words):
            yield f"recomputed `{model}` {words[0]} `{start}`"
        kls = [figures.shared[x, variant]["kl"][0] for x in (model, start)]
        yield part, [*kls, *change[:3]]


def _sizes(text: str, figures: Recomputed) -> Iterator[Due | str]:
    pattern = r"`([^`]+)` is ([\d.,]+) % of the float model's size, with ([\d,]+) Linear"
    for variant, share, linears in re.findall(pattern, text):
        made = [m["variants"].get(variant, {}) for m in figures.summary["models"].values()]
        made = [m for m in made if "bytes_after" in m]
        shares = [
            100 * sum(m["bytes_after"].values()) / sum(m["bytes_before"].values()) for m in made
        ]
        if not any(shows(share, s) for s in shares):
            yield f"published {share} % of `{variant}`, recomputed {shares}"
        if int(linears.replace(",", "")) not in [m["quantized_linears"] for m in made]:
            yield f"published {linears} Linears of `{variant}`"


def _one_scale(text: str, figures: Recomputed) -> Iterator[Due | str]:
    """Perplexities of variants with one scale a tensor; the inputs are `recomputed_records`'."""
    model, baseline = _codes(text)[0], figures.study.baseline
    for variant, said in ONE_SCALE.findall(text):
        sides = ((model, v) for v in (variant, baseline))
        yield said, [figures.shared[side]["perplexity"][0] for side in sides]


def _training(text: str, figures: Recomputed) -> Iterator[Due | str]:
    start, model = _codes(text)[:2]
    made = figures.summary["models"][model]["finetuning"]
    loss = text.partition(" nats an answer")[0]
    yield loss, [made["heldout_loss_before"], made["heldout_loss_after"]]
    baseline = figures.study.baseline
    for name in figures.study.evaluation.datasets:
        said = re.search(rf"{re.escape(NAMES.get(name, name))} from ([^(]*)\(([^ ]*)", text)
        if said:
            scores = [100 * figures.sets[m, baseline, name]["accuracy"][0] for m in (start, model)]
            yield said[1], scores
            yield said[2], [scores[1] - scores[0]]


def _method(text: str, figures: Recomputed) -> Iterator[Due | str]:
    s, family = figures.study.statistics, len(figures.study.statistics.primary)
    alpha = 1 - s.confidence
    values = [0, 1, family, 1, alpha, 100 * (1 - 2 * alpha), 100 * s.margin]
    yield text, [*values, 100 * s.power, 100 * s.confidence]


def _checks(text: str, figures: Recomputed) -> Iterator[Due | str]:
    recipes: dict[str, Variant] = dict(figures.study.variants)
    counted = [a for (_, v), a in figures.asked.items() if recipes[v].recipe != "seed"]
    failed = sum(len(a.failed) for a in counted)
    told = re.match(r"(?:(\d[\d,]*) of|All) (\d[\d,]*) checks", text)
    said = [int(n.replace(",", "")) for n in (told[1] or "0", told[2])]
    if said != [failed, sum(len(a.gates) for a in counted)]:
        yield f"recomputed {failed} of {sum(len(a.gates) for a in counted)}"


def _legend(text: str, figures: Recomputed) -> Iterator[Due | str]:
    rows = figures.asked[next(iter(figures.study.models)), figures.study.baseline].passages
    level = 100 * figures.study.statistics.confidence
    text = text.replace("top-1", "")
    yield text, [level, sum(r["tokens"] for r in rows), len(rows)]


TELLERS: tuple[tuple[str, Teller], ...] = (
    (r"^Rounding alone has a size", _noise),
    (r"^Token by token, ", _tokens),
    (r"^In `[^`]+`, (?:no effect of )?smoothing itself", _smoothing),
    (r"`[^`]+` moves `[^`]+` (?:more|less|and) ", _between_models),
    (r"^`[^`]+` is [\d.,]+ % of the float model's size", _sizes),
    (r"^In `[^`]+`, (?:none|\d+) of [\d,]+ Linear inputs", _one_scale),
    (r"Fine-tuning `[^`]+` into `", _training),
    (r"^\*\*Comparisons\.\*\* Every variant", _method),
    (r"^(?:All [\d,]+ checks on|[\d,]+ of [\d,]+ checks fail)", _checks),
    (r"^In brackets the ", _legend),
    *ON_VERDICTS,
)
