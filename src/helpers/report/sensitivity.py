"""Where the loss lies: outlier channels, Linears left float, and KL against α.

With one int8 scale for the whole tensor, a step is the largest value / 127. A channel that never
exceeds half a step is rounded to zero. Where that befalls most channels, the Linear reads little
but its outlier. This is read from the calibration, and explained together with SQNR.

What leaving Linears float would save is measured inside the quantization, on the calibration items
that judge, and so apart from every number that a verdict rests on. Every row is one draw of
rounding (NOTES.md, 2026-11-23); what a draw moves is read off the rows themselves, and nothing
smaller is called a cause.
"""

import math
from dataclasses import dataclass

import numpy as np
from IPython.display import Markdown

from helpers.quantization.channel_maxima import channel_maxima
from helpers.report import figures
from helpers.report.estimates import CalibrationResults, VariantResults
from helpers.report.markdown import (
    MISSING,
    Markup,
    Rows,
    code,
    count,
    folded,
    listed,
    markdown_table,
    number,
    two_decimals,
)
from helpers.report.results import Results

HALF_STEPS = 2 * 127  # half steps from zero to the end of a symmetric int8 scale


@dataclass(frozen=True)
class LinearInput:
    """One Linear's input: its largest channel, and the effect of a single scale.

    Attributes:
        ratio: largest channel / median channel, of their abs-max; None if the median is 0.
        rounded_away: share of channels that never exceed half a step.
    """

    linear: str
    channel: int
    largest: float
    median: float
    ratio: float | None
    rounded_away: float

    @property
    def name(self) -> str:
        return self.linear.removeprefix("model.layers.")


def linear_inputs(calibrated: CalibrationResults) -> list[LinearInput]:
    """Every Linear's input, the one with the largest ratio first; those without one last."""
    inputs = []
    for linear, absmax in calibrated.absmax.items():
        maxima = channel_maxima(absmax)
        rounded_away = float(np.mean(absmax < maxima.largest / HALF_STEPS))
        inputs.append(LinearInput(linear, *maxima, rounded_away))
    return sorted(inputs, key=lambda i: (i.ratio is None, -(i.ratio or i.largest), i.linear))


def outlier_dominated_inputs(calibrated: CalibrationResults) -> list[LinearInput]:
    """Inputs of which one scale per tensor rounds most channels to zero."""
    return [i for i in linear_inputs(calibrated) if i.rounded_away > 0.5]


def has_outliers(results: Results, model: str) -> bool:
    """Whether one channel dominates any Linear input of the model."""
    return bool(outlier_dominated_inputs(results.calibrations[model]))


def output_sqnr(evaluated: VariantResults) -> dict[str, float]:
    """Output SQNR in dB by Linear of the final variant: the last curve of its record."""
    curves = evaluated.quantization["results"]["sqnr_db"]
    return list(curves.values())[-1] if curves else {}


def zeroed_tokens(calibrated: CalibrationResults) -> tuple[int, int]:
    """(tokens that one scale rounds entirely to zero, all tokens) of the shown input."""
    half_step = float(calibrated.absmax[calibrated.surface_of].max()) / HALF_STEPS
    return int((calibrated.surface.max(1) < half_step).sum()), len(calibrated.surface)


def per_tensor_variants(results: Results, model: str) -> list[VariantResults]:
    """The model's quantized variants with one activation scale per tensor."""
    quantized = [e for e in results.compared_variants_of(model) if e.quantization]
    return [e for e in quantized if activation_granularity(results, e.variant).startswith("tensor")]


def per_token_variants(results: Results, model: str) -> list[VariantResults]:
    """The model's quantized variants with one activation scale per token."""
    quantized = [e for e in results.compared_variants_of(model) if e.quantization]
    return [e for e in quantized if activation_granularity(results, e.variant).startswith("token")]


def activation_granularity(results: Results, variant: str) -> str:
    """The study file's word for its activation scales; empty if it quantizes none."""
    scheme = results.study.variants[variant].scheme
    return scheme[1] if scheme else ""


COLLAPSE_RATIO = 1.5  # a perplexity this many times the baseline's is a collapse

UNCHANGED_DB = 0.5  # smoothing that changes an output SQNR by less did not reach the Linear
INPUTS_WITHOUT_NORM = {
    "down_proj": "a `down_proj` reads the product inside the MLP",
    "o_proj": "an `o_proj` reads the attention's weighted values",
}


def has_collapsed(perplexity: float | None, baseline: float | None) -> bool:
    """Whether perplexity rose beyond COLLAPSE_RATIO or is not finite."""
    return baseline is not None and (perplexity is None or perplexity >= COLLAPSE_RATIO * baseline)


def outlier_sentences(results: Results) -> list[str]:
    """Inputs with a dominant outlier channel, and what per-tensor scales do to them, all models."""
    inputs = {m: outlier_dominated_inputs(results.calibrations[m]) for m in results.models}
    totals = {m: count(len(results.calibrations[m].absmax), "Linear input") for m in inputs}
    counts = [f"{len(inputs[m]) or 'none'} of {totals[m]} of `{m}`" for m in inputs]
    sentences = [f"One outlier channel dominates in {listed(counts)}."]
    sentences += [
        _per_tensor_sentence(results, variant, inputs)
        for variant in results.compared
        if activation_granularity(results, variant).startswith("tensor")
    ]
    if any(inputs.values()):
        sentences += [_zeroed_sentence(results, inputs), _reach_sentences(results, inputs)]
    return list(filter(None, sentences))


def _per_tensor_sentence(results: Results, variant: str, inputs: dict) -> str:
    """The perplexity of a variant with one activation scale per tensor, in every model."""
    clauses: dict[str, list[str]] = {}
    for model in results.models:
        e, base = results.evaluations[model, variant], results.baseline_of(model)
        level, before = e.shared_text["perplexity"], base.shared_text["perplexity"]
        reached = any(i.linear in output_sqnr(e) for i in inputs[model])
        verb = "collapses" if reached and has_collapsed(level, before) else "does not collapse"
        clause = f"{two_decimals(level)} in `{model}` (against {two_decimals(before)})"
        clauses.setdefault(verb, []).append(clause)
    outcomes = [f"{verb}: its perplexity is {listed(parts)}" for verb, parts in clauses.items()]
    return f"`{variant}`, with one activation scale per tensor, {'; it '.join(outcomes)}."


def _zeroed_sentence(results: Results, inputs: dict[str, list[LinearInput]]) -> str:
    """How many tokens of the pictured item one scale rounds to zero, in every model."""
    clauses = []
    for model, dominated in inputs.items():
        calibrated = results.calibrations[model]
        if any(i.linear == calibrated.surface_of for i in dominated):
            zeroed, tokens = zeroed_tokens(calibrated)
            name = calibrated.surface_of.removeprefix("model.layers.")
            clauses.append(f"{zeroed} of {count(tokens, 'token')} at `{name}` of `{model}`")
    if not clauses:
        return ""
    return f"In the item pictured below, one scale rounds {listed(clauses)} entirely to zero."


def _reach_sentences(results: Results, inputs: dict[str, list[LinearInput]]) -> str:
    """Where smoothing does not reach the outliers; what all models have in common once."""
    models_by_text: dict[str, list[str]] = {}
    for model, dominated in inputs.items():
        for e in per_tensor_variants(results, model):
            if text := _smoothing_reach(results, e, dominated):
                models_by_text.setdefault(text, []).append(f"`{model}`")
    return " ".join(f"In {listed(models)}, {text}" for text, models in models_by_text.items())


def outlier_figure_title(model: str, worst: LinearInput) -> str:
    """Title of the figure of a model's largest channels."""
    if worst.ratio is None:
        return f"{model}: the median channel of {worst.name} is 0"
    return f"{model}: {worst.name} reaches {number(worst.ratio)}× its median channel"


def _smoothing_reach(results: Results, e: VariantResults, inputs: list[LinearInput]) -> str:
    """What smoothing in this variant does to the outliers' inputs; empty without inputs."""
    levels, recipe = output_sqnr(e), results.study.variants[e.variant]
    quantized = [i for i in inputs if i.linear in levels]
    if inputs and levels and not quantized:
        return f"`{e.variant}` keeps these Linears in float."
    curves = list(e.quantization["results"]["sqnr_db"].values())
    if not (quantized and recipe.smooth and len(curves) > 1):
        return ""
    unchanged = [
        i for i in quantized if abs(curves[0][i.linear] - curves[-1][i.linear]) < UNCHANGED_DB
    ]
    chosen = _recorded_sensitivity(e).get("alpha", {}).get("targets")  # of optional ones
    targets = chosen or recipe.smooth.targets
    reach = _unreached_sentence(targets, unchanged) if unchanged else "reaches them."
    return f"smoothing in `{e.variant}` {reach}"


def _unreached_sentence(targets, inputs: list[LinearInput]) -> str:
    """The inputs that smoothing does not reach, and why, if the architecture tells."""
    places = listed([target.replace("_", " ") for target in targets])
    kinds = dict.fromkeys(i.linear.rpartition(".")[2] for i in inputs)
    explanations = [INPUTS_WITHOUT_NORM[kind] for kind in kinds if kind in INPUTS_WITHOUT_NORM]
    text = f"does not reach {listed([f'`{i.name}`' for i in inputs])}: it acts at {places}"
    return text + (f", and {listed(explanations)}, which follows no norm." if explanations else ".")


AS_QUANTIZED = "nothing"
ALONE = {"every activation": "weights", "every weight": "activations"}  # that are still rounded


def loss_chapter(results: Results) -> list[Markdown | figures.Picture]:
    """What leaving Linears in float would save, and a curve for each grid of α."""
    rows = left_float_rows(results)
    if not rows:
        return []
    parts = [
        "### Where the loss lies",
        chance_note(largest_chance_rise(results)),
        markdown_table(loss_carrier_rows(results)),
        folded("KL with some Linears left in float [nats per token]", markdown_table(rows)),
        *decompositions(results),
        *protections(results),
    ]
    pictures = [
        figures.Picture(
            figures.kl_by_alpha(curves, variants=results.compared, title=title),
            f"KL from the float model against α. {title}; {_alpha_numbers(curves)}.",
        )
        for model in results.models
        if (curves := alpha_curves(results, model))
        for title in [alpha_figure_title(curves, model)]
    ]
    return [Markdown("\n\n".join(filter(None, parts)) + "\n"), *pictures]


def _alpha_numbers(curves: dict[str, list[dict]]) -> str:
    """`smoothquant_o3: 0.87 to 1.2 nats a token`."""
    kls = {variant: [row["kl"] for row in curve] for variant, curve in curves.items()}
    return ", ".join(f"{v}: {number(min(x))} to {number(max(x))} nats" for v, x in kls.items())


def _recorded_sensitivity(variant: VariantResults) -> dict:
    return (variant.quantization or {}).get("results", {}).get("losses") or {}


def _rows_by_left_float(results: Results, model: str) -> dict[str, dict[str, dict]]:
    """Variant → label of the Linears left in float → its row."""
    measured = {
        e.variant: _recorded_sensitivity(e).get("left_float")
        for e in results.compared_variants_of(model)
    }
    return {v: {row["float"]: row for row in rows} for v, rows in measured.items() if rows}


def left_float_rows(results: Results) -> Rows:
    """KL from the float model by the Linears left in float: a row a model, a column a variant."""
    by_model = {model: _rows_by_left_float(results, model) for model in results.models}
    labels = dict.fromkeys(
        label
        for variants in by_model.values()
        for rows in variants.values()
        for label in rows
        if label not in ALONE
    )
    return [
        {"left in float": _short_label(label), "model": code(model)}
        | {
            code(v): number(rows[label]["kl"]) if label in rows else MISSING
            for v, rows in by_model[model].items()
        }
        for label in labels
        for model in results.models
        if by_model[model]
    ]


def largest_chance_rise(results: Results) -> float | None:
    """Largest relative rise of the KL with Linears left in float; None if not measured.

    A float Linear adds no error, so a rise is chance: every change redraws the rounding.
    """
    rises = [
        row["kl"] / rows[AS_QUANTIZED]["kl"] - 1
        for model in results.models
        for rows in _rows_by_left_float(results, model).values()
        if (rows[AS_QUANTIZED]["kl"] or 0) > 0
        for label, row in rows.items()
        if row["kl"] is not None and label not in ALONE
    ]
    return max(rises, default=None)


def chance_note(chance: float | None) -> str:
    """How to read the rows below, given the size of chance; empty if it was not measured."""
    if chance is None:
        return ""
    return (
        "A Linear left in float adds no error, but every change redraws the rounding of all other "
        "Linears. A row above the first is therefore chance; here one is up to "
        f"{1 + chance:.2f} times the first. A fall by at most that factor, a saving of "
        f"{100 * _saving_by_chance(chance):.0f} %, cannot be distinguished from chance."
    )


def _saving_by_chance(rise: float) -> float:
    """The saving that is as large a factor as a rise: half of a KL where another one doubled."""
    return rise / (1 + rise)


def _short_label(label: str) -> str:
    return label.replace("model.layers.", "").replace("model.decoder.layers.", "")


def loss_carrier_rows(results: Results) -> Rows:
    """By variant and model, the kind of Linear that carries most of the loss, if one does."""
    rows, chance_rise = [], largest_chance_rise(results) or 0.0
    for variant in results.compared:
        for model in results.models:
            if measured := _rows_by_left_float(results, model).get(variant):
                row = {"largest saving of KL": code(variant), "model": code(model)}
                rows.append(row | _carrier_cells(measured, chance_rise))
    return rows


def _carrier_cells(measured: dict[str, dict], chance_rise: float) -> dict[str, str]:
    quantized_kl = measured[AS_QUANTIZED]["kl"]
    cells = {"left in float": "none beyond chance", "KL as quantized": number(quantized_kl)}
    cells |= {"KL then": MISSING, "saved": MISSING}
    if quantized_kl is None:
        return cells | {"left in float": MISSING, "KL as quantized": "not finite"}
    finite = {
        label: row["kl"]
        for label, row in measured.items()
        if row["kl"] is not None and label not in ALONE
    }
    best = min(finite, key=finite.__getitem__)  # "nothing" where nothing is saved
    share = 1 - finite[best] / quantized_kl if quantized_kl > 0 else 0.0
    if share <= _saving_by_chance(chance_rise):
        return cells
    cells["left in float"] = _short_label(best)
    return cells | {"KL then": number(finite[best]), "saved": f"{100 * share:.0f} %"}


def decomposition_rows(results: Results, model: str) -> Rows:
    """KL of every int8 variant, of its weights and its activations alone, and the remainder.

    Variants without both rows, or with a KL that is not finite, are left out.
    """
    table = []
    for variant, rows in _rows_by_left_float(results, model).items():
        both = rows[AS_QUANTIZED]["kl"]
        alone = {part: rows.get(label, {}).get("kl") for label, part in ALONE.items()}
        if both is None or None in alone.values():
            continue
        table.append(
            {"variant": code(variant), "KL": number(both)}
            | {f"{part} alone": number(kl) for part, kl in alone.items()}
            | {"not additive": number(both - sum(alone.values()))}
        )
    return table


def decompositions(results: Results) -> list[str]:
    """Texts and tables on weights and activations alone, model by model; empty without any."""
    parts = []
    for model in results.models:
        if shares := decomposition_rows(results, model):
            parts += [decomposition_text(model), markdown_table(shares)]
    return parts


def decomposition_text(model: str) -> str:
    """How to read the table of weights and activations alone."""
    return (
        f"#### Weights or activations of `{model}`?\n\n"
        "KL in nats per token on the same calibration items: as quantized, with the weights alone "
        "rounded (W8A16), and with the activations alone rounded (A8), both simulated. The "
        "remainder is not additive: errors of both that add up or cancel, and the chance of a draw "
        "of rounding."
    )


def protection_rows(results: Results) -> Rows:
    """Which Linears `protect` left float, their bytes, and the KL beside random choices."""
    rows = []
    for model in results.models:
        for evaluated in results.compared_variants_of(model):
            if record := _recorded_sensitivity(evaluated).get("protected"):
                rows.append({"protected": code(evaluated.variant), "model": code(model)})
                rows[-1] |= _protection_cells(record)
    return rows


def _protection_cells(record: dict) -> dict[str, str]:
    share = record["chosen_bytes"] / record["bytes"]
    sets = [math.inf if row["kl"] is None else row["kl"] for row in record["random"]]
    rank, of = record["rank"], len(sets) + 1
    return {
        "left float": Markup(", ".join(code(_short_label(name)) for name in record["chosen"])),
        "Linears": f"{len(record['chosen'])} of {len(record['linears'])}",
        "bytes": f"{100 * share:.2f} %",
        "KL, all in int8": number(record["kl"]),
        "KL, these float": number(record["kl_chosen"]),
        "KL, random choices": f"{number(min(sets))} to {number(max(sets))}",
        "rank": f"{rank} of {of}",
        "p": f"{rank / of:.2g}",
    }


def protections(results: Results) -> list[str]:
    """Text and table on the Linears that `protect` left float; empty without any."""
    rows = protection_rows(results)
    if not rows:
        return []
    return ["#### Linears left float by `protect`\n\n" + PROTECTION_NOTE, markdown_table(rows)]


PROTECTION_NOTE = (
    "Of all sets of Linears that fit the declared share of the float model's bytes, quantization "
    "left float the one with the largest sum of KLs, each measured on the judging items with one "
    "Linear in int8. The KLs below are in nats per token on other calibration items, simulated "
    "with weights rounded to nearest. Each random choice fills as many bytes; the rank is that of "
    "the choice among all, with ties against it."
)


def alpha_curves(results: Results, model: str) -> dict[str, list[dict]]:
    """Variant → the rows of its α grid with a finite KL."""
    curves = {
        e.variant: [
            row
            for row in _recorded_sensitivity(e).get("alpha", {}).get("curve") or []
            if row["kl"] is not None
        ]
        for e in results.compared_variants_of(model)
    }
    return {variant: curve for variant, curve in curves.items() if curve}


def alpha_figure_title(curves: dict[str, list[dict]], model: str) -> str:
    """Title of the α figure: the α with the lowest KL of each grid."""
    best = {v: min(curve, key=lambda row: row["kl"]) for v, curve in curves.items()}
    names = {v: f"{v}, {figures.OPTIONAL}" if r.get("optional") else v for v, r in best.items()}
    places = [f"α = {row['alpha']:g} ({names[v]})" for v, row in best.items()]
    return f"{model}: lowest KL at " + listed(places)
