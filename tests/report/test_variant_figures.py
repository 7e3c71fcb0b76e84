"""Every variant is drawn in every figure that shows variants, with one colour and marker."""

import pytest
from matplotlib.colors import to_hex

from helpers.report import figures, glance
from helpers.report.cost_chapter import throughput_plot
from helpers.report.estimates import Cost
from made_up_cost import account

NINE = [f"variant_{letter}" for letter in "abcdefghi"]
SPAN = {"delta": 0.1, "low": 0.0, "high": 0.2, "kind": "exploratory", "filled": True}
FIGURE = {"models": ["m"], "margin": 0.05, "title": "", "stacked": False}


def forest(variants):
    rows = [SPAN | {"dataset": "arc", "model": "m", "variant": v} for v in variants]
    return glance.interval_plot(rows, [], [], variants=variants, focus=variants, **FIGURE)


def tokens(variants):
    """Intervals of one variant, and the KL of all."""
    rows = [SPAN | {"dataset": "arc", "model": "m", "variant": v} for v in variants]
    kl = [{"model": "m", "variant": v, "kl": 0.1, "low": 0.05, "high": 0.2} for v in variants]
    kl = [row | {"floor": False} for row in kl]
    options = FIGURE | {"stacked": True}
    return glance.interval_plot(rows, [], kl, variants=variants, focus=variants, **options)


def alphas(variants):
    curve = [{"alpha": a, "kl": 1.0 + a} for a in (0.2, 0.5, 0.8)]
    return figures.kl_by_alpha(dict.fromkeys(variants, curve), variants=variants, title="")


def errors(variants):
    curves = {name: {"as it is": {"0.q_proj": 30.0, "0.k_proj": 31.0}} for name in variants}
    return figures.sqnr_by_variant(curves, variants=variants, title="")


def drawn(figure) -> set[tuple[str, str]]:
    """(colour, marker) of what is drawn with one."""
    lines = [line for axes in figure.axes for line in axes.lines]
    return {(to_hex(x.get_color()), x.get_marker()) for x in lines}


@pytest.mark.parametrize("draw", [forest, tokens, alphas, errors])
@pytest.mark.parametrize("count", [1, 6, 7, 9])
def test_all_are_drawn_and_look_the_same_everywhere(draw, count):
    variants = NINE[:count]
    looks = set(figures.variant_looks(variants).values())
    assert len(looks) == count
    assert looks <= drawn(draw(variants))


@pytest.mark.parametrize("draw", [forest, tokens, alphas, errors])
def test_each_variant_has_its_own_look_in_every_figure(draw, monkeypatch):
    """One variant's data at a time: two that changed places would be seen."""
    looks = figures.variant_looks(NINE)
    for module in (figures, glance):
        monkeypatch.setattr(module, "variant_looks", lambda _: looks)
    for name in NINE:
        lines = [line for axes in draw([name]).axes for line in axes.lines if len(line.get_xdata())]
        own = {(to_hex(x.get_color()), x.get_marker()) for x in lines if x.get_marker() != "None"}
        assert looks[name] in own
        assert not own & (set(looks.values()) - {looks[name], (looks[name][0], "o")})


def test_thirty_six_variants_look_different():
    names = [str(i) for i in range(36)]
    assert len(set(figures.variant_looks(names).values())) == 36


def test_the_figure_of_costs_uses_the_studys_looks(study):
    """Where it measures some of the variants only, they keep their places in the study."""
    cost = Cost(account(study, "base"), {})
    measured = [way.variant for way in cost.others]
    study = ["not_measured", *measured]
    looks = figures.variant_looks(study)
    assert {looks[name] for name in measured} <= drawn(
        throughput_plot(cost, variants=study, title="")
    )


def test_a_partial_report_shows_the_cost_of_what_it_does_not_compare(study):
    cost = Cost(account(study, "base"), {})
    measured = [way.variant for way in cost.others]
    looks = drawn(throughput_plot(cost, variants=measured[1:], title=""))
    assert set(figures.variant_looks(measured).values()) <= looks
