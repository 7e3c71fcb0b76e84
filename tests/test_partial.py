"""A report of what is complete: the largest whole part, with all that is missing named."""

import itertools

import pytest

import toy_project
from helpers.core.errors import StudyError
from helpers.report import chapters
from helpers.statistics.comparison import VariantPredictions
from helpers.statistics.verdicts import study_verdicts
from helpers.study import stages
from helpers.study.partial import folder, part_of, wanted_part
from helpers.study.schema import Study
from helpers.study.stages import Run

STUDY = Study.model_validate(toy_project.STUDY)
ALL = set(stages.runs(STUDY))


def part(*missing: Run):
    return part_of(STUDY, ALL - set(missing))


def test_a_complete_study_is_whole():
    complete = part()
    assert complete.study == STUDY
    assert complete.missing == ()


def test_a_variant_that_is_missing_everywhere_is_left_out():
    gone = [Run("quantization", m, "smooth") for m in STUDY.models]
    gone += [Run("evaluation", m, "smooth") for m in STUDY.models]
    complete = part(*gone)
    assert list(complete.study.variants) == ["noquant", "rtn"]
    assert list(complete.study.models) == ["base", "tuned"]
    assert set(complete.missing) == {f"{r.stage} {r.model} {r.variant}" for r in gone}


def test_a_model_whose_baseline_is_missing_is_left_out_and_its_rest_is_named():
    complete = part(Run("evaluation", "tuned", "noquant"))
    assert list(complete.study.models) == ["base"]
    assert "evaluation tuned noquant" in complete.missing
    assert "evaluation tuned rtn (complete, but not what it is compared with)" in complete.missing


def test_a_missing_measurement_of_cost_is_named_and_leaves_out_nothing():
    complete = part(Run("cost", "base"))
    assert complete.study == STUDY
    assert complete.missing == ("cost base",)
    assert Run("cost", "base") not in complete.runs


def test_a_trained_model_is_not_shown_without_what_it_was_trained_from():
    with pytest.raises(StudyError, match="no model's calibration and baseline are complete"):
        part(Run("calibration", "base"))


def test_one_gap_among_many_models_costs_one_model_and_no_variant():
    data = toy_project.STUDY | {"models": {f"m{i}": {"random": "llama"} for i in range(5)}}
    study = Study.model_validate(data | {"statistics": data["statistics"] | {"primary": []}})
    complete = part_of(study, set(stages.runs(study)) - {Run("evaluation", "m3", "rtn")})
    assert list(complete.study.models) == ["m0", "m1", "m2", "m4"]
    assert list(complete.study.variants) == list(study.variants)


def test_whatever_is_missing_the_part_is_whole_and_the_rest_is_named():
    for count in (1, 2, 3):
        for gone in itertools.combinations(sorted(ALL, key=lambda r: r.name), count):
            try:
                complete = part(*gone)
            except StudyError:
                continue
            needed = {run for run in stages.runs(complete.study) if run.stage != "cost"}
            assert needed <= set(complete.runs)
            assert not set(complete.runs) & set(gone)
            assert STUDY.baseline in complete.study.variants
            assert len(complete.missing) == len(ALL - set(complete.runs))
            assert {f"{r.stage} {r.model} {r.variant}".strip() for r in gone} <= set(
                complete.missing
            )


def answers(right: int) -> list[dict]:
    rows = []
    for i in range(60):
        row = {"id": f"i{i}", "cluster": "", "prompt_hash": "h", "golds": [f"{i % 3}"]}
        row |= {"parsed": f"{i % 3 if i < right else 7}", "score": float(i < right)}
        rows.append(row | {"status": "answered", "finish_reason": "scored", "output": ""})
    return rows


def test_no_verdict_on_what_is_missing_and_no_easier_test_for_the_rest():
    """Holm's family stays the declared comparisons: a missing one counts with p = 1."""
    pairs = [
        {"model": "base", "dataset": "arc", "baseline": "noquant", "variant": v}
        for v in ("rtn", "smooth")
    ]
    declared = toy_project.STUDY["statistics"] | {"primary": pairs}
    study = Study.model_validate(toy_project.STUDY | {"statistics": declared})
    verdicts_by_place = {
        ("base", "arc", name): VariantPredictions(name, answers(right))
        for name, right in (("noquant", 55), ("rtn", 48), ("smooth", 49))
    }
    whole = study_verdicts(study, verdicts_by_place)
    del verdicts_by_place["base", "arc", "smooth"]
    some = study_verdicts(study, verdicts_by_place)
    first, second = study.statistics.primary
    assert set(whole) - set(some) >= {second}
    assert some[first].primary
    assert some[first].holm_p == min(1.0, 2 * some[first].paired.p)
    assert some[first].holm_p >= whole[first].holm_p


def test_what_is_missing_is_named_first():
    assert chapters.notice(()) == []
    [warning] = chapters.notice(("evaluation base `x`", "calibration tuned"))
    assert warning.data.startswith("**This report is partial.**")
    assert "- evaluation base &#96;x&#96;\n- calibration tuned" in warning.data


def test_a_partial_report_is_asked_for_by_yes_or_no(study_path):
    from helpers.study.study_run import open_job

    job = open_job(study_path)
    whole = wanted_part(job, partial="no")
    assert (whole.of(job), whole.missing) == (job, ())
    assert folder(job.paths, partial="no") == job.paths.root != folder(job.paths, partial="yes")
    with pytest.raises(StudyError, match="partial = 'some' is neither yes nor no"):
        wanted_part(job, partial="some")
    with pytest.raises(StudyError, match="run make study"):
        wanted_part(job, partial="yes")
