"""The report's chapters: for every model and evaluation set, its text, tables and figures.

Each function returns what a cell of 04_analysis displays, in order, so that a study with
one model or five reads the same way. What stands in them is made elsewhere.
"""

from IPython.display import Markdown
from matplotlib.figure import Figure

from helpers.report import (
    appendix,
    executive,
    executive_controls,
    figures,
    figures_comparison,
    graded_chapter,
    narrative,
    narrative_findings,
    outliers,
    outliers_narrative,
    tables_datasets,
    tables_headline,
)
from helpers.report.items_page import PAGE
from helpers.report.markdown import count, dataset_name, escape, markdown_table, percent
from helpers.report.results import Results

Shown = list[Markdown | Figure]


def markdown_output(*paragraphs: str) -> Markdown:
    """Paragraphs and tables as one Markdown output; empty ones are left out."""
    return Markdown("\n\n".join(filter(None, paragraphs)) + "\n")


def notice(missing: tuple[str, ...]) -> Shown:
    """The first paragraph of a partial report: the runs that it lacks; empty for a complete one."""
    if not missing:
        return []
    lines = narrative.bullets([escape(name) for name in missing])
    warning = "**This report is partial.** It lacks the runs below, and no verdict rests on them. "
    warning += "Declared comparisons among them still count in Holm's family."
    return [markdown_output(warning, lines)]


def opening(results: Results) -> Shown:
    """The question, the answer, the headline table, the key findings and the controls."""
    verdicts, controls = executive.verdict_table(results), executive_controls.control_table(results)
    return [
        markdown_output(
            f"# {escape(results.study.title)}",
            narrative.question_sentence(results),
            "## Executive summary",
            executive.answer_sentences(results),
            markdown_table(verdicts) if verdicts else "",
            narrative.bullets(
                [*executive.verdict_bullets(results), *graded_chapter.summary_bullets(results)]
            ),
        ),
        markdown_output(
            "### Scores",
            markdown_table(tables_headline.headline_table(results)),
            narrative.headline_legend(results),
        ),
        markdown_output(
            "### Key findings", narrative.bullets(narrative_findings.key_findings(results))
        ),
        markdown_output(
            "### Controls", narrative.controls_sentence(results), markdown_table(controls)
        ),
    ]


def outlier_pictures(results: Results) -> Shown:
    """For every model: the outliers, the worst input as a surface, and SQNR by layer."""
    return [part for model in results.models for part in _outlier_section(results, model)]


def _outlier_section(results: Results, model: str) -> Shown:
    calibrated = results.calibrations[model]
    inputs = {i.linear: i for i in outliers.linear_inputs(calibrated)}
    in_order = [inputs[linear] for linear in calibrated.absmax]
    worst, pictured = next(iter(inputs.values())), inputs[calibrated.surface_of]
    maxima = figures.layer_maxima(
        [i.name for i in in_order],
        [i.largest for i in in_order],
        [i.median for i in in_order],
        title=outliers_narrative.outlier_figure_title(model, worst),
    )
    column = calibrated.surface[:, calibrated.surface.max(0).argmax()]  # (tokens,)
    outlier_tokens = int((column > column.max() / 2).sum())
    tokens = f"{count(outlier_tokens, 'token')} of {len(column)}"
    claim = f"{model}, {pictured.name}: one channel at {tokens} sets the scale"
    surface = figures.outlier_surface(calibrated.surface, title=claim)
    introduction = markdown_output(
        f"### Model `{model}`", outliers_narrative.outlier_paragraph(results, model)
    )
    tables = [markdown_table(appendix.outlier_table(results, model, rows=6))]
    if low := appendix.worst_sqnr_table(results, model, rows=6):
        tables.append(markdown_table(low))
    return [introduction, maxima, surface, *_sqnr_figure(results, model), markdown_output(*tables)]


def _sqnr_figure(results: Results, model: str) -> Shown:
    curves = {
        e.variant: e.quantization["results"]["sqnr_db"]
        for e in results.compared_variants_of(model)
        if results.study.variants[e.variant].quantized and outliers.output_sqnr(e)
    }
    if not curves:
        return []
    lows = {
        v: min(list(ways.values())[-1].items(), key=lambda x: x[1]) for v, ways in curves.items()
    }
    variant = min(lows, key=lambda v: lows[v][1])
    name, level = lows[variant]
    label = name.removeprefix("model.layers.")
    title = f"{model}: lowest SQNR {level:.1f} dB, at {label} under {variant}"
    return [figures_comparison.sqnr_by_variant(curves, variants=results.compared, title=title)]


def base_models(results: Results) -> Shown:
    """Comparisons of the models that the study did not fine-tune itself."""
    return _model_comparisons(results, [m for m in results.models if m not in results.training])


def trained_models(results: Results) -> Shown:
    """Comparisons of the models that the study fine-tuned, also with their start models."""
    comparisons = _model_comparisons(results, list(results.training))
    return [*comparisons, markdown_output(narrative.model_comparison_sentences(results))]


def _model_comparisons(results: Results, models: list[str]) -> Shown:
    return [part for model in models for part in model_comparison(results, model)]


def model_comparison(results: Results, model: str) -> Shown:
    """One model's comparisons by item and by token."""
    rows = tables_headline.comparison_table(results, model)
    table = markdown_table(rows) if rows else "This study has no variant besides the baseline."
    return [
        markdown_output(f"### Model `{model}`: items", table),
        *_forest_plot(results, model),
        markdown_output(
            f"### Model `{model}`: tokens",
            markdown_table(tables_headline.token_table(results, model)),
        ),
        *_token_figure(results, model),
    ]


def _forest_plot(results: Results, model: str) -> Shown:
    rows = [
        {
            "dataset": dataset_name(c.dataset),
            "variant": c.variant,
            "delta": v.paired.delta,
            "low": v.paired.interval.low,
            "high": v.paired.interval.high,
            "filled": v.primary,
            "kind": v.kind,
        }
        for c, v in tables_headline.ordered_comparisons(results, model)
        if c.baseline == results.study.baseline
        and c.variant in executive_controls.headline_variants(results)
    ]
    if not rows:
        return []
    title = narrative.forest_plot_title(results, model)
    margin = results.rules.margin
    return [
        figures_comparison.forest_plot(rows, variants=results.compared, margin=margin, title=title)
    ]


def _token_figure(results: Results, model: str) -> Shown:
    rows, floor = [], None
    for e in results.compared_variants_of(model):
        kl = results.token_estimates[e.key]["kl"]
        if e.variant == results.noise_floor:
            floor = kl.value
        elif kl.value and e.variant in executive_controls.headline_variants(results):
            low, high = (kl.interval.low, kl.interval.high) if kl.interval else (None, None)
            rows.append({"model": model, "variant": e.variant, "kl": kl.value})
            rows[-1] |= {"low": low, "high": high}
    if not rows:
        return []
    title = narrative.token_figure_title(results, model, [row["variant"] for row in rows])
    return [figures_comparison.kl_plot(rows, variants=results.compared, floor=floor, title=title)]


def dataset_chapters(results: Results) -> Shown:
    """Every evaluation set: scores, answer format, constant answers, sample items."""
    names = enumerate(results.study.evaluation.datasets, start=1)
    page = f"All items, with prompts and every answer, are in [{PAGE}]({PAGE})."
    return [
        markdown_output(page),
        *(dataset_chapter(results, name, place) for place, name in names),
    ]


def dataset_chapter(results: Results, dataset: str, place: int) -> Markdown:
    """One evaluation set, for all models and variants."""
    best = tables_headline.best_fixed_answers(results)[dataset]
    predictions = results.baseline_of(results.models[0]).predictions[dataset]
    passages = len({p["cluster"] or p["id"] for p in predictions})
    about = f"{count(len(predictions), 'item')}"
    if passages < len(predictions):
        about += f" on {count(passages, 'passage')}"
    parts = [
        f"### 5.{place} {dataset_name(dataset)}",
        f"{about}. The best constant answer, always {escape(best.answer)}, is right on "
        f"{percent(best.score)} of them.",
        markdown_table(tables_datasets.score_table(results, dataset)),
        "Format and length of the answers:",
        markdown_table(tables_datasets.behavior_table(results, dataset)),
    ]
    for model in results.models:
        differing = tables_datasets.count_differing_items(results, dataset, model)
        parts += [
            f"Items of `{model}`, differing answers first "
            f"({differing} of {len(predictions)} differ):",
            markdown_table(tables_datasets.sample_answer_table(results, dataset, model, rows=5)),
        ]
    return markdown_output(*parts)


def technical_details(results: Results) -> Markdown:
    """Method, recipes, calibration, protocols, layers and bytes, gates, jobs, packages."""
    r = results.runtime
    parts = ["**Comparisons.** " + narrative.method_paragraph(results)]
    parts += ["**Variants.**", markdown_table(appendix.recipe_table(results))]
    parts += ["**Calibration.**", markdown_table(appendix.calibration_table(results))]
    parts += ["**Evaluation.**", markdown_table(appendix.protocol_table(results))]
    if sizes := appendix.size_table(results):
        parts += ["**Layers and bytes**, float → variant.", markdown_table(sizes)]
    for model in results.models:
        if gates := appendix.checkpoint_gate_table(results, model):
            parts += [f"**Checks on the checkpoints of `{model}`.**", markdown_table(gates)]
        if gates := appendix.evaluation_gate_table(results, model):
            parts += [f"**Checks on the evaluations of `{model}`.**", markdown_table(gates)]
    where = f"{r.device}, {r.dtype}, {count(r.threads, 'thread')} per job, runtime {r.quantized}"
    parts += [
        f"**Jobs**, on {appendix.machine_kinds(results)} ({where}).",
        markdown_table(appendix.job_table(results)),
    ]
    if computed := appendix.operation_table(results):
        about = "**Operations** (TFLOP per stage): 10¹² multiplications and additions of matrix "
        about += "products, counted from items and weights with answers at their maximum length."
        parts += [about, markdown_table(computed)]
    parts += [
        "**Packages.**",
        markdown_table(appendix.package_table(results)),
    ]
    return markdown_output(*parts)


def conclusion(results: Results) -> Markdown:
    """The conclusions, and the command that reproduces the study."""
    command = f"To reproduce: `make study STUDY={results.name}`."
    files = "The numbers are in `summary.json` and `summary.csv`, every answer in `answers/`."
    return markdown_output(
        narrative.bullets(narrative.conclusion_sentences(results)), f"{command} {files}"
    )
