"""What one comparison of a variant with its baseline lets one say: data in, a verdict out.

Three questions in a fixed order. Is this a measurement of the variant at all (*invalid*)?
Does the evaluation set tell this baseline from a fixed answer (*uninformative*)? Only
then: what does the test say? Significance cannot certify garbage.

Left out on purpose: winners, relative changes of percentages, p-values of comparisons
that are invalid, and verdicts on comparisons nobody declared beforehand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from helpers.statistics.comparison import (
    DecisionRules,
    PairedComparison,
    VariantPredictions,
    decision_rules,
    paired_comparison,
)
from helpers.statistics.intervals import holm, tost_from_interval
from helpers.statistics.validity import invalid_reason, uninformative_reason
from helpers.study.schema import Comparison, Study

Kind = Literal[
    "worse", "better", "equivalent", "inconclusive", "uninformative", "invalid", "exploratory"
]


@dataclass(frozen=True)
class Verdict:
    """The conclusion of one comparison; `holm_p` is None without a valid declared test."""

    kind: Kind
    reason: str
    primary: bool
    holm_p: float | None
    paired: PairedComparison


def study_verdicts(
    study: Study,
    answers: Mapping[tuple[str, str, str], VariantPredictions],
    disagreements: Mapping[Comparison, str] = MappingProxyType({}),
) -> dict[Comparison, Verdict]:
    """Every variant against the study's baseline, and every declared comparison.

    Holm's family is all declared comparisons. An invalid one stays in it with p = 1, so that a
    failed check never eases the test of another. A comparison with a missing side stays in it
    too and gets no verdict.

    Args:
        answers: by (model, dataset, variant).
        disagreements: comparisons whose figures do not follow from the answers, with the
            reason: they are invalid.
    """
    rules, primary = decision_rules(study), study.statistics.primary
    comparisons = [*primary, *_baseline_comparisons(study)]
    compared, p_values = {}, dict.fromkeys(primary, 1.0)
    for c in dict.fromkeys(comparisons):
        if not {(c.model, c.dataset, name) for name in (c.baseline, c.variant)} <= answers.keys():
            continue
        baseline, variant = (answers[c.model, c.dataset, v] for v in (c.baseline, c.variant))
        adapter = study.evaluation.datasets[c.dataset].adapter
        alpha = rules.alpha / rules.family if c in primary else rules.alpha
        paired = paired_comparison(baseline, variant, rules, alpha=alpha)
        reasons = (
            disagreements.get(c) or invalid_reason(adapter, baseline, variant, rules),
            uninformative_reason(adapter, baseline, rules),
        )
        compared[c] = paired, reasons
        if c in primary and not reasons[0]:
            p_values[c] = paired.p
    holm_p_values = holm(p_values)
    return {
        c: decide_verdict(p, *reasons, holm_p_values.get(c), rules)
        for c, (p, reasons) in compared.items()
    }


def _baseline_comparisons(study: Study) -> list[Comparison]:
    return [
        Comparison(model=model, dataset=dataset, baseline=study.baseline, variant=variant)
        for model in study.models
        for dataset in study.evaluation.datasets
        for variant in study.variants
        if variant != study.baseline
    ]


def decide_verdict(
    paired: PairedComparison,
    invalid: str | None,
    uninformative: str | None,
    holm_p: float | None,
    rules: DecisionRules,
) -> Verdict:
    """The verdict of one comparison; `holm_p` is None for one that was not declared."""
    primary = holm_p is not None
    identical = f"identical answers on all {paired.n} items" if paired.identical else ""
    within_margin = tost_from_interval(paired.equivalence, margin=rules.margin, alpha=rules.alpha)
    if invalid:
        return Verdict("invalid", invalid, primary, None, paired)
    if uninformative:
        return Verdict("uninformative", uninformative, primary, holm_p, paired)
    if holm_p is None:
        return Verdict("exploratory", identical, primary, None, paired)
    if holm_p <= rules.alpha and paired.delta != 0:
        reason = "the difference is nevertheless inside the margin" if within_margin else ""
        return Verdict("worse" if paired.delta < 0 else "better", reason, primary, holm_p, paired)
    return Verdict(
        "equivalent" if within_margin else "inconclusive", identical, primary, holm_p, paired
    )
