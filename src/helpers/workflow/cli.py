"""Command line of the Makefile and the Snakefile, and the jobs it runs: notebooks and the export.

Each job says in one line that it starts, and in one how it ended and how long it took.

papermill executes a notebook on this very interpreter, whatever kernels are installed, under a
temporary name that becomes the final one only on success; of a failure the notebook is kept beside
it. A job ends when the process that started it ends, however that ended, and its kernel with it.

What is kept has no machine paths, no clock times, no rewritten lines and small pictures. Cleaning
works on the notebook's JSON, so that it can be done, and tested, without Jupyter. A figure uses
few colours, and every one is kept three times (notebook, report.html, report_files): with a
palette it takes about a third of the bytes and looks the same.

The executed analysis is exported as report.md and a self-contained report.html, without code.
"""

import signal

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it silently
    # As helpers.core.processes.allow_interrupts, before anything is imported.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

import argparse
import base64
import importlib
import io
import json
import logging
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from helpers.core.errors import StudyError, one_line, remedy_for, safe_message
from helpers.core.files import PROJECT, outputs_root, relative_to_project, write_atomically
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
from helpers.workflow.fork_server import JOB_ENVIRONMENT, run_in_fork

COLORS = 128


def reduce_palette(png: str) -> str:
    """A base64 PNG with a palette of 128 colours, or unchanged if that is no smaller.

    Transparent parts become white, as on the page.
    """
    from PIL import Image

    raw = base64.b64decode(png)
    picture = Image.open(io.BytesIO(raw)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    stream = io.BytesIO()
    flat.quantize(COLORS, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    smaller = stream.getvalue()
    return base64.b64encode(smaller if len(smaller) < len(raw) else raw).decode("ascii")


WIDGET = "application/vnd.jupyter.widget-view+json"
PNG = "image/png"
ITEMS_PAGE = "items.html"  # beside the report
PAPERMILL_KEEPS = ("duration", "exception", "parameters", "status", "version")


def cleaned_text(path: Path) -> str:
    """The cleaned text of an executed notebook's file."""
    cleaned = clean_notebook(json.loads(path.read_text("utf-8")))
    return json.dumps(cleaned, indent=1, ensure_ascii=False) + "\n"


def clean_notebook(notebook: dict) -> dict:
    """The notebook without machine paths, clock times and widgets.

    nbconvert's ClearMetadataPreprocessor would keep a single field of papermill's metadata, skip
    Markdown cells and leave outputs alone.
    """
    metadata = {k: v for k, v in notebook["metadata"].items() if k != "widgets"}
    cells = [_clean_cell(cell) for cell in notebook["cells"]]
    return notebook | {"metadata": _only_durations(metadata), "cells": cells}


def _clean_cell(cell: dict) -> dict:
    metadata = {k: v for k, v in cell["metadata"].items() if k != "execution"}
    cell = cell | {"metadata": _only_durations(metadata)}
    if cell["cell_type"] == "code":
        cell["outputs"] = _clean_outputs(cell["outputs"])
    return cell


def _only_durations(metadata: dict) -> dict:
    if "papermill" not in metadata:
        return metadata
    kept_fields = {k: v for k, v in metadata["papermill"].items() if k in PAPERMILL_KEEPS}
    return metadata | {"papermill": kept_fields}


def _clean_outputs(outputs: list[dict]) -> list[dict]:
    from helpers.report.pages import NARROW  # a fork server holds nothing of the report

    cleaned: list[dict] = []
    for output in outputs:
        if WIDGET in output.get("data", {}):
            continue
        for kind in (PNG, NARROW):
            if kind in output.get("data", {}):
                compressed = reduce_palette("".join(output["data"][kind]))
                output = output | {"data": output["data"] | {kind: compressed}}
        if output["output_type"] != "stream":
            cleaned.append(without_machine_paths(output))
            continue
        text = "".join(output["text"])  # a string or a list of lines
        if cleaned and cleaned[-1].get("name") == output["name"]:
            text = cleaned.pop()["text"] + text
        cleaned.append(output | {"text": text})
    for output in cleaned:
        if output["output_type"] == "stream":
            text = without_machine_paths(final_line_states(output["text"]))
            output["text"] = text.splitlines(keepends=True)
    return cleaned


def final_line_states(text: str) -> str:
    """The text as a terminal shows it: of a line rewritten in place, the last state."""
    text = text.replace("\x1b[A", "").replace("\r\n", "\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def without_machine_paths(value):
    """The data with a name in place of each path to this machine's folders."""
    if isinstance(value, dict):
        return {k: without_machine_paths(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_machine_paths(v) for v in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"/\S*/ipykernel_\d+/\d+\.py", "<cell>", value)
    folders = {outputs_root(): "outputs", PROJECT: ".", Path(sys.prefix): "<python>"}
    folders |= {Path(sys.base_prefix): "<python>", Path.home(): "~"}
    for folder, name in sorted(folders.items(), key=lambda p: -len(str(p[0]))):
        if len(folder.parts) > 2:  # `/` or `/usr` would match unrelated paths
            prefix = "" if name == "." else f"{name}/"
            value = value.replace(f"{folder}/", prefix)
            value = re.sub(re.escape(str(folder)) + r"(?![\w.-])", name, value)
    return value


START_ATTEMPTS = 3  # where a kernel has TCP ports, another can take one before it does


class JobFailed(Exception):
    """A job's notebook failed; the message is for the terminal."""

    def __init__(self, text: str):
        super().__init__(safe_message(text))


def kernel(arguments: list[str]) -> None:
    """Become a Jupyter kernel that ends with the runner that started it."""
    die_with_parent(int(os.environ["JPY_PARENT_PID"]))
    sys.path.pop(0)  # `-m` put the working directory there
    from ipykernel.kernelapp import launch_new_instance

    quiet = ["--HistoryManager.enabled=False", "--IPKernelApp.log_level=CRITICAL"]
    launch_new_instance(argv=[*arguments, *quiet])


def _kernel_manager_class():
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisInterpreter(AsyncKernelManager):
        """Starts the job's own interpreter instead of an installed kernel.

        A TCP port that is free when it is chosen can be taken before the kernel binds it, since
        other kernels start at the same moment. Linux has socket names for that, which no two
        kernels share and which leave no file behind.
        """

        def __init__(self, **settings):
            if sys.platform == "linux":
                settings |= {"transport": "ipc", "ip": f"@study-{uuid.uuid4().hex}"}
            super().__init__(**settings)

        @property
        def kernel_spec(self) -> KernelSpec:
            start = [sys.executable, "-m", "helpers.workflow.cli", "kernel"]
            argv = [*start, "-f", "{connection_file}"]
            return KernelSpec(argv=argv, display_name="Python 3 (ipykernel)", language="python")

    return ThisInterpreter


def run_notebook(notebook: Path, output: Path, parameters: dict[str, str]) -> None:
    """Execute `notebook` with the parameters into `output`.

    Raises:
        JobFailed: a cell failed. `<output>.failed.ipynb` shows which; `output` does not exist.
    """
    running = output.with_name(f"{output.stem}.running.ipynb")
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    os.environ.update(JOB_ENVIRONMENT)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for old in (output, running):
            old.unlink(missing_ok=True)
        _execute(notebook, running, parameters)
        _publish(running, output)
        failed.unlink(missing_ok=True)
    except Exception as error:
        raise JobFailed(_reason(error) + _keep_failed(running, failed)) from error
    finally:
        running.unlink(missing_ok=True)


def _execute(notebook: Path, running: Path, parameters: dict[str, str]) -> None:
    import papermill

    for name in ("asyncio", "traitlets"):  # the job reports their errors itself
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            papermill.execute_notebook(
                notebook,
                running,
                parameters=parameters,
                cwd=PROJECT,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                kernel_manager_class=_kernel_manager_class(),
                shutdown_kernel="immediate",  # all is written; a graceful end takes seconds
            )
            return
        except RuntimeError as error:
            never_ran = "before replying to kernel_info" in str(error)
            if not never_ran or attempt == START_ATTEMPTS:
                raise


def _publish(running: Path, final: Path) -> None:
    text = cleaned_text(running)
    write_atomically(final, lambda path: path.write_text(text, encoding="utf-8"))


def _keep_failed(running: Path, failed: Path) -> str:
    """Keep the failed notebook if possible; returns a line that names it, or an empty text."""
    try:
        _publish(running, failed)
    except (OSError, ValueError):  # papermill wrote none, or the disk is full
        return ""
    return f"\nsee {relative_to_project(failed)}"


def _reason(error: Exception) -> str:
    """The error in one line; a StudyError without the exception's name."""
    from nbclient.exceptions import DeadKernelError

    if isinstance(error, DeadKernelError):
        return "the kernel died; most often the machine ran out of memory"
    name = getattr(error, "ename", type(error).__name__)
    value = str(getattr(error, "evalue", error)).strip()
    if name == StudyError.__name__:
        return value
    reason = f"{name}: {value.splitlines()[-1] if value else 'no message'}"
    return "; ".join(filter(None, (reason, remedy_for(f"{name} {value}"))))


HIDDEN = "hide-in-report"
# Figures carry what they show as their alternative text.
MARKDOWN_TEMPLATE = """
{%- extends 'markdown/index.md.j2' -%}
{%- block data_png %}
{%- set alt = (output | get_metadata('alt', 'image/png')) or 'figure' %}
![{{ alt }}]({{ output.metadata.filenames['image/png'] | path2url }})
{% endblock data_png -%}
"""


def export_report(notebook: Path, study: str, folder: Path) -> None:
    """Write report.md, report_files/ and report.html of an executed notebook to a folder."""
    import nbformat
    from nbconvert import HTMLExporter, MarkdownExporter

    from helpers.report.pages import report_page
    from helpers.study.loading import load_study

    content = _without_stderr(nbformat.read(notebook, as_version=4))
    title = one_line(load_study(study, with_sources=False).title)
    resources = {"metadata": {"name": title}}
    exporter = HTMLExporter(config=_config(), template_name="basic", exclude_anchor_links=True)
    body, _ = exporter.from_notebook_node(content, resources)
    html = report_page(_beside_the_report(body), title=title, narrow=_narrow_figures(content))
    exporter = MarkdownExporter(config=_config(), raw_template=MARKDOWN_TEMPLATE)
    markdown, extracted = exporter.from_notebook_node(
        content, resources | {"unique_key": "report", "output_files_dir": "report_files"}
    )
    markdown = _beside_the_report(re.sub(r"\n{4,}", "\n\n\n", markdown))
    shutil.rmtree(folder / "report_files", ignore_errors=True)
    for name, data in extracted.get("outputs", {}).items():
        write_atomically(folder / name, lambda path, data=data: path.write_bytes(data))
    write_atomically(folder / "report.html", lambda p: p.write_text(html, encoding="utf-8"))
    write_atomically(folder / "report.md", lambda p: p.write_text(markdown, encoding="utf-8"))


def _beside_the_report(text: str) -> str:
    """Links that lead from the executed notebook to the report's folder, as seen from there."""
    return text.replace(f"](../{ITEMS_PAGE})", f"]({ITEMS_PAGE})").replace(
        f'href="../{ITEMS_PAGE}"', f'href="{ITEMS_PAGE}"'
    )


def _narrow_figures(notebook) -> dict[str, str]:
    """Data address of each figure that has a form for phones, to that form's address."""
    from helpers.report.pages import NARROW

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    bundles = [output.data for output in outputs if NARROW in output.get("data", {})]
    address = "data:image/png;base64,"
    return {address + data[PNG].strip(): address + data[NARROW].strip() for data in bundles}


def _config():
    """nbconvert's configuration: a report shows no code."""
    from traitlets.config import Config

    config = Config()
    config.TemplateExporter.exclude_input = True
    config.TemplateExporter.exclude_input_prompt = True
    config.TemplateExporter.exclude_output_prompt = True
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_cell_tags = {HIDDEN}
    return config


def _without_stderr(notebook):
    """The notebook without output to stderr."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


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
