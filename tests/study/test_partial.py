"""A report of what is complete: the largest whole part, with all that is missing named."""

import itertools

import pytest

import toy_project
from helpers.core.errors import StudyError
from helpers.report import chapters
from helpers.statistics.verdicts import VariantPredictions, study_verdicts
from helpers.study import stages
from helpers.study.schema import Study
from helpers.study.stages import Run, largest_complete_part, part_to_report, report_folder

STUDY = Study.model_validate(toy_project.STUDY)
ALL = set(stages.runs(STUDY))


def part(*missing: Run):
    return largest_complete_part(STUDY, ALL - set(missing))


def test_a_complete_study_is_whole():
    whole_part = part()
    assert whole_part.study == STUDY
    assert whole_part.missing == ()


def test_a_variant_that_is_missing_everywhere_is_left_out():
    gone = [Run("quantization", m, "smooth") for m in STUDY.models]
    gone += [Run("evaluation", m, "smooth") for m in STUDY.models]
    remaining = part(*gone)
    assert list(remaining.study.variants) == ["noquant", "rtn"]
    assert list(remaining.study.models) == ["base", "tuned"]
    assert set(remaining.missing) == {f"{r.stage} {r.model} {r.variant}" for r in gone}


def test_a_model_whose_baseline_is_missing_is_left_out_and_its_rest_is_named():
    remaining = part(Run("evaluation", "tuned", "noquant"))
    assert list(remaining.study.models) == ["base"]
    assert "evaluation tuned noquant" in remaining.missing
    assert "evaluation tuned rtn (complete, but not what it is compared with)" in remaining.missing


def test_a_missing_measurement_of_cost_is_named_and_leaves_out_nothing():
    remaining = part(Run("cost", "base"))
    assert remaining.study == STUDY
    assert remaining.missing == ("cost base",)
    assert Run("cost", "base") not in remaining.runs


def test_a_trained_model_is_not_shown_without_what_it_was_trained_from():
    with pytest.raises(StudyError, match="no model's calibration and baseline are complete"):
        part(Run("calibration", "base"))


def test_one_gap_among_many_models_costs_one_model_and_no_variant():
    data = toy_project.STUDY | {"models": {f"m{i}": {"random": "llama"} for i in range(5)}}
    study = Study.model_validate(data | {"statistics": data["statistics"] | {"primary": []}})
    remaining = largest_complete_part(
        study, set(stages.runs(study)) - {Run("evaluation", "m3", "rtn")}
    )
    assert list(remaining.study.models) == ["m0", "m1", "m2", "m4"]
    assert list(remaining.study.variants) == list(study.variants)


def test_whatever_is_missing_the_part_is_whole_and_the_rest_is_named():
    for count in (1, 2, 3):
        for gone in itertools.combinations(sorted(ALL, key=lambda r: r.name), count):
            try:
                remaining = part(*gone)
            except StudyError:
                continue
            needed = {run for run in stages.runs(remaining.study) if run.stage != "cost"}
            assert needed <= set(remaining.runs)
            assert not set(remaining.runs) & set(gone)
            assert STUDY.baseline in remaining.study.variants
            assert len(remaining.missing) == len(ALL - set(remaining.runs))
            assert {f"{r.stage} {r.model} {r.variant}".strip() for r in gone} <= set(
                remaining.missing
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
    made = {
        ("base", "arc", name): VariantPredictions(name, answers(right))
        for name, right in (("noquant", 55), ("rtn", 48), ("smooth", 49))
    }
    whole = study_verdicts(study, made)
    del made["base", "arc", "smooth"]
    some = study_verdicts(study, made)
    first, second = study.statistics.declared("accuracy")
    assert set(whole) - set(some) >= {second}
    assert some[first].primary
    assert some[first].holm_p == min(1.0, 4 * some[first].paired.p)  # graded scores judge too
    assert some[first].holm_p >= whole[first].holm_p


def test_what_is_missing_is_named_first():
    assert chapters.notice(()) == []
    [shown] = chapters.notice(("evaluation base `x`", "calibration tuned"))
    assert shown.data.startswith("**This report is partial.**")
    assert "- evaluation base &#96;x&#96;\n- calibration tuned" in shown.data


def test_a_partial_report_is_asked_for_by_yes_or_no(study_path):
    from helpers.study.loading import open_job

    job = open_job(study_path)
    whole = part_to_report(job, partial="no")
    assert (whole.of(job), whole.missing) == (job, ())
    assert (
        report_folder(job.paths, partial="no")
        == job.paths.root
        != report_folder(job.paths, partial="yes")
    )
    with pytest.raises(StudyError, match="partial = 'some' is neither yes nor no"):
        part_to_report(job, partial="some")
    with pytest.raises(StudyError, match="run make study"):
        part_to_report(job, partial="yes")
