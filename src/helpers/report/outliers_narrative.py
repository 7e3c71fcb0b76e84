"""Why one activation scale per tensor fails where it does, told from calibration and SQNR."""

from helpers.report.markdown import count, listed, number, percent, two_decimals
from helpers.report.outliers import (
    LinearInput,
    outlier_dominated_inputs,
    output_sqnr,
    per_tensor_variants,
    per_token_variants,
    zeroed_tokens,
)
from helpers.report.results import Results
from helpers.report.results_data import VariantResults

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
