"""Graded scores of a whole study, from its rows to the report, and held to the answers again."""

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from IPython.display import Markdown

import test_report
from helpers.core.errors import StudyError
from helpers.core.records import write_json
from helpers.report import cost_chapter, glance, graded_chapter, summary
from helpers.report.checks import recomputation, recomputed_graded_report
from helpers.report.checks.recomputation import recompute
from helpers.report.checks.recomputed_graded_report import (
    wrong_cards,
    wrong_graded_blocks,
    wrong_graded_cells,
)
from helpers.report.checks.recomputed_tables import RecomputedFigures
from helpers.report.graded_chapter import graded_blocks
from helpers.report.results import load_results
from helpers.statistics.checks.recomputed_graded_study import GradedBlocks
from helpers.statistics.checks.recomputed_verdicts import comparison_rows, read_answers
from helpers.statistics.graded_study import (
    ROUNDING_MOVES,
    GradedVerdict,
    PooledVerdict,
    graded_scores,
    graded_study,
)
from helpers.study.loading import load_study
from helpers.study.schema import Comparison, RotatedModel, Variant
from simulated_rows import option_rows, quantized, written_rows
from test_recompute import copy_of
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


def graded_makers(variants=VARIANTS, loss=PLANTED, noise=0.1, raised=0.0) -> dict:
    """Replacements for the rows of `test_report`, whose variants lose probability and no answer.

    Args:
        variants: in the order in which the study is written, model by model.
        loss: by variant, in nats; None for a copy of the baseline's rows.
        raised: what the second model loses more.
    """

    def rows_of(name, seed):
        model, variant = divmod(seed, len(variants))
        rng = np.random.default_rng(4)
        rows = option_rows(rng, 80, know=6.0) if name == "arc" else written_rows(rng, 60)
        own = loss.get(variants[variant], 0.0)
        if own is not None and variant:
            own += raised * bool(model)
            rows = quantized(rows, np.random.default_rng(seed), noise=noise, loss=own)
        return [complete(row, is_text=name != "arc") for row in rows]

    seeds = {name: iter(range(100)) for name in ("arc", "squad_v2")}
    return {
        "arc_rows": lambda rng, accuracy: rows_of("arc", next(seeds["arc"])),
        "squad_rows": lambda rng, accuracy: rows_of("squad_v2", next(seeds["squad_v2"])),
    }


@pytest.fixture
def graded_job(make_job, monkeypatch):  # noqa: F811
    """A function that makes a study with graded scores; its options are `graded_makers`'."""

    def make(**options):
        for name, rows in graded_makers(**options).items():
            monkeypatch.setattr(test_report, name, rows)
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


def test_a_comparison_is_judged_by_the_score_that_it_names(graded_job):
    """Its p is corrected over the comparisons of that score; both scores share the level."""
    results = load_results(graded_job())
    study = results.study
    (first, *_) = study.statistics.primary
    primary = [first, first.model_copy(update={"dataset": "squad_v2"})]
    for scores, judged_by_graded, factor in (
        (["graded", "graded"], 2, 1),
        (["accuracy", "accuracy"], 0, 1),
        (["graded", "accuracy"], 1, 2),
        ([None, None], 2, 2),
    ):
        declared = zip(primary, scores, strict=True)
        primaries = tuple(c.model_copy(update={"score": score}) for c, score in declared)
        statistics = study.statistics.model_copy(update={"primary": primaries})
        changed = study.model_copy(update={"statistics": statistics})
        judged = graded_study(changed, results.published.variants, results.verdicts)
        own = [v for v in judged.comparisons.values() if v.declared]
        assert len(own) == judged_by_graded
        if own:
            smallest = min(own, key=lambda v: v.comparison.p)
            expected = min(1.0, smallest.comparison.p * len(own) * factor)
            assert smallest.holm_p == pytest.approx(expected)


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


def titled(kinds: dict[str, str], pooled: dict[str, str]) -> str:
    """The title over variants a and b whose one comparison and pooled sets have these verdicts."""
    verdict = lambda kind: GradedVerdict(kind, "", SimpleNamespace(delta=-0.01), 0.03)  # noqa: E731
    of = lambda v: Comparison(model="m", dataset="arc", baseline="noquant", variant=v)  # noqa: E731
    graded = SimpleNamespace(
        comparisons={of(v): verdict(kind) for v, kind in kinds.items()},
        pooled={("m", v): PooledVerdict(("arc",), verdict(k), None) for v, k in pooled.items()},
    )
    study = SimpleNamespace(baseline="noquant")
    return graded_chapter.figure_title(
        SimpleNamespace(studied_variants=["a", "b"], graded=graded, study=study)
    )


@pytest.mark.parametrize(
    ("kinds", "pooled", "title"),
    [
        (("worse", "equivalent"), ("worse", "equivalent"), "a found worse in 1 comparison"),
        (("worse", "worse"), (), "a and b found worse in 2 comparisons"),
        (("equivalent", "inconclusive"), ("equivalent", "worse"), "b found worse in 1 comparison"),
        (("uninformative", "invalid"), (), "nothing can be said about a and b"),
        (("uninformative", "equivalent"), (), "no loss of b found"),
    ],
)
def test_the_figure_is_titled_by_what_was_found(kinds, pooled, title):
    made = titled(dict(zip("ab", kinds, strict=True)), dict(zip("ab", pooled, strict=False)))
    assert made.removesuffix(" of pooled sets") == f"Graded scores: {title}"


def test_rows_without_graded_fields_change_nothing(make_job):  # noqa: F811
    results = load_results(make_job())
    assert graded_blocks(results.graded) == {}
    (only,) = graded_chapter.chapter(results)
    assert "hold no log-probabilities" in only.data
    assert graded_chapter.cost_sentences(results) == []


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
def published(as_published, tmp_path, monkeypatch):
    """A copy of the published study; texts are read in another test."""
    from helpers.report.checks import recomputation as module

    monkeypatch.setattr(module, "_misread_answers", lambda *_: [])
    return copy_of(as_published, tmp_path / "copy", monkeypatch)[0]


@pytest.fixture(scope="module")
def as_published(tmp_path_factory):
    """The folder of a study with graded scores, its summary and the text of its report."""
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        for name, rows in graded_makers().items():
            patch.setattr(test_report, name, rows)
        publish(test_report.made_up_job(folder, patch))
    return folder


def publish(job) -> None:
    """Write the summary and the parts of the report that are read here."""
    results = load_results(job)
    summary.write_summary(results, job.paths.root)
    parts = [next(glance.sections(results))]
    pictures = [*glance.picture(results), *glance.right_or_wrong_picture(results)]
    parts += [f"![{picture.alt}](picture.png)" for picture in pictures]
    parts += [part.data for part in graded_chapter.chapter(results)]
    cost = cost_chapter.cost_chapter(results)
    parts += ["## 6. Cost and gain", *(part.data for part in cost if isinstance(part, Markdown))]
    report = "\n\n".join(["## Executive summary", *parts])
    (job.paths.root / "report.md").write_text(report, "utf-8")


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
        (r"(?m)^\| ARC .* \| `rtn_w8a8` \| `base` \| [+−]?\d+\.(\d)", "column Δ"),
        (r"(?m)^\| SQuAD v2 &.* `base` .* \| [+−]?\d+\.(\d) \[[^|]*\|$", "column Δ right or"),
        (r"(?m)^\| `base` \| `rtn_w8a8` \| ARC, SQuAD v2 \| [+−]?\d+\.(\d)", "column difference"),
        (r"(?m)^\| `base` \| `rtn_w8a8` \| ARC, SQuAD v2 \| .* \| \d+\.(\d) %", "column recovery"),
        (r"fine-tuned − start[^`]*\| `tuned` \| `rtn_w8a8` \| [+−]?\d+\.(\d)", "column ARC"),
        (r"losses above \d+\.(\d) points", "by graded scores"),
        (r"by score pooled, [^(]*\([+−]?\d+\.(\d)", "Does fine-tuning raise"),
        (r"Margins: ±(\d) points", "Option sets"),
        (r"(?m)^!\[.* pooled [+−]?\d+\.(\d) points", "![Graded scores"),
        (r"(?m)^!\[.* pooled [+−]?\d+\.\d points \([+−]?\d+\.(\d) to", "![Graded scores"),
        (r"(?m)^!\[Right or wrong.* ARC [+−]?\d+\.(\d) points", "![Right or wrong"),
        (r"(?m)^!\[Right or wrong.* points \([+−]?\d+\.(\d) to", "![Right or wrong"),
        (r"(?m)^!\[Right or wrong, \d+ declared comparisons?: (\d) ", "the title says"),
        (r"(?m)^!\[.* KL in nats a token: \S+ \d\.0*[1-9](\d)", "![Graded scores"),
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


@pytest.mark.bank("report", "a figure's title says otherwise", "make verdicts", at="report.md")
@pytest.mark.parametrize(
    "title",
    [
        "no loss of rtn_w8a8 found",
        "nothing can be said about rtn_w8a8",
        "smoothquant_w8a8 found worse in 1 comparison",
        "smoothquant_w8a8 found worse in 17 comparisons",
        "smoothquant_w8a8 is best",
    ],
)
def test_a_title_that_says_otherwise_is_named(published, title):
    path = published.paths.root / "report.md"
    text = path.read_text("utf-8")
    true = re.search(r"!\[Graded scores: (.*?)\. ", text)[1]
    assert differences(published) == []
    assert title != true
    edited = text.replace(f"![Graded scores: {true}.", f"![Graded scores: {title}.")
    path.write_text(edited, "utf-8")
    found = recompute(str(published.paths.root.parents[1] / "study.yaml"))[1]
    assert any("title" in line for line in found), (true, found)


@pytest.mark.bank("report", "an edited number or word in a card", "make verdicts", at="report.md")
def test_every_edited_part_of_a_card_is_named(published):
    """Each number of each card changed, and each word of its verdicts, one at a time."""
    path = published.paths.root / "report.md"
    text = path.read_text("utf-8")
    figures = recomputed_figures(published)
    assert list(wrong_cards(text, figures)) == []
    table = re.search(r"(?m)^\| at a glance.*\n((?:\|.*\n)+)", text)
    cells = [m for m in re.finditer(r"\d+|worse|equivalent|inconclusive|none", table[1])]
    rows = set()
    for part in cells:
        other = "better" if part[0].isalpha() else str((int(part[0]) + 3) % 10)
        at = table.start(1) + part.start()
        edited = text[:at] + other + text[at + len(part[0]) :]
        row = edited[edited.rindex("\n|", 0, at) :].split("|")[1].strip()
        if not edited[:at].rpartition("\n")[2].count("|") > 1:
            continue  # the row's name, which a number is part of
        rows.add(row)
        lines = list(wrong_cards(edited, figures))
        assert any(f", {row}: published" in line for line in lines), (row, part[0], lines)
    assert len(rows) >= 6, rows


def recomputed_figures(job, study=None) -> RecomputedFigures:
    """What the recomputation makes of a study's answers, read with its settings or others."""
    study = study or job.study
    stored = json.loads((job.paths.root / "summary.json").read_text("utf-8"))
    answers = read_answers(job.paths.root / "answers", study)
    p_values = recomputation._published_p_values(stored["comparisons"])
    return RecomputedFigures(answers, comparison_rows(study, answers.answers, p_values), stored)


def wrong_texts(text: str, figures: RecomputedFigures) -> list[str]:
    """Sentences and cells of tables that the answers contradict."""
    return [*recomputation.wrong_sentences(text, figures), *wrong_graded_cells(text, figures)]


def test_a_card_with_a_row_that_nobody_checks_is_named(published):
    text = (published.paths.root / "report.md").read_text("utf-8")
    edited = text.replace("| recovery |", "| happiness |", 1)
    lines = list(wrong_cards(edited, recomputed_figures(published)))
    assert any("card of base, smoothquant_w8a8, happiness: no check knows" in x for x in lines)


def test_the_answer_on_fine_tuning_turned_is_named(published):
    path = published.paths.root / "report.md"
    text = path.read_text("utf-8")
    turned = re.sub(r"(raise the cost\?\*\*) (?:Yes|No)\b", r"\1 By one of two measures", text)
    assert turned != text
    path.write_text(turned, "utf-8")
    assert any("Does fine-tuning raise" in line for line in differences(published))


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
    path.write_text(path.read_text("utf-8").replace("## 4. Graded scores", "## 4. Other"), "utf-8")
    assert any("no chapter on graded scores" in line for line in differences(published))


def rotated(results):
    """The same answers, of a study whose second model was rotated instead of trained."""
    source = RotatedModel(rotate={"start": "base", "rotations": ["r1"]})
    study = results.study.model_copy(update={"models": results.study.models | {"tuned": source}})
    made = {"rotations": results.training, "training": {}}
    return dataclasses.replace(results, study=study, **made)


@pytest.mark.parametrize(("raised", "kind"), [(-0.4, "better"), (0.4, "worse")])
def test_a_rotated_model_is_compared_with_its_start_as_a_fine_tuned_one_is(
    graded_job, raised, kind
):
    job = graded_job(loss=dict.fromkeys(VARIANTS, 0.4), raised=raised)
    trained = load_results(job)
    results = rotated(trained)
    assert results.graded.rotation == trained.graded.finetuning
    assert results.graded.finetuning == trained.graded.rotation == ()
    assert {cost.pooled.kind for cost in results.graded.rotation} == {kind}
    assert "rotation_cost" not in graded_blocks(trained.graded)

    summary.write_summary(trained, job.paths.root)
    figures = recomputed_figures(job, results.study)
    blocks = graded_blocks(results.graded)
    assert {row["rotated"] for row in blocks["rotation_cost"]} == {"tuned"}
    assert wrong_graded_blocks(blocks, figures) == []
    blocks["rotation_cost"][0]["kl"]["delta"] += 0.01
    [line] = wrong_graded_blocks(blocks, figures)
    assert "rotation_cost" in line

    [sentence] = glance.made_model_sentences(results)
    assert sentence.startswith("**Does rotation lower the cost?** ")
    text = "\n\n".join([sentence, *(part.data for part in graded_chapter.chapter(results))])
    assert wrong_texts(text, figures) == []
    for pattern, place in (
        (r"lower the cost\?\*\* (\w)", "Does rotation lower"),
        (r"by score pooled, [^(]*\([+−]?\d+\.(\d)", "Does rotation lower"),
        (r"rotated − start[^`]*\| `tuned` \| `rtn_w8a8` \| [+−]?\d+\.(\d)", "column ARC"),
    ):
        at = re.search(pattern, text).start(1)
        other = "4" if text[at] == "5" else "5"
        lines = wrong_texts(text[:at] + other + text[at + 1 :], figures)
        assert any(place in line for line in lines), (pattern, lines)


@pytest.mark.parametrize(
    ("kinds", "raised", "lowered"),
    [
        ([], "Nothing can be said", "Nothing can be said"),
        (["worse", "worse"], "Yes", "No"),
        (["better", "better"], "No", "Yes"),
        (["equivalent", "worse"], "By one of two measures", "No"),
        (["equivalent", "better"], "No", "By one of two measures"),
        (["worse", "better"], "By one of two measures", "By one of two measures"),
        (["equivalent", "equivalent"], "No", "No"),
        (["inconclusive", "equivalent"], "No increase was detected", "No decrease was detected"),
        (["inconclusive", "worse"], "By one of two measures", "No decrease was detected"),
        (["inconclusive", "better"], "No increase was detected", "By one of two measures"),
    ],
)
def test_an_answer_is_yes_or_no_only_if_both_measures_say_so(kinds, raised, lowered):
    assert graded_chapter.cost_answer(set(kinds), graded_chapter.RAISED) == raised
    assert graded_chapter.cost_answer(set(kinds), graded_chapter.LOWERED) == lowered
    assert recomputed_graded_report._higher_answer(kinds) == raised
    assert recomputed_graded_report._lower_answer(kinds) == lowered


def test_without_graded_scores_a_rotation_is_judged_by_the_kl_alone(make_job):  # noqa: F811
    results = rotated(load_results(make_job()))
    sentences = glance.made_model_sentences(results)
    assert len(sentences) == len(results.studied_variants)
    assert all("`tuned`" in s and "nats per token" in s for s in sentences)
    assert all(s.startswith("**Does rotation lower the cost?** ") for s in sentences)
