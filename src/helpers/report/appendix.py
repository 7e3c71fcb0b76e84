"""How it was done, as tables: recipes, gates, sizes, calibration, protocols, jobs, packages."""

from helpers.core.gates import WHOLE_VARIANT
from helpers.report.executive_controls import SHOWS
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
from helpers.report.outliers import linear_inputs, sqnr
from helpers.report.results import Results
from helpers.report.results_data import Evaluated


def recipes(results: Results) -> Rows:
    """Each variant in words, read from the records of the models it was made for."""
    rows = []
    for name in results.variants:
        made = [results.evaluations[model, name].quantization for model in results.models]
        words = {record["results"]["scheme"] for record in made if record}
        dtype = results.study.variants[name].dtype or results.runtime.dtype
        where, role = f"the model as loaded, in {dtype}", results.role(name)
        role = f"{role}: shows {SHOWS[role]}" if role else ""
        if control := results.unsmoothed(name):
            role = f"its control without smoothing is {control}"
        told = f"{'; '.join(sorted(words)) or where}{f' ({role})' if role else ''}"
        rows.append({"variant": code(name), "recipe": told})
    return rows


def outlier_inputs(results: Results, model: str, *, rows: int) -> Rows:
    """The inputs whose largest channel stands furthest above the median one."""
    found = linear_inputs(results.calibrations[model])[:rows]
    return [
        {
            "Linear": code(i.name),
            "channel": str(i.channel),
            "largest": number(i.largest),
            "median channel": number(i.median),
            "ratio": MISSING if i.ratio is None else f"{number(i.ratio)}×",
            "channels one scale rounds to zero": percent(i.rounded_away),
        }
        for i in found
    ]


def worst_outputs(results: Results, model: str, *, rows: int) -> Rows | None:
    """Output SQNR of the worst Linears in every quantized variant; None without any."""
    quantized = [v for v in results.compared if results.study.variants[v].quantized]
    curves = {v: sqnr(results.evaluations[model, v]) for v in quantized}
    curves = {name: values for name, values in curves.items() if values}
    if not curves:
        return None
    lowest = {n: min(v.get(n, 1e9) for v in curves.values()) for v in curves.values() for n in v}
    order = sorted(lowest, key=lambda n: (lowest[n], n))[:rows]
    found = []
    for name in order:
        row = {"output SQNR [dB]": code(name.removeprefix("model.layers."))}
        for variant, values in curves.items():
            row[code(variant)] = f"{values[name]:.1f}" if name in values else MISSING
        found.append(row)
    return found


def gates(results: Results, model: str) -> Rows | None:
    """What each gate on the checkpoints measured, and whether it holds."""
    checked = [e for e in results.compared_in(model) if e.verification]
    return _gate_rows([(e, e.verification["gates"]) for e in checked])


def evaluation_gates(results: Results, model: str) -> Rows | None:
    """Each gate on the evaluations: where it fails, with what it measured, else how often held."""
    return _gate_rows([(e, e.checked["gates"]) for e in results.of_model(model)])


def _gate_rows(checked: list[tuple[Evaluated, list[dict]]]) -> Rows | None:
    """A row for each gate and each result it has; variants with the same one share a row."""
    rows = []
    for name in dict.fromkeys(g["name"] for _, gates in checked for g in gates):
        by_result: dict[str, list[str]] = {}
        for e, gates in checked:
            found = [g for g in gates if g["name"] == name]
            if found:
                by_result.setdefault(_gate_cell(found), []).append(code(e.variant))
        for result, variants in by_result.items():
            who = "all" if len(variants) == len(checked) > 1 else ", ".join(variants)
            rows.append({"gate": name, "variants": Markup(who), "result": Markup(result)})
    return rows or None


def _gate_cell(found: list[dict]) -> str:
    failed = [g for g in found if not g["passed"]]
    if failed or len(found) < 2:
        return " ".join(map(_gate, failed or found))
    return f"holds on {len(found)} evaluation sets"


def _gate(gate: dict) -> str:
    guarded = gate.get("invalidates", WHOLE_VARIANT)
    where = "" if guarded == WHOLE_VARIANT else f" on {escape(dataset_name(guarded))}"
    if gate["passed"]:
        return f"holds{where}: {escape(gate['measured'])}"
    return f"**FAILS**{where}: {escape(gate['measured'])}; limit: {escape(gate['limit'])}"


def sizes(results: Results) -> Rows | None:
    """Bytes of the checkpoint by part, what became int8, and the ratio to the float model."""
    made = [e for m in results.models for e in results.compared_in(m) if e.quantization]
    rows = [_size(e, quantized=results.study.variants[e.variant].quantized) for e in made]
    return rows or None


def _size(e: Evaluated, *, quantized: bool) -> dict:
    made = e.quantization["results"]
    before, after = made["bytes_before"], made["bytes_after"]
    row = {"model": code(e.model), "variant": code(e.variant)}
    row["int8 Linears"] = str(made["quantized_linears"] if quantized else 0)
    row["smoothed groups"] = str(made["smoothed_groups"])
    row |= {part: f"{megabytes(before[part])} → {megabytes(after[part])}" for part in before}
    total = sum(after.values()) / sum(before.values())
    return row | {"all": megabytes(sum(after.values())), "of the float model": percent(total)}


def calibrations(results: Results) -> Rows:
    """Items and tokens each model was calibrated on."""
    rows = []
    for model, found in results.calibrations.items():
        r = found.record["results"]
        row = {"model": code(model), "items": str(len(r["items"])), "tokens": f"{r['tokens']:,}"}
        row["Linear inputs"] = str(r["linears"])
        rows.append(row | {"model files": Markup(f"`{found.record['inputs']['model'][:12]}`")})
    return rows


def protocols(results: Results) -> Rows:
    """How each evaluation set is asked and scored, with its first prompt's hash."""
    rows = []
    for name, wanted in results.study.evaluation.datasets.items():
        asked = results.baseline_of(results.models[0]).predictions[name]
        source = next(iter(wanted.source.model_dump().values()))
        rows.append(
            {
                "dataset": dataset_name(name),
                "items": str(len(asked)),
                "source": code(source),
                "protocol": _protocol(wanted.ask),
                "prompt tokens": f"{sum(p['prompt_tokens'] for p in asked):,}",
                "first prompt": Markup(f"{code(asked[0]['id'])}: `{asked[0]['prompt_hash']}`"),
            }
        )
    return rows


def _protocol(ask) -> str:
    if ask.protocol == "loglikelihood":
        how = "per byte" if ask.normalize == "bytes" else "not normalized"
        return f"the option text with the largest log-likelihood, {how}"
    shots = count(ask.shots, "worked example")
    return f"greedy chat answer, {shots}, at most {ask.max_new_tokens} tokens, read from the " + (
        "last box" if ask.answer == "boxed" else "whole text"
    )


def jobs(results: Results) -> Rows:
    """How long every stage took and the most memory one of its jobs held."""
    stages: dict[str, list[dict]] = {}
    for record in records(results):
        stages.setdefault(record["stage"], []).append(record)
    rows = [
        {
            "stage": stage,
            "jobs": str(len(found)),
            "time of all": f"{sum(r['duration_s'] for r in found):,.0f} s",
            "longest job": f"{max(r['duration_s'] for r in found):,.0f} s",
            "peak memory": f"{max(r['peak_memory_bytes'] for r in found) / 1e9:.2f} GB",
        }
        for stage, found in stages.items()
    ]
    return rows


def operations(results: Results) -> Rows | None:
    """What every stage computes, in all and by arithmetic; None where no record says it."""
    stages: dict[str, list[dict]] = {}
    for record in records(results):
        stages.setdefault(record["stage"], []).append(record.get("operations"))
    stages = {stage: counts for stage, counts in stages.items() if all(counts)}
    kinds = sorted({kind for counts in stages.values() for c in counts for kind in c})
    rows = []
    for stage, counts in stages.items():
        sums = [sum(c.get(kind, 0) for c in counts) for kind in kinds]
        row = {"stage": stage, "jobs": str(len(counts)), "TFLOP": number(sum(sums) / 1e12)}
        rows.append(row | {k: number(n / 1e12) for k, n in zip(kinds, sums, strict=True)})
    return rows or None


def records(results: Results) -> list[dict]:
    """Every record of the study, stage by stage."""
    evaluated = list(results.evaluations.values())
    found = [*results.training.values(), *(c.record for c in results.calibrations.values())]
    found += [e.quantization for e in evaluated if e.quantization]
    found += [cost.record for cost in results.costs.values() if cost]
    return found + [e.record for e in evaluated]


def packages(results: Results) -> Rows:
    """Package versions of all jobs; more than one where jobs ran on different ones."""
    found: dict[str, set[str]] = {}
    for record in records(results):
        for name, version in record["packages"].items():
            found.setdefault(name, set()).add(version)
    versions = [" and ".join(sorted(v)) for v in found.values()]
    pairs = zip(found, versions, strict=True)
    return [{"package": code(name), "version": version} for name, version in pairs]


def machines(results: Results) -> str:
    """The kinds of machine the jobs ran on; no names."""
    kinds = {(r["machine"]["architecture"], r["machine"]["cpu_count"]) for r in records(results)}
    return " and ".join(f"{arch} with {cpus} CPUs" for arch, cpus in sorted(kinds))
