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
    """An executed notebook's file as it is to be kept."""
    cleaned = clean_notebook(json.loads(path.read_text("utf-8")))
    return json.dumps(cleaned, indent=1, ensure_ascii=False) + "\n"


def clean_notebook(notebook: dict) -> dict:
    """The notebook without machine paths, clock times and what widgets leave behind."""
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
    about = {k: v for k, v in metadata["papermill"].items() if k in PAPERMILL_KEEPS}
    return metadata | {"papermill": about}


def _clean_outputs(outputs: list[dict]) -> list[dict]:
    kept: list[dict] = []
    for output in outputs:
        if WIDGET in output.get("data", {}):
            continue
        if PNG in output.get("data", {}):
            smaller = reduce_palette("".join(output["data"][PNG]))
            output = output | {"data": output["data"] | {PNG: smaller}}
        if output["output_type"] != "stream":
            kept.append(without_machine_paths(output))
            continue
        text = "".join(output["text"])  # a string or a list of lines
        if kept and kept[-1].get("name") == output["name"]:
            text = kept.pop()["text"] + text
        kept.append(output | {"text": text})
    for output in kept:
        if output["output_type"] == "stream":
            text = without_machine_paths(final_line_states(output["text"]))
            output["text"] = text.splitlines(keepends=True)
    return kept


def final_line_states(text: str) -> str:
    """What a terminal shows at the end: of a line rewritten in place, its last state."""
    text = text.replace("\x1b[A", "").replace("\r\n", "\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def without_machine_paths(value):
    """The same data, its strings with this machine's folders by name instead of by path."""
    if isinstance(value, dict):
        return {k: without_machine_paths(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_machine_paths(v) for v in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"/\S*/ipykernel_\d+/\d+\.py", "<cell>", value)
    places = {outputs_root(): "outputs", PROJECT: ".", Path(sys.prefix): "<python>"}
    places |= {Path(sys.base_prefix): "<python>", Path.home(): "~"}
    for place, name in sorted(places.items(), key=lambda p: -len(str(p[0]))):
        if len(place.parts) > 2:  # not `/` or `/usr`: too little to tell a path by
            inside = "" if name == "." else f"{name}/"
            value = value.replace(f"{place}/", inside)
            value = re.sub(re.escape(str(place)) + r"(?![\w.-])", name, value)
    return value
