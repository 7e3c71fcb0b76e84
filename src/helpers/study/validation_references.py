"""Whether what a study file says about its own names fits together.

Every setting is sound by itself here; what is looked at is what one says of another.
"""

from collections.abc import Mapping
from operator import attrgetter

from helpers.study.schema import EvaluationSet, Study
from helpers.study.schema_names import RESERVED_NAMES
from helpers.study.schema_sources import FineTunedModel
from helpers.study.validation_messages import unknown_name_line

PROTOCOLS = {
    "arc": {"loglikelihood", "generate"},
    "boolq": {"loglikelihood", "generate"},
    "squad_v2": {"generate"},
    "openmath": {"generate"},
}


def broken_references(study: Study) -> list[str]:
    """The contradictions among a study file's own names, one line each."""
    problems = _baseline(study) + _float_types(study) + _reserved_names(study)
    for name, model in study.models.items():
        if isinstance(model, FineTunedModel):
            problems += _start(study, f"models.{name}.finetune.start", model.finetune.start)
    for name, dataset in study.evaluation.datasets.items():
        prompting = _prompting_problems(dataset, thinking=bool(study.enable_thinking))
        problems += [f"evaluation.datasets.{name}.{problem}" for problem in prompting]
    return problems + _comparisons(study) + _old_rules(study)


def _baseline(study: Study) -> list[str]:
    if study.baseline not in study.variants:
        return [unknown_name_line("baseline", study.baseline, "variant", study.variants)]
    if study.variants[study.baseline].is_unmodified:
        return []
    return [
        f"baseline = {study.baseline!r} is not the model as it was loaded; name a variant "
        "that changes nothing ({})"
    ]


def _float_types(study: Study) -> list[str]:
    """The float type of a control must differ from the study's own."""
    problems = []
    for name, variant in study.variants.items():
        key = f"variants.{name}.dtype = {variant.dtype!r}"
        if variant.dtype == study.runtime.dtype:
            problems.append(
                f"{key} is runtime.dtype already; name the other one, so that the two differ "
                "by rounding"
            )
        elif variant.dtype and study.runtime.dtype == "auto":
            problems.append(
                f"{key} may equal runtime.dtype = 'auto' on some machine; name runtime.dtype too"
            )
    return problems


def _reserved_names(study: Study) -> list[str]:
    return [
        f"{kind}.{name} names what every run writes itself; rename it"
        for kind, reserved in RESERVED_NAMES.items()
        for name in sorted(reserved & set(attrgetter(kind)(study)))
    ]


def _start(study: Study, key: str, start: str) -> list[str]:
    if start not in study.models:
        return [unknown_name_line(key, start, "model", study.models)]
    if isinstance(study.models[start], FineTunedModel):
        return [f"{key} = {start!r} is itself fine-tuned by this study; start from a given model"]
    return []


def _prompting_problems(dataset: EvaluationSet, *, thinking: bool) -> list[str]:
    """Contradictions in the settings of one evaluation set; each line starts with its key."""
    problems, ask = [], dataset.ask
    if ask.protocol not in PROTOCOLS[dataset.adapter]:
        problems.append(
            f"ask.protocol = {ask.protocol!r} cannot ask {dataset.adapter} items; use "
            f"{' or '.join(sorted(PROTOCOLS[dataset.adapter]))}"
        )
    if dataset.keep and dataset.adapter != "openmath":
        problems.append(
            f"keep = {dataset.keep!r} is for openmath items, not for {dataset.adapter}; remove it"
        )
    if thinking and ask.protocol == "generate" and (ask.answer, ask.stop) != ("boxed", "turn"):
        problems.append(
            f"ask.answer = {ask.answer!r} with stop = {ask.stop!r} would take thoughts for the "
            "answer, since enable_thinking = true; use answer: boxed, stop: turn"
        )
    return problems


def _comparisons(study: Study) -> list[str]:
    problems, primary = [], study.statistics.primary
    for index, pair in enumerate(primary):
        key = f"statistics.primary.{index}"
        defined: dict[str, Mapping[str, object]] = {
            "model": study.models,
            "dataset": study.evaluation.datasets,
            "baseline": study.variants,
            "variant": study.variants,
        }
        for field, names in defined.items():
            value = getattr(pair, field)
            if value not in names:
                kind = "variant" if field == "baseline" else field
                problems.append(unknown_name_line(f"{key}.{field}", value, kind, names))
        if pair.variant == pair.baseline:
            problems.append(f"{key}.variant = {pair.variant!r} is its own baseline; name another")
        if pair in primary[:index]:
            problems.append(f"{key} repeats an earlier comparison; remove it")
    return problems


def _old_rules(study: Study) -> list[str]:
    problems = []
    for index, name in enumerate(study.old_rules_chapter):
        key = f"old_rules_chapter.{index}"
        if name not in study.variants:
            problems.append(unknown_name_line(key, name, "variant", study.variants))
        elif name == study.baseline:
            problems.append(
                f"{key} = {name!r} is the baseline; name a variant that is compared with it"
            )
    return problems
