"""Where the loss lies, told from records: the right carrier, and no claim where there is none."""

import json
from types import SimpleNamespace

import pytest

from helpers.quantization.protection import Protection
from helpers.report import figures, sensitivity, tables
from helpers.report.checks.recomputed_chapters import wrong_records
from helpers.report.markdown import markdown_table
from helpers.study.schema import Variant


def study_of(left_float: list[dict], curve: list[dict] | None = None):
    """A study of one model and one quantized variant with these records."""
    record = {"left_float": left_float, "alpha": {"alphas": {}, "curve": curve or []}}
    quantization = {"results": {"losses": record}}
    variant = SimpleNamespace(variant="o3", quantization=quantization)
    return SimpleNamespace(
        models=["base"], compared=["o3"], compared_variants_of=lambda _: [variant]
    )


def row(label: str, kl: float | None) -> dict:
    return {"float": label, "linears": 1, "kl": kl, "top1_agreement": 0.9}


NAMED = "model.layers.3.mlp.down_proj"


def carrier(rows: list[dict]) -> dict[str, str]:
    """The only row of the table of carriers."""
    [found] = sensitivity.loss_carrier_rows(study_of(rows))
    assert (found["largest saving of KL"], found["model"]) == ("`o3`", "`base`")
    return found


def test_the_carrier_is_what_saves_most():
    found = carrier([row("nothing", 0.8), row("every q_proj", 0.7), row(NAMED, 0.2)])
    assert found["left in float"] == "3.mlp.down_proj"
    assert (found["KL as quantized"], found["KL then"], found["saved"]) == (
        "0.800",
        "0.200",
        "75 %",
    )


def test_without_a_carrier_none_is_named():
    found = carrier([row("nothing", 0.8), row("every q_proj", 0.8), row("every k_proj", 0.9)])
    assert (found["left in float"], found["saved"]) == ("none beyond chance", sensitivity.MISSING)


def test_what_saves_no_more_than_chance_moves_is_not_named():
    rows = [row("nothing", 0.8), row("every q_proj", 1.0), row(NAMED, 0.65)]  # 1.25, 1 / 1.23
    assert sensitivity.largest_chance_rise(study_of(rows)) == pytest.approx(0.25)
    assert carrier(rows)["left in float"] == "none beyond chance"
    text = sensitivity.loss_chapter(study_of(rows))[0].data
    assert "up to 1.25 times the first" in text
    assert "a saving of 20 %" in text
    rows[2] = row(NAMED, 0.63)  # 1 / 1.27
    assert carrier(rows)["left in float"] == "3.mlp.down_proj"


def test_a_saving_may_be_beyond_a_chance_that_more_than_doubles_a_loss():
    """No saving is above 100 %, so that rises and savings are compared as factors."""
    rows = [row("nothing", 0.8), row("every q_proj", 1.7), row(NAMED, 0.3)]
    assert carrier(rows)["left in float"] == "3.mlp.down_proj"


def test_the_chapter_has_a_curve_only_where_a_grid_was_tried():
    rows = [row("nothing", 0.8), row("every q_proj", 0.7)]
    assert len(sensitivity.loss_chapter(study_of(rows))) == 1
    curve = [{"alpha": a, "kl": k, "top1_agreement": 0.9} for a, k in ((0.3, 0.5), (0.8, 0.2))]
    parts = sensitivity.loss_chapter(study_of(rows, curve))
    assert len(parts) == 2
    assert "α = 0.8 (o3)" in sensitivity.alpha_figure_title({"o3": curve}, "base")


def test_optional_targets_have_a_line_of_their_own_and_are_named_where_they_win():
    rows = [(0.3, False, 0.5), (0.8, False, 0.2), (0.3, True, 0.1), (0.8, True, 0.4)]
    curve = [{"alpha": a, "optional": o, "kl": k, "top1_agreement": 0.9} for a, o, k in rows]
    title = sensitivity.alpha_figure_title({"o3": curve}, "base")
    assert title.endswith("α = 0.3 (o3, optional targets too)")
    figure = figures.kl_by_alpha({"o3": curve}, variants=["noquant", "o3"], title=title)
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["o3"] == [0.5, 0.2]
    assert lines["o3, optional targets too"] == [0.1, 0.4]


def test_what_is_not_finite_is_said_and_never_the_least():
    broken = [row("nothing", None), row("every q_proj", 0.7), row(NAMED, None)]
    assert carrier(broken)["KL as quantized"] == "not finite"
    assert sensitivity.largest_chance_rise(study_of(broken)) is None
    partly = [row("nothing", 0.8), row("every q_proj", None), row(NAMED, 0.2)]
    assert carrier(partly)["left in float"] == "3.mlp.down_proj"
    assert sensitivity.left_float_rows(study_of(partly))[1]["`o3`"] == sensitivity.MISSING
    only = [row("nothing", 0.8), row("every q_proj", None)]
    assert carrier(only)["left in float"] == "none beyond chance"
    curve = [{"alpha": 0.3, "kl": None}, {"alpha": 0.8, "kl": 0.2}]
    parts = sensitivity.loss_chapter(study_of(partly, curve))
    assert len(parts) == 2
    assert sensitivity.alpha_curves(study_of(partly, curve), "base") == {"o3": curve[1:]}


def test_a_record_without_probes_is_passed_over():
    assert sensitivity.loss_chapter(study_of([])) == []


def test_weights_and_activations_alone_are_told_apart_and_carry_nothing():
    """Their rows are no Linears left float: they raise no chance and are no carrier."""
    rows = [row("nothing", 0.8), row("every q_proj", 0.7), row("every activation", 0.1)]
    both = [*rows, row("every weight", 0.9)]
    assert carrier(both)["left in float"] == "every q_proj"
    study = study_of(both)
    assert sensitivity.largest_chance_rise(study) == pytest.approx(0)
    assert [r["left in float"] for r in sensitivity.left_float_rows(study)] == [
        "nothing",
        "every q_proj",
    ]
    (shares,) = sensitivity.decomposition_rows(study, "base")
    assert (shares["weights alone"], shares["activations alone"]) == ("0.100", "0.900")
    assert shares["not additive"] in ("-0.200", "−0.200")
    assert "Weights or activations" in sensitivity.loss_chapter(study)[0].data
    assert sensitivity.decomposition_rows(study_of(rows), "base") == []
    unknown = study_of([*rows, row("every weight", None)])
    assert sensitivity.decomposition_rows(unknown, "base") == []


CHOSEN = ["model.layers.0.self_attn.v_proj", "model.layers.10.mlp.down_proj"]
PROTECTED = {
    "bytes": 1000,
    "chosen_bytes": 29,
    "chosen": CHOSEN,
    "linears": {n: {"kl": 1e-4, "bytes": 10} for n in (*CHOSEN, "model.layers.1.mlp.up_proj")},
    "judging_items": [9],
    "other_items": [0, 1, 2],
    "kl": 0.02123,
    "kl_chosen": 0.01614,
    "random": [{"chosen": [], "kl": 0.0168 + 0.001 * i} for i in range(19)],
    "rank": 1,
}


@pytest.mark.bank("report", "a protected variant in a report: {case}", at="report.md")
@pytest.mark.parametrize(
    ("case", "shown", "instead"),
    [
        ("another Linear", "`0.self_attn.v_proj`", "`1.self_attn.v_proj`"),
        ("a Linear fewer", "`0.self_attn.v_proj`, ", ""),
        ("fewer bytes", "2.90 %", "1.90 %"),
        ("a lower KL", "0.0161", "0.0131"),
        ("a better rank", "1 of 20", "1 of 40"),
    ],
)
def test_the_choice_in_a_report_is_the_one_that_was_printed(tmp_path, case, shown, instead):
    study = study_of([])
    [variant] = study.compared_variants_of("base")
    variant.quantization["results"]["losses"]["protected"] = PROTECTED
    text = markdown_table(sensitivity.protection_rows(study))
    lines = [Protection(Variant(), PROTECTED).sentence]
    lines.append(tables.protected_table(PROTECTED).to_string())
    cell = {"outputs": [{"text": "\n".join(lines)}]}
    notebook = tmp_path / "02_quantization.base.o3.ipynb"
    notebook.write_text(json.dumps({"cells": [cell]}), "utf-8")
    assert wrong_records(text, None, tmp_path) == []
    changed = text.replace(shown, instead)
    assert changed != text
    [line] = wrong_records(changed, None, tmp_path)
    assert "protected Linears of base/o3" in line
