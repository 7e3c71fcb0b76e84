"""Where the loss lies: outlier channels, Linears left float, and KL against α.

With one int8 scale for the whole tensor, a step is the largest value / 127. A channel that never
exceeds half a step is rounded to zero. Where that befalls most channels, the Linear reads little
but its outlier. This is read from the calibration, and explained together with SQNR.

What leaving Linears float would save is measured inside the quantization, on the calibration items
that judge, and so apart from every number that a verdict rests on. Every row is one draw of
rounding (NOTES.md, 2026-11-23); what a draw moves is read off the rows themselves, and nothing
smaller is called a cause.
"""

from dataclasses import dataclass

import numpy as np
from IPython.display import Markdown
from matplotlib.figure import Figure

from helpers.quantization.channel_maxima import channel_maxima
from helpers.report import figures
from helpers.report.estimates import CalibrationResults, VariantResults
from helpers.report.markdown import (
    MISSING,
    Rows,
    code,
    count,
    listed,
    markdown_table,
    number,
    percent,
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


def outlier_finding(results: Results, model: str) -> str:
    """Inputs with a dominant outlier channel, and the perplexity of per-tensor variants."""
    inputs = outlier_dominated_inputs(results.calibrations[model])
    total = len(results.calibrations[model].absmax)
    if not inputs:
        return (
            f"In `{model}`, no outlier channel dominates in any of {total} Linear inputs: one int8 "
            "scale per tensor would nowhere round most channels to zero."
        )
    text = (
        f"In `{model}`, one outlier channel dominates in {len(inputs)} of "
        f"{count(total, 'Linear input')}: {listed([describe_input(i) for i in inputs])}."
    )
    base = results.baseline_of(model).shared_text["perplexity"]
    for e in per_tensor_variants(results, model):
        level = e.shared_text["perplexity"]
        perplexities = f"its perplexity is {two_decimals(level)} against {two_decimals(base)}"
        collapsed = has_collapsed(level, base) and any(i.linear in output_sqnr(e) for i in inputs)
        text += f" `{e.variant}`, with one activation scale per tensor, "
        text += (
            f"collapses: {perplexities}." if collapsed else f"does not collapse: {perplexities}."
        )
    return text


def describe_input(linear_input: LinearInput) -> str:
    ratio = "and the median channel is 0"
    if linear_input.ratio is not None:
        ratio = f"{number(linear_input.ratio)} times the median channel"
    largest = f"channel {linear_input.channel} reaches {number(linear_input.largest)}"
    return f"`{linear_input.name}` ({largest}, {ratio})"


def outlier_figure_title(model: str, worst: LinearInput) -> str:
    """Title of the figure of a model's largest channels."""
    if worst.ratio is None:
        return f"{model}: the median channel of {worst.name} is 0"
    return f"{model}: {worst.name} reaches {number(worst.ratio)}× its median channel"


def outlier_paragraph(results: Results, model: str) -> str:
    """The effect of per-tensor scales, from the calibration and the SQNR records."""
    inputs = outlier_dominated_inputs(results.calibrations[model])
    if not inputs:
        return outlier_finding(results, model)
    calibrated = results.calibrations[model]
    parts = [outlier_finding(results, model)]
    parts.append(
        "With one int8 scale per tensor, a step is the largest value / 127, and a channel that "
        "stays below half a step is rounded to zero: "
        + listed([f"{percent(i.rounded_away)} of the channels of `{i.name}`" for i in inputs])
        + "."
    )
    if any(i.linear == calibrated.surface_of for i in inputs):
        zeroed, tokens = zeroed_tokens(calibrated)
        name = calibrated.surface_of.removeprefix("model.layers.")
        parts.append(
            f"In the item shown below, one scale rounds {zeroed} of {count(tokens, 'token')} at "
            f"`{name}` entirely to zero."
        )
    parts += [
        _per_tensor_sentences(results, e, inputs) for e in per_tensor_variants(results, model)
    ]
    if variants := [e for e in per_token_variants(results, model) if output_sqnr(e)]:
        parts.append(
            "With one scale per token, only the few tokens that carry the outlier lose precision: "
            "the output SQNR is " + listed(_sqnr_by_variant(variants, inputs)) + "."
        )
    return " ".join(filter(None, parts))


def _sqnr_by_variant(variants: list[VariantResults], inputs: list[LinearInput]) -> list[str]:
    """The output SQNR of these inputs by variant; variants with equal values are grouped."""
    by_levels: dict[str, list[str]] = {}
    for e in variants:
        by_levels.setdefault(_sqnr_levels(e, inputs), []).append(f"`{e.variant}`")
    return [f"{levels} dB under {listed(names)}" for levels, names in by_levels.items()]


def _sqnr_levels(e: VariantResults, inputs: list[LinearInput]) -> str:
    return listed([f"{output_sqnr(e)[i.linear]:.1f}" for i in inputs if i.linear in output_sqnr(e)])


def _per_tensor_sentences(results: Results, e: VariantResults, inputs: list[LinearInput]) -> str:
    """The effect of one scale per tensor in this variant, and the reach of its smoothing."""
    levels, recipe = output_sqnr(e), results.study.variants[e.variant]
    quantized = [i for i in inputs if i.linear in levels]
    if levels and not quantized:
        return f"`{e.variant}` keeps these Linears in float."
    text = ""
    curves = list(e.quantization["results"]["sqnr_db"].values())
    if recipe.smooth and len(curves) > 1:
        unchanged = [
            i for i in quantized if abs(curves[0][i.linear] - curves[-1][i.linear]) < UNCHANGED_DB
        ]
        text = f"Smoothing in `{e.variant}` "
        text += (
            _unreached_sentence(recipe.smooth.targets, unchanged) if unchanged else "reaches them."
        )
    if quantized:
        text += (
            f" Their output SQNR under `{e.variant}` is {_sqnr_levels(e, quantized)} dB. SQNR "
            "weights tokens by their power, and the tokens with the outlier hold nearly all of it, "
            "so it does not show the loss of the other tokens."
        )
    return text.strip()


def _unreached_sentence(targets, inputs: list[LinearInput]) -> str:
    """The inputs that smoothing does not reach, and why, if the architecture tells."""
    places = listed([target.replace("_", " ") for target in targets])
    kinds = dict.fromkeys(i.linear.rpartition(".")[2] for i in inputs)
    explanations = [INPUTS_WITHOUT_NORM[kind] for kind in kinds if kind in INPUTS_WITHOUT_NORM]
    text = f"does not reach {listed([f'`{i.name}`' for i in inputs])}: it acts at {places}"
    return text + (f", and {listed(explanations)}, which follows no norm." if explanations else ".")


AS_QUANTIZED = "nothing"
ALONE = {"every activation": "weights", "every weight": "activations"}  # that are still rounded


def loss_chapter(results: Results) -> list[Markdown | Figure]:
    """For every model: a sentence and a table, and a curve for each variant with a grid of α."""
    parts: list[Markdown | Figure] = []
    if chance_rise := largest_chance_rise(results):
        parts.append(Markdown(chance_note(chance_rise)))
    for model in results.models:
        rows = left_float_rows(results, model)
        if not rows:
            continue
        sentences = " ".join(loss_carrier_sentences(results, model))
        text = f"### Where the loss of `{model}` lies\n\n{sentences}"
        parts.append(Markdown(f"{text}\n\n{markdown_table(rows)}\n"))
        if shares := decomposition_rows(results, model):
            parts.append(Markdown(f"{decomposition_text(model)}\n\n{markdown_table(shares)}\n"))
        if curves := alpha_curves(results, model):
            title = alpha_figure_title(curves, model)
            parts.append(figures.kl_by_alpha(curves, variants=results.compared, title=title))
    return parts


def _recorded_sensitivity(variant: VariantResults) -> dict:
    return (variant.quantization or {}).get("results", {}).get("losses") or {}


def _rows_by_left_float(results: Results, model: str) -> dict[str, dict[str, dict]]:
    """Variant → label of the Linears left in float → its row."""
    measured = {
        e.variant: _recorded_sensitivity(e).get("left_float")
        for e in results.compared_variants_of(model)
    }
    return {v: {row["float"]: row for row in rows} for v, rows in measured.items() if rows}


def left_float_rows(results: Results, model: str) -> Rows:
    """KL from the float model by the Linears left in float, one column per variant."""
    rows_by_variant = _rows_by_left_float(results, model)
    labels = dict.fromkeys(
        label for rows in rows_by_variant.values() for label in rows if label not in ALONE
    )
    return [
        {
            "left in float": _short_label(label),
            **{
                code(v): number(r[label]["kl"]) if label in r else MISSING
                for v, r in rows_by_variant.items()
            },
        }
        for label in labels
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


def chance_note(chance: float) -> str:
    """How to read the rows below, given the size of chance."""
    return (
        "A Linear left in float adds no error, but every change redraws the rounding of all other "
        "Linears. A row above the first is therefore chance; here it is up to "
        f"{100 * chance:.0f} % above. A decrease of at most that size cannot be distinguished from "
        "chance.\n"
    )


def _short_label(label: str) -> str:
    return label.replace("model.layers.", "").replace("model.decoder.layers.", "")


def loss_carrier_sentences(results: Results, model: str) -> list[str]:
    """One sentence per variant: the kind of Linear that carries most of its loss."""
    sentences, chance_rise = [], largest_chance_rise(results) or 0.0
    for variant, rows in _rows_by_left_float(results, model).items():
        quantized_kl = rows[AS_QUANTIZED]["kl"]
        if quantized_kl is None:
            sentences.append(f"As quantized, `{variant}` gives non-finite probabilities.")
            continue
        finite = {
            label: row["kl"]
            for label, row in rows.items()
            if row["kl"] is not None and label not in ALONE
        }
        best = min(finite, key=finite.__getitem__)  # "nothing" where nothing is saved
        share = 100 * (1 - finite[best] / quantized_kl) if quantized_kl > 0 else 0.0
        if share <= 100 * chance_rise:
            sentences.append(
                f"No single kind of Linear carries the loss of `{variant}` beyond chance."
            )
            continue
        sentences.append(
            f"Leaving {_short_label(best)} in float would reduce the KL of `{variant}` "
            f"from {number(quantized_kl)} to {number(finite[best])} nats per token "
            f"(by {share:.0f} %)."
        )
    return sentences


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


def decomposition_text(model: str) -> str:
    """How to read the table of weights and activations alone."""
    return (
        f"#### Weights or activations of `{model}`?\n\n"
        "KL in nats per token on the same calibration items: as quantized, with the weights alone "
        "rounded (W8A16), and with the activations alone rounded (A8), both simulated. The "
        "remainder is not additive: errors of both that add up or cancel, and the chance of a draw "
        "of rounding."
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
    best = {v: min(curve, key=lambda row: row["kl"])["alpha"] for v, curve in curves.items()}
    return f"{model}: lowest KL at " + listed([f"α = {a:g} ({v})" for v, a in best.items()])
