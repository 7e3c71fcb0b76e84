"""The report's chapters: for every model and evaluation set, its text, tables and figures.

Each function returns what a cell of 04_analysis displays, in order, so that a study with one model
or five reads the same way. What stands in them is made elsewhere, but for the appendix: how it was
done, as tables of recipes, gates, sizes, calibration, protocols, jobs and packages.
"""

from IPython.display import Markdown

from helpers.core.records import WHOLE_VARIANT
from helpers.evaluation.checks.item_gates import unchecked_note
from helpers.report import figures, glance, graded_chapter, narrative, sensitivity, tables
from helpers.report.estimates import VariantResults
from helpers.report.figures import Picture
from helpers.report.markdown import (
    MISSING,
    Markup,
    Rows,
    code,
    count,
    dataset_name,
    escape,
    folded,
    listed,
    markdown_table,
    megabytes,
    number,
    percent,
)
from helpers.report.narrative import ROLE_PURPOSES
from helpers.report.pages import PAGE
from helpers.report.results import Results
from helpers.report.sensitivity import output_sqnr
from helpers.study.schema import AnySet, TaskSet


def recipe_table(results: Results) -> Rows:
    """Each variant's recipe in words, from the records of its models."""
    rows = []
    for name in results.variants:
        records = [results.evaluations[model, name].quantization for model in results.models]
        schemes = {record["results"]["scheme"] for record in records if record}
        dtype = results.study.variants[name].dtype or results.runtime.dtype
        as_loaded, role = f"the model as loaded, in {dtype}", results.role(name)
        role = f"{role}: {ROLE_PURPOSES[role]}" if role else ""
        if control := results.unsmoothed_twin(name):
            role = f"control without smoothing: {control}"
        recipe = "; ".join(sorted(schemes)) or as_loaded
        if kv := results.study.variants[name].kv:
            recipe += f"; KV cache in {kv}, one scale for a token and head (simulated)"
        recipe += f" ({role})" if role else ""
        rows.append({"variant": code(name), "recipe": recipe})
    return rows


def outlier_table(results: Results, *, rows: int) -> Rows:
    """The Linear inputs with the largest ratio of largest to median channel, all models.

    The last columns are the output SQNR under the quantized variants.
    """
    inputs = {m: sensitivity.linear_inputs(results.calibrations[m]) for m in results.models}
    names = dict.fromkeys(
        i.name for place in range(rows) for m in inputs for i in inputs[m][place : place + 1]
    )
    table = []
    for name in list(names)[:rows]:
        for model in results.models:
            for i in (i for i in inputs[model] if i.name == name):
                table.append(_outlier_row(model, i) | _sqnr_cells(results, model, i.linear))
    return table


def _outlier_row(model: str, i: sensitivity.LinearInput) -> dict[str, str]:
    return {
        "Linear": code(i.name),
        "model": code(model),
        "channel": str(i.channel),
        "largest": number(i.largest),
        "median channel": number(i.median),
        "ratio": MISSING if i.ratio is None else f"{number(i.ratio)}×",
        "channels rounded to zero by one scale": percent(i.rounded_away),
    }


def _quantized_variants(results: Results) -> list[str]:
    return [v for v in results.compared if results.study.variants[v].quantized]


def _sqnr_cells(results: Results, model: str, linear: str) -> dict[str, str]:
    """Output SQNR of one Linear by variant."""
    cells = {}
    for variant in _quantized_variants(results):
        levels = output_sqnr(results.evaluations[model, variant])
        column = Markup(f"{code(variant)} [dB]")
        cells[column] = f"{levels[linear]:.1f}" if linear in levels else MISSING
    return cells


def worst_sqnr_table(results: Results, *, rows: int) -> Rows:
    """The Linears with the worst output SQNR in any quantized variant, all models."""
    lowest: dict[str, float] = {}
    for model in results.models:
        for variant in _quantized_variants(results):
            for name, level in output_sqnr(results.evaluations[model, variant]).items():
                lowest[name] = min(level, lowest.get(name, level))
    order = sorted(lowest, key=lambda name: (lowest[name], name))[:rows]
    return [
        {"lowest output SQNR": code(name.removeprefix("model.layers.")), "model": code(model)}
        | _sqnr_cells(results, model, name)
        for name in order
        for model in results.models
    ]


def checkpoint_gate_table(results: Results, model: str) -> Rows | None:
    """The gates on the checkpoints: measured value, pass or fail."""
    checked = [e for e in results.compared_variants_of(model) if e.verification]
    return _gate_rows([(e, e.verification["gates"]) for e in checked])


def evaluation_gate_table(results: Results, model: str) -> Rows | None:
    """The gates on the evaluations: each failure with its measured value, passes as a count."""
    return _gate_rows([(e, e.evaluation_gates["gates"]) for e in results.variants_of(model)])


def _gate_rows(gates_by_variant: list[tuple[VariantResults, list[dict]]]) -> Rows | None:
    """A row for each gate and each result it has; variants with the same one share a row."""
    rows = []
    for name in dict.fromkeys(g["name"] for _, gates in gates_by_variant for g in gates):
        by_result: dict[str, list[str]] = {}
        for e, gates in gates_by_variant:
            same_gate = [g for g in gates if g["name"] == name]
            if same_gate:
                by_result.setdefault(_gate_cell(same_gate), []).append(code(e.variant))
        for result, variants in by_result.items():
            variant_names = (
                "all" if len(variants) == len(gates_by_variant) > 1 else ", ".join(variants)
            )
            rows.append({"gate": name, "variants": Markup(variant_names), "result": Markup(result)})
    return rows or None


def _gate_cell(same_gate: list[dict]) -> str:
    failed = [g for g in same_gate if not g["passed"]]
    if failed or len(same_gate) < 2:
        return " ".join(map(_gate_text, failed or same_gate))
    return f"passes on {len(same_gate)} evaluation sets"


def _gate_text(gate: dict) -> str:
    guarded = gate.get("invalidates", WHOLE_VARIANT)
    where = "" if guarded == WHOLE_VARIANT else f" on {escape(dataset_name(guarded))}"
    if gate["passed"]:
        return f"passes{where}: {escape(gate['measured'])}"
    return f"**FAILS**{where}: {escape(gate['measured'])}; limit: {escape(gate['limit'])}"


def size_table(results: Results) -> Rows | None:
    """Bytes of the checkpoint by part, its int8 Linears, and the ratio to the float model."""
    quantized = [
        e for m in results.models for e in results.compared_variants_of(m) if e.quantization
    ]
    rows = [_size_row(e, quantized=results.study.variants[e.variant].quantized) for e in quantized]
    return rows or None


def _size_row(e: VariantResults, *, quantized: bool) -> dict:
    sizes = e.quantization["results"]
    before, after = sizes["bytes_before"], sizes["bytes_after"]
    row = {"model": code(e.model), "variant": code(e.variant)}
    row["int8 Linears"] = str(sizes["quantized_linears"] if quantized else 0)
    row["smoothed groups"] = str(sizes["smoothed_groups"])
    row |= {part: f"{megabytes(before[part])} → {megabytes(after[part])}" for part in before}
    total = sum(after.values()) / sum(before.values())
    return row | {
        "all": megabytes(sum(after.values())),
        "relative to the float model": percent(total),
    }


def calibration_table(results: Results) -> Rows:
    """Items and tokens of each model's calibration."""
    rows = []
    for model, calibration in results.calibrations.items():
        record = calibration.record["results"]
        row = {
            "model": code(model),
            "items": str(len(record["items"])),
            "tokens": f"{record['tokens']:,}",
        }
        row["Linear inputs"] = str(record["linears"])
        rows.append(
            row | {"model files": Markup(f"`{calibration.record['inputs']['model'][:12]}`")}
        )
    return rows


def protocol_table(results: Results) -> Rows:
    """Protocol and scoring of each evaluation set, with the hash of its first prompt."""
    rows, plain_models = [], _models_without_template(results)
    for name, evaluation_set in results.study.evaluation.datasets.items():
        predictions = results.baseline_of(results.models[0]).predictions[name]
        source = next(iter(evaluation_set.source.model_dump().values()))
        rows.append(
            {
                "dataset": dataset_name(name),
                "items": str(len(predictions)),
                "source": code(source),
                "protocol": _protocol_cell(evaluation_set, plain_models),
                "prompt tokens": f"{sum(p['prompt_tokens'] for p in predictions):,}",
                "first prompt": Markup(
                    f"{code(predictions[0]['id'])}: `{predictions[0]['prompt_hash']}`"
                ),
            }
        )
    return rows


def _models_without_template(results: Results) -> str:
    """The models that answer plain text, if not all answer chats; "all" if none does."""
    plain = [
        model
        for model, calibration in results.calibrations.items()
        if calibration.record["results"].get("chat_template", {"sha256": ""})["sha256"] is None
    ]
    return "all" if len(plain) == len(results.calibrations) else ", ".join(map(code, plain))


def _protocol_cell(evaluation_set: AnySet, plain_models: str) -> str:
    if isinstance(evaluation_set, TaskSet):
        return _task_cell(evaluation_set)
    ask = evaluation_set.ask
    if ask.protocol == "loglikelihood":
        normalization = "per byte" if ask.normalize == "bytes" else "not normalized"
        shown = f", after {count(ask.shots, 'worked example')}" if ask.shots else ""
        return f"the option text with the largest log-likelihood, {normalization}{shown}"
    shots = count(ask.shots, "worked example")
    form = "greedy answer to plain text" if plain_models == "all" else "greedy chat answer"
    form += f" (plain text for {plain_models})" if plain_models not in ("", "all") else ""
    return f"{form}, {shots}, at most {ask.max_new_tokens} tokens, read from the " + (
        "last box" if ask.answer == "boxed" else "whole text"
    )


def _task_cell(task_set: TaskSet) -> str:
    """How a task's requests are answered, and what no check can derive without the harness."""
    definition = task_set.read
    description = {
        "multiple_choice": "the option with the largest log-likelihood",
        "loglikelihood": "whether its target is what the model would write",
        "loglikelihood_rolling": "the log-likelihood of whole texts, beside their words reversed",
        "generate_until": f"a greedy answer of at most {definition.max_new_tokens} tokens",
    }[definition.output_type]
    name = task_set.task.rpartition("/")[2]
    cell = f"task {name} of lm-evaluation-harness {definition.harness}: {description}, "
    cell += count(task_set.shots, "worked example")
    cell += f"; right or wrong by {definition.metric}" if definition.metric else ""
    note = unchecked_note(task_set)
    return f"{cell}; {note}" if note else cell


def job_table(results: Results) -> Rows:
    """Duration of every stage and the peak memory of its largest job."""
    stages: dict[str, list[dict]] = {}
    for record in all_records(results):
        stages.setdefault(record["stage"], []).append(record)
    rows = [
        {
            "stage": stage,
            "jobs": str(len(records)),
            "total time": f"{sum(r['duration_s'] for r in records):,.0f} s",
            "longest job": f"{max(r['duration_s'] for r in records):,.0f} s",
            "peak memory": f"{max(r['peak_memory_bytes'] for r in records) / 1e9:.2f} GB",
        }
        for stage, records in stages.items()
    ]
    return rows


def operation_table(results: Results) -> Rows | None:
    """Operations of every stage, in total and by arithmetic; None if no record has them."""
    stages: dict[str, list[dict]] = {}
    for record in all_records(results):
        stages.setdefault(record["stage"], []).append(record.get("operations"))
    stages = {stage: counts for stage, counts in stages.items() if all(counts)}
    kinds = sorted({kind for counts in stages.values() for c in counts for kind in c})
    rows = []
    for stage, counts in stages.items():
        sums = [sum(c.get(kind, 0) for c in counts) for kind in kinds]
        row = {"stage": stage, "jobs": str(len(counts)), "TFLOP": number(sum(sums) / 1e12)}
        rows.append(row | {k: number(n / 1e12) for k, n in zip(kinds, sums, strict=True)})
    return rows or None


def all_records(results: Results) -> list[dict]:
    """Every record of the study, stage by stage."""
    variants = list(results.evaluations.values())
    records = [*results.training.values(), *results.rotations.values()]
    records += [c.record for c in results.calibrations.values()]
    records += [e.quantization for e in variants if e.quantization]
    records += [cost.record for cost in results.costs.values() if cost]
    return records + [e.record for e in variants]


def package_table(results: Results) -> Rows:
    """Package versions of all jobs; several if jobs ran with different ones."""
    versions_by_package: dict[str, set[str]] = {}
    for record in all_records(results):
        for name, version in record["packages"].items():
            versions_by_package.setdefault(name, set()).add(version)
    versions = [" and ".join(sorted(v)) for v in versions_by_package.values()]
    pairs = zip(versions_by_package, versions, strict=True)
    return [{"package": code(name), "version": version} for name, version in pairs]


def machine_kinds(results: Results) -> str:
    """Architecture and core count of the machines that ran the jobs; no host names."""
    kinds = {
        (r["machine"]["architecture"], r["machine"]["cpu_count"]) for r in all_records(results)
    }
    return " and ".join(f"{arch} with {cpus} CPUs" for arch, cpus in sorted(kinds))


Shown = list[Markdown | Picture]


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
    """The question, the report at a glance, the key findings, and folded scores and controls."""
    first, *pictures = glance.sections(results)
    verdicts, controls = narrative.verdict_table(results), narrative.control_table(results)
    recipes = graded_chapter.recipe_bullets(results)
    findings = [*narrative.verdict_bullets(results), *recipes, *narrative.key_findings(results)]
    return [
        markdown_output(
            f"# {escape(results.study.title)}",
            narrative.question_sentence(results),
            "## Executive summary",
            first,
        ),
        *pictures,
        markdown_output(
            "### Key findings",
            narrative.bullets(findings),
            folded(
                "Declared verdicts by right or wrong", markdown_table(verdicts) if verdicts else ""
            ),
            folded(
                "Scores of every variant",
                markdown_table(tables.headline_table(results)),
                narrative.headline_legend(results),
            ),
            folded("Controls", narrative.controls_sentence(results), markdown_table(controls)),
        ),
    ]


def outlier_pictures(results: Results) -> Shown:
    """The outliers of all models in words, tables and figures, kind by kind."""
    lasting = (
        "SQNR weights tokens by their power, and the tokens with the outlier hold nearly all of "
        "it: it does not show the loss of the other tokens. With one scale per token, only the few "
        "tokens that carry the outlier lose precision."
    )
    return [
        markdown_output(
            " ".join(sensitivity.outlier_sentences(results)),
            markdown_table(outlier_table(results, rows=OUTLIER_ROWS)),
            lasting if any(sensitivity.has_outliers(results, m) for m in results.models) else "",
        ),
        *(_maxima_picture(results, model) for model in results.models),
        *(_surface_picture(results, model) for model in results.models),
        *(picture for model in results.models for picture in _sqnr_pictures(results, model)),
        *_worst_sqnr(results),
    ]


OUTLIER_ROWS = 6


def _worst_sqnr(results: Results) -> Shown:
    rows = worst_sqnr_table(results, rows=OUTLIER_ROWS)
    title = "The Linears with the lowest output SQNR"
    return [markdown_output(folded(title, markdown_table(rows)))] if rows else []


def _maxima_picture(results: Results, model: str) -> Picture:
    calibrated = results.calibrations[model]
    inputs = {i.linear: i for i in sensitivity.linear_inputs(calibrated)}
    in_order = [inputs[linear] for linear in calibrated.absmax]
    title = sensitivity.outlier_figure_title(model, next(iter(inputs.values())))
    maxima = figures.layer_maxima(
        [i.name for i in in_order],
        [i.largest for i in in_order],
        [i.median for i in in_order],
        title=title,
    )
    highest = sorted(in_order, key=lambda i: -i.largest)[:2]
    peaks = listed([f"{i.name} {number(i.largest)}" for i in highest])
    alt = f"Largest and median channel of every Linear input of {model}, log scale. "
    return Picture(maxima, f"{alt}{title}. The highest peaks: {peaks}.")


def _surface_picture(results: Results, model: str) -> Picture:
    calibrated = results.calibrations[model]
    name = calibrated.surface_of.removeprefix("model.layers.")
    column = calibrated.surface[:, calibrated.surface.max(0).argmax()]  # (tokens,)
    outlier_tokens = int((column > column.max() / 2).sum())
    tokens = f"{count(outlier_tokens, 'token')} of {len(column)}"
    claim = f"{model}, {name}: one channel at {tokens} sets the scale"
    surface = figures.outlier_surface(calibrated.surface, title=claim)
    peak = number(float(column.max()))
    alt = f"Magnitudes over tokens and channels as a surface. {claim}; its peak is {peak}."
    return Picture(surface, alt)


def _sqnr_pictures(results: Results, model: str) -> list[Picture]:
    curves = {
        e.variant: e.quantization["results"]["sqnr_db"]
        for e in results.compared_variants_of(model)
        if results.study.variants[e.variant].quantized and sensitivity.output_sqnr(e)
    }
    if not curves:
        return []
    lows = {
        v: min(list(ways.values())[-1].items(), key=lambda x: x[1]) for v, ways in curves.items()
    }
    variant = min(lows, key=lambda v: lows[v][1])
    name, level = lows[variant]
    title = f"{model}: lowest SQNR {level:.1f} dB, at {_short(name)} under {variant}"
    figure = figures.sqnr_by_variant(curves, variants=results.compared, title=title)
    each = [f"{v} {low:.1f} dB at {_short(linear)}" for v, (linear, low) in lows.items()]
    return [Picture(figure, f"Output SQNR of every Linear. {title}. Lowest: {listed(each)}.")]


def _short(linear: str) -> str:
    return linear.removeprefix("model.layers.")


def model_comparisons(results: Results) -> Shown:
    """Right and wrong, and the tokens: every variant against the baseline, models side by side."""
    training = [narrative.training_summary(results, model) for model in results.training]
    declared = tables.comparison_table(results, declared=True)
    others = tables.comparison_table(results, declared=False)
    none = "This study has no variant besides the baseline."
    return [
        markdown_output(
            " ".join(training),
            " ".join(narrative.rotation_summary(results, model) for model in results.rotations),
            "### Items",
            markdown_table(declared) if declared else none if not others else "",
            folded("Comparisons that nobody declared", markdown_table(others) if others else ""),
        ),
        *_right_or_wrong_picture(results),
        markdown_output(
            "### Tokens",
            markdown_table(tables.token_table(results)),
            *_kl_by_token(results),
        ),
    ]


def _kl_by_token(results: Results) -> list[str]:
    """Quantiles of the KL, and folded the tokens where it is largest; empty if none was kept."""
    parts = [part for model in results.models for part in _kl_of_model(results, model)]
    reading = (
        "KL of each token of the shared text, in nats. Quantiles interpolate linearly between the "
        "sorted values (numpy's default)."
    )
    return [reading, *parts] if parts else []


def _kl_of_model(results: Results, model: str) -> list[str]:
    if not (quantiles := tables.kl_quantile_table(results, model)):
        return []
    variants = [e for e in results.compared_variants_of(model) if e.kl_by_token]
    nonfinite = [
        f"**The KL of {e.kl_by_token.nonfinite:,} of these tokens is not finite** under "
        f"{code(e.variant)}, which has no mean and no quantile."
        for e in variants
        if e.kl_by_token.nonfinite
    ]
    title = "Tokens with the largest KL under each variant (places in a passage count from 0)"
    return [
        f"#### KL by token, model {code(model)}",
        " ".join(nonfinite),
        markdown_table(quantiles),
        folded(title, markdown_table(tables.kl_tail_table(results, model))),
    ]


def _right_or_wrong_picture(results: Results) -> list[Picture]:
    """Differences of right and wrong, where the figure at a glance shows graded scores."""
    return glance.right_or_wrong_picture(results) if results.graded.comparisons else []


def dataset_chapters(results: Results, *, page: str) -> Shown:
    """Every evaluation set: scores, answer format, constant answers, sample items.

    Args:
        page: where items.html lies as seen from the executed notebook.
    """
    names = enumerate(results.study.evaluation.datasets, start=1)
    return [
        markdown_output(f"All items, with prompts and every answer, are in [{PAGE}]({page})."),
        *(dataset_chapter(results, name, place) for place, name in names),
    ]


def dataset_chapter(results: Results, dataset: str, place: int) -> Markdown:
    """One evaluation set, for all models and variants."""
    best = tables.best_fixed_answers(results)[dataset]
    predictions = results.baseline_of(results.models[0]).predictions[dataset]
    passages = len({p["cluster"] or p["id"] for p in predictions})
    about = f"{count(len(predictions), 'item')}"
    if passages < len(predictions):
        about += f" on {count(passages, 'passage')}"
    parts = [
        f"### 5.{place} {dataset_name(dataset)}",
        f"{about}. The best constant answer, always {escape(best.answer)}, is right on "
        f"{percent(best.score)} of them.",
        markdown_table(tables.score_table(results, dataset)),
        folded(
            "Format and length of the answers",
            markdown_table(tables.behavior_table(results, dataset)),
        ),
    ]
    for model in results.models:
        differing = tables.count_differing_items(results, dataset, model)
        parts.append(
            folded(
                f"Items of `{model}`, differing answers first "
                f"({differing} of {len(predictions)} differ)",
                markdown_table(tables.sample_answer_table(results, dataset, model, rows=5)),
            )
        )
    return markdown_output(*parts)


def technical_details(results: Results) -> Markdown:
    """Method, recipes, calibration, protocols, layers and bytes, gates, jobs, packages."""
    r = results.runtime
    parts = ["**Comparisons.** " + narrative.method_paragraph(results)]
    parts += [folded("Variants", markdown_table(recipe_table(results)))]
    parts += [folded("Calibration", markdown_table(calibration_table(results)))]
    parts += [folded("Evaluation", markdown_table(protocol_table(results)))]
    if sizes := size_table(results):
        parts += [folded("Layers and bytes, float → variant", markdown_table(sizes))]
    for model in results.models:
        if gates := checkpoint_gate_table(results, model):
            parts += [folded(f"Checks on the checkpoints of `{model}`", markdown_table(gates))]
        if gates := evaluation_gate_table(results, model):
            parts += [folded(f"Checks on the evaluations of `{model}`", markdown_table(gates))]
    where = f"{r.device}, {r.dtype}, {count(r.threads, 'thread')} per job, runtime {r.quantized}"
    parts += [
        folded(
            f"Jobs, on {machine_kinds(results)} ({where})",
            markdown_table(job_table(results)),
        )
    ]
    if computed := operation_table(results):
        about = "10¹² multiplications and additions of matrix products, counted from items and "
        about += "weights with answers at their maximum length."
        parts += [folded("Operations (TFLOP per stage)", about, markdown_table(computed))]
    parts += [folded("Packages", markdown_table(package_table(results)))]
    return markdown_output(*parts)


def conclusion(results: Results) -> Markdown:
    """The conclusions, and the command that reproduces the study."""
    command = f"To reproduce: `make study STUDY={results.name}`."
    files = "The numbers are in `summary.json` and `summary.csv`, every answer in `answers/`."
    return markdown_output(
        narrative.bullets(narrative.conclusion_sentences(results)), f"{command} {files}"
    )
