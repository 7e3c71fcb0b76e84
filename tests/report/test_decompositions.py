"""Weights or activations: the parts of a loss add up, and a second program finds each number."""

import json
from dataclasses import replace

import numpy as np
import pytest

import test_report
from helpers.core.records import read_json, write_json
from helpers.report import graded_chapter, summary
from helpers.report.checks import recomputation
from helpers.report.results import load_results
from helpers.statistics.recipe_parts import PARTS, rulers_of
from simulated_rows import option_rows, quantized
from test_draws_report import NAME, study_path
from test_graded_study import complete
from test_report import make_job  # noqa: F401 - a fixture

RULERS = {"weights_alone": "w8a16", "activations_alone": "a8"}
DRAWS = 2


@pytest.fixture
def parted_job(make_job, monkeypatch):  # noqa: F811
    """A study with two draws of an int8 variant and of both its rulers."""

    def arc_rows(rng, accuracy):
        rows = option_rows(np.random.default_rng(4), 80, know=6.0)
        return [complete(row, is_text=False) for row in quantized(rows, rng, noise=0.2)]

    def change(settings):
        ours = settings["variants"][NAME] | {"repeats": DRAWS}
        variants = {v: ours | {"preset": p} for v, p in RULERS.items()}
        settings["variants"] = {"noquant": {}, NAME: ours, **variants}
        settings["models"] = {"base": settings["models"]["base"]}
        primary = settings["statistics"]["primary"]
        settings["statistics"]["primary"] = [
            c for c in primary if (c["model"], c["variant"]) == ("base", NAME)
        ]

    monkeypatch.setattr(test_report, "arc_rows", arc_rows)
    monkeypatch.setattr(recomputation, "_misread_answers", lambda *_: [])
    job = make_job(change)
    for seed, model in enumerate(job.study.models):
        for number, variant in enumerate((NAME, *RULERS)):
            paths = replace(job.paths, draw=2, drawn=variant)
            of_draw = replace(job, paths=paths, draw=2).of_option_sets
            if not number:  # one calibration for all three
                test_report.write_calibration(of_draw, model, 902.0, None)
            test_report.write_quantization(of_draw, model, variant, True)
            test_report.write_evaluation(of_draw, model, variant, 50 + seed + 7 * number, 0.8, 0.1)
            checkpoint = f"checkpoint of {variant}, draw 2"
            path = paths.variant(model, variant) / "verification.json"
            write_json(path, read_json(path, made_by="") | {"checkpoint": checkpoint})
            path = paths.evaluation(model, variant) / "record.json"
            record = read_json(path, made_by="")
            record["inputs"]["variant"], record["parameters"]["draw"] = checkpoint, 2
            write_json(path, record)
    return job


@pytest.fixture
def published(parted_job):
    """A study with its summary and chapters, as the analysis leaves them."""
    results = load_results(parted_job)
    summary.write_summary(results, parted_job.paths.root)
    parts = [
        *graded_chapter.chapter(results),
        *graded_chapter.draws_chapter(results),
        *graded_chapter.decompositions_chapter(results),
    ]
    text = "\n\n".join(part.data for part in parts if hasattr(part, "data"))
    (parted_job.paths.root / "report.md").write_text(text, "utf-8")
    return parted_job


def lines_on_parts(job) -> list[str]:
    """What the recomputation says of weights and activations."""
    lines = recomputation.recompute(study_path(job))[1]
    return [line for line in lines if "decompositions" in line or "Weights or" in line]


def test_the_parts_add_up_in_every_draw(parted_job):
    results = load_results(parted_job)
    measures = [(one.model, one.measure) for one in results.decompositions]
    assert measures == [(m, k) for m in results.models for k in ("graded score", "KL")]
    for one in results.decompositions:
        assert (one.weights, one.activations) == tuple(RULERS)
        both, weights, activations, rest = (np.array(one.parts[part].draws) for part in PARTS)
        assert len(both) == DRAWS
        np.testing.assert_allclose(weights + activations + rest, both, atol=1e-12)
        for part in one.parts.values():
            assert part.low < part.draws[0] < part.high


def test_the_whole_is_the_pooled_difference_of_the_graded_chapter(parted_job):
    results = load_results(parted_job)
    pooled = results.graded.pooled["base", NAME]
    one = next(d for d in results.decompositions if d.measure == "graded score")
    assert set(one.sets) <= set(pooled.sets)
    if one.sets == pooled.sets:
        assert one.parts["both"].draws[0] == pytest.approx(pooled.verdict.comparison.delta)


@pytest.mark.parametrize(
    "change",
    [
        {"smooth": None, "repeats": 1},
        {"rounding": "gptq"},
        {"kv": "int8"},
        {"ignore": ["lm_head", "down_proj"]},
    ],
)
def test_a_variant_that_differs_in_more_has_no_rulers(parted_job, change):
    study = load_results(parted_job).study
    assert rulers_of(study, NAME) == tuple(RULERS)
    other = study.variants[NAME].model_copy(update=change)
    variants = study.variants | {NAME: other}
    assert rulers_of(study.model_copy(update={"variants": variants}), NAME) is None


def test_a_failed_ruler_is_said_and_nothing_is_apart(parted_job):
    path = parted_job.paths.evaluation("base", "weights_alone") / "gates.json"
    gates = read_json(path, made_by="")
    gates["gates"][0]["passed"] = gates["passed"] = False
    write_json(path, gates)
    results = load_results(parted_job)
    broken = [one for one in results.decompositions if one.model == "base"]
    assert all(one.parts == {} for one in broken)
    assert all(one.reason.startswith("weights_alone failed a check") for one in broken)
    assert graded_chapter.decompositions_table(results)[0]["both"] == "–"


def test_the_numbers_follow_from_the_answers(published):
    assert lines_on_parts(published) == []


@pytest.mark.bank(
    "report", "an edited part of a loss", "make verdicts", at="summary.json, decompositions"
)
def test_every_edited_number_is_named(published):
    path = published.paths.root / "summary.json"
    data = json.loads(path.read_text("utf-8"))
    for row in data["decompositions"]:
        row["parts"]["weights"]["low"] += 0.01
        row["parts"]["not_additive"]["draws"][1] += 0.01
    write_json(path, data)
    lines = lines_on_parts(published)
    assert sum("weights, low" in line for line in lines) == len(data["decompositions"])
    assert sum("not_additive, draws 2" in line for line in lines) == len(data["decompositions"])


@pytest.mark.bank(
    "report", "an edited cell of weights and activations", "make verdicts", at="report.md"
)
def test_every_edited_cell_is_named(published):
    path = published.paths.root / "report.md"
    text = path.read_text("utf-8")
    chapter = text.index("## Weights or activations")
    row = next(
        line for line in text[chapter:].splitlines() if "graded scores" in line and "|" in line
    )
    number = row.split("|")[5].strip().split(" ")[0]
    edited = row.replace(number, "+77.7", 1)
    path.write_text(text.replace(row, edited), "utf-8")
    assert any("weights alone" in line for line in lines_on_parts(published))
