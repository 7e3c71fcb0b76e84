"""One table, one picture and one JSON file of all comparisons."""

from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from benchmarks.turns import Comparison
from helpers.core.files import write_atomically
from helpers.core.records import write_json
from helpers.report.figures import ALARM, INK, QUIET, in_house_style, new_figure

HEADER = ("what", "ours", "peer", "ours took", "peer took", "ratio", "rounds", "goal", "answers")


def write(folder: Path, machine: dict, rows: list[Comparison], *, took_s: float) -> None:
    """Write report.md, bench.json and ratios.png; the folder is created if necessary."""
    machine = machine | {"took_s": round(took_s)}
    write_json(folder / "bench.json", {"machine": machine, "comparisons": list(map(_plain, rows))})
    write_atomically(folder / "ratios.png", lambda p: ratios(rows).savefig(p, format="png"))
    text = markdown(machine, rows)
    write_atomically(folder / "report.md", lambda p: p.write_text(text, encoding="utf-8"))


def _plain(row: Comparison) -> dict:
    return {
        "what": row.what,
        "ours": row.ours,
        "peer": row.peer,
        "unit": row.unit,
        "ours_spent": [round(x, 4) for x in row.ours_spent],
        "peer_spent": [round(x, 4) for x in row.peer_spent],
        "ratios": [round(x, 4) for x in row.ratios],
        "goal": row.goal,
        "reached": row.reached,
        "agreement": row.agreement.text,
        "agrees": row.agreement.holds,
    }


def markdown(machine: dict, rows: list[Comparison]) -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    peaks = ", ".join(f"{kind} {value}" for kind, value in machine["gemm_peak_gops"].items())
    lines = [
        "# How fast, beside what others use",
        "",
        "Made by `make bench`, in one run, each way in turns with its peer. Ratio: what the peer "
        "took over what ours took, the middle of the rounds, and in brackets the least and the "
        "most of any. Seconds drift with the machine; "
        "ratios hold better. The model is the demo study's, its items, prompts and caps too.",
        "",
        f"Machine: {machine['cores']} cores ({machine['threads']} threads used), "
        f"{machine['architecture']} with {', '.join(machine['cpu_features']) or 'no extensions'}, "
        f"{machine['memory_gb']} GB. The best matrix product reaches, in billions of operations "
        f"a second: {peaks}. The whole took {machine['took_s']} s. "
        f"Versions: {versions}.",
        "",
        "![ratios](ratios.png)",
        "",
        f"| {' | '.join(HEADER)} |",
        "| :--- | :--- | :--- | ---: | ---: | ---: | ---: | :--- | :--- |",
        *map(_line, rows),
    ]
    return "\n".join(lines) + "\n"


def _line(row: Comparison) -> str:
    cells = [row.what, row.ours, row.peer, _spent(row.ours_spent, row.unit)]
    cells += [_spent(row.peer_spent, row.unit), _ratio(row), str(len(row.ratios) or "–")]
    cells += [_goal(row), _agrees(row)]
    return f"| {' | '.join(cells)} |"


def _spent(spent: list[float], unit: str) -> str:
    return f"{median(spent):.3g} {unit}" if spent else "–"


def _ratio(row: Comparison) -> str:
    if row.ratio is None:
        return "–"
    low, high = min(row.ratios), max(row.ratios)
    spread = f" [{low:.2f}, {high:.2f}]" if len(row.ratios) > 1 else ""
    return f"{row.ratio:.2f}×{spread}"


def _goal(row: Comparison) -> str:
    if row.goal is None:
        return "–"
    return f"≥ {row.goal:.2g}× {({True: '✓', False: '✗ missed', None: 'not run'})[row.reached]}"


def _agrees(row: Comparison) -> str:
    mark = {True: "✓ ", False: "✗ differ: ", None: ""}[row.agreement.holds]
    return mark + row.agreement.text


@in_house_style
def ratios(rows: list[Comparison]) -> Figure:
    """One bar per comparison: the ratio, its range over the rounds, and the goal as a tick."""
    shown = [row for row in rows if row.ratio is not None][::-1]
    figure, axes = new_figure(9, 0.42 * len(shown) + 1)
    for place, row in enumerate(shown):
        axes.barh(place, row.ratio, color=INK if row.reached is not None else QUIET, height=0.6)
        axes.hlines(place, min(row.ratios), max(row.ratios), color="black", linewidth=1)
        if row.goal:
            axes.vlines(row.goal, place - 0.4, place + 0.4, color=ALARM, linewidth=2)
        axes.annotate(
            f"{row.ratio:.2f}×",
            (max(row.ratio, *row.ratios), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    labels = [f"{row.what}:\n{row.ours} / {row.peer}" for row in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="peer / ours; the red tick is the goal", title="How many times less ours takes")
    axes.margins(x=0.08, y=0.01)
    return figure
