"""Jobs as the terminal sees them, and the command line the Makefile and Snakefile use.

Each job says in one line that it starts, and in one how it ended and how long it took.
"""

import argparse
import fcntl
import os
import sys
import time
from pathlib import Path

from helpers.study.errors import StudyError
from helpers.study.execution import JobFailed, die_with_parent, kernel, run_notebook


def _note(word: str) -> str:
    """Add a word to the account of this `make study`; return `[ 3/18]` if it keeps one."""
    account = os.environ.get("STUDY_PROGRESS", "")
    if not account or not Path(account).is_file():
        return word
    with open(account, "a+", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(f"{word}\n")
        stream.flush()
        stream.seek(0)
        total, *words = stream.read().split()
    return f"[{words.count('done'):>{len(total)}}/{total}]" if word == "done" else word


def _say(first: str, label: str, rest: str = "") -> None:
    line = f"{first:<8} {label}  {rest}".rstrip()
    sys.stderr.write(f"{line}\n")  # one write: jobs share the terminal


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def job(label: str, work) -> int:
    """Do the work; say when it starts, and when and how it ends. Returns the exit code."""
    die_with_parent()
    _say("start", label)
    started = time.monotonic()
    try:
        work()
    except (JobFailed, StudyError) as error:
        _say(_note("failed"), label, _duration(time.monotonic() - started))
        sys.stderr.write("".join(f"         {x}\n" for x in str(error).splitlines()))
        return 1
    except KeyboardInterrupt:
        return 130
    _say(_note("done"), label, _duration(time.monotonic() - started))
    return 0


def _label(stage: str, parameters: dict[str, str]) -> str:
    model, variant = parameters.get("model", ""), parameters.get("variant", "")
    return f"{stage:<12}  {model:<12}  {variant:<18}"


def main(argv: list[str] | None = None) -> int:
    """The command line; see `--help`."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["kernel"]:
        kernel(arguments[1:])
        return 0
    parser = argparse.ArgumentParser(prog="python -m helpers.study.jobs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="read a study file and say what is wrong with it")
    check.add_argument("study")
    study = commands.add_parser("study", help="check a study, then run what is not current")
    study.add_argument("study")
    study.add_argument("--cores", type=int, required=True)
    study.add_argument("--job-mb", type=int, default=3000, help="memory set aside for one job")
    study.add_argument("--only-report", action="store_true", help="only analysis and export")
    run = commands.add_parser("run", help="execute one notebook")
    run.add_argument("--notebook", type=Path, required=True)
    run.add_argument("--output", type=Path, required=True)
    run.add_argument("-p", dest="parameters", nargs=2, action="append", default=[])
    export = commands.add_parser("export", help="make report.md and report.html")
    export.add_argument("--notebook", type=Path, required=True)
    export.add_argument("--study", required=True)
    export.add_argument("--to", type=Path, required=True)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    given = parser.parse_args(arguments[:cut])
    given.options = arguments[cut + 1 :]  # after `--`: Snakemake's own
    return _dispatch(given)


def _dispatch(given: argparse.Namespace) -> int:
    from helpers.study import workflow

    match given.command:
        case "check":
            return workflow.check(given.study)
        case "study":
            return workflow.run_study(given)
        case "run":
            parameters = dict(given.parameters)
            stem = given.notebook.stem
            label = _label(stem.partition("_")[2] or stem, parameters)
            output = given.output.absolute()
            return job(label, lambda: run_notebook(given.notebook, output, parameters))
    from helpers.study.export import export_report

    label = _label("report", {})
    return job(label, lambda: export_report(given.notebook, given.study, given.to))


if __name__ == "__main__":
    sys.exit(main())
