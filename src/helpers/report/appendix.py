"""How it was done, as tables: recipes, gates, sizes, calibration, protocols, jobs, packages."""

from helpers.core.gates import WHOLE_VARIANT
from helpers.report.executive_controls import ROLE_PURPOSES
from helpers.report.markdown import (
    MISSING,
    Markup,
    Rows,
    code,
    count,
    dataset_name,
    escape,
    megabytes,
    number,
    percent,
)
from helpers.report.outliers import linear_inputs, output_sqnr
from helpers.report.results import Results
from helpers.report.results_data import VariantResults


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
        recipe = f"{'; '.join(sorted(schemes)) or as_loaded}{f' ({role})' if role else ''}"
        rows.append({"variant": code(name), "recipe": recipe})
    return rows


def outlier_table(results: Results, model: str, *, rows: int) -> Rows:
    """The Linear inputs with the largest ratio of largest to median channel."""
    inputs = linear_inputs(results.calibrations[model])[:rows]
    return [
        {
            "Linear": code(i.name),
            "channel": str(i.channel),
            "largest": number(i.largest),
            "median channel": number(i.median),
            "ratio": MISSING if i.ratio is None else f"{number(i.ratio)}×",
            "channels rounded to zero by one scale": percent(i.rounded_away),
        }
        for i in inputs
    ]


def worst_sqnr_table(results: Results, model: str, *, rows: int) -> Rows | None:
    """Output SQNR of the worst Linears in every quantized variant; None without any."""
    quantized = [v for v in results.compared if results.study.variants[v].quantized]
    curves = {v: output_sqnr(results.evaluations[model, v]) for v in quantized}
    curves = {name: values for name, values in curves.items() if values}
    if not curves:
        return None
    lowest = {n: min(v.get(n, 1e9) for v in curves.values()) for v in curves.values() for n in v}
    order = sorted(lowest, key=lambda n: (lowest[n], n))[:rows]
    table = []
    for name in order:
        row = {"output SQNR [dB]": code(name.removeprefix("model.layers."))}
        for variant, values in curves.items():
            row[code(variant)] = f"{values[name]:.1f}" if name in values else MISSING
        table.append(row)
    return table


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
    rows = []
    for name, evaluation_set in results.study.evaluation.datasets.items():
        predictions = results.baseline_of(results.models[0]).predictions[name]
        source = next(iter(evaluation_set.source.model_dump().values()))
        rows.append(
            {
                "dataset": dataset_name(name),
                "items": str(len(predictions)),
                "source": code(source),
                "protocol": _protocol_cell(evaluation_set.ask),
                "prompt tokens": f"{sum(p['prompt_tokens'] for p in predictions):,}",
                "first prompt": Markup(
                    f"{code(predictions[0]['id'])}: `{predictions[0]['prompt_hash']}`"
                ),
            }
        )
    return rows


def _protocol_cell(ask) -> str:
    if ask.protocol == "loglikelihood":
        normalization = "per byte" if ask.normalize == "bytes" else "not normalized"
        return f"the option text with the largest log-likelihood, {normalization}"
    shots = count(ask.shots, "worked example")
    return f"greedy chat answer, {shots}, at most {ask.max_new_tokens} tokens, read from the " + (
        "last box" if ask.answer == "boxed" else "whole text"
    )


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
    records = [*results.training.values(), *(c.record for c in results.calibrations.values())]
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
