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
from helpers.report.lm_eval_results import aggregated
from helpers.report.lm_eval_samples import sample
from helpers.report.results import Evaluated, Results, load_results
from helpers.study.study_run import Job, open_job


def write_harness_files(job: Job) -> Path:
    """Write every variant's files anew and return the folder they are in.

    Raises:
        StudyError: the results are not complete, or there is no record of what was asked.
    """
    results, folder = load_results(job), job.paths.root / "lm-eval"
    made = [(found, _samples(job, results, found)) for found in results.evaluations.values()]
    shutil.rmtree(folder, ignore_errors=True)
    for found, samples in made:
        place, date = folder / f"{found.model}__{found.variant}", _date(found)
        write_json(place / f"results_{date}.json", aggregated(results, found, samples))
        for task, rows in samples.items():
            write_jsonl(place / f"samples_{task}_{date}.jsonl", rows)
    return folder


def _samples(job: Job, results: Results, found: Evaluated) -> dict[str, list[dict]]:
    """The rows of every evaluation set, each with what the baseline was asked."""
    baseline = job.paths.evaluation(found.model, results.study.baseline)
    samples = {}
    for name, wanted in results.study.evaluation.datasets.items():
        asked, rows = read_prompts(baseline, name), []
        for place, row in enumerate(found.predictions[name]):
            known = asked.get(row["id"], {})
            if known.get("prompt_hash") != row["prompt_hash"]:
                raise StudyError(
                    f"{found.model}/{found.variant}: what item {row['id']} of {name} was asked is "
                    "not on record; run 03_evaluation again"
                )
            rows.append(sample(place, row, known, wanted))
        samples[name] = rows
    return samples


def _date(found: Evaluated) -> str:
    """When the evaluation began, as the harness puts it into the names of its files."""
    began = datetime.fromisoformat(found.record["started"]).astimezone(UTC)
    return began.strftime("%Y-%m-%dT%H-%M-%S.%f")


def main(argv: list[str] | None = None) -> int:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.report.lm_eval_export", description=__doc__
    )
    parser.add_argument("study", help="a study's name in params/, or the path of its YAML file")
    given = parser.parse_args(argv)
    try:
        print(f"written: {write_harness_files(open_job(given.study))}")
    except StudyError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
