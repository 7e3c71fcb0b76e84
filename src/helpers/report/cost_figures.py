"""How fast each way of running a model reads and writes, drawn with spread and limit."""

from matplotlib.figure import Figure

from helpers.cost.results import ConfigurationResult, Cost
from helpers.report.figures import INK, QUIET, in_house_style, new_figure
from helpers.report.figures_comparison import variant_looks

PANELS = {"prefill": "reading [tokens / s]", "decode": "writing [tokens / s]"}


@in_house_style
def throughput_plot(cost: Cost, *, variants: list[str], title: str) -> Figure:
    """Tokens per second of every configuration: median, rounds, and the limit of its Linears.

    The bar beside a point is the reading speed if the Linears ran at the speed of the bare
    matrix product and all else took no time.
    """
    ways = cost.configurations
    figure, panels = new_figure(8.4, 1.5 + 0.36 * len(ways), ncols=2, sharey=True)
    looks = _configuration_looks(cost, variants)
    for axes, (quantity, label) in zip(panels, PANELS.items(), strict=True):
        for place, way in enumerate(ways):
            spread, (color, marker) = cost.measured(way, quantity), looks[way.name]
            axes.hlines(place, spread.low, spread.high, color=color, linewidth=3, alpha=0.5)
            axes.plot(spread.value, place, marker, color=color, markersize=6)
        axes.set_xlabel(label)
        axes.axvline(cost.measured(cost.reference, quantity).value, color=QUIET, linewidth=0.8)
    for place, way in enumerate(ways):
        if limit := cost.prefill_limit(way):
            color = looks[way.name][0]
            panels[0].vlines(limit, place - 0.32, place + 0.32, color=color, linewidth=2)
    for axes in panels:
        axes.set_xlim(left=0)
        axes.margins(x=0.06)
    panels[0].set_yticks(range(len(ways)), [_configuration_label(cost, way) for way in ways])
    panels[0].set_ylim(len(ways) - 0.4, -0.6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _configuration_label(cost: Cost, way: ConfigurationResult) -> str:
    return way.name if way.variant == cost.measurements["baseline"] else way.variant


def _configuration_looks(cost: Cost, variants: list[str]) -> dict[str, tuple[str, str]]:
    """Variants as in every figure of the study; the baseline in ink, its bfloat16 paler.

    A partial report may compare fewer variants than were measured: the others come last.
    """
    measured = [way.variant for way in cost.others]
    looks = variant_looks(list(dict.fromkeys([*variants, *measured])))
    looks_by_name = {way.name: looks[way.variant] for way in cost.others}
    return looks_by_name | {cost.reference.name: (INK, "o"), cost.bfloat16.name: ("#5b7a9d", "o")}
