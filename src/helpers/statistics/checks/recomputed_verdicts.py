"""Published answers of a study, and its comparisons and verdicts recomputed from them.

One file an evaluation set, one line an item, with every model's and variant's answer side by side;
one file for the shared text; one with every gate. What the answers to an item have in common stands
once. Reading them gives back the rows that verdicts are made from: nothing of a model, a tokenizer
or torch is needed.

A comparison whose counts, test, correction or intervals are not those of `recomputed_statistics`
is named, with what differs, and is invalid in the report. What cannot be computed again differs;
nothing is raised. The rows of summary.json are made again too. Whether a comparison is a
measurement at all is asked of `helpers.statistics.verdicts`; the best constant answer, repeated
ends and whether the baseline beats the constant are computed again. Imports no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from helpers.core.errors import StudyError
from helpers.core.files import draw_name
from helpers.core.records import (
    WHOLE_VARIANT,
    failed_check,
    read_json,
    read_jsonl,
    sha256_file,
    write_json,
    write_jsonl,
)
from helpers.evaluation.checks.recomputed_answers import words_of
from helpers.evaluation.predictions import SHARED_TEXT
from helpers.sources.items import gold_number
from helpers.statistics.checks.recomputed_statistics import (
    FEWEST_FLIPS,
    BootstrapSettings,
    RecomputedComparison,
    detectable_loss,
    detectable_mean_loss,
    holm,
    recompute_comparison,
    score_figure,
)
from helpers.statistics.verdicts import (
    LARGEST_BROKEN_SHARE,
    SMALLEST_READABLE_SHARE,
    ControlOutcome,
    VariantAnswers,
    VariantPredictions,
    Verdict,
    control_outcome,
    decision_rules,
    invalid_reason,
    study_verdicts,
    uninformative_reason,
)
from helpers.study.schema import Comparison, Study

GATES = "gates.json"
ITEM_KEYS = ("id", "cluster", "golds", "foil")
MODEL_KEYS = (  # they depend on the chat template and the tokenizer
    "prompt_hash",
    "prompt_tokens",
    "tokens",
    "token_texts",
    "gold_hash",
    "gold_tokens",
    "foil_tokens",
)
VARIANT_KEYS = ("model", "variant")
MADE_BY = "04_analysis"

AnswersByVariant = Mapping[tuple[str, str], VariantAnswers]  # by (model, variant)
Draws = dict[tuple[str, str], list[VariantAnswers]]  # by (model, variant): the second on

TOLERANCE = 1e-6  # absolute, of fractions computed by two methods
NARROWEST, WIDEST = 0.6, 1.7  # ratio of an interval's half-width to the jackknife's


@dataclass(frozen=True)
class PublishedAnswers:
    """The published answers and gates of a study: enough for every verdict.

    Attributes:
        variants: by (model, variant); of its first draw.
        draws: all further draws of the variants that are repeated; they have option sets only.
    """

    study: Study
    variants: dict[tuple[str, str], VariantAnswers]
    draws: Draws = field(default_factory=dict)

    @property
    def every_draw(self) -> dict[tuple[str, str], VariantAnswers]:
        """By (model, name): the first draw has its variant's name, the second `<variant>~2`."""
        further = {
            (model, draw_name(variant, number)): of_draw
            for (model, variant), draws in self.draws.items()
            for number, of_draw in enumerate(draws, start=2)
        }
        return self.variants | further

    @property
    def answers(self) -> dict[tuple[str, str, str], VariantPredictions]:
        """Predictions by (model, dataset, variant), in the type that verdicts take."""
        return {
            (model, dataset, variant): VariantPredictions(
                variant, rows, failed_check(variant_answers.gates, [WHOLE_VARIANT, dataset])
            )
            for (model, variant), variant_answers in self.variants.items()
            for dataset, rows in variant_answers.predictions.items()
        }

    @property
    def control_outcomes(self) -> dict[tuple[str, str], ControlOutcome]:
        """The outcome of each control by (model, variant)."""
        return all_control_outcomes(self.study, self.variants)


def all_control_outcomes(
    study: Study, answers: AnswersByVariant
) -> dict[tuple[str, str], ControlOutcome]:
    """The outcome of every control of every model, by (model, variant)."""
    order = [study.baseline, *(variant for variant in study.variants if variant != study.baseline)]
    outcomes = {
        (model, variant): control_outcome(
            study, variant, answers[model, variant], answers[model, study.baseline]
        )
        for model in study.models
        for variant in order
    }
    return {owner: outcome for owner, outcome in outcomes.items() if outcome}


def write_answers(
    folder: Path, study: Study, answers: AnswersByVariant, draws: Draws | None = None
) -> dict[str, str]:
    """Write all files into a folder; return the content hash of each by its name."""
    answers = PublishedAnswers(study, dict(answers), draws or {}).every_draw
    files = {f"{name}.jsonl": _side_by_side(answers, name) for name in study.evaluation.datasets}
    files[f"{SHARED_TEXT}.jsonl"] = _side_by_side(answers, SHARED_TEXT)
    for name, rows in files.items():
        write_jsonl(folder / name, rows)
    gates = {
        _variant_path(owner): list(map(_short_gate, variant_answers.gates))
        for owner, variant_answers in answers.items()
    }
    write_json(folder / GATES, gates)
    return {name: sha256_file(folder / name) for name in [*files, GATES]}


def read_answers(folder: Path, study: Study) -> PublishedAnswers:
    """Read the files of `write_answers`; every set, item and variant must be there.

    Raises:
        StudyError: a file is missing or damaged, or lacks a variant or an item.
    """
    gates = read_json(folder / GATES, made_by=MADE_BY)
    owners = [(m, v) for m in study.models for v in study.variants]
    repeated = [
        (model, variant, draw)
        for model, variant in owners
        for draw in range(2, study.variants[variant].repeats + 1)
    ]
    names = [*study.evaluation.datasets, SHARED_TEXT]
    option_sets = [*study.with_option_sets_only.evaluation.datasets, SHARED_TEXT]
    rows = {name: read_jsonl(folder / f"{name}.jsonl", made_by=MADE_BY) for name in names}
    for name, evaluation_set in study.evaluation.datasets.items():
        if len(rows[name]) != evaluation_set.items:
            raise StudyError(
                f"{folder.name}/{name}.jsonl has {len(rows[name])} items but the study has "
                f"{evaluation_set.items}; run {MADE_BY} again"
            )

    def answers_of(owner: tuple[str, str], names: list[str]) -> VariantAnswers:
        if _variant_path(owner) not in gates:
            raise StudyError(
                f"{folder.name}/{GATES} has no {_variant_path(owner)}; run {MADE_BY} again"
            )
        by_name = {name: _rows_of_variant(folder, name, rows[name], owner) for name in names}
        passages = by_name.pop(SHARED_TEXT)
        return VariantAnswers(by_name, passages, gates[_variant_path(owner)])

    draws: Draws = {}
    for model, variant, draw in repeated:
        of_draw = answers_of((model, draw_name(variant, draw)), option_sets)
        draws.setdefault((model, variant), []).append(of_draw)
    return PublishedAnswers(study, {owner: answers_of(owner, names) for owner in owners}, draws)


def _short_gate(gate: dict) -> dict:
    """A passed gate's name only; a failed gate with its measured value."""
    keys = ("name", "passed", "invalidates") if gate["passed"] else gate
    return {key: gate[key] for key in keys if key in gate}


def _variant_path(owner: tuple[str, str]) -> str:
    return "/".join(owner)


def _side_by_side(answers: AnswersByVariant, name: str) -> list[dict]:
    """One row per item, in the first variant's order: its own keys, then by model, by variant.

    Prompt fields that differ from the first variant's are kept with the variant's answer.
    """
    rows: dict[str, dict] = {}
    for (model, variant), variant_answers in answers.items():
        for row in (
            variant_answers.passages
            if name == SHARED_TEXT
            else variant_answers.predictions.get(name, ())  # a further draw lacks some sets
        ):
            item = rows.setdefault(row["id"], _subset(row, ITEM_KEYS) | {"models": {}})
            of_model = item["models"].setdefault(model, _subset(row, MODEL_KEYS) | {"answers": {}})
            shared_fields = {k: v for k, v in (item | of_model).items() if row.get(k) == v}
            variant_fields = {
                k: v for k, v in row.items() if k not in shared_fields and k not in VARIANT_KEYS
            }
            of_model["answers"][variant] = variant_fields
    return list(rows.values())


def _subset(row: dict, keys: tuple[str, ...]) -> dict:
    return {key: row[key] for key in keys if key in row}


def _rows_of_variant(
    folder: Path, name: str, rows: list[dict], owner: tuple[str, str]
) -> list[dict]:
    """The evaluation's rows of one variant of one model."""
    model, variant = owner
    variant_rows = []
    for row in rows:
        try:
            of_model = row["models"][model]
            variant_fields = of_model["answers"][variant]
        except KeyError:
            raise StudyError(
                f"{folder.name}/{name}.jsonl: item {row['id']} has no answer of "
                f"{_variant_path(owner)}; run {MADE_BY} again"
            ) from None
        variant_rows.append(
            _subset(row, ITEM_KEYS) | _subset(of_model, MODEL_KEYS) | variant_fields
        )
    return variant_rows


def disagreements(study: Study, answers: Mapping, verdicts: Mapping) -> dict[Comparison, str]:
    """The differing figures in words, by comparison; empty if all agree.

    Args:
        answers: by (model, dataset, variant): `predictions` of each.
        verdicts: by comparison: `kind`, `holm_p`, `primary` and `paired` of each.
    """
    settings = bootstrap_settings(study)
    reasons = {}
    for c, verdict in verdicts.items():
        if reason := _comparison_differences(c, verdict.paired, answers, settings):
            reasons[c] = reason
    for c, reason in _holm_differences(study, verdicts).items():
        reasons.setdefault(c, reason)
    return {
        c: f"its figures do not follow from the answers: {reason}" for c, reason in reasons.items()
    }


def checked_verdicts(study: Study, answers: Mapping) -> dict[Comparison, Verdict]:
    """The study's verdicts; invalid if the figures do not follow from the answers."""
    verdicts = study_verdicts(study, answers)
    if wrong := disagreements(study, answers, verdicts):
        verdicts = study_verdicts(study, answers, wrong)
        # A correction over a wrong family invalidates all its comparisons.
        if wrong := disagreements(study, answers, verdicts) | wrong:
            verdicts = study_verdicts(study, answers, wrong)
    return verdicts


def bootstrap_settings(study: Study) -> BootstrapSettings:
    """The study's confidence, resamples and seed."""
    return BootstrapSettings(study.statistics.confidence, study.statistics.resamples, study.seed)


def _comparison_differences(
    c: Comparison, paired, answers: Mapping, settings: BootstrapSettings
) -> str:
    try:
        baseline, variant = (
            answers[c.model, c.dataset, v].predictions for v in (c.baseline, c.variant)
        )
        return "; ".join(
            figure_differences(paired, recompute_comparison(baseline, variant, settings))
        )
    except Exception as error:  # rows of any shape must not stop the report
        return f"they cannot be computed again ({type(error).__name__}: {error})"


def figure_differences(paired, recomputed: RecomputedComparison) -> list[str]:
    """Figures of a comparison that differ from the recomputed ones."""
    lines = [
        f"{name} {getattr(paired, name)}, recomputed {getattr(recomputed, name)}"
        for name in ("n", "clusters", "losses", "gains")
        if getattr(paired, name) != getattr(recomputed, name)
    ]
    pairs = {
        "delta": (paired.delta, recomputed.delta, TOLERANCE),
        "p": (paired.p, recomputed.p, max(recomputed.p_tolerance, TOLERANCE)),
        "low": (paired.interval.low, recomputed.low, TOLERANCE),
        "high": (paired.interval.high, recomputed.high, TOLERANCE),
        "equivalence low": (paired.equivalence.low, recomputed.equivalence_low, TOLERANCE),
        "equivalence high": (paired.equivalence.high, recomputed.equivalence_high, TOLERANCE),
    }
    lines += [
        f"{name} {value:.6g}, recomputed {recomputed_value:.6g}"
        for name, (value, recomputed_value, tolerance) in pairs.items()
        if not abs(value - recomputed_value) <= tolerance
    ]
    half = (paired.interval.high - paired.interval.low) / 2
    flips = recomputed.losses + recomputed.gains
    # If nearly all items flip, a score interval is far from a normal one.
    comparable = FEWEST_FLIPS <= flips <= recomputed.n / 2 and recomputed.jackknife > 0
    if comparable and not NARROWEST <= half / recomputed.jackknife <= WIDEST:
        lines.append(f"half-width {half:.4g}, {recomputed.jackknife:.4g} by a jackknife")
    return lines


def _holm_differences(study: Study, verdicts: Mapping) -> dict[Comparison, str]:
    """Declared comparisons whose corrected p differs from Holm's over all declared ones."""
    declared = declared_for(study, "accuracy")
    p_values = holm([_p_in_family(verdicts.get(c)) for c in declared])
    expected = {
        c: min(1.0, level_share(study) * p) for c, p in zip(declared, p_values, strict=True)
    }
    reasons = {}
    for c, verdict in verdicts.items():
        if verdict.kind == "invalid":
            continue
        value, recomputed = verdict.holm_p, expected.get(c)
        if (value is None) != (recomputed is None):
            reasons[c] = "it was corrected and not declared, or declared and not corrected"
        elif recomputed is not None and not math.isclose(
            value, recomputed, rel_tol=TOLERANCE, abs_tol=1e-12
        ):
            reason = f"Holm p {value:.6g}, over all {len(declared)} declared {recomputed:.6g}"
            reasons[c] = reason
    return reasons


def declared_for(study: Study, score: str) -> list[Comparison]:
    """The comparisons whose declaration names this score, or none."""
    judged: dict[Comparison, None] = {}
    for d in study.statistics.primary:
        if d.score is None or d.score == score:
            c = Comparison(model=d.model, dataset=d.dataset, baseline=d.baseline, variant=d.variant)
            judged[c] = None
    return list(judged)


def level_share(study: Study) -> int:
    """What an adjusted p is multiplied by: 2 where two scores judge declared comparisons."""
    return 2 if all(declared_for(study, score) for score in ("accuracy", "graded")) else 1


def _p_in_family(verdict) -> float:
    """The p that enters Holm's family: 1 without a valid test."""
    return 1.0 if verdict is None or verdict.kind == "invalid" else verdict.paired.p


EXACT_METHOD = "exact McNemar, Tango interval"
PASSAGE_METHOD = "sign-flip test and bootstrap by passage"


def comparison_rows(
    study: Study, answers: Mapping, published_p: Mapping[Comparison, float | None]
) -> dict[Comparison, dict]:
    """By comparison, the expected row of summary.json with `family_p`: the p that the report shows.

    Args:
        answers: `VariantPredictions` by (model, dataset, variant).
        published_p: the published p; a Monte Carlo p enters Holm's family as published.
    """
    settings, declared = bootstrap_settings(study), declared_for(study, "accuracy")
    rows = {}
    by_score = [*declared, *declared_for(study, "graded")]
    for c in dict.fromkeys([*by_score, *_baseline_comparisons(study)]):
        baseline, variant = (answers.get((c.model, c.dataset, v)) for v in (c.baseline, c.variant))
        if baseline is not None and variant is not None:
            rows[c] = _comparison_row(study, c, baseline, variant, settings, declared=c in declared)
    for c, row in rows.items():
        row["family_p"] = _published_or_exact_p(row, published_p.get(c))
    p_values = [1.0 if c not in rows else rows[c]["family_p"] for c in declared]
    adjusted = holm([1.0 if p is None else p for p in p_values])
    holm_p_values = {
        c: min(1.0, level_share(study) * p) for c, p in zip(declared, adjusted, strict=True)
    }
    for c, row in rows.items():
        if c in holm_p_values and row["verdict"] != "invalid":
            row["holm_p"] = holm_p_values[c]
        row["verdict"] = _verdict_kind(study, row)
        row["reason"] = _verdict_reason(study, row)
    return rows


def _baseline_comparisons(study: Study) -> list[Comparison]:
    others = [v for v in study.variants if v != study.baseline]
    return [
        Comparison(model=m, dataset=d, baseline=study.baseline, variant=v)
        for m in study.models
        for d in study.evaluation.datasets
        for v in others
    ]


def _comparison_row(
    study: Study,
    c: Comparison,
    baseline: VariantPredictions,
    variant: VariantPredictions,
    settings: BootstrapSettings,
    *,
    declared: bool,
) -> dict:
    adapter, rules = study.evaluation.datasets[c.dataset].adapter, decision_rules(study)
    recomputed = recompute_comparison(baseline.predictions, variant.predictions, settings)
    invalid = invalid_reason(adapter, baseline, variant, rules)
    uninformative = None if invalid else uninformative_reason(adapter, baseline, rules)
    if not invalid and bool(uninformative) == is_informative(
        adapter, baseline.predictions, settings
    ):
        uninformative = "two computations disagree on whether the baseline beats a constant answer"
    kind = "invalid" if invalid else "uninformative" if uninformative else ""
    after = {row["id"]: answer_of(row) for row in variant.predictions}
    return {
        **c.model_dump(),
        "metric": "exact_match" if adapter == "squad_v2" else "accuracy",
        "primary": declared,
        "verdict": kind,
        "reason": invalid or uninformative or "",
        "n": recomputed.n,
        "clusters": recomputed.clusters,
        "losses": recomputed.losses,
        "gains": recomputed.gains,
        "delta": recomputed.delta,
        "low": recomputed.low,
        "high": recomputed.high,
        "equivalence_low": recomputed.equivalence_low,
        "equivalence_high": recomputed.equivalence_high,
        "p": None if invalid else recomputed.p,
        "p_tolerance": recomputed.p_tolerance,
        "holm_p": None,
        "smallest_detectable_loss": _detectable_loss(study, recomputed, declared=declared),
        "identical_answers": all(answer_of(r) == after[r["id"]] for r in baseline.predictions),
        "method": EXACT_METHOD if recomputed.clusters == recomputed.n else PASSAGE_METHOD,
    }


def is_informative(adapter: str, rows: list[dict], settings: BootstrapSettings) -> bool:
    """Whether a baseline significantly beats the best constant answer."""
    readable = sum(row["status"] != "unparsed" for row in rows) / len(rows)
    varied_answers = (
        len({answer_of(r) for r in rows}) > 1 or len({tuple(r["golds"]) for r in rows}) == 1
    )
    low = score_figure(rows, settings)[1]
    beats_fixed_answer = low is not None and low > best_constant(adapter, rows)[1]
    cut = sum(row["finish_reason"] == "length" for row in rows) / len(rows)
    looped = sum(repeats_at_its_end(row.get("output", "")) for row in rows) / len(rows)
    mostly_complete = max(cut, looped) <= LARGEST_BROKEN_SHARE
    return (
        readable >= SMALLEST_READABLE_SHARE
        and varied_answers
        and beats_fixed_answer
        and mostly_complete
    )


def answer_of(row: Mapping) -> tuple[str, str | None]:
    """(status, parsed answer) of a prediction."""
    return row["status"], row["parsed"]


def best_constant(adapter: str, rows: list[dict]) -> tuple[str, float]:
    """(the constant answer with the best score, its score), each constant tried on every item.

    Of equal constants the first in the alphabet counts, and abstaining before any text.
    """
    readings = [{_reading(adapter, gold) for gold in row["golds"]} for row in rows]
    constants = sorted({reading for own in readings for reading in own})
    tried = [
        (f"answering “{constant}”", sum(constant in own for own in readings) / len(rows))
        for constant in constants
    ]
    abstaining = ("abstaining", sum(not own for own in readings) / len(rows))
    if adapter == "squad_v2" or not tried:
        tried.insert(0, abstaining)
    return max(tried, key=lambda one: one[1])


def _reading(adapter: str, gold: str) -> str:
    """A gold as it is compared: words, a number, the letter of a place, or the text itself."""
    if adapter == "squad_v2":
        return " ".join(words_of(gold))
    if adapter == "arc":
        return gold.translate(str.maketrans("12345", "ABCDE")) if len(gold) == 1 else gold
    number = gold_number(gold) if adapter == "openmath" else None
    return gold if number is None else str(number)


def repeats_at_its_end(text: str) -> bool:
    """Whether the text ends in four or more repetitions of one piece, over 24 characters or more.

    The piece has at most 60 characters; its last repetition may be incomplete.
    """
    for size in range(1, 61):
        length = max(24, 4 * size)
        end = text[len(text) - length :] if len(text) >= length else ""
        if end and end == (end[:size] * length)[:length]:
            return True
    return False


def _detectable_loss(
    study: Study, recomputed: RecomputedComparison, *, declared: bool
) -> float | None:
    alpha = round(1 - study.statistics.confidence, 12)
    tests = len(declared_for(study, "accuracy")) * level_share(study)
    level = alpha / tests if declared else alpha
    power = study.statistics.power
    if recomputed.clusters == recomputed.n:
        return detectable_loss(recomputed.n, recomputed.gains / recomputed.n, level, power)
    if recomputed.standard_error <= 1e-12:
        return detectable_loss(recomputed.clusters, 0.0, level, power)
    return detectable_mean_loss(recomputed.standard_error, recomputed.clusters, level, power)


def _published_or_exact_p(row: dict, published: float | None) -> float | None:
    """The published p if it is within the tolerance of the exact one, else the exact one."""
    if row["p"] is None:
        return None
    within_tolerance = published is not None and abs(published - row["p"]) <= row["p_tolerance"]
    return published if within_tolerance else row["p"]


def _within_margin(study: Study, row: dict) -> bool:
    margin = study.statistics.margin
    return -margin < row["equivalence_low"] and row["equivalence_high"] < margin


def _verdict_kind(study: Study, row: dict) -> str:
    if row["verdict"] or not row["primary"]:
        return row["verdict"] or "exploratory"
    if row["holm_p"] <= round(1 - study.statistics.confidence, 12) and row["delta"]:
        return "worse" if row["delta"] < 0 else "better"
    return "equivalent" if _within_margin(study, row) else "inconclusive"


def _verdict_reason(study: Study, row: dict) -> str:
    """The reason of an invalid or uninformative row, or the remark of another verdict."""
    if row["reason"]:
        return row["reason"]
    if row["verdict"] in ("worse", "better"):
        inside = "the difference is nevertheless inside the margin"
        return inside if _within_margin(study, row) else ""
    return f"identical answers on all {row['n']} items" if row["identical_answers"] else ""
