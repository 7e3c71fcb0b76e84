"""`make scale`: seconds and peak memory of every stage at two sizes, and what 8 B would need.

Runs the study `params/sizes.yaml`, whose jobs keep their own account of both, and then
verifies every quantized checkpoint once more in a process of its own, since in the study
verification shares one with quantization. Writes `outputs/scale/sizes.md` and `sizes.json`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time

from benchmarks.machine import features
from helpers.core.files import StudyPaths, outputs_root, write_atomically
from helpers.core.records import package_versions, peak_memory_bytes, read_json, write_json
from helpers.report.markdown import MISSING, markdown_table, signed
from helpers.study.loading import open_job
from helpers.study.stages import Run, runs

STUDY, FOLDER = "sizes", "scale"
MADE = "quantization"  # the stage that makes a checkpoint
OWN_ACCOUNT = "cost"  # measures in processes of their own, which its job does not see
# Qwen/Qwen3-8B: 36 layers, hidden 4096, intermediate 12288, 32 heads and 8 key/value heads
# of 128, 151936 tokens, head not tied.
LINEARS_8B = 36 * (2 * 4096 * 32 * 128 + 2 * 4096 * 8 * 128 + 3 * 4096 * 12288)
WEIGHTS_8B = LINEARS_8B + 2 * 151936 * 4096
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verify", nargs=2, metavar=("MODEL", "VARIANT"), help="only this")
    options = parser.parse_args()
    if options.verify:
        print(json.dumps(verified(*options.verify)))
        return
    run_alone()
    table = [measured(run) for run in runs(open_job(STUDY).study) if run.stage != OWN_ACCOUNT]
    table += [again(row["model"], row["variant"]) for row in table if row["stage"] == MADE]
    write(sorted(table, key=lambda row: row["weights"]))


def run_alone() -> None:
    """Run the whole study again, one job at a time, since parallel jobs share time and memory."""
    command = [sys.executable, "-m", "helpers.workflow.cli", "study", STUDY]
    command += ["--cores", str(len(os.sched_getaffinity(0))), "--job-mb", str(2**20)]
    subprocess.run([*command, "--", "--forceall"], check=True)


def measured(run: Run) -> dict:
    """One stage of one model, from the record of its job."""
    record = read_json(run.record(StudyPaths(STUDY)), made_by="make scale")
    row = {"model": run.model, "variant": run.variant, "stage": run.stage}
    row |= {"weights": weights_of(run.model), "duration_s": record["duration_s"]}
    return row | {"peak_bytes": record["peak_memory_bytes"], "runs_in": "a notebook"}


def again(model: str, variant: str) -> dict:
    """Verification in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--verify", model, variant]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row = {"model": model, "variant": variant, "stage": "verification"}
    row |= {"weights": weights_of(model), **json.loads(done.stdout.splitlines()[-1])}
    return row | {"runs_in": "a process"}


def verified(model: str, variant: str) -> dict:
    """Seconds, peak and outcome of all gates on one checkpoint of the study."""
    from helpers.core.records import sha256_folder
    from helpers.runtime.devices import prepare
    from helpers.sources.models import model_folder
    from helpers.verification.variant_gates import verify_checkpoint

    job = prepare(open_job(STUDY, model=model, variant=variant))
    source_hash = sha256_folder(model_folder(job.study, job.model, job.paths))
    started = time.monotonic()
    gates = verify_checkpoint(job, source_hash=source_hash)
    return {
        "duration_s": round(time.monotonic() - started, 3),
        "peak_bytes": peak_memory_bytes(),
        "gates": len(gates),
        "gates_passed": sum(gate.passed for gate in gates),
        "census": next(
            gate.measured for gate in gates if gate.name == "quantized layers as declared"
        ),
    }


def weights_of(model: str) -> int:
    """Number of weights of the source; a tied head counts once."""
    from helpers.sources.model_files import TensorFiles
    from helpers.sources.models import model_folder

    job = open_job(STUDY, model=model)
    files = TensorFiles(model_folder(job.study, model, job.paths), dtype=None)
    return sum(files.size_bytes(name) // files.stored_dtype(name).itemsize for name in files)


def extrapolated(table: list[dict]) -> list[dict]:
    """Estimated needs of each stage at 8 B: a line through the two measured sizes."""
    estimates = []
    for stage in dict.fromkeys((row["stage"], row["variant"]) for row in table):
        small, large = (row for row in table if (row["stage"], row["variant"]) == stage)
        slope = (large["peak_bytes"] - small["peak_bytes"]) / (large["weights"] - small["weights"])
        beyond = WEIGHTS_8B - large["weights"]
        row = {"stage": stage[0], "variant": stage[1], "bytes_per_weight": round(slope, 2)}
        row["fixed_bytes"] = round(large["peak_bytes"] - slope * large["weights"])
        estimates.append(row | {"peak_bytes": round(large["peak_bytes"] + slope * beyond)})
    return estimates


def machine() -> dict:
    """The machine's figures, without its name."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cpu_features": list(features()),
    }


def write(table: list[dict]) -> None:
    folder, at_8b = outputs_root() / FOLDER, extrapolated(table)
    account = {"machine": machine(), "packages": package_versions(), "stages": table}
    account |= {"weights_8b": WEIGHTS_8B, "at_8b": at_8b}
    write_json(folder / "sizes.json", account)
    text = as_markdown(account)
    write_atomically(folder / "sizes.md", lambda p: p.write_text(text, encoding="utf-8"))
    print(f"written: {folder.name}/sizes.md", file=sys.stderr)


def as_markdown(account: dict) -> str:
    """The report: the measurements, and the arithmetic of the estimates."""
    m, packages = account["machine"], account["packages"]
    checks = [
        f"{r['model']}: {r['gates_passed']} of {r['gates']} checks hold, {r['census']}."
        for r in account["stages"]
        if "census" in r
    ]
    weights = account["weights_8b"]
    return "\n\n".join(
        [
            "# Time and memory by size",
            f"{m['cores']} cores, {m['architecture']}, {m['memory_bytes'] / GIB:.0f} GiB, "
            f"{', '.join(m['cpu_features']) or 'no vector features known here'}; torch "
            f"{packages['torch']}, transformers {packages['transformers']}. Float weights in "
            "float32, four bytes each. Made by `make scale` from `params/sizes.yaml`, one job at "
            "a time.",
            "Peak is the most memory the job's process ever held: libraries, files mapped into "
            "memory and all. A copy is the float weights once.",
            markdown_table([_measured(r) for r in account["stages"]]).strip(),
            "Verification stands alone here, and is part of quantization above. "
            + " ".join(checks),
            "## What 8 B weights would need",
            "Not run. Peak = fixed + bytes per weight × weights, through the two sizes above, at "
            f"the {weights / 1e9:.2f} B weights of Qwen3-8B ({4 * weights / GIB:.1f} GiB in "
            "float32):",
            markdown_table([_beyond(r) for r in account["at_8b"]]).strip() + "\n",
        ]
    )


def _measured(r: dict) -> dict:
    row = {"model": r["model"], "weights": f"{r['weights'] / 1e9:.3f} B", "stage": r["stage"]}
    row |= {"variant": r["variant"] or MISSING, "time [s]": f"{r['duration_s']:.0f}"}
    row["peak [GiB]"] = f"{r['peak_bytes'] / GIB:.2f}"
    return row | {"copies": f"{r['peak_bytes'] / (4 * r['weights']):.2f}"}


def _beyond(r: dict) -> dict:
    row = {"stage": r["stage"], "variant": r["variant"] or MISSING}
    row |= {"bytes per weight": f"{r['bytes_per_weight']:.2f}"}
    row |= {"fixed [GiB]": signed(r["fixed_bytes"] / GIB, 2)}
    return row | {"at 8 B [GiB]": f"{r['peak_bytes'] / GIB:.0f}"}


if __name__ == "__main__":
    main()
