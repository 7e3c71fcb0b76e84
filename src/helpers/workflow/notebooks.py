"""Notebooks: executed as jobs, cleaned to be kept, exported as report.md and report.html.

papermill executes a notebook on this very interpreter, whatever kernels are installed, under a
temporary name that becomes the final one only on success; of a failure the notebook is kept beside
it. A job ends when the process that started it ends, however that ended, and its kernel with it.

What is kept has no machine paths, no clock times, no rewritten lines and small pictures. Cleaning
works on the notebook's JSON, so that it can be done, and tested, without Jupyter. A figure uses
few colours, and every one is kept three times (notebook, report.html, report_files): with a
palette it takes about a third of the bytes and looks the same.

The executed analysis is exported as report.md and a self-contained report.html, without code.
"""

import base64
import io
import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path

from helpers.core.errors import StudyError, one_line, remedy_for, safe_message
from helpers.core.files import PROJECT, outputs_root, relative_to_project, write_atomically
from helpers.core.processes import die_with_parent

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


JOB_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",  # whatever the locale is
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # silences the debugger's start-up warning
    "TOKENIZERS_PARALLELISM": "false",
}
START_ATTEMPTS = 3  # kernels starting at the same moment can pick the same port


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
        """Starts the job's own interpreter instead of an installed kernel."""

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
