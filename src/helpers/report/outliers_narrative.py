"""Why one activation scale per tensor fails where it does, told from calibration and SQNR."""

from helpers.report.markdown import count, listed, number, percent, two_decimals
from helpers.report.outliers import LinearInput, per_tensor, per_token, silent_tokens, sqnr, swamped
from helpers.report.results import Results
from helpers.report.results_data import Evaluated

COSTLY = 1.5  # perplexity this many times the baseline's is called a collapse

UNCHANGED_DB = 0.5  # an output SQNR that smoothing moves by less was not smoothed
NO_NORM = {
    "down_proj": "a `down_proj` reads the product inside the MLP",
    "o_proj": "an `o_proj` reads the attention's weighted values",
}


def collapsed(perplexity: float | None, baseline: float | None) -> bool:
    """Whether a variant lost the model; one without a finite perplexity did."""
    return baseline is not None and (perplexity is None or perplexity >= COSTLY * baseline)


def outlier_finding(results: Results, model: str) -> str:
    """Inputs one scale per tensor cannot hold, and what became of the variants that have one."""
    found = swamped(results.calibrations[model])
    total = len(results.calibrations[model].absmax)
    if not found:
        return (
            f"In `{model}`, none of {total} Linear inputs has outliers so large that one int8 "
            "scale for the tensor would round most of its channels to zero."
        )
    text = (
        f"In `{model}`, {len(found)} of {total} Linear inputs {'is' if len(found) == 1 else 'are'} "
        f"ruled by single channels: {listed([input_words(i) for i in found])}."
    )
    base = results.baseline_of(model).shared_text["perplexity"]
    for e in per_tensor(results, model):
        level = e.shared_text["perplexity"]
        fate = f"its perplexity is {two_decimals(level)} against {two_decimals(base)}"
        here = collapsed(level, base) and any(i.linear in sqnr(e) for i in found)
        text += f" `{e.variant}`, with one activation scale a tensor, "
        text += f"collapses there: {fate}." if here else f"does not collapse: {fate}."
    return text


def input_words(found: LinearInput) -> str:
    ratio = "and the median channel is 0"
    if found.ratio is not None:
        ratio = f"{number(found.ratio)} times the median channel"
    return f"`{found.name}` (channel {found.channel} reaches {number(found.largest)}, {ratio})"


def figure_claim(model: str, worst: LinearInput) -> str:
    """What the figure of a model's largest channels shows, as its title."""
    if worst.ratio is None:
        return f"{model}: the median channel of {worst.name} is 0"
    return f"{model}: {worst.name} reaches {number(worst.ratio)}× its median channel"


def outlier_story(results: Results, model: str) -> str:
    """Why per-tensor scales fail where they do, from the calibration and the SQNR records."""
    found = swamped(results.calibrations[model])
    if not found:
        return outlier_finding(results, model)
    calibrated = results.calibrations[model]
    parts = [outlier_finding(results, model)]
    parts.append(
        "A step of one int8 scale is the largest value / 127, and a channel that stays below "
        "half a step is rounded to zero: there "
        + listed([f"{percent(i.rounded_away)} of the channels of `{i.name}`" for i in found])
        + "."
    )
    if any(i.linear == calibrated.surface_of for i in found):
        silent, tokens = silent_tokens(calibrated)
        name = calibrated.surface_of.removeprefix("model.layers.")
        parts.append(
            f"In the item pictured below, one scale turns {silent} of {count(tokens, 'token')} at "
            f"`{name}` into zeros altogether."
        )
    parts += [_scheme_story(results, e, found) for e in per_tensor(results, model)]
    if spared := [e for e in per_token(results, model) if sqnr(e)]:
        parts.append(
            "With a scale for each token the damage stays within the few tokens that carry the "
            "outlier: " + listed(_under(spared, found)) + "."
        )
    return " ".join(filter(None, parts))


def _under(spared: list[Evaluated], found: list[LinearInput]) -> list[str]:
    """The inputs' output SQNR under each variant; variants that agree are named together."""
    by_levels: dict[str, list[str]] = {}
    for e in spared:
        by_levels.setdefault(_levels(e, found), []).append(f"`{e.variant}`")
    return [f"{levels} dB under {listed(names)}" for levels, names in by_levels.items()]


def _levels(e: Evaluated, found: list[LinearInput]) -> str:
    return listed([f"{sqnr(e)[i.linear]:.1f}" for i in found if i.linear in sqnr(e)])


def _scheme_story(results: Results, e: Evaluated, found: list[LinearInput]) -> str:
    """What one scale a tensor does in this variant, and whether its smoothing reaches there."""
    levels, recipe = sqnr(e), results.study.variants[e.variant]
    held = [i for i in found if i.linear in levels]
    if levels and not held:
        return f"`{e.variant}` keeps these Linears in float."
    text = ""
    curves = list(e.quantization["results"]["sqnr_db"].values())
    if recipe.smooth and len(curves) > 1:
        near = [i for i in held if abs(curves[0][i.linear] - curves[-1][i.linear]) < UNCHANGED_DB]
        text = f"The smoothing of `{e.variant}` "
        text += _missed(recipe.smooth.targets, near) if near else "reaches them."
    if held:
        text += (
            f" Their output SQNR under `{e.variant}` is {_levels(e, held)} dB; it weighs tokens by "
            "their power, nearly all of which is the outlier's own, and so does not show what "
            "the others lose."
        )
    return text.strip()


def _missed(targets, missed: list[LinearInput]) -> str:
    """That smoothing left these inputs as they were, and why, where the architecture says it."""
    places = listed([target.replace("_", " ") for target in targets])
    kinds = dict.fromkeys(i.linear.rpartition(".")[2] for i in missed)
    why = [NO_NORM[kind] for kind in kinds if kind in NO_NORM]
    text = f"does not reach {listed([f'`{i.name}`' for i in missed])}: it is folded in at {places}"
    return text + (f", and {listed(why)}, which follows no norm." if why else ".")
