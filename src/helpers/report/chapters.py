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
    narrative,
    narrative_findings,
    outliers,
    outliers_narrative,
    tables_datasets,
    tables_headline,
)
from helpers.report.estimates import token_estimates
from helpers.report.items_page import PAGE
from helpers.report.markdown import count, dataset_name, escape, markdown_table, percent
from helpers.report.results import Results

Shown = list[Markdown | Figure]


def text(*paragraphs: str) -> Markdown:
    """Paragraphs and tables as one Markdown output; empty ones are left out."""
    return Markdown("\n\n".join(filter(None, paragraphs)) + "\n")


def notice(missing: tuple[str, ...]) -> Shown:
    """What a partial report lacks, before anything else; nothing for a whole one."""
    if not missing:
        return []
    lines = narrative.bullets([escape(name) for name in missing])
    about = "**This report is partial.** Nothing is said here about the runs it lacks, and no "
    about += "verdict rests on them; declared comparisons among them stay counted in Holm's family."
    return [text(about, lines)]


def opening(results: Results) -> Shown:
    """The question, the answer, the headline table, the key findings and the controls."""
    verdicts, duties = executive.verdict_table(results), executive_controls.duties(results)
    return [
        text(
            f"# {escape(results.study.title)}",
            narrative.question(results),
            "## Executive summary",
            executive.answer(results),
            markdown_table(verdicts) if verdicts else "",
            narrative.bullets(executive.meanings(results)),
        ),
        text(
            "### Scores",
            markdown_table(tables_headline.headline(results)),
            narrative.legend(results),
        ),
        text("### Key findings", narrative.bullets(narrative_findings.findings(results))),
        text("### Controls", narrative.controls_claim(results), markdown_table(duties)),
    ]


def outlier_pictures(results: Results) -> Shown:
    """For every model: the outliers, the worst input as a surface, and SQNR by layer."""
    return [part for model in results.models for part in _outliers_of(results, model)]


def _outliers_of(results: Results, model: str) -> Shown:
    calibrated = results.calibrations[model]
    inputs = {i.linear: i for i in outliers.linear_inputs(calibrated)}
    in_order = [inputs[linear] for linear in calibrated.absmax]
    worst, shown = next(iter(inputs.values())), inputs[calibrated.surface_of]
    maxima = figures.layer_maxima(
        [i.name for i in in_order],
        [i.largest for i in in_order],
        [i.median for i in in_order],
        title=outliers_narrative.figure_claim(model, worst),
    )
    column = calibrated.surface[:, calibrated.surface.max(0).argmax()]  # (tokens,)
    loud = int((column > column.max() / 2).sum())
    tokens = f"{count(loud, 'token')} of {len(column)}"
    claim = f"{model}, {shown.name}: one channel at {tokens} sets the scale"
    surface = figures.outlier_surface(calibrated.surface, title=claim, channels=96)
    told = text(f"### Model `{model}`", outliers_narrative.outlier_story(results, model))
    tables = [markdown_table(appendix.outlier_inputs(results, model, rows=6))]
    if low := appendix.worst_outputs(results, model, rows=6):
        tables.append(markdown_table(low))
    return [told, maxima, surface, *_sqnr_figure(results, model), text(*tables)]


def _sqnr_figure(results: Results, model: str) -> Shown:
    curves = {
        e.variant: e.quantization["results"]["sqnr_db"]
        for e in results.compared_in(model)
        if results.study.variants[e.variant].quantized and outliers.sqnr(e)
    }
    if not curves:
        return []
    lows = {
        v: min(list(ways.values())[-1].items(), key=lambda x: x[1]) for v, ways in curves.items()
    }
    variant = min(lows, key=lambda v: lows[v][1])
    name, level = lows[variant]
    title = (
        f"{model}: worst under {variant}, {name.removeprefix('model.layers.')} at {level:.1f} dB"
    )
    return [figures_comparison.sqnr_by_variant(curves, variants=results.compared, title=title)]


def base_models(results: Results) -> Shown:
    """Comparisons of the models the study did not train itself."""
    return _comparisons(results, [m for m in results.models if m not in results.training])


def trained_models(results: Results) -> Shown:
    """Comparisons of the models it fine-tuned, and how they differ from their start."""
    found = _comparisons(results, list(results.training))
    return [*found, text(narrative.models_compared(results))]


def _comparisons(results: Results, models: list[str]) -> Shown:
    return [part for model in models for part in comparison(results, model)]


def comparison(results: Results, model: str) -> Shown:
    """One model: what its items say, and what its tokens say."""
    rows = tables_headline.comparison(results, model)
    table = markdown_table(rows) if rows else "This study has nothing to compare the baseline with."
    return [
        text(f"### Model `{model}`: items", table),
        *_forest(results, model),
        text(
            f"### Model `{model}`: tokens",
            markdown_table(tables_headline.token_level(results, model)),
        ),
        *_token_figure(results, model),
    ]


def _forest(results: Results, model: str) -> Shown:
    found = [
        {
            "dataset": dataset_name(c.dataset),
            "variant": c.variant,
            "delta": v.paired.delta,
            "low": v.paired.interval.low,
            "high": v.paired.interval.high,
            "filled": v.primary,
            "kind": v.kind,
        }
        for c, v in tables_headline.ordered(results, model)
        if c.baseline == results.study.baseline
        and c.variant in executive_controls.shown_beside(results)
    ]
    if not found:
        return []
    title = narrative.forest_claim(results, model)
    margin = results.rules.margin
    return [figures_comparison.forest(found, variants=results.compared, margin=margin, title=title)]


def _token_figure(results: Results, model: str) -> Shown:
    rows, floor = [], None
    for e in results.compared_in(model):
        kl = token_estimates(e, results.rules)["kl"]
        if e.variant == results.noise_floor:
            floor = kl.value
        elif kl.value and e.variant in executive_controls.shown_beside(results):
            low, high = (kl.interval.low, kl.interval.high) if kl.interval else (None, None)
            rows.append({"model": model, "variant": e.variant, "kl": kl.value})
            rows[-1] |= {"low": low, "high": high}
    if not rows:
        return []
    title = narrative.token_claim(results, model, [row["variant"] for row in rows])
    return [
        figures_comparison.token_costs(rows, variants=results.compared, floor=floor, title=title)
    ]


def dataset_chapters(results: Results) -> Shown:
    """Every evaluation set: scores, conduct, fixed answers, sample items."""
    names = enumerate(results.study.evaluation.datasets, start=1)
    page = f"All items, with prompts and every answer, are in [{PAGE}]({PAGE})."
    return [text(page), *(dataset_chapter(results, name, place) for place, name in names)]


def dataset_chapter(results: Results, dataset: str, place: int) -> Markdown:
    """One evaluation set, for all models and variants."""
    best = tables_headline.best_fixed(results)[dataset]
    asked = results.baseline_of(results.models[0]).predictions[dataset]
    passages = len({p["cluster"] or p["id"] for p in asked})
    about = f"{count(len(asked), 'item')}"
    if passages < len(asked):
        about += f" on {count(passages, 'passage')}"
    parts = [
        f"### 5.{place} {dataset_name(dataset)}",
        f"{about}. The best fixed answer, always {escape(best.answer)}, is right on "
        f"{percent(best.score)} of them.",
        markdown_table(tables_datasets.scores(results, dataset)),
        "How the answers came about:",
        markdown_table(tables_datasets.conduct(results, dataset)),
    ]
    for model in results.models:
        differing = tables_datasets.differing(results, dataset, model)
        parts += [
            f"Items of `{model}`, those answered differently first "
            f"({differing} of {len(asked)} are):",
            markdown_table(tables_datasets.samples(results, dataset, model, rows=5)),
        ]
    return text(*parts)


def technical_details(results: Results) -> Markdown:
    """Method, recipes, calibration, protocols, layers and bytes, gates, jobs, packages."""
    r = results.runtime
    parts = ["**Comparisons.** " + narrative.method(results)]
    parts += ["**Variants.**", markdown_table(appendix.recipes(results))]
    parts += ["**Calibration.**", markdown_table(appendix.calibrations(results))]
    parts += ["**Evaluation.**", markdown_table(appendix.protocols(results))]
    if sizes := appendix.sizes(results):
        parts += ["**Layers and bytes**, float → variant.", markdown_table(sizes)]
    for model in results.models:
        if gates := appendix.gates(results, model):
            parts += [f"**Checks on the checkpoints of `{model}`.**", markdown_table(gates)]
        if gates := appendix.evaluation_gates(results, model):
            parts += [f"**Checks on the evaluations of `{model}`.**", markdown_table(gates)]
    where = f"{r.device}, {r.dtype}, {count(r.threads, 'thread')} a job, runtime {r.quantized}"
    parts += [
        f"**Jobs**, on {appendix.machines(results)} ({where}).",
        markdown_table(appendix.jobs(results)),
    ]
    if computed := appendix.operations(results):
        about = (
            "**What the study computes** (TFLOP a stage): 10¹² multiplications and additions of "
        )
        about += "products of matrices, counted from items and weights, answers at their longest."
        parts += [about, markdown_table(computed)]
    parts += [
        "**Packages.**",
        markdown_table(appendix.packages(results)),
    ]
    return text(*parts)


def conclusion(results: Results) -> Markdown:
    """What can be said, what cannot, and how to do it again."""
    again = f"To do it again: `make study STUDY={results.name}`."
    files = "The numbers are in `summary.json` and `summary.csv`, every answer in `predictions/`."
    return text(narrative.bullets(narrative.conclusions(results)), f"{again} {files}")
