"""The report's numbers for programs: summary.json and summary.csv, and every answer.

Fractions are 0–1. No times and no durations: the same records make the same bytes. The
answers lie beside them, named by their content hashes, so that
`helpers.report.checks.recomputation` can make every verdict again.
"""

import csv
import io
from pathlib import Path

from helpers.core.file_writing import write_atomically
from helpers.core.gates import WHOLE_VARIANT
from helpers.core.records import write_json
from helpers.report import outliers, tables_headline
from helpers.report.estimates import Estimate, main_metric
from helpers.report.graded_summary import graded_blocks
from helpers.report.results import Results
from helpers.report.results_data import VariantResults
from helpers.statistics.controls import ControlOutcome
from helpers.statistics.published_answers import write_answers
from helpers.statistics.verdicts import Verdict
from helpers.study.schema import Comparison, Study

COLUMNS = ("model", "variant", "dataset", "metric", "value", "low", "high", "n")
SHARED = "shared_text"
CLUSTERS = "items on one passage, and near-duplicates"
ANSWERS = "answers"


def write_summary(results: Results, folder: Path, *, missing: tuple[str, ...] = ()) -> None:
    """Write the answers and summary.csv, then summary.json, whose presence marks completion.

    Args:
        missing: the runs that a partial report lacks; summary.json names them.
    """
    hashes = write_answers(folder / ANSWERS, results.study, results.published.variants)
    table = csv_text(results)
    write_atomically(folder / "summary.csv", lambda p: p.write_text(table, encoding="utf-8"))
    partial = {"missing": list(missing)} if missing else {}
    write_json(folder / "summary.json", partial | summary(results) | {ANSWERS: hashes})


def summary(results: Results) -> dict:
    """All headline numbers, and every verdict with its inputs."""
    study, s = results.study, results.study.statistics
    return {
        "study": results.name,
        "title": study.title,
        "seed": study.seed,
        "baseline": study.baseline,
        "statistics": {
            "confidence": s.confidence,
            "power": s.power,
            "margin": s.margin,
            "resamples": s.resamples,
            "primary_comparisons": len(s.primary),
        },
        "clusters": CLUSTERS,
        "best_fixed_answers": {
            name: {"answer": best.answer, "score": best.score}
            for name, best in tables_headline.best_fixed_answers(results).items()
        },
        "controls": [control_row(at, outcome) for at, outcome in results.control_outcomes.items()],
        "models": {model: _model_summary(results, model) for model in results.models},
        "comparisons": [comparison_row(study, c, v) for c, v in results.verdicts.items()],
        **graded_blocks(results.graded),
    }


def _model_summary(results: Results, model: str) -> dict:
    fields = {}
    if model in results.training:
        training = results.training[model]["results"]
        keys = ("training_items", "heldout_loss_before", "heldout_loss_after")
        fields["finetuning"] = {key: training[key] for key in keys}
    worst = outliers.linear_inputs(results.calibrations[model])[:8]
    fields["largest_outliers"] = [vars(i) for i in worst]
    fields["variants"] = {
        e.variant: _variant_summary(results, e) for e in results.variants_of(model)
    }
    return fields


def _variant_summary(results: Results, e: VariantResults) -> dict:
    fields = {"passed": e.passed, "failed_gates": [_gate_label(gate) for gate in e.failed_gates]}
    if e.quantization:
        quantization = e.quantization["results"]
        keys = ("scheme", "quantized_linears", "smoothed_groups", "bytes_before", "bytes_after")
        fields |= {key: quantization[key] for key in keys}
    tokens = results.token_estimates[e.key]
    fields[SHARED] = {name: _estimate_fields(estimate) for name, estimate in tokens.items()}
    fields["datasets"] = {
        dataset: {
            n: _estimate_fields(x) for n, x in results.dataset_estimates[*e.key, dataset].items()
        }
        for dataset in results.study.evaluation.datasets
    }
    return fields


def _gate_label(gate: dict) -> str:
    """The gate's name, with the evaluation set that it guards, if it guards only one."""
    guarded = gate.get("invalidates", WHOLE_VARIANT)
    return gate["name"] if guarded == WHOLE_VARIANT else f"{gate['name']} ({guarded})"


def _estimate_fields(estimate: Estimate) -> dict:
    low, high = _interval_limits(estimate)
    return {"value": estimate.value, "low": low, "high": high, "n": estimate.n}


def _interval_limits(estimate: Estimate) -> tuple[float | None, float | None]:
    interval = estimate.interval
    return (interval.low, interval.high) if interval else (None, None)


def control_row(at: tuple[str, str], outcome: ControlOutcome) -> dict:
    """One control's outcome as plain data."""
    row = {"model": at[0], "variant": at[1], "role": outcome.role}
    return row | {"must": outcome.expected, "found": outcome.observed, "done": outcome.ok}


def comparison_row(study: Study, c: Comparison, verdict: Verdict) -> dict:
    """One verdict and its inputs as plain data."""
    paired, invalid = verdict.paired, verdict.kind == "invalid"
    adapter = study.evaluation.datasets[c.dataset].adapter
    return {
        **c.model_dump(),
        "metric": main_metric(adapter),
        "primary": verdict.primary,
        "verdict": verdict.kind,
        "reason": verdict.reason,
        "n": paired.n,
        "clusters": paired.clusters,
        "losses": paired.losses,
        "gains": paired.gains,
        "delta": paired.delta,
        "low": paired.interval.low,
        "high": paired.interval.high,
        "equivalence_low": paired.equivalence.low,
        "equivalence_high": paired.equivalence.high,
        "p": None if invalid else paired.p,
        "holm_p": verdict.holm_p,
        "smallest_detectable_loss": paired.detectable,
        "identical_answers": paired.identical,
        "method": paired.method,
    }


def csv_text(results: Results) -> str:
    """Long form: one line per figure."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for e in (results.evaluations[m, v] for m in results.models for v in results.variants):
        by_dataset = {SHARED: results.token_estimates[e.key]}
        for dataset in results.study.evaluation.datasets:
            by_dataset[dataset] = results.dataset_estimates[*e.key, dataset]
        for dataset, estimates in by_dataset.items():
            for metric, x in estimates.items():
                writer.writerow(
                    [e.model, e.variant, dataset, metric, x.value, *_interval_limits(x), x.n]
                )
    return stream.getvalue()
