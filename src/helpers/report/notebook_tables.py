"""Tables of the notebooks, as pandas frames made from plain numbers.

What a model wrote is shown as written: pandas escapes HTML, and here characters that act
on a terminal are replaced and formulas are left unrendered.
"""

import pandas as pd

from helpers.core.plain_text import one_line

# Looked up whenever a frame is shown: "$5 and $6" in an answer is no formula.
pd.set_option("display.html.use_mathjax", False)

METRICS = ("items", "accuracy", "macro_f1", "exact_match", "f1", "format_success")
METRICS += ("gold_nats_per_token", "foil_nats_per_token", "gold_above_foil")
SAMPLES = 2  # answers shown of each evaluation set: a look at their form, no evidence


def layer_maxima_table(rows: list[dict]) -> pd.DataFrame:
    """One row per Linear: largest channel, median channel, and their ratio."""
    frame = pd.DataFrame(rows).astype({"ratio": float})
    return frame.set_index("name").rename_axis(None).round(1)


def largest_channel_title(row: dict) -> str:
    """Title of the figure of channel maxima: the Linear with the largest ratio."""
    claim = f"{row['layer']}: channel {row['channel']} reaches {row['largest']:.0f}, "
    if row["ratio"] is None:
        return claim + "the median channel is 0"
    return claim + f"{row['ratio']:.0f}× the median channel"


def short_layer(name: str) -> str:
    """`model.layers.11.mlp.down_proj` as `11.mlp.down_proj`."""
    return name.removeprefix("model.layers.")


def checkpoint_bytes_table(before: dict[str, int], after: dict[str, int]) -> pd.DataFrame:
    """Bytes of each part of a model before and after, in MB, with the ratio."""
    frame = pd.DataFrame({"float [MB]": before, "variant [MB]": after}) / 1e6
    frame.loc["total"] = frame.sum()
    frame["ratio"] = frame["variant [MB]"] / frame["float [MB]"]
    return frame.round(3)


def before_and_after_table(values: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """One row per quantity: before, after, change."""
    frame = pd.DataFrame.from_dict(values, orient="index", columns=["before", "after"])
    frame["change"] = frame["after"] - frame["before"]
    return frame.round(4)


def sqnr_summary_table(curves: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Lowest, median and highest SQNR in dB over the Linears, and the name of the lowest."""
    rows = {}
    for name, values in curves.items():
        series = pd.Series(values)
        rows[name] = {
            "lowest [dB]": series.min(),
            "median [dB]": series.median(),
            "highest [dB]": series.max(),
            "lowest at": short_layer(series.idxmin()),
        }
    return pd.DataFrame.from_dict(rows, orient="index").round(1)


def worst_layer_title(curves: dict[str, dict[str, float]]) -> str:
    """Title of the SQNR figure: the Linear with the lowest SQNR."""
    name, values = list(curves.items())[-1]
    worst = min(values, key=values.get)
    return f"{name.capitalize()}, {short_layer(worst)} is the worst: {values[worst]:.1f} dB"


def alpha_table(choice) -> pd.DataFrame:
    """KL at every α of the grid, or the number of groups by α."""
    if choice.curve:
        return pd.DataFrame(choice.curve).set_index("alpha")
    counts = pd.Series(choice.alphas, dtype=float).value_counts().sort_index()
    return counts.rename("groups").rename_axis("alpha").to_frame()


def left_float_table(losses: list[dict]) -> pd.DataFrame:
    """KL as quantized, and with some Linears left in float."""
    return pd.DataFrame(losses, columns=["float", "linears", "kl", "top1_agreement"])


def gate_table(verified: dict) -> pd.DataFrame:
    """Each gate with its measured value and its limit."""
    frame = pd.DataFrame(verified["gates"])
    frame["passed"] = frame["passed"].map({True: "passes", False: "FAILS"})
    frame["measured"] = frame["measured"].map(one_line)  # it may quote an item's id
    return frame.rename(columns={"name": "gate", "passed": "result"}).set_index("gate")


def sample_answers_table(
    predictions: dict[str, list[dict]], *, each: int = SAMPLES
) -> pd.DataFrame:
    """The first answers of every evaluation set, as they were given."""
    columns = ["dataset", "golds", "output", "parsed", "status", "score"]
    rows = [
        {"dataset": name} | p
        for name, dataset_predictions in predictions.items()
        for p in dataset_predictions[:each]
    ]
    for row in rows:
        row["golds"] = one_line("; ".join(row["golds"]))
        row |= {key: one_line(row[key]) for key in ("output", "parsed") if row[key] is not None}
    return pd.DataFrame(rows)[columns]


def as_column(values: dict[str, float]) -> pd.DataFrame:
    """A mapping as a one-column table."""
    return pd.DataFrame.from_dict(values, orient="index", columns=["value"]).round(4)


def metric_table(metrics: dict[str, dict]) -> pd.DataFrame:
    """The main metrics, one row per evaluation set; empty if a set lacks one."""
    rows = {
        dataset: {name: values.get(name) for name in METRICS} for dataset, values in metrics.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").round(3)
