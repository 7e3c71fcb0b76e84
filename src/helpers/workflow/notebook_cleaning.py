"""Makes an executed notebook fit to keep: no machine paths, no clock times, no rewritten lines,
small pictures.

Works on the notebook's JSON, so that it can be done, and tested, without Jupyter.
"""

import json
import re
import sys
from pathlib import Path

from helpers.core.paths import PROJECT, outputs_root
from helpers.workflow.notebook_pictures import reduce_palette

WIDGET = "application/vnd.jupyter.widget-view+json"
PNG = "image/png"
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
    cleaned: list[dict] = []
    for output in outputs:
        if WIDGET in output.get("data", {}):
            continue
        if PNG in output.get("data", {}):
            compressed = reduce_palette("".join(output["data"][PNG]))
            output = output | {"data": output["data"] | {PNG: compressed}}
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
