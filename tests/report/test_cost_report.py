"""The chapter on cost says what the rounds say, and what is odd about them."""

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from helpers.core.errors import StudyError
from helpers.core.records import read_json, write_json
from helpers.report import cost_chapter, glance, summary
from helpers.report.checks.recomputed_graded_report import multiplying_as
from helpers.report.estimates import Cost
from helpers.report.results import load_results
from helpers.study.loading import load_study
from made_up_cost import account, write_cost
from test_report import make_job, record, whole_report

__all__ = ["make_job"]  # a fixture


@pytest.fixture
def costs(study):
    """make(edit): the made-up cost of the tests' study, edited."""

    def make(edit=lambda measurements: None) -> Cost:
        measurements = account(study, "base")
        edit(measurements)
        return Cost(measurements, record={})

    return make


def named(told: dict, name: str) -> dict:
    return next(w for w in told["ways"] if w["name"] == name)


def test_ratios_are_taken_round_by_round(costs):
    """Each round of the other is half as long, however long the rounds themselves are."""

    def slow_second_round(seconds):
        named(seconds, "noquant float32")["prefill_s"] = [1.0, 9.0, 1.0]
        named(seconds, "rtn_w8a8 float32")["prefill_s"] = [0.5, 4.5, 0.5]

    cost = costs(slow_second_round)
    configuration = next(w for w in cost.others if w.variant == "rtn_w8a8")
    ratio = cost.ratio(configuration, "prefill", cost.reference)
    assert (ratio.value, ratio.low, ratio.high) == (2, 2, 2)
    measured = cost.measured(configuration, "prefill")
    assert (measured.value, measured.low, measured.high) == (2000, 1000 / 4.5, 2000)
    assert "**The machine was not quiet**" in cost_chapter.measurement_note(cost)


def test_the_gain_is_told_in_bytes_and_tokens_a_second(costs):
    lines = cost_chapter.gain_bullets(costs())
    line = next(x for x in lines.splitlines() if "`rtn_w8a8`" in x)
    assert "40.1 % of `noquant`'s bytes on disk" in line  # 2,008,000 of 5,008,000
    assert "its Linears take 26.5 % of float32's memory" in line
    assert "reads 1,818 tokens per second, faster than float32 (2.00×)" in line
    assert "within the spread of bfloat16" in line
    assert "slower" not in lines
    assert "not quiet" not in cost_chapter.measurement_note(costs())


def test_a_slower_variant_is_called_slower(costs):
    cost = costs(lambda told: named(told, "rtn_w8a8 float32").update(prefill_s=[2.0, 2.4, 2.2]))
    line = next(x for x in cost_chapter.gain_bullets(cost).splitlines() if "`rtn_w8a8`" in x)
    assert "**slower than float32** (0.50×)" in line
    assert "**slower than bfloat16**" in line


def test_what_was_not_measured_is_named_with_its_reason(costs):
    lines = cost_chapter.gain_bullets(
        costs(lambda lines: lines.update(left_out={"x": "runs in float"}))
    )
    assert "- `x` runs in float; it was not measured." in lines


def test_a_processor_without_units_is_said_to_save_memory_only(costs):
    def multiplies(units: str, products: str):
        how = {"processor": "AVX2", "int8_units": units, "bfloat16_products": products}
        return lambda told: told.update(arithmetic=how | {"int8_products": "float32 in blocks"})

    lacking = cost_chapter.arithmetic_note(
        costs(multiplies("no", "float32, rounded to bfloat16 once"))
    )
    assert "no int8 units: int8 saves memory here, not time" in lacking
    assert "int8 products are computed as float32 in blocks, exactly" in lacking
    assert "no bfloat16 units: bfloat16 is multiplied in float32" in lacking
    whole = cost_chapter.arithmetic_note(costs(multiplies("yes", "bfloat16")))
    assert "has int8 units" in whole
    assert "no " not in whole
    assert cost_chapter.arithmetic_note(costs()) == ""  # records from before it was noted


def test_a_simulation_is_called_one(costs):
    changes = {"simulated": True, "arithmetic": "float32"}
    cost = costs(lambda told: named(told, "rtn_w8a8 float32").update(changes))
    assert "`rtn_w8a8` (int8 simulated in float32)" in cost_chapter.gain_bullets(cost)
    row = next(r for r in cost_chapter.limit_table(cost) if r["variant"] == "`rtn_w8a8`")
    assert row["Linears multiply in"] == "int8 simulated in float32"


def test_the_limit_is_the_best_product_and_more_than_it_is_said_to_be_odd(costs):
    cost = costs()
    assert cost.peak(cost.reference).high == 100e9
    assert cost.peak_fraction(cost.reference) == pytest.approx(40e9 / (0.8 * 1.1) / 100e9)
    assert "exceeded the measured limit" not in cost_chapter.limit_note(cost)
    faster = costs(lambda told: told["peaks"].update(float32=[30e9, 30e9, 30e9]))
    assert "`noquant` float32 exceeded the measured limit" in cost_chapter.limit_note(faster)


def test_a_device_without_a_product_or_without_timed_linears_has_gaps(costs):
    def elsewhere(seconds):
        seconds["peaks"]["int8"] = [None, None, None]
        for w in seconds["ways"]:
            w["linears_s"] = [None, None, None]

    cost = costs(elsewhere)
    assert "no product in int8" in cost_chapter.limit_note(cost)
    row = next(r for r in cost_chapter.limit_table(cost) if r["variant"] == "`rtn_w8a8`")
    assert {row["bare product [GOP/s]"], row["time in Linears"]} == {"–"}
    assert cost_chapter.model_section(
        cost, [configuration.variant for configuration in cost.others]
    )


def test_a_study_without_the_measurement_reports_and_names_it_missing(make_job):
    job = make_job()
    with_it = summary.summary(load_results(job))
    (job.paths.cost("base") / "record.json").unlink()
    results = load_results(job)
    assert "The cost of `base` was not measured" in whole_report(results)
    assert summary.summary(results) == with_it  # durations are not among the results


def test_durations_change_nothing_in_the_summary(make_job):
    job = make_job()
    before = summary.summary(load_results(job))

    def slower(told):
        for w in told["ways"]:
            w["prefill_s"] = [3 * s for s in w["prefill_s"]]

    write_cost(job, "base", record("cost", {"model": "base"}, {}, {}), slower)
    assert summary.summary(load_results(job)) == before


def test_a_trained_model_shares_the_cost_of_its_start(make_job):
    assert "`tuned` has the same shapes as the model it was trained from" in whole_report(
        load_results(make_job())
    )


def test_a_cost_of_other_files_is_refused(make_job):
    job = make_job()
    path = job.paths.cost("base") / "record.json"
    record = read_json(path, made_by="")
    record["inputs"]["static"] = "files of something else"
    write_json(path, record)
    with pytest.raises(StudyError, match="base: the cost of static was measured on other files"):
        load_results(job)


def test_the_chapter_needs_no_torch():
    code = "import sys, helpers.report.cost_chapter; print('torch' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "False"


def test_a_study_that_leaves_cost_out_says_so(make_job):
    def leave_out(settings):
        settings["runtime"]["cost"] = False

    results = load_results(make_job(leave_out))
    report = whole_report(results)
    assert results.costs == {}
    assert "This study measures neither speed nor memory" in report
    assert "has the same shapes as the model it was trained from" not in report
    assert "`make study` measures it" not in report


def test_variants_that_multiply_alike_have_the_speed_of_the_one_that_was_measured():
    measured = SimpleNamespace(variant="smoothquant_best")
    ratio = lambda _way, _quantity, _against: SimpleNamespace(value=2.0)  # noqa: E731
    cost = SimpleNamespace(others=[measured], reference=None, ratio=ratio)
    cost.multiplying_as = partial(Cost.multiplying_as, cost)
    results = SimpleNamespace(study=load_study("recipes"), costs={"base": cost})

    def told(variant: str) -> str:
        return glance._speeds(results, SimpleNamespace(model="base", variant=variant))

    assert told("smoothquant_best") == told("smoothquant_gptq") == told("rtn_w8a8") != ""
    others = ("o3_down", "smoothquant_protected", "smoothquant_kv8", "w4a16", "noquant_bf16")
    assert {told(variant) for variant in others} == {""}
    alike = set(multiplying_as(results.study, "smoothquant_gptq"))
    assert {"smoothquant_best", "rtn_w8a8"} < alike
    assert alike & set(others) == {"smoothquant_kv8"}  # its Linears do
    assert multiplying_as(results.study, "smoothquant_kv8") == []


def test_what_was_measured_and_a_partial_report_lacks_is_passed_over():
    measured = [SimpleNamespace(variant=name) for name in ("o3", "smoothquant_best")]
    study = load_study("recipes")
    recipes = {name: recipe for name, recipe in study.variants.items() if name != "o3"}
    way = Cost.multiplying_as(SimpleNamespace(others=measured), "rtn_w8a8", recipes)
    assert way is measured[1]
