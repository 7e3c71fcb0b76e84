"""A study's results in lm-evaluation-harness's format, for whatever reads its files.

    python -m helpers.report.lm_eval_export demo

writes, for every variant of every model, `outputs/<study>/lm-eval/<model>__<variant>/`
with `results_<date>.json` and `samples_<task>_<date>.jsonl`: the names, the fields and
the hashes of its 0.4.13. Only results that the report would show are handed on. The
tasks are this study's own and not the harness's of similar names: items, prompts and
parsing differ.
"""

import argparse
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from helpers.core.errors import StudyError
from helpers.core.records import write_json, write_jsonl
from helpers.evaluation.prompt_records import read_prompts
from helpers.report.lm_eval_results import aggregated_results
from helpers.report.lm_eval_samples import sample_line
from helpers.report.results import Results, VariantResults, load_results
from helpers.study.study_run import Job, open_job


def write_harness_files(job: Job) -> Path:
    """Write every variant's files anew and return the folder they are in.

    Raises:
        StudyError: the results are not complete, or the prompts are not on record.
    """
    results, folder = load_results(job), job.paths.root / "lm-eval"
    samples_by_variant = [
        (variant, _sample_rows(job, results, variant)) for variant in results.evaluations.values()
    ]
    shutil.rmtree(folder, ignore_errors=True)
    for variant, samples in samples_by_variant:
        place, date = folder / f"{variant.model}__{variant.variant}", _evaluation_date(variant)
        write_json(place / f"results_{date}.json", aggregated_results(results, variant, samples))
        for task, rows in samples.items():
            write_jsonl(place / f"samples_{task}_{date}.jsonl", rows)
    return folder


def _sample_rows(job: Job, results: Results, variant: VariantResults) -> dict[str, list[dict]]:
    """The rows of every evaluation set, each with the baseline's prompt."""
    baseline = job.paths.evaluation(variant.model, results.study.baseline)
    samples = {}
    for name, evaluation_set in results.study.evaluation.datasets.items():
        prompt_records, rows = read_prompts(baseline, name), []
        for place, row in enumerate(variant.predictions[name]):
            prompt_record = prompt_records.get(row["id"], {})
            if prompt_record.get("prompt_hash") != row["prompt_hash"]:
                raise StudyError(
                    f"{variant.model}/{variant.variant}: the prompt of item {row['id']} of "
                    f"{name} is not on record; run 03_evaluation again"
                )
            rows.append(sample_line(place, row, prompt_record, evaluation_set))
        samples[name] = rows
    return samples


def _evaluation_date(variant: VariantResults) -> str:
    """Start time of the evaluation in the format of the harness's file names."""
    began = datetime.fromisoformat(variant.record["started"]).astimezone(UTC)
    return began.strftime("%Y-%m-%dT%H-%M-%S.%f")


def main(argv: list[str] | None = None) -> int:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.report.lm_eval_export", description=__doc__
    )
    parser.add_argument("study", help="a study's name in params/, or the path of its YAML file")
    arguments = parser.parse_args(argv)
    try:
        print(f"written: {write_harness_files(open_job(arguments.study))}")
    except StudyError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
