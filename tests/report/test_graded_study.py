"""Graded scores of a whole study, from its rows to the report, and held to the answers again."""

import json
import re

import numpy as np
import pytest

import test_report
from helpers.core.errors import StudyError
from helpers.core.records import write_json
from helpers.report import graded_chapter, summary
from helpers.report.checks.recomputation import recompute
from helpers.report.graded_chapter import graded_blocks
from helpers.report.results import load_results
from helpers.statistics.checks.recomputed_graded_study import GradedBlocks
from helpers.statistics.graded_study import ROUNDING_MOVES, graded_scores, graded_study
from helpers.study.loading import load_study
from helpers.study.schema import Comparison, Variant
from simulated_rows import option_rows, quantized, written_rows
from test_report import make_job  # noqa: F401 - a fixture

VARIANTS = ("noquant", "rtn_w8a8", "smoothquant_w8a8", "static")  # of the study
PLANTED = {"rtn_w8a8": 0.0, "smoothquant_w8a8": 0.35}  # loss in nats of the right answer


def complete(row: dict, *, is_text: bool) -> dict:
    """A simulated row with the fields of a prediction; every answer is right, whatever the loss."""
    gold = row["golds"][0]
    if is_text:  # noise may have lifted a short one above 0
        golds = [min(x, -0.001) for x in row["gold_loglikelihoods"]]
        row = row | {"gold_loglikelihoods": golds}
    fields = test_report.scored(row["id"], row["cluster"], row["golds"], gold, gold)
    if row["id"].endswith("7"):  # some are wrong, the same for every variant
        fields |= {"parsed": "wrong", "score": 0.0}
    foil = "another answer" if row.get("foil_tokens") else None
    extra = {"f1": fields["score"], "foil": foil, "gold_hash": "x"} if is_text else {}
    return fields | row | extra


@pytest.fixture
def graded_job(make_job, monkeypatch):  # noqa: F811
    """A function that makes a study whose variants lose probability and no answer.

    `loss` by variant; `copies` of the baseline's rows; `finetuned` loses `raised` more.
    """

    def make(loss=PLANTED, noise=0.1, raised=0.0):
        def rows_of(name, seed):
            model, variant = divmod(seed % 100, len(VARIANTS))
            rng = np.random.default_rng(4)
            rows = option_rows(rng, 80, know=6.0) if name == "arc" else written_rows(rng, 60)
            own = loss.get(VARIANTS[variant], 0.0)
            if own is not None and variant:
                own += raised * bool(model)
                rows = quantized(rows, np.random.default_rng(seed), noise=noise, loss=own)
            return [complete(row, is_text=name != "arc") for row in rows]

        seeds = iter(range(100))
        current = {}

        def arc_rows(rng, accuracy):
            current["seed"] = next(seeds)
            return rows_of("arc", current["seed"])

        monkeypatch.setattr(test_report, "arc_rows", arc_rows)
        monkeypatch.setattr(
            test_report, "squad_rows", lambda rng, accuracy: rows_of("squad_v2", current["seed"])
        )
        job = make_job()
        assert tuple(job.study.variants) == VARIANTS
        return job

    return make


def comparison(results, dataset: str, variant: str, model: str = "base"):
    baseline = results.study.baseline
    c = Comparison(model=model, dataset=dataset, baseline=baseline, variant=variant)
    return results.graded.comparisons[c]


def test_a_planted_loss_is_seen_by_graded_scores_and_not_by_accuracy(graded_job):
    results = load_results(graded_job())
    for dataset in ("arc", "squad_v2"):
        judged = comparison(results, dataset, "smoothquant_w8a8")
        assert judged.kind == "worse", dataset
        assert judged.comparison.delta < 0
    declared = [v for v in results.verdicts.values() if v.primary]
    assert {v.kind for v in declared} <= {"equivalent", "inconclusive"}
    assert all(v.paired.losses == v.paired.gains == 0 for v in declared)
    assert results.graded.pooled["base", "smoothquant_w8a8"].verdict.kind == "worse"
    assert results.graded.pooled["base", "smoothquant_w8a8"].recovery.interval.high < 1


def test_a_copy_of_the_baseline_differs_nowhere(graded_job):
    results = load_results(graded_job(loss=dict.fromkeys(VARIANTS)))
    for judged in results.graded.comparisons.values():
        assert judged.kind == "equivalent"
        assert judged.comparison.identical
        assert judged.comparison.delta == 0
    for pooled in results.graded.pooled.values():
        assert pooled.recovery.value == pytest.approx(1)
    for cost in results.graded.finetuning:
        assert cost.pooled.kind == "equivalent"


def test_one_cost_of_both_models_is_no_effect_of_fine_tuning(graded_job):
    results = load_results(graded_job(noise=0.0))
    assert {cost.pooled.kind for cost in results.graded.finetuning} == {"equivalent"}


def test_a_cost_that_only_the_fine_tuned_model_has_is_found(graded_job):
    results = load_results(graded_job(loss={}, raised=0.4))
    kinds = {cost.variant: cost.pooled.kind for cost in results.graded.finetuning}
    assert kinds == dict.fromkeys(VARIANTS[1:], "worse")


def test_where_rounding_alone_moves_a_score_nothing_is_said(graded_job):
    """`static` is made the noise floor: it loses on ARC and SQuAD v2 as much as the variant."""
    results = load_results(graded_job(loss=PLANTED | {"static": 0.35}))
    assert comparison(results, "arc", "smoothquant_w8a8").kind == "worse"
    variants = results.study.variants | {"static": Variant(dtype="bfloat16")}
    study = results.study.model_copy(update={"variants": variants})
    answers, verdicts = results.published.variants, results.verdicts
    judged = graded_study(study, answers, verdicts)
    assert set(judged.blind.values()) == {ROUNDING_MOVES}
    assert {v.kind for v in judged.comparisons.values()} == {"uninformative"}
    assert not judged.pooled
    rows = {c: {"verdict": v.kind, "reason": v.reason} for c, v in verdicts.items()}
    recomputed = GradedBlocks(study, answers, rows).blocks()
    reasons = {row["uninformative_because"] for row in recomputed["graded"]["abilities"]}
    assert reasons == {ROUNDING_MOVES}
    assert {c["verdict"] for c in recomputed["graded"]["comparisons"]} == {"uninformative"}
    assert recomputed["pooled"] == []


def test_a_noise_floor_inside_the_margin_takes_nothing_away(graded_job):
    results = load_results(graded_job(loss=PLANTED | {"static": 0.0}, noise=0.01))
    variants = results.study.variants | {"static": Variant(dtype="bfloat16")}
    study = results.study.model_copy(update={"variants": variants})
    judged = graded_study(study, results.published.variants, results.verdicts)
    assert set(judged.blind.values()) == {""}


def test_what_is_invalid_by_its_answers_is_invalid_here(graded_job):
    job = graded_job()
    test_report.break_gate(job, "base", "smoothquant_w8a8", "arc")
    results = load_results(job)
    assert comparison(results, "arc", "smoothquant_w8a8").kind == "invalid"
    assert comparison(results, "squad_v2", "smoothquant_w8a8").kind != "invalid"
    pooled = results.graded.pooled["base", "smoothquant_w8a8"]
    assert (pooled.verdict.kind, pooled.verdict.comparison, pooled.recovery) == (
        "invalid",
        None,
        None,
    )


def test_rows_without_graded_fields_change_nothing(make_job):  # noqa: F811
    results = load_results(make_job())
    assert graded_blocks(results.graded) == {}
    assert graded_chapter.chapter(results) == []
    assert graded_chapter.summary_bullets(results) == []


@pytest.mark.parametrize("margins", [{"probability": 0.0}, {"nats": -0.1}, {"points": 3.0}])
def test_margins_that_are_none_are_refused_by_name(write_study, study_settings, margins):
    study_settings["statistics"]["graded_margins"] = margins
    with pytest.raises(StudyError, match=f"statistics.graded_margins.{next(iter(margins))}"):
        load_study(write_study(study_settings))


def test_the_demo_states_the_margins_of_a_study_that_names_none(write_study, study_settings):
    assert "graded_margins" not in study_settings["statistics"]
    default = load_study(write_study(study_settings)).statistics.graded_margins
    assert default == load_study("demo").statistics.graded_margins


@pytest.mark.parametrize("field", ["logprobs", "option_bytes"])
def test_a_row_without_its_numbers_leaves_its_set_out(field):
    rows = option_rows(np.random.default_rng(1))
    assert graded_scores(rows, "bytes") is not None
    del rows[3][field]
    assert graded_scores(rows, "bytes") is None


def test_a_probability_that_is_not_finite_is_no_score():
    rows = option_rows(np.random.default_rng(1))
    rows[3]["logprobs"] = [float("nan"), *rows[3]["logprobs"][1:]]
    assert graded_scores(rows, "bytes") is None


@pytest.fixture
def published(graded_job, monkeypatch):
    """A study with its summary and the text of its report; texts are read in another test."""
    from helpers.report.checks import recomputation as module

    monkeypatch.setattr(module, "_misread_answers", lambda *_: [])
    job = graded_job()
    results = load_results(job)
    summary.write_summary(results, job.paths.root)
    parts = [part for part in graded_chapter.chapter(results) if hasattr(part, "data")]
    bullets = "\n".join(f"- {text}" for text in graded_chapter.summary_bullets(results))
    text = f"## Executive summary\n\n{bullets}\n\n### Controls\n\n"
    report = text + "\n\n".join(part.data for part in parts)
    (job.paths.root / "report.md").write_text(report, "utf-8")
    return job


def differences(job) -> list[str]:
    found = recompute(str(job.paths.root.parents[1] / "study.yaml"))[1]
    return [line for line in found if "no check" in line or _on_graded(line)]


def _on_graded(line: str) -> bool:
    words = ("graded", "pooled", "finetuning_cost", "Graded", "fine-tuning", "Fine-tuning", "row")
    return any(word in line for word in words)


def test_untouched_blocks_and_tables_are_as_published(published):
    assert differences(published) == []


def changed(value):
    return value + 0.011 if isinstance(value, float) else f"{value}x"


EDITS = {
    "graded comparison": (lambda s: s["graded"]["comparisons"][0], "delta", "delta"),
    "graded verdict": (lambda s: s["graded"]["comparisons"][1], "verdict", "verdict"),
    "ability": (lambda s: s["graded"]["abilities"][0], "mean", "mean"),
    "pooled": (lambda s: s["pooled"][0], "high", "high"),
    "recovery": (lambda s: s["pooled"][0]["recovery"], "low", "recovery, low"),
    "cost of a set": (lambda s: s["finetuning_cost"][0]["sets"]["arc"], "p", "arc, p"),
    "pooled cost": (lambda s: s["finetuning_cost"][0]["pooled"], "low", "pooled, low"),
    "KL": (lambda s: s["finetuning_cost"][1]["kl"], "equivalence_high", "kl, equivalence_high"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.bank(
    "report", "an edited graded number in the summary", "make verdicts", at="summary.json"
)
def test_an_edited_number_of_a_block_is_named(published, edit):
    part, key, place = EDITS[edit]
    path = published.paths.root / "summary.json"
    stored = json.loads(path.read_text("utf-8"))
    before = part(stored)[key]
    part(stored)[key] = changed(before)
    write_json(path, stored)
    (line,) = differences(published)
    assert place in line
    assert f"published {changed(before)!r}" in line


@pytest.mark.parametrize(
    ("pattern", "place"),
    [
        (r"(?m)^\| `base` \| `rtn_w8a8` \| [+−]?\d+\.(\d)", "column ARC"),
        (r"(?m)^\| `base` \| `rtn_w8a8` \| ARC, SQuAD v2 \| [+−]?\d+\.(\d)", "column difference"),
        (r"(?m)^\| `base` \| `rtn_w8a8` \| ARC, SQuAD v2 \| .* \| \d+\.(\d) %", "column recovery"),
        (r"fine-tuned − start[^`]*\| `tuned` \| `rtn_w8a8` \| [+−]?\d+\.(\d)", "column ARC"),
        (r"losses above \d+\.(\d) points", "Graded scores of"),
        (r"by score pooled, [^(]*\([+−]?\d+\.(\d)", "Fine-tuning and the cost"),
        (r"Margins: ±(\d) points", "Option sets"),
    ],
)
@pytest.mark.bank(
    "report", "an edited graded number in the report", "make verdicts", at="report.md"
)
def test_an_edited_number_of_the_report_is_named(published, pattern, place):
    path = published.paths.root / "report.md"
    text = path.read_text("utf-8")
    digit = re.search(pattern, text)
    assert digit, pattern
    other = str((int(digit[1]) + 3) % 10)
    path.write_text(text[: digit.start(1)] + other + text[digit.end(1) :], "utf-8")
    found = recompute(str(published.paths.root.parents[1] / "study.yaml"))[1]
    assert any(place in line for line in found), found


def test_a_verdict_turned_in_the_table_is_named(published):
    path = published.paths.root / "report.md"
    text = path.read_text("utf-8")
    assert "**worse**" in text
    path.write_text(text.replace("**worse**", "equivalent", 1), "utf-8")
    assert any("recomputed" in line and "worse" in line for line in differences(published))


def test_a_summary_without_any_block_is_named(published):
    path = published.paths.root / "summary.json"
    stored = json.loads(path.read_text("utf-8"))
    for block in ("graded", "pooled", "finetuning_cost"):
        stored.pop(block, None)
    write_json(path, stored)
    assert "summary.json has no graded scores, and the answers have" in differences(published)


def test_a_report_without_the_chapter_is_named(published):
    path = published.paths.root / "report.md"
    path.write_text(path.read_text("utf-8").replace("## Graded scores", "## Other"), "utf-8")
    assert any("no chapter on graded scores" in line for line in differences(published))
