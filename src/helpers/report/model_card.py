"""A checkpoint's model card: README.md in the Hub's style, beside the weights it is about.

What it says of the checkpoint is read back: the scheme from its config, the Linears from
its tensors, the sizes from its files, the checks from `verification.json`, never from
what was asked for. It is written before the checkpoint is evaluated, so that the hash by
which an evaluation names the checkpoint is that of the folder with its card. Verdicts
come later, in the report, to which it points.
"""

from pathlib import Path

import yaml
from safetensors import safe_open

from helpers.core.file_writing import write_atomically
from helpers.core.records import read_json
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
from helpers.study.schema import Study
from helpers.study.schema_sources import BundledModel, FineTunedModel, HubModel
from helpers.study.study_run import Job

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
        f"# {job.model}, {job.variant}",
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
    if isinstance(source, FineTunedModel):
        source, tuned = study.models[source.finetune.start], True
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
        source = job.study.models[source.finetune.start]
    name = next(iter(source.model_dump().values()))
    results = calibration["results"]
    return (
        f"{description} ({code(str(name))}), its files "
        f"{code(calibration['inputs']['model'][:12])}, calibrated "
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
