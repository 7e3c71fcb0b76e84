"""Command line of the Makefile and the Snakefile; one job and its progress lines.

Each job says in one line that it starts, and in one how it ended and how long it took.
"""

import signal

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it silently
    # As helpers.core.processes.allow_interrupts, before anything is imported.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from helpers.core.errors import StudyError, remedy_for
from helpers.core.processes import (
    DONE,
    FAILED,
    START,
    STOPPED,
    block_interrupts_in_threads,
    die_with_parent,
    format_duration,
    progress_file,
    report_activity,
    report_event,
)
from helpers.workflow.fork_server import run_in_fork
from helpers.workflow.notebooks import JobFailed, kernel, run_notebook


def run_job(label: str, work: Callable[[], None]) -> int:
    """Run a job and report its start, its result and its duration. Returns the exit code."""
    die_with_parent()
    report_event(START, label)
    started = time.monotonic()
    try:
        with report_activity(" ".join(label.split()), progress_file()):
            work()
    except (JobFailed, StudyError, OSError) as error:
        report_event(
            FAILED, label, f"{format_duration(time.monotonic() - started)}\n{_error_line(error)}"
        )
        return 1
    except KeyboardInterrupt:
        report_event(STOPPED, label)
        return 130
    report_event(DONE, label, format_duration(time.monotonic() - started))
    return 0


def _error_line(error: Exception) -> str:
    """The error message, with the remedy if the operating system raised it."""
    return "; ".join(
        filter(None, (str(error), isinstance(error, OSError) and remedy_for(str(error))))
    )


def _label(stage: str, parameters: dict[str, str]) -> str:
    model, variant = parameters.get("model", ""), parameters.get("variant", "")
    if calibration := parameters.get("calibration_name", ""):
        model = f"{model}+{calibration}"
    if (draw := int(parameters.get("draw", 1))) > 1:  # the last of its names carries it
        model, variant = (model, f"{variant}~{draw}") if variant else (f"{model}~{draw}", "")
    return f"{stage:<12}  {model:<12}  {variant:<18}"


def main(argv: list[str] | None = None) -> int:
    """The command line; see `--help`."""
    arguments = sys.argv[1:] if argv is None else argv
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # from here on Ctrl-C is reported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if arguments[:1] == ["kernel"]:
        kernel(arguments[1:])
        return 0
    if arguments[:1] == ["engine"]:
        return engine(arguments[1:])
    if arguments[:1] == ["answer"]:
        importlib.import_module(arguments[1]).main(*arguments[2:])
        return 0
    separator = arguments.index("--") if "--" in arguments else len(arguments)
    try:
        args = _parser().parse_args(arguments[:separator])
        args.options = arguments[separator + 1 :]  # after `--`: Snakemake's own
        return _dispatch(args)
    except (StudyError, OSError) as error:
        print(_error_line(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def engine(arguments: list[str]) -> int:
    """Run Snakemake in this process; Ctrl-C during its imports ends it silently."""
    block_interrupts_in_threads()  # they start the jobs
    try:
        from snakemake.cli import main as snakemake

        return int(snakemake(arguments) or 0)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers.workflow.cli", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="check a study file and list its errors")
    check.add_argument("study")
    study = commands.add_parser("study", help="check a study, then run what is not current")
    study.add_argument("study")
    study.add_argument("--cores", type=int, required=True)
    study.add_argument("--job-mb", type=int, default=3000, help="memory set aside for one job")
    study.add_argument("--executor", default="local", help="where jobs run: a folder of profiles/")
    study.add_argument("--only-report", action="store_true", help="only analysis and export")
    study.add_argument("--partial", action="store_true", help="report what is complete")
    run = commands.add_parser("run", help="execute one notebook")
    run.add_argument("--notebook", type=Path, required=True)
    run.add_argument("--output", type=Path, required=True)
    run.add_argument("-p", dest="parameters", nargs=2, action="append", default=[])
    export = commands.add_parser("export", help="make report.md and report.html")
    export.add_argument("--notebook", type=Path, required=True)
    export.add_argument("--study", required=True)
    export.add_argument("--to", type=Path, required=True)
    return parser


def _dispatch(args: argparse.Namespace) -> int:
    from helpers.workflow import launcher

    match args.command:
        case "check":
            return launcher.check_study(args.study) or launcher.check_study_sources(
                args.study, dry=True
            )
        case "study":
            return launcher.run_study(args)
        case "run":
            parameters = dict(args.parameters)
            stage = args.notebook.stem.partition("_")[2] or args.notebook.stem
            return run_job(_label(stage, parameters), lambda: _run(args, stage, parameters))
    from helpers.workflow.notebooks import export_report

    return run_job(_label("report", {}), lambda: export_report(args.notebook, args.study, args.to))


def _run(args: argparse.Namespace, stage: str, parameters: dict[str, str]) -> None:
    """Execute the notebook; for a run of the study, record the fingerprint of its inputs."""
    from helpers.study import stages
    from helpers.study.loading import open_job

    output, fingerprint = args.output.absolute(), nullcontext()
    if stage in stages.NOTEBOOKS and "partial" not in parameters:
        keys = {"study", "model", "variant", "draw", "calibration_name"} & set(parameters)
        run_parameters = {key.removesuffix("_name"): parameters[key] for key in keys}
        job = open_job(**run_parameters)
        run = stages.run_of(job, stage)
        fingerprint = stages.record_fingerprint(job.study, job.paths, run)
    with fingerprint:
        run_notebook(args.notebook, output, parameters)


if __name__ == "__main__":
    try:
        code = run_in_fork(sys.argv[1:])
        sys.exit(main() if code is None else code)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
