"""A verdict is withheld from garbage, from ties and from what nobody declared beforehand."""

import pytest

from helpers.core.errors import StudyError
from helpers.evaluation.scoring import best_fixed_answer
from helpers.statistics.intervals import detectable_mean_difference, mcnemar_exact
from helpers.statistics.verdicts import (
    DecisionRules,
    VariantPredictions,
    decide_verdict,
    invalid_reason,
    paired_comparison,
    study_verdicts,
    uninformative_reason,
)
from helpers.study.loading import load_study

RULES = DecisionRules(confidence=0.95, power=0.8, margin=0.05, resamples=2000, seed=7, family=1)
LABELS = "ABCD"


def choices(right: list[bool], *, cluster=None) -> list[dict]:
    """Multiple-choice predictions, right where told, on golds that take turns."""
    rows = []
    for i, good in enumerate(right):
        gold, wrong = LABELS[i % 4], LABELS[(i + 1 + i // 4 % 3) % 4]
        answer = gold if good else (wrong if wrong != gold else LABELS[(i + 1) % 4])
        rows.append(
            {
                "id": f"item-{i:04d}",
                "cluster": cluster(i) if cluster else f"item-{i:04d}",
                "golds": [gold],
                "parsed": answer,
                "status": "answered",
                "finish_reason": "scored",
                "score": float(answer == gold),
                "prompt_hash": f"hash-{i}",
            }
        )
    return rows


def reading(kinds: list[str], *, golds: list[list[str]]) -> list[dict]:
    """SQuAD predictions: `right`, `wrong`, `abstained` or `unparsed`."""
    rows = []
    for i, (kind, gold) in enumerate(zip(kinds, golds, strict=True)):
        status = kind if kind in ("abstained", "unparsed") else "answered"
        parsed = {"right": gold[0] if gold else "", "wrong": f"no {i}"}.get(kind)
        score = float(kind == "right" or (kind == "abstained" and not gold))
        row = {"id": f"q{i}", "cluster": f"q{i}", "golds": gold, "parsed": parsed}
        row |= {"status": status, "finish_reason": "stop", "prompt_hash": "h", "score": score}
        rows.append(row)
    return rows


def verdict_of(before, after, *, adapter="arc", holm_p=None, problem=None, rules=RULES):
    """The verdict as a study would reach it, for one declared comparison."""
    sides = VariantPredictions("noquant", before), VariantPredictions("variant", after, problem)
    paired = paired_comparison(*sides, rules, alpha=rules.alpha)
    invalid = invalid_reason(adapter, *sides, rules)
    uninformative = uninformative_reason(adapter, sides[0], rules)
    p = paired.p if holm_p is None else holm_p
    return decide_verdict(paired, invalid, uninformative, p, rules)


def mostly(n: int, wrong: range) -> list[bool]:
    return [i not in wrong for i in range(n)]


def test_a_clear_loss_is_worse_and_its_mirror_better():
    strong, weak = choices(mostly(100, range(0, 20))), choices(mostly(100, range(0, 50)))
    assert verdict_of(strong, weak).kind == "worse"
    assert verdict_of(weak, strong).kind == "better"


def test_identical_answers_are_equivalent_only_where_there_are_enough_of_them():
    many, few = choices(mostly(100, range(20))), choices(mostly(20, range(4)))
    assert verdict_of(many, many).kind == "equivalent"
    verdict = verdict_of(few, few)
    assert verdict.kind == "inconclusive"
    assert verdict.reason == "identical answers on all 20 items"


def test_equal_scores_of_different_answers_are_not_called_identical():
    before, after = choices(mostly(100, range(20))), choices(mostly(100, range(20)))
    after[0]["parsed"] = next(
        x for x in LABELS if x not in (after[0]["parsed"], *after[0]["golds"])
    )
    verdict = verdict_of(before, after)
    assert (verdict.paired.losses, verdict.paired.gains) == (0, 0)
    assert not verdict.reason


def test_no_difference_comes_with_the_smallest_loss_that_would_have_been_found():
    before, after = choices(mostly(100, range(20))), choices(mostly(100, range(3, 29)))
    verdict = verdict_of(before, after)
    assert verdict.kind == "inconclusive"
    assert 0.05 < verdict.paired.detectable < 0.25


def test_the_test_decides_and_not_the_interval():
    """Five losses of twelve: Tango's interval excludes 0, exact McNemar does not reject."""
    before, after = choices(mostly(12, range(0))), choices(mostly(12, range(5)))
    verdict = verdict_of(before, after)
    assert verdict.paired.interval.high < 0
    assert verdict.paired.p > 0.05
    assert verdict.kind == "inconclusive"


@pytest.mark.parametrize(
    ("items", "exceptions", "invalid"),
    [
        (20, 0, False),
        (20, 1, False),
        (20, 5, False),  # 2 × ½⁵ = 6 %: all lost and none gained may be chance
        (20, 6, True),  # 2 × ½⁶ = 3 %
        (20, 20, True),
        (200, 5, False),
        (200, 6, True),  # few beside the rest, and still no chance
        (12, 3, False),
        (12, 4, True),  # a third of the answers is no exception
    ],
)
def test_one_answer_is_invalid_unless_the_baseline_nearly_gives_it_too(items, exceptions, invalid):
    golds = [[f"gold {i}"] for i in range(items)]
    same = [row | {"parsed": "no", "score": 0.0} for row in reading(["wrong"] * items, golds=golds)]
    others = [row | {"parsed": f"other {i}"} for i, row in enumerate(same[:exceptions])]
    before = VariantPredictions("noquant", [*others, *same[exceptions:]])
    verdict = invalid_reason("openmath", before, VariantPredictions("variant", same), RULES)
    assert (verdict == "it gives the same answer to every question") == invalid


def test_one_answer_that_is_not_the_baselines_is_invalid():
    golds = [[f"gold {i}"] for i in range(20)]
    rows = [row | {"score": 0.0} for row in reading(["wrong"] * 20, golds=golds)]
    yes, no = ([row | {"parsed": word} for row in rows] for word in ("yes", "no"))
    sides = VariantPredictions("noquant", yes), VariantPredictions("variant", no)
    reason = invalid_reason("openmath", *sides, RULES)
    assert reason == "it gives the same answer to every question"


def test_a_failed_check_is_invalid_whatever_the_scores_say():
    weak, strong = choices(mostly(100, range(50))), choices(mostly(100, range(10)))
    verdict = verdict_of(weak, strong, problem="quantized layers as declared (3 of 4 Linears)")
    assert verdict.kind == "invalid"
    assert "quantized layers as declared" in verdict.reason
    assert verdict.holm_p is None


def test_a_failed_check_of_the_baseline_is_no_result_either():
    sides = (
        VariantPredictions("rtn", choices([True] * 40), "quantized layers as declared"),
        VariantPredictions("v", choices([True] * 40)),
    )
    assert "rtn" in invalid_reason("arc", *sides, RULES)


HALF = [["gold"] if i % 2 else [] for i in range(20)]
FLOAT = ["right" if i == 1 else "wrong" for i in range(20)]  # exact match 5 %


@pytest.mark.parametrize("said", ["unparsed", "abstained"])
def test_silence_that_scores_on_unanswerable_questions_is_invalid_never_better(said):
    """The report this project redoes: 5 % → 50 % for a model that emits nothing."""
    before, after = reading(FLOAT, golds=HALF), reading([said] * 20, golds=HALF)
    verdict = verdict_of(before, after, adapter="squad_v2")
    assert verdict.kind == "invalid"
    assert verdict.holm_p is None
    if said == "abstained":  # significance alone would have certified it
        assert verdict.paired.delta == pytest.approx(0.45)
        assert mcnemar_exact(verdict.paired.losses, verdict.paired.gains) < 0.05


def test_logits_that_are_not_finite_are_invalid():
    before, after = choices(mostly(100, range(20))), choices(mostly(100, range(20)))
    after[3]["finish_reason"] = "nonfinite"
    assert "not finite" in verdict_of(before, after).reason


def test_a_variant_no_better_than_a_fixed_answer_is_invalid_if_the_baseline_is_better():
    before, after = choices(mostly(100, range(20))), choices(mostly(100, range(5, 100)))
    verdict = verdict_of(before, after)
    assert verdict.kind == "invalid"
    assert "always answering" in verdict.reason


def test_a_baseline_no_better_than_a_fixed_answer_says_nothing_about_the_variant():
    """Even where the variant scores significantly less."""
    before, after = choices(mostly(100, range(28, 100))), choices(mostly(100, range(8, 100)))
    verdict = verdict_of(before, after)
    assert verdict.paired.p < 0.001
    assert verdict.kind == "uninformative"
    assert "noquant itself" in verdict.reason


def test_a_baseline_that_is_seldom_readable_measures_the_format():
    kinds = ["right"] * 9 + ["unparsed"] * 11
    before = reading(kinds, golds=[["gold"]] * 20)
    assert "readable" in uninformative_reason(
        "squad_v2", VariantPredictions("noquant", before), RULES
    )


def test_fixed_answers_see_through_label_styles_and_number_styles():
    digits = [{"golds": [x]} for x in ("1", "1", "A", "2", "C")]
    assert best_fixed_answer("arc", digits).score == pytest.approx(3 / 5)
    numbers = [{"golds": [x]} for x in ("12", "12.0", "3", "x+1")]
    assert best_fixed_answer("openmath", numbers).score == pytest.approx(2 / 4)
    empty = [{"golds": x} for x in ([], ["a"], [])]
    assert best_fixed_answer("squad_v2", empty).score == pytest.approx(2 / 3)


def test_other_items_are_refused_by_name():
    before, after = choices([True] * 10), choices([True] * 10)
    after[4]["id"] = "elsewhere"
    with pytest.raises(StudyError, match=r"different items .*elsewhere.*03_evaluation"):
        verdict_of(before, after)


def test_other_words_for_an_item_are_invalid_and_stop_nothing():
    before, after = choices([True] * 10), choices([True] * 10)
    after[4]["prompt_hash"] = "another"
    verdict = verdict_of(before, after)
    assert verdict.kind == "invalid"
    assert verdict.reason == "1 of its items had other prompts or tokens (item-0004)"


@pytest.mark.parametrize("cluster", [None, lambda i: f"passage {i // 3}"])
def test_the_order_of_items_changes_nothing(cluster):
    before = choices(mostly(60, range(12)), cluster=cluster)
    after = choices(mostly(60, range(8, 25)), cluster=cluster)
    assert verdict_of(before, after) == verdict_of(before[::-1], after[20:] + after[:20])


def test_flips_within_one_passage_are_one_observation():
    def cluster(i):
        return "one passage" if i < 20 else f"passage {i // 2}"

    before = choices(mostly(100, range(90, 100)), cluster=cluster)
    after = choices(mostly(100, [*range(12), *range(90, 100)]), cluster=cluster)
    verdict = verdict_of(before, after)
    assert mcnemar_exact(verdict.paired.losses, verdict.paired.gains) < 0.001
    assert verdict.paired.p == 1.0
    assert verdict.kind == "inconclusive"


def test_without_flips_shared_passages_count_as_the_independent_items():
    """Resampling shows no spread there; the interval is that of so many passages."""
    rows = choices(mostly(100, range(20)), cluster=lambda i: f"passage {i // 2}")
    alone = choices(mostly(50, range(10)))
    shared, single = verdict_of(rows, rows).paired, verdict_of(alone, alone).paired
    assert (shared.interval, shared.detectable) == (single.interval, single.detectable)


def test_the_detectable_loss_by_passage_is_that_of_the_noncentral_t():
    before = choices(mostly(80, range(12)), cluster=lambda i: f"passage {i // 2}")
    after = choices(mostly(80, range(5, 21)), cluster=lambda i: f"passage {i // 2}")
    verdict = verdict_of(before, after).paired
    from helpers.statistics.intervals import bootstrap_mean

    pairs = zip(before, after, strict=True)
    spread = bootstrap_mean(
        [a["score"] - b["score"] for b, a in pairs],
        [row["cluster"] for row in before],
        confidence=0.95,
        **RULES.random,
    )
    expected = detectable_mean_difference(
        spread.standard_error, clusters=spread.clusters, alpha=0.05, power=0.8
    )
    assert verdict.detectable == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def two_declared(study_settings, write_study):
    """A study of one model and one set of 100 items that declares two comparisons."""
    study_settings["models"].pop("tuned")
    datasets = study_settings["evaluation"]["datasets"]
    datasets.pop("squad_v2")
    study_settings["statistics"]["primary"] = [
        {"model": "base", "dataset": "arc", "baseline": "noquant", "variant": variant}
        | {"score": "accuracy"}
        for variant in ("rtn_w8a8", "smoothquant_w8a8")
    ]
    study_settings["variants"]["extra"] = {"preset": "o1"}
    return load_study(write_study(study_settings))


def judged(study, *, problem=None):
    before = choices(mostly(100, range(20)))
    after = choices(mostly(100, range(28)))  # 8 losses: p = 0.0078
    rows = {"noquant": before, "rtn_w8a8": after, "smoothquant_w8a8": after, "extra": after}
    problems = {"rtn_w8a8": problem}
    answers = {
        ("base", "arc", name): VariantPredictions(name, dataset_rows, problems.get(name))
        for name, dataset_rows in rows.items()
    }
    return {c.variant: v for c, v in study_verdicts(study, answers).items()}


def test_holm_runs_over_the_declared_comparisons(two_declared):
    verdicts = judged(two_declared)
    for name in ("rtn_w8a8", "smoothquant_w8a8"):
        assert verdicts[name].holm_p == pytest.approx(2 * verdicts[name].paired.p)
        assert verdicts[name].kind == "worse"


def test_where_graded_scores_judge_too_both_share_the_level(two_declared):
    """Half of the level each: p is doubled, and doubled again."""
    verdicts = judged(with_scores(two_declared, None, "accuracy"))
    for name in ("rtn_w8a8", "smoothquant_w8a8"):
        assert verdicts[name].holm_p == pytest.approx(4 * verdicts[name].paired.p)


def test_what_graded_scores_alone_judge_has_no_verdict_by_right_or_wrong(two_declared):
    verdicts = judged(with_scores(two_declared, "graded", "accuracy"))
    assert (verdicts["rtn_w8a8"].kind, verdicts["rtn_w8a8"].holm_p) == ("exploratory", None)
    paired = verdicts["smoothquant_w8a8"].paired
    assert verdicts["smoothquant_w8a8"].holm_p == pytest.approx(2 * paired.p)


def with_scores(study, *scores):
    declared = zip(study.statistics.primary, scores, strict=True)
    primary = tuple(c.model_copy(update={"score": score}) for c, score in declared)
    statistics = study.statistics.model_copy(update={"primary": primary})
    return study.model_copy(update={"statistics": statistics})


def test_an_invalid_comparison_stays_in_holms_family(two_declared):
    """Failing a check must not make the other comparison's test easier."""
    verdicts = judged(two_declared, problem="quantized layers as declared")
    assert verdicts["rtn_w8a8"].kind == "invalid"
    assert verdicts["smoothquant_w8a8"].holm_p == pytest.approx(
        2 * verdicts["smoothquant_w8a8"].paired.p
    )


def test_what_was_not_declared_gets_no_verdict(two_declared):
    verdict = judged(two_declared)["extra"]
    assert verdict.paired.p < 0.01
    assert (verdict.kind, verdict.primary, verdict.holm_p) == ("exploratory", False, None)
