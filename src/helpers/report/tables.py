"""Tables of the report and of the notebooks.

Of the report: the headline, one model's comparisons, its token-level cost, and of each evaluation
set the scores, how answers came about, and answers side by side.

Of the notebooks, as pandas frames made from plain numbers; all answers of a study are one frame,
to be sliced. What a model wrote is shown as written: pandas escapes HTML, and here characters that
act on a terminal are replaced and formulas are left unrendered.
"""

from collections.abc import Iterator

import pandas as pd

from helpers.core.errors import one_line
from helpers.evaluation.scoring import FixedAnswer, best_fixed_answer
from helpers.report.estimates import Estimate, VariantResults, main_metric, token_difference
from helpers.report.markdown import (
    MISSING,
    Markup,
    Rows,
    code,
    dataset_name,
    escape,
    number,
    p_value,
    percent,
    percent_span,
    points,
    quoted,
    signed4,
    two_decimals,
    with_span,
)
from helpers.report.narrative import (
    EQUALITY_ROLES,
    headline_variants,
    kl_over_noise_floor,
    variant_label,
)
from helpers.report.results import Results
from helpers.statistics.verdicts import VariantPredictions, Verdict, uninformative_reason
from helpers.study.schema import Comparison

ROLES = {role: "control: expected to equal the baseline" for role in EQUALITY_ROLES}
ROLES |= {"noise floor": "noise floor: flips by rounding alone"}


def headline_table(results: Results) -> Rows:
    """Every variant of every model: checks, token-level cost, and each evaluation set.

    Controls that must equal the baseline have their own table. The last row gives the score of
    the best constant answer on the same items.
    """
    rows, variants_shown = [], headline_variants(results)
    for model in results.models:
        shown = [e for e in results.variants_of(model) if e.variant in variants_shown]
        rows += [_headline_row(results, e) for e in shown]
    fixed = {"model": "any", "variant": "best constant answer"}
    fixed |= dict.fromkeys(("checks", "perplexity", "KL [nats]", "top-1"), MISSING)
    for name, best in best_fixed_answers(results).items():
        fixed[dataset_name(name)] = Markup(f"{percent(best.score)} ({escape(best.answer)})")
    return [*rows, fixed]


def _headline_row(results: Results, variant: VariantResults) -> dict:
    tokens = results.token_estimates[variant.key]
    row = {"model": code(variant.model), "variant": variant_label(results, variant.variant)}
    row["checks"] = checks_cell(variant)
    row |= {
        "perplexity": two_decimals(tokens["perplexity"].value),
        "KL [nats]": number(tokens["kl"].value),
        "top-1": percent(tokens["top1_agreement"].value),
    }
    for name, evaluation_set in results.study.evaluation.datasets.items():
        main = main_estimate(results, variant, name)
        mark = "" if variant.failed_check_on(name) is None else "\u00a0✗"
        if (verdict := verdict_on(results, variant, name)) is not None:
            mark = {"invalid": "\u00a0✗", "uninformative": "\u00a0○"}.get(verdict.kind, mark)
        elif uninformative_reason(
            evaluation_set.adapter, predictions_of(variant, name), results.rules
        ):
            mark = "\u00a0○"
        row[dataset_name(name)] = Markup(percent_span(main.value, main.interval) + mark)
    return row


def predictions_of(variant: VariantResults, dataset: str) -> VariantPredictions:
    """The variant's predictions of one evaluation set, in the type that verdicts take."""
    return VariantPredictions(
        variant.variant, variant.predictions[dataset], variant.failed_check_on(dataset)
    )


def verdict_on(results: Results, variant: VariantResults, dataset: str) -> Verdict | None:
    """The verdict against the study's baseline; None for the baseline itself."""
    for comparison, verdict in results.verdicts.items():
        at = (comparison.model, comparison.dataset, comparison.variant)
        if at == (variant.model, dataset, variant.variant) and (
            comparison.baseline == results.study.baseline
        ):
            return verdict
    return None


def main_estimate(results: Results, variant: VariantResults, dataset: str) -> Estimate:
    """Accuracy or exact match of one variant on one evaluation set."""
    adapter = results.study.evaluation.datasets[dataset].adapter
    return results.dataset_estimates[*variant.key, dataset][main_metric(adapter)]


def best_fixed_answers(results: Results) -> dict[str, FixedAnswer]:
    """The best constant answer of every evaluation set; all models have the same items."""
    first = results.baseline_of(results.models[0])
    datasets = results.study.evaluation.datasets
    return {
        name: best_fixed_answer(evaluation_set.adapter, first.predictions[name])
        for name, evaluation_set in datasets.items()
    }


def checks_cell(variant: VariantResults) -> str:
    """`70 of 70`: the number of passed checks on the checkpoint and on the evaluation."""
    total = len(variant.gates)
    return f"{total - len(variant.failed_gates)} of {total}" + ("" if variant.passed else " ✗")


def comparison_table(results: Results, *, declared: bool) -> Rows:
    """Comparisons of right and wrong, the models in neighbouring rows.

    Args:
        declared: the declared comparisons, or all others.
    """
    rows, reasons_shown = [], set()
    for c, verdict in ordered_comparisons(results):
        if verdict.primary != declared:
            continue
        row = _comparison_row(results, c, verdict)
        if verdict.kind == "exploratory" and (role := results.role(c.variant)):
            row["verdict"] = Markup(ROLES.get(role, "exploratory"))
        if verdict.kind == "uninformative" and (c.dataset, verdict.reason) in reasons_shown:
            row["verdict"] = Markup("uninformative, as above")
        if verdict.kind == "invalid" and verdict.reason in {reason for _, reason in reasons_shown}:
            row["verdict"] = Markup("**invalid**, as above")
        reasons_shown.add((c.dataset, verdict.reason))
        rows.append(row)
    return rows


def ordered_comparisons(results: Results) -> list[tuple[Comparison, Verdict]]:
    """All comparisons, by evaluation set, variant, baseline and model."""
    datasets, variants = list(results.study.evaluation.datasets), results.variants

    def place(judged: tuple[Comparison, Verdict]) -> tuple[int, ...]:
        c, _ = judged
        order = datasets.index(c.dataset), variants.index(c.variant), variants.index(c.baseline)
        return (*order, results.models.index(c.model))

    return sorted(results.verdicts.items(), key=place)


def _comparison_row(results: Results, c: Comparison, verdict: Verdict) -> dict:
    paired = verdict.paired
    tested = verdict.kind != "invalid"
    against = "" if c.baseline == results.study.baseline else f" vs `{c.baseline}`"
    units = f" ({paired.clusters} passages)" if paired.clusters < paired.n else ""
    return {
        "dataset": dataset_name(c.dataset),
        "variant": Markup(f"{variant_label(results, c.variant)}{against}"),
        "model": code(c.model),
        "verdict": Markup(verdict_text(verdict, results.rules.margin)),
        "items": f"{paired.n}{units}",
        "lost": str(paired.losses),
        "gained": str(paired.gains),
        "Δ [points]": with_span(paired.delta, paired.interval, points),
        "p": p_value(paired.p if tested else None),
        "Holm p": p_value(verdict.holm_p),
        "detectable loss": _loss_cell(paired.detectable),
    }


def _loss_cell(fraction: float | None) -> str:
    return "none" if fraction is None else f"{100 * fraction:.1f}"


def verdict_text(verdict: Verdict, margin: float) -> str:
    """The verdict in words, with its reason; safe as Markdown."""
    word = {
        "worse": "**worse**",
        "better": "**better**",
        "equivalent": f"**equivalent within ±{100 * margin:.1f} points**",
        "inconclusive": "**inconclusive** (no difference detected)",
        "uninformative": "**uninformative**" if verdict.primary else "uninformative",
        "invalid": "**invalid**",
        "exploratory": "exploratory",
    }[verdict.kind]
    return f"{word}: {escape(verdict.reason)}" if verdict.reason else word


def token_table(results: Results) -> Rows:
    """Perplexity, its change, KL and top-1 agreement, with intervals by passage."""
    return [
        _token_row(results, results.evaluations[model, variant])
        for variant in results.variants
        for model in results.models
    ]


def _token_row(results: Results, variant: VariantResults) -> dict:
    tokens, baseline = results.token_estimates[variant.key], results.baseline_of(variant.model)
    row = {"variant": variant_label(results, variant.variant), "model": code(variant.model)}
    row["perplexity"] = two_decimals(tokens["perplexity"].value)
    if variant is baseline:
        row |= {"Δ loss [nats/token]": MISSING, "KL [nats/token]": "0"}
        if results.noise_floor:
            row["KL / noise floor"] = "0"
        return row | {"top-1 agreement": "100.0 %"}
    loss = token_difference(baseline, variant, "nll", results.rules)
    row["Δ loss [nats/token]"] = with_span(loss.value, loss.interval, signed4)
    kl = tokens["kl"]
    row["KL [nats/token]"] = with_span(kl.value, kl.interval, number)
    if results.noise_floor:
        row["KL / noise floor"] = number(kl_over_noise_floor(results, variant), 2)
    top = tokens["top1_agreement"]
    return row | {"top-1 agreement": percent_span(top.value, top.interval)}


QUANTILE_COLUMNS = {
    "mean KL [nats]": "kl",
    "median": "kl_median",
    "99th percentile": "kl_percentile_99",
    "99.9th percentile": "kl_percentile_99_9",
    "largest": "kl_largest",
}
TEXT_BEFORE, TEXT_AFTER = 60, 20  # characters around a token of the tail


def kl_quantile_table(results: Results, model: str) -> Rows:
    """Mean, quantiles and largest KL of a token; no row without the KL of each token."""
    rows = []
    for variant in results.compared_variants_of(model):
        if variant.kl_by_token is None:
            continue
        tokens = results.token_estimates[variant.key]
        row = {"variant": variant_label(results, variant.variant)}
        row |= {column: number(tokens[key].value) for column, key in QUANTILE_COLUMNS.items()}
        row["in the largest 1 %"] = percent(tokens["kl_tail_share"].value)
        rows.append(row)
    return rows


def kl_tail_table(results: Results, model: str) -> Rows:
    """The tokens with the largest KL under each variant, or without a finite one, in their text."""
    rows = []
    for variant in results.compared_variants_of(model):
        texts = {row["id"]: row.get("token_texts", []) for row in variant.passages}
        for at in variant.kl_by_token.tail if variant.kl_by_token else ():
            passage, end = texts[at.passage], at.token + 1
            before, token, after = (
                "".join(part)
                for part in (passage[: at.token], passage[at.token : end], passage[end:])
            )
            if not token.strip():
                token = token.replace(" ", "␣").replace("\n", "⏎")
            row = {"variant": variant_label(results, variant.variant)}
            row["KL [nats]"] = "not finite" if at.kl is None else number(at.kl)
            row |= {"passage": code(at.passage), "token": str(at.token)}
            row["text before"] = quoted(_last_part(before, TEXT_BEFORE), limit=TEXT_BEFORE)
            row["its text"] = quoted(token, limit=TEXT_AFTER)
            row["text after"] = quoted(after, limit=TEXT_AFTER)
            rows.append(row)
    return rows


def _last_part(text: str, limit: int) -> str:
    plain = one_line(text)
    return plain if len(plain) <= limit else f"…{plain[1 - limit :].lstrip()}"


LONGEST_TEXT = 110  # characters of a question or an answer
METRIC_NAMES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "exact_match": "exact match",
    "f1": "F1",
    "has_answer_exact_match": "HasAns EM",
    "has_answer_f1": "HasAns F1",
    "no_answer_exact_match": "NoAns EM",
    "no_answer_f1": "NoAns F1",
    "median_absolute_difference": "median absolute difference",
    "median_absolute_difference_coverage": "items with a number",
    "format_success": "readable",
}
NOT_FRACTIONS = {"median_absolute_difference"}
NOT_IN_TABLE = {"no_answer_f1"}  # equals the exact match by definition


def score_table(results: Results, dataset: str) -> Rows:
    """The metrics of every variant of every model."""
    rows = []
    for variant in _all_variants(results):
        row = {"model": code(variant.model), "variant": code(variant.variant)}
        for name, estimate in results.dataset_estimates[*variant.key, dataset].items():
            if name not in NOT_IN_TABLE and name != "format_success":
                row[METRIC_NAMES[name]] = _metric_cell(name, estimate)
        rows.append(row)
    return rows


def _metric_cell(name: str, estimate: Estimate) -> str:
    if name in NOT_FRACTIONS:
        return number(estimate.value)
    return percent_span(estimate.value, estimate.interval)


def behavior_table(results: Results, dataset: str) -> Rows:
    """Counts of answered, abstained and unparsed, finish reasons, and output tokens."""
    rows = []
    for variant in _all_variants(results):
        m = variant.metrics[dataset]
        row = {"model": code(variant.model), "variant": code(variant.variant)}
        row |= {status: str(m[status]) for status in ("answered", "abstained", "unparsed")}
        row["readable"] = percent(m["format_success"])
        ends = ", ".join(f"{reason} {n}" for reason, n in m["finish_reasons"].items())
        row["finish reasons"] = ends
        row["output tokens"] = f"{m['output_tokens']:,}"
        rows.append(row)
    return rows


def sample_answer_table(results: Results, dataset: str, model: str, *, rows: int) -> Rows:
    """Answers of the variants to the same items, differing answers first."""
    by_variant = {e.variant: _by_id(e, dataset) for e in _side_by_side(results, model)}
    item_ids = [p["id"] for p in results.baseline_of(model).predictions[dataset]]
    order = sorted(item_ids, key=lambda key: _agreement([p[key] for p in by_variant.values()]))
    table = []
    for key in order[:rows]:
        golds = by_variant[results.study.baseline][key]["golds"]
        question = results.questions[dataset].get(key)
        row = {"item": quoted(question, limit=LONGEST_TEXT) if question else code(key)}
        row["gold answer"] = quoted("; ".join(golds), limit=60) if golds else "(none)"
        row |= {
            code(name): answer_cell(predictions[key]) for name, predictions in by_variant.items()
        }
        table.append(row)
    return table


def _by_id(variant: VariantResults, dataset: str) -> dict[str, dict]:
    return {p["id"]: p for p in variant.predictions[dataset]}


def _side_by_side(results: Results, model: str) -> list[VariantResults]:
    """The variants whose answers the table shows: all but those that only measure rounding."""
    skipped = (*EQUALITY_ROLES, "noise floor")
    return [e for e in results.variants_of(model) if results.role(e.variant) not in skipped]


def _agreement(predictions: list[dict]) -> int:
    """0 if scores differ, 1 if only answers differ, 2 if all are the same."""
    if len({p["score"] for p in predictions}) > 1:
        return 0
    return 1 if len({(p["status"], p["parsed"]) for p in predictions}) > 1 else 2


def answer_cell(prediction: dict) -> Markup:
    """The parsed answer with its mark; the raw text if it could not be parsed."""
    mark = "✓" if prediction["score"] else "✗"
    match prediction["status"]:
        case "abstained":
            return Markup(f"{mark} abstained")
        case "unparsed":
            return Markup(f"{mark} unparsed: {quoted(prediction['output'], limit=LONGEST_TEXT)}")
    return Markup(f"{mark} {quoted(prediction['parsed'], limit=LONGEST_TEXT)}")


def count_differing_items(results: Results, dataset: str, model: str) -> int:
    """The number of items with differing answers among these variants."""
    by_variant = [_by_id(e, dataset) for e in _side_by_side(results, model)]
    return sum(_agreement([p[key] for p in by_variant]) < 2 for key in by_variant[0])


def _all_variants(results: Results) -> list[VariantResults]:
    return [variant for model in results.models for variant in results.variants_of(model)]


# Looked up whenever a frame is shown: "$5 and $6" in an answer is no formula.
pd.set_option("display.html.use_mathjax", False)

METRICS = ("items", "accuracy", "macro_f1", "exact_match", "f1", "format_success")
METRICS += ("gold_nats_per_token", "foil_nats_per_token", "gold_above_foil")
SAMPLES = 2  # answers shown of each evaluation set: a look at their form, no evidence


def layer_maxima_table(rows: list[dict]) -> pd.DataFrame:
    """One row per Linear: largest channel, median channel, and their ratio."""
    frame = pd.DataFrame(rows).astype({"ratio": float})
    return frame.set_index("name").rename_axis(None).round(1)


def largest_channel_title(row: dict) -> str:
    """Title of the figure of channel maxima: the Linear with the largest ratio."""
    claim = f"{row['layer']}: channel {row['channel']} reaches {row['largest']:.0f}, "
    if row["ratio"] is None:
        return claim + "the median channel is 0"
    return claim + f"{row['ratio']:.0f}× the median channel"


def short_layer(name: str) -> str:
    """`model.layers.11.mlp.down_proj` as `11.mlp.down_proj`."""
    return name.removeprefix("model.layers.")


def checkpoint_bytes_table(before: dict[str, int], after: dict[str, int]) -> pd.DataFrame:
    """Bytes of each part of a model before and after, in MB, with the ratio."""
    frame = pd.DataFrame({"float [MB]": before, "variant [MB]": after}) / 1e6
    frame.loc["total"] = frame.sum()
    frame["ratio"] = frame["variant [MB]"] / frame["float [MB]"]
    return frame.round(3)


def before_and_after_table(values: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """One row per quantity: before, after, change."""
    frame = pd.DataFrame.from_dict(values, orient="index", columns=["before", "after"])
    frame["change"] = frame["after"] - frame["before"]
    return frame.round(4)


def function_table(divergence: dict[str, float | None]) -> pd.DataFrame:
    """KL from another model in nats per token, and top-1 agreement, as numbers to read."""
    frame = pd.DataFrame({key: [value] for key, value in divergence.items()}, index=["rotated"])
    return frame.rename(columns={"kl": "KL", "top1_agreement": "top-1 agreement"})


def sqnr_summary_table(curves: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Lowest, median and highest SQNR in dB over the Linears, and the name of the lowest."""
    rows = {}
    for name, values in curves.items():
        series = pd.Series(values)
        rows[name] = {
            "lowest [dB]": series.min(),
            "median [dB]": series.median(),
            "highest [dB]": series.max(),
            "lowest at": short_layer(series.idxmin()),
        }
    return pd.DataFrame.from_dict(rows, orient="index").round(1)


def worst_layer_title(curves: dict[str, dict[str, float]]) -> str:
    """Title of the SQNR figure: the Linear with the lowest SQNR."""
    name, values = list(curves.items())[-1]
    worst = min(values, key=values.get)
    return f"{name.capitalize()}, {short_layer(worst)} is the worst: {values[worst]:.1f} dB"


def alpha_table(choice) -> pd.DataFrame:
    """KL at every α of the grid, by whether optional targets are in; or groups by α."""
    if choice.curve:
        keys = [key for key in ("optional", "alpha") if key in choice.curve[0]]
        return pd.DataFrame(choice.curve).set_index(keys)
    counts = pd.Series(choice.alphas, dtype=float).value_counts().sort_index()
    return counts.rename("groups").rename_axis("alpha").to_frame()


def protected_table(record: dict) -> pd.DataFrame:
    """The Linears that `protect` leaves float: their KL alone in int8, and the bytes they take."""
    linears = record.get("linears", {})
    rows = [
        {"Linear": short_layer(name), "KL alone in int8": linears[name]["kl"]}
        | {"bytes more": linears[name]["bytes"]}
        for name in record.get("chosen", ())
    ]
    return pd.DataFrame(rows, columns=["Linear", "KL alone in int8", "bytes more"])


def left_float_table(losses: list[dict]) -> pd.DataFrame:
    """KL as quantized, and with some Linears left in float."""
    return pd.DataFrame(losses, columns=["float", "linears", "kl", "top1_agreement"])


def gate_table(verified: dict) -> pd.DataFrame:
    """Each gate with its measured value and its limit."""
    frame = pd.DataFrame(verified["gates"])
    frame["passed"] = frame["passed"].map({True: "passes", False: "FAILS"})
    frame["measured"] = frame["measured"].map(one_line)  # it may quote an item's id
    return frame.rename(columns={"name": "gate", "passed": "result"}).set_index("gate")


def sample_answers_table(
    predictions: dict[str, list[dict]], *, each: int = SAMPLES
) -> pd.DataFrame:
    """The first answers of every evaluation set, as they were given."""
    columns = ["dataset", "golds", "output", "parsed", "status", "score"]
    rows = [
        {"dataset": name} | p
        for name, dataset_predictions in predictions.items()
        for p in dataset_predictions[:each]
    ]
    for row in rows:
        row["golds"] = one_line("; ".join(row["golds"]))
        row |= {key: one_line(row[key]) for key in ("output", "parsed") if row[key] is not None}
    return pd.DataFrame(rows, columns=columns)  # of no sets, a table without rows


def as_column(values: dict[str, float]) -> pd.DataFrame:
    """A mapping as a one-column table."""
    return pd.DataFrame.from_dict(values, orient="index", columns=["value"]).round(4)


def metric_table(metrics: dict[str, dict]) -> pd.DataFrame:
    """The main metrics, one row per evaluation set; empty if a set lacks one."""
    rows = {
        dataset: {name: values.get(name) for name in METRICS} for dataset, values in metrics.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").round(3)


# "$5 and $6" in an answer is no formula.
pd.set_option("display.html.use_mathjax", False)

COLUMNS = (
    "model",
    "variant",
    "dataset",
    "id",
    "cluster",
    "question",
    "golds",
    "output",
    "parsed",
    "status",
    "finish_reason",
    "score",
    "f1",
    "prompt_tokens",
    "output_tokens",
    "valid",
)
# Texts stay Python's, so that None is None and any text of a model or a data set fits.
NUMBERS = {"score": float, "f1": float, "prompt_tokens": int, "output_tokens": int, "valid": bool}


def answers_frame(results: "Results") -> pd.DataFrame:
    """One row an answer; see `Results.frame`."""
    rows = (row for evaluated in results.evaluations.values() for row in _rows(results, evaluated))
    return pd.DataFrame(rows, columns=COLUMNS, dtype=object).astype(NUMBERS)


def _rows(results: "Results", evaluated) -> Iterator[dict]:
    owner = {"model": evaluated.model, "variant": evaluated.variant}
    for dataset, predictions in evaluated.predictions.items():
        valid = evaluated.failed_check_on(dataset) is None
        questions = results.questions.get(dataset, {})
        for row in predictions:
            question = questions.get(row["id"])
            yield row | owner | {"dataset": dataset, "question": question, "valid": valid}


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with texts of models and data sets in one line each, safe to be shown."""
    return frame.map(lambda value: one_line(value) if isinstance(value, str | list) else value)
