"""The largest channel against the median one: exact where it is defined, and never infinite."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.core.files import PROJECT
from helpers.core.records import Record
from helpers.quantization import calibration, channel_maxima, smoothing
from helpers.report import figures, tables
from helpers.sources.models import FloatStage

NOTEBOOK = PROJECT / "notebooks" / "01_calibration.ipynb"


@pytest.mark.parametrize("channels", [1, 2, 5, 64])
def test_the_ratio_is_the_largest_channel_in_median_channels(channels):
    absmax = np.random.default_rng(channels).uniform(0.5, 9, channels).astype("float32")
    maxima = channel_maxima.channel_maxima(absmax)
    in_order = sorted(map(float, absmax))
    assert absmax[maxima.channel] == maxima.largest == in_order[-1]
    middle = in_order[(channels - 1) // 2] + in_order[channels // 2]
    assert maxima.ratio * middle / 2 == pytest.approx(maxima.largest)


@pytest.mark.parametrize("values", [[0, 0, 0, 7], [0, 0, 3], [0, 0]])
def test_a_median_channel_of_zero_has_no_ratio(values):
    maxima = channel_maxima.channel_maxima(np.array(values, "float32"))
    assert (maxima.largest, maxima.median, maxima.ratio) == (max(values), 0, None)


def test_inputs_without_a_ratio_come_last_and_there_is_a_first_in_any_case():
    absmax = {"dead": [0, 0, 0], "a": [1, 2, 8], "sparse": [0, 0, 5], "b": [1, 2, 9]}
    rows = channel_maxima.layer_maxima({n: np.array(v, "float32") for n, v in absmax.items()})
    assert [row["name"] for row in rows] == list(absmax)
    order = [row["name"] for row in channel_maxima.by_ratio(rows)]
    assert order == ["b", "a", "sparse", "dead"]
    none = channel_maxima.by_ratio([row for row in rows if row["ratio"] is None])
    assert none[0]["name"] == "sparse"
    assert "the median channel is 0" in tables.largest_channel_title(none[0])


def cells_after(start: str) -> list[str]:
    """Code cells of the notebook from the one that begins so on."""
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return code[next(i for i, cell in enumerate(code) if cell.startswith(start)) :]


@pytest.mark.parametrize("where", ["one Linear", "every Linear"])
def test_the_notebook_records_a_model_with_dead_channels(model, tmp_path, where):
    """An MLP most of whose channels never fire, as pruning or ReLU leave it; or all norms 0."""
    with torch.no_grad():
        layer = model.model.layers[1].mlp
        layer.up_proj.weight[: 3 * len(layer.up_proj.weight) // 4] = 0
        if where == "every Linear":
            for parameter in model.parameters():
                parameter.zero_()
    tokens = [[5, 6, 7, 8], [9, 10, 11]]
    statistics = calibration.run_calibration(model, tokens, batch_tokens=64)
    study = SimpleNamespace(enable_thinking=None, variants={})
    job = SimpleNamespace(study=study, paths=SimpleNamespace(root=tmp_path))
    record = Record(tmp_path / "calibration", stage="calibration", parameters={})
    space = {
        "absmax": calibration.as_arrays(statistics),
        "describe_template": lambda *_, **__: {},
        "calibration": calibration,
        "channel_maxima": channel_maxima,
        "smoothing": smoothing,
        "figures": figures,
        "item_ids": lambda _: [],
        "items": [],
        "network": model,
        "tables": tables,
        "run": FloatStage(job=job, record=record, tokenizer=None, source=tmp_path),
        "statistics": statistics,
        "tokens": tokens,
    }
    for cell in cells_after("maxima ="):
        exec(cell, space)
    written = json.loads((tmp_path / "calibration" / "record.json").read_text())["results"]
    ratios = {row["name"]: row["ratio"] for row in written["maxima"]}
    dead = "model.layers.1.mlp.down_proj"
    assert ratios[dead] is None
    assert [r for r in written["worst_layers"] if r["ratio"] is not None] == sorted(
        (r for r in written["maxima"] if r["ratio"] is not None), key=lambda r: -r["ratio"]
    )[: channel_maxima.WORST]
    undefined = {name for name, ratio in ratios.items() if ratio is None}
    assert undefined == (set(ratios) if where == "every Linear" else {dead})
