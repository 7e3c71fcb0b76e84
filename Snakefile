"""The jobs of a study (model × variant), one notebook each; `make study` runs them.

What runs, what it reads and what it depends on is decided in helpers.study.stages, where it
is tested; here it becomes rules. Tracked parameters come from wildcards, the study file and
the content of modules and data: functions of `input` or `output` would not be tracked, and
times of files are no content. The first rule asks for every stage's executed notebook and
record, so that a run cut short is never taken for done.
"""

import logging
import os
import re
import sys

from helpers.core import processes
from helpers.core.errors import StudyError, one_line_error
from helpers.core.files import StudyPaths, relative_to_project
from helpers.study import stages
from helpers.study.loading import load_study, study_file
from helpers.workflow.display import may_take_gpu
from helpers.workflow.launcher import PLAN_WIDTH
from snakemake.logging import logger
from snakemake_interface_logger_plugins.common import LogEvent

GIVEN = str(config.get("study", "demo"))
PYTHON = sys.executable
logging.raiseExceptions = False  # on a full disk the job reports the error, not every log line
try:
    STUDY = load_study(GIVEN)
    RUNS = stages.runs(STUDY)
    DEPENDS = {run: stages.dependency_text(STUDY, run) for run in [*RUNS, stages.Run("analysis")]}
except StudyError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
PATHS = StudyPaths(study_file(GIVEN).stem)
GPUS = int(may_take_gpu(STUDY.runtime.device))  # jobs do not share a GPU


def executed(stage, model="", variant=""):
    return relative_to_project(stages.Run(stage, model, variant).executed(PATHS))


def record(stage, model="", variant=""):
    return relative_to_project(stages.Run(stage, model, variant).record(PATHS))


def run_of(stage, wildcards):
    names = [wildcards.get("model", ""), wildcards.get("variant", "") or calibration_of(wildcards)]
    return stages.Run(stage, *names, draw=int(draw_of(wildcards) or 1))


def calibration_of(wildcards):
    """The name of one of the study's calibrations, which stands behind a plus; else empty."""
    return wildcards.get("calibration", "").removeprefix("+")


def calibration_option(wildcards):
    return f"-p calibration_name {name}" if (name := calibration_of(wildcards)) else ""


def draw_of(wildcards):
    """The number of a further draw, whose folders and notebooks end in `~2`; else empty."""
    return wildcards.get("draw", "").removeprefix("~")


def draw_option(wildcards):
    return f"-p draw {number}" if (number := draw_of(wildcards)) else ""


def needs(stage):
    """Input function: the records of the upstream runs."""

    def files(wildcards):
        return [relative_to_project(r.record(PATHS)) for r in stages.upstream_runs(STUDY, run_of(stage, wildcards))]

    return files


def depends(stage):
    """Params function: one text, so that swapped values count as a change."""
    return lambda wildcards: DEPENDS[run_of(stage, wildcards)]


def one_of(names):
    return "|".join(re.escape(name) for name in names) or "(?!)"


def made_by(stage):
    """Models that a stage makes; two stages write to the same place."""
    return one_of(run.model for run in RUNS if run.stage == stage)


def log_errors(message):
    """Log filter: one line for Snakemake's own errors, none for jobs, which report themselves."""
    reported = ("CalledProcessError", "Exiting because a job", "At least one job did not")
    event, text = getattr(message, "event", None), message.getMessage()
    if event == LogEvent.JOB_ERROR:
        for job in workflow.dag.jobs:
            if workflow.dag.jobid(job) == message.jobid:
                processes.report_lost_job(job.message)
    if message.levelno < logging.ERROR or event == LogEvent.JOB_ERROR:
        return False
    message.msg, message.args = one_line_error(text), ()
    return not any(x in text for x in reported)


def log_plan(message):
    """Log filter of a dry run: one line for each job, with the reason it would run."""
    if getattr(message, "event", None) == LogEvent.JOB_INFO and message.rule_name != "all":
        print(f"{message.rule_msg:<{PLAN_WIDTH}}", str(message.reason).partition(":")[0].lower())
    if "Nothing to be done" in message.getMessage():
        print("nothing to run: all is current", file=sys.stderr)
    return message.levelno >= logging.ERROR


if log_filter := {"run": log_errors, "plan": log_plan}.get(config.get("show")):
    for handler in logger.handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.addFilter(log_filter)


wildcard_constraints:
    model=one_of(STUDY.models),
    variant=one_of(STUDY.variants),
    calibration=r"(\+[a-z0-9_.-]+)?",
    draw="(~[0-9]+)?",


onstart:
    if progress_file := os.environ.get("STUDY_PROGRESS"):
        jobs = [job for job in workflow.dag.needrun_jobs() if job.rule.name != "all"]
        with open(progress_file, "w", encoding="utf-8") as stream:
            stream.write(f"{len(jobs)}\n")


COMMAND = (
    "exec {PYTHON:q} -m helpers.workflow.cli run --notebook notebooks/{params.notebook}.ipynb"
    " --output {output.notebook:q} -p study {GIVEN:q}"
)


rule all:
    input:
        [relative_to_project(PATHS.root / name) for name in ("report.md", "report.html", "items.html")],
        [relative_to_project(run.executed(PATHS)) for run in [*RUNS, stages.Run("analysis")]],
        [relative_to_project(run.record(PATHS)) for run in [*RUNS, stages.Run("analysis")]],
    message:
        "all of study {GIVEN}"


rule finetuning:
    input:
        needs("finetuning"),
    output:
        notebook=executed("finetuning", "{model}"),
        record=record("finetuning", "{model}"),
    params:
        notebook=stages.NOTEBOOKS["finetuning"],
        depends=depends("finetuning"),
    message:
        "finetuning {wildcards.model}"
    wildcard_constraints:
        model=made_by("finetuning"),
    priority: 1  # all runs of a trained model wait for it
    threads: STUDY.runtime.threads
    resources:
        gpu=GPUS,
    shell:
        COMMAND + " -p model {wildcards.model:q}"


rule rotation:
    input:
        needs("rotation"),
    output:
        notebook=executed("rotation", "{model}"),
        record=record("rotation", "{model}"),
    params:
        notebook=stages.NOTEBOOKS["rotation"],
        depends=depends("rotation"),
    message:
        "rotation {wildcards.model}"
    wildcard_constraints:
        model=made_by("rotation"),
    priority: 1  # all runs of a rotated model wait for it
    threads: STUDY.runtime.threads
    resources:
        gpu=GPUS,
    shell:
        COMMAND + " -p model {wildcards.model:q}"


rule calibration:
    input:
        needs("calibration"),
    output:
        notebook=executed("calibration", "{model}{calibration}{draw}"),
        record=relative_to_project(PATHS.root / "{model}" / "calibration{calibration}{draw}" / "record.json"),
    params:
        notebook=stages.NOTEBOOKS["calibration"],
        depends=depends("calibration"),
        named=calibration_option,
        draw=draw_option,
    message:
        "calibration {wildcards.model}{wildcards.calibration}{wildcards.draw}"
    priority: 1  # variants wait for it; evaluations have similar lengths and fill the end
    threads: STUDY.runtime.threads
    resources:
        gpu=GPUS,
    shell:
        COMMAND + " -p model {wildcards.model:q} {params.named} {params.draw}"


rule quantization:
    input:
        needs("quantization"),
    output:
        notebook=executed("quantization", "{model}", "{variant}{draw}"),
        record=record("quantization", "{model}", "{variant}{draw}"),
    params:
        notebook=stages.NOTEBOOKS["quantization"],
        depends=depends("quantization"),
        draw=draw_option,
    message:
        "quantization {wildcards.model} {wildcards.variant}{wildcards.draw}"
    priority: 1  # its evaluation waits for it
    threads: STUDY.runtime.threads
    resources:
        gpu=GPUS,
    shell:
        COMMAND + " -p model {wildcards.model:q} -p variant {wildcards.variant:q} {params.draw}"


rule cost:
    # It measures durations and takes every core, so that nothing runs beside it.
    input:
        needs("cost"),
    output:
        notebook=executed("cost", "{model}"),
        record=record("cost", "{model}"),
    params:
        notebook=stages.NOTEBOOKS["cost"],
        depends=depends("cost"),
    message:
        "cost {wildcards.model}"
    threads: workflow.resource_settings.cores or os.cpu_count()
    resources:
        gpu=GPUS,
    shell:
        COMMAND + " -p model {wildcards.model:q}"


rule evaluation:
    input:
        needs("evaluation"),
    output:
        notebook=executed("evaluation", "{model}", "{variant}{draw}"),
        record=record("evaluation", "{model}", "{variant}{draw}"),
    params:
        notebook=stages.NOTEBOOKS["evaluation"],
        depends=depends("evaluation"),
        draw=draw_option,
    message:
        "evaluation {wildcards.model} {wildcards.variant}{wildcards.draw}"
    threads: STUDY.runtime.threads
    resources:
        gpu=GPUS,
    shell:
        COMMAND + " -p model {wildcards.model:q} -p variant {wildcards.variant:q} {params.draw}"


rule analysis:
    input:
        needs("analysis"),
        # Every stage's executed notebook too, because the report links to them.
        [relative_to_project(run.executed(PATHS)) for run in RUNS],
    output:
        notebook=executed("analysis"),
        record=record("analysis"),
        table=relative_to_project(PATHS.root / "summary.csv"),
        page=relative_to_project(PATHS.root / "items.html"),
    params:
        notebook=stages.NOTEBOOKS["analysis"],
        depends=depends("analysis"),
    message:
        "analysis"
    shell:
        COMMAND


rule export:
    input:
        executed("analysis"),
    output:
        relative_to_project(PATHS.root / "report.md"),
        relative_to_project(PATHS.root / "report.html"),
    params:
        title=STUDY.title,
        to=relative_to_project(PATHS.root),
    message:
        "report"
    shell:
        "exec {PYTHON:q} -m helpers.workflow.cli export --notebook {input[0]:q}"
        " --study {GIVEN:q} --to {params.to:q}"
