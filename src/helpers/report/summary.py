"""Files for other programs and people: summary.json, summary.csv, the answers, model cards.

In the summary fractions are 0–1. No times and no durations: the same records make the same bytes.
The answers lie beside it, named by their content hashes, so that
`helpers.report.checks.recomputation` can make every verdict again.

A model card is a checkpoint's README.md in the Hub's style, beside the weights it is about. What
it says of the checkpoint is read back: the scheme from its config, the Linears from its tensors,
the sizes from its files, the checks from `verification.json`, never from what was asked for. It is
written before the checkpoint is evaluated, so that the hash by which an evaluation names the
checkpoint is that of the folder with its card. Verdicts come later, in the report, to which it
points.
"""

import csv
import io
from pathlib import Path

import yaml
from safetensors import safe_open

from helpers.core.files import draw_name, write_atomically
from helpers.core.records import WHOLE_VARIANT, read_json, write_json
from helpers.report import sensitivity, tables
from helpers.report.estimates import Estimate, VariantResults, main_metric
from helpers.report.graded_chapter import (
    calibrations_block,
    decompositions_block,
    draws_block,
    graded_blocks,
)
from helpers.report.markdown import (
    Rows,
    code,
    count,
    escape,
    listed,
    markdown_table,
    megabytes,
    percent,
)
from helpers.report.results import Results
from helpers.statistics.checks.recomputed_verdicts import write_answers
from helpers.statistics.verdicts import ControlOutcome, Verdict
from helpers.study.inputs import UNKNOWN_ORIGIN
from helpers.study.loading import Job
from helpers.study.schema import (
    BundledModel,
    Comparison,
    FineTunedModel,
    HubModel,
    MadeModel,
    RotatedModel,
    Study,
)

COLUMNS = ("model", "variant", "dataset", "metric", "value", "low", "high", "n")
SHARED = "shared_text"
CLUSTERS = "items on one passage, and near-duplicates"
ANSWERS = "answers"


def write_summary(results: Results, folder: Path, *, missing: tuple[str, ...] = ()) -> None:
    """Write the answers and summary.csv, then summary.json, whose presence marks completion.

    Args:
        missing: the runs that a partial report lacks; summary.json names them.
    """
    published = results.published
    hashes = write_answers(folder / ANSWERS, results.study, published.variants, published.draws)
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
            for name, best in tables.best_fixed_answers(results).items()
        },
        "controls": [control_row(at, outcome) for at, outcome in results.control_outcomes.items()],
        "models": {model: _model_summary(results, model) for model in results.models},
        "comparisons": [comparison_row(study, c, v) for c, v in results.verdicts.items()],
        **graded_blocks(results.graded),
        **draws_block(results.recipes),
        **calibrations_block(results),
        **decompositions_block(results),
    }


def _model_summary(results: Results, model: str) -> dict:
    fields = {}
    if model in results.training:
        training = results.training[model]["results"]
        keys = ("training_items", "heldout_loss_before", "heldout_loss_after")
        fields["finetuning"] = {key: training[key] for key in keys}
    if model in results.rotations:
        settings = results.study.models[model].rotate.model_dump(mode="json")
        fields["rotation"] = settings | results.rotations[model]["results"]
    worst = sensitivity.linear_inputs(results.calibrations[model])[:8]
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
    if kl := e.kl_by_token:
        fields["kl_by_token"] = {"nonfinite": kl.nonfinite, "tail": [vars(at) for at in kl.tail]}
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


CARD = "README.md"
BUNDLED = {"smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
MADE_BY = "02_quantization"


def write_card(job: Job, before: dict[str, int], after: dict[str, int]) -> Path:
    """Write the card of the job's checkpoint and return its path.

    Args:
        before, after: bytes on disk by part, of the source's files and of the checkpoint's.

    Raises:
        StudyError: the checkpoint has not been verified, or its model not calibrated.
    """
    folder = job.paths.checkpoint(job.model, job.variant)
    config = read_json(folder / "config.json", made_by=MADE_BY)
    scheme = config.get("quantization_config", {})
    verified = read_json(folder.parent / "verification.json", made_by=MADE_BY)
    path = job.paths.calibration(job.model) / "record.json"
    calibration = read_json(path, made_by="01_calibration")
    parts = [
        front_matter(job.study, job.model, card_tags(job, scheme, verified)),
        f"# {job.model}, {draw_name(job.variant, job.draw)}",
        origin_sentence(job, calibration),
        markdown_table(facts_table(folder, scheme, before, after)),
        "## Checks",
        checks_section(verified),
        "## Quality",
        f"The report of the study {code(job.name)} compares its answers with those of its "
        "controls: `../../../report.md`. Its metrics are in `../evaluation/metrics.json`. Without "
        "that report its quality is unknown.",
        "## Use",
        usage_text(folder.name, bool(scheme)),
        "## Limits",
        LIMITS,
    ]
    write_atomically(folder / CARD, lambda p: p.write_text("\n\n".join(parts) + "\n", "utf-8"))
    return folder / CARD


def card_tags(job: Job, scheme: dict, verified: dict) -> list[str]:
    """The Hub's tags; `smoothquant` only if the checks on the checkpoint passed."""
    smoothed = ["smoothquant"] if job.recipe.smooth and verified["passed"] else []
    return [*smoothed, *(["w8a8", "int8", "compressed-tensors"] if scheme else [])]


def front_matter(study: Study, model: str, tags: list[str]) -> str:
    """The Hub's metadata: YAML between two lines of dashes; only known fields."""
    fields = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    source, tuned = study.models[model], False
    if isinstance(source, MadeModel):
        source, tuned = study.models[source.start], isinstance(source, FineTunedModel)
    if isinstance(source, BundledModel):
        fields["base_model"], fields["license"] = BUNDLED[source.bundled]
    elif isinstance(source, HubModel):
        fields["base_model"] = source.hub
    if "base_model" in fields:
        fields["base_model_relation"] = "finetune" if tuned else "quantized"
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def origin_sentence(job: Job, calibration: dict) -> str:
    """One sentence on the source model and the calibration."""
    source, description = job.study.models[job.model], "The model"
    if isinstance(source, FineTunedModel):
        description = f"The model {code(source.finetune.start)}, fine-tuned here by full training"
        source = job.study.models[source.start]
    if isinstance(source, RotatedModel):
        rotations = listed([r.upper() for r in source.rotate.rotations])
        description = f"The model {code(source.start)}, rotated here by {rotations} of SpinQuant"
        source = job.study.models[source.start]
    name = next(iter(source.model_dump().values()))
    results = calibration["results"]
    model = f"{description} ({code(str(name))}), its files "
    model += code(calibration["inputs"]["model"][:12])
    if job.recipe.made_elsewhere:
        return f"{model}; a copy of a checkpoint {UNKNOWN_ORIGIN}."
    return (
        f"{model}, calibrated "
        f"on {count(len(results['items']), 'item')} of {results['tokens']:,} tokens, "
        "and written by llmcompressor."
    )


def facts_table(folder: Path, scheme: dict, before: dict[str, int], after: dict[str, int]) -> Rows:
    """Scheme, Linears and bytes as read from the files."""
    rows = []
    for name, group in scheme.get("config_groups", {}).items():
        for key in ("weights", "input_activations"):
            if scheme_part := group.get(key):
                rows.append(
                    {
                        "part": f"{key.replace('_', ' ')} ({name})",
                        "read back": _scheme_words(scheme_part),
                    }
                )
    int8 = [n for n, dtype in stored_dtypes(folder).items() if dtype == "I8"]
    rows.append({"part": "tensors in int8", "read back": str(len(int8))})
    if kept := scheme.get("ignore", []):
        rows.append({"part": "kept float", "read back": ", ".join(kept)})
    for part, size in after.items():
        scheme_part = f"{megabytes(size)}, {megabytes(before[part])} before"
        rows.append({"part": part, "read back": scheme_part})
    share = percent(sum(after.values()) / sum(before.values()))
    return [*rows, {"part": "all", "read back": f"{share} of the model it was made from"}]


def _scheme_words(scheme: dict) -> str:
    kind = f"{scheme['type']}{scheme['num_bits']} per {scheme['strategy']}"
    timing = ", dynamic" if scheme.get("dynamic") else ""
    return f"{kind}{timing}{', symmetric' if scheme.get('symmetric') else ''}"


def stored_dtypes(folder: Path) -> dict[str, str]:
    """Dtype of every tensor in a folder's safetensors files, by tensor name."""
    dtypes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as tensors:
            names = list(tensors.keys())
            dtypes |= {name: tensors.get_slice(name).get_dtype() for name in names}
    return dtypes


def checks_section(verified: dict) -> str:
    """Every gate with its measured value; failed gates come first in the summary."""
    gates = verified["gates"]
    failed = [escape(gate["name"]) for gate in gates if not gate["passed"]]
    summary = f"All {len(gates)} checks on these files pass."
    if failed:
        summary = (
            f"**Not to be used.** {len(failed)} of {len(gates)} checks fail: {listed(failed)}."
        )
    rows = [
        {"check": gate["name"], "result": "passes" if gate["passed"] else "FAILS"}
        | {"measured": gate["measured"], "limit": gate["limit"]}
        for gate in gates
    ]
    return f"{summary}\n\n{markdown_table(rows)}"


def usage_text(folder: str, quantized: bool) -> str:
    """How to run the checkpoint, and which engines compute in int8."""
    if not quantized:
        return "transformers loads it like any float model; smoothing does not change its function."
    return (
        f"`vllm serve {folder}` runs it on int8 kernels. transformers loads it with "
        "compressed-tensors, which only simulates int8 and is slower than the float model."
    )


LIMITS = (
    "- It has the limits of the model that it was made from, whose license and terms apply.\n"
    "- Two correct int8 implementations give different numbers: single answers differ between "
    "them, the average quality does not."
)
