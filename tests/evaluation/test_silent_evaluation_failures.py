"""A bank of failures that leave a plausible number behind; each gate sees its own.

A tiny model answers a tiny study soundly; each test breaks one thing and names the gate.
"""

from dataclasses import replace

import pytest

from helpers.core.records import WHOLE_VARIANT, gates_record
from helpers.evaluation.checks.evaluation_data import (
    ask_alone,
    ask_alone_again,
    read_golds_alone,
    render_golds_again,
    render_items_again,
    used_items,
)
from helpers.evaluation.checks.integrity import EvaluationData, evaluation_gates
from helpers.evaluation.checks.item_gates import raw_digests
from helpers.evaluation.checks.numeric_gates import reference_gates
from helpers.evaluation.scoring import (
    all_metrics,
    best_fixed_answer,
    ends_in_loop,
    shared_text_metrics,
)
from helpers.study.schema import Variant

ROWS, PASSAGES = "rows of the answers", "rows of the passages"
MODEL, VARIANT = "tuned", "smooth_only"
OWNER = {"model": MODEL, "variant": VARIANT}
SETTINGS = """
title: Gates
seed: 7
runtime: {device: cpu, dtype: float32, threads: 1, quantized: int8}
models:
  base: {random: llama}
  tuned:
    finetune: {start: base, dataset: {shipped: openmath_train}, items: 8, heldout_items: 4,
      epochs: 1, learning_rate: 1.0e-3, warmup_fraction: 0.1, batch_items: 4, max_tokens: 512,
      autocast: none}
calibration: {adapter: openmath, dataset: {shipped: openmath_train}, items: 6, max_tokens: 512,
  batch_tokens: 2048}
variants:
  noquant: {}
  smooth_only: {smooth: {alpha: 0.5, targets: [attention_input, mlp_input]}}
  rtn_w8a8: {preset: w8a8}
  float_bf16: {dtype: bfloat16}
baseline: noquant
evaluation:
  batch: {tokens: 1024, rows: 16}
  datasets:
    arc: {adapter: arc, source: {shipped: arc}, items: 12,
      ask: {protocol: loglikelihood, normalize: bytes}}
    squad_v2: {adapter: squad_v2, source: {shipped: squad_v2}, items: 12,
      ask: {protocol: generate, answer: boxed, stop: answer, shots: 1, max_new_tokens: 8}}
    openmath: {adapter: openmath, source: {shipped: openmath_eval}, items: 12,
      ask: {protocol: generate, answer: boxed, stop: answer, shots: 2, max_new_tokens: 8}}
  shared_text: {dataset: {shipped: squad_v2}, passages: 3, max_tokens: 64}
statistics: {confidence: 0.95, power: 0.8, margin: 0.05, resamples: 200, primary: []}
"""


@pytest.fixture(scope="module")
def tiny():
    import torch

    from helpers.sources.models import byte_tokenizer, random_model

    torch.set_num_threads(1)
    return random_model("llama", seed=3), byte_tokenizer()


@pytest.fixture(scope="module")
def settled(tmp_path_factory):
    from helpers.study.loading import load_study

    path = tmp_path_factory.mktemp("bank") / "failures.yaml"
    path.write_text(SETTINGS, "utf-8")
    return load_study(path)


def shared_text(study, model, reference, tokenizer) -> list[dict]:
    """Rows of the shared text, the model held against the reference."""
    from helpers.inference.perplexity import passage_rows, passage_tokens, read_passages
    from helpers.sources.sampling import shared_passages

    passages = shared_passages(study)
    tokens = passage_tokens(tokenizer, passages, max_tokens=64)
    both = [read_passages(m, tokens, batch_tokens=512) for m in (model, reference)]
    return passage_rows(passages, tokens, *both)


def shaken_in(tiny, settled, dtype: str) -> list[dict]:
    """Rows of the tiny float model with every weight off by one rounding, against itself."""
    import copy

    import torch

    from helpers.evaluation.checks.evaluation_data import perturb_by_rounding_

    model = copy.deepcopy(tiny[0])
    perturb_by_rounding_(model, dtype=getattr(torch, dtype))
    return shared_text(settled, model, *tiny)


def computed_again(tiny, study):
    """The figures of the shared text by `second_opinion`, the tiny model held against itself."""
    import torch

    from helpers.core.records import sha256_text
    from helpers.evaluation.checks.second_opinion import Recomputed, compare_passage
    from helpers.sources.sampling import shared_passages

    rows, counts = [], {}
    for text in shared_passages(study):
        tokens = tiny[1](text).input_ids[:64]
        with torch.inference_mode():
            logits = tiny[0](input_ids=torch.tensor([tokens[:-1]])).logits[0].double()
        counts[sha256_text(text)[:16]] = len(tokens) - 1
        rows.append(
            {"id": sha256_text(text)[:16], **compare_passage(tokens, logits, logits, logits)}
        )
    texts = {sha256_text(t)[:16]: t[1:64] for t in shared_passages(study)}
    return Recomputed([rows[0], rows[-1]], counts, texts)


@pytest.fixture(scope="module")
def sound(tiny, settled) -> EvaluationData:
    """A float variant that equals its baseline, as it must: asked once, in earnest."""
    from helpers.evaluation.engine import ask_all

    model, tokenizer = tiny
    answers = ask_all(model, tokenizer, settled)
    passages = shared_text(settled, model, model, tokenizer)
    alone = ask_alone(model, tokenizer, settled)
    return EvaluationData(
        settled,
        MODEL,
        VARIANT,
        {name: [row | OWNER for row in rows] for name, rows in answers.items()},
        [row | OWNER for row in passages],
        {"datasets": all_metrics(settled, answers), "shared_text": shared_text_metrics(passages)},
        answers,
        passages,
        render_items_again(settled, tokenizer, tokenizer),
        used_items(settled, MODEL, VARIANT),
        alone,
        repeated=ask_alone_again(model, tokenizer, settled, VARIANT, alone),
        golds_alone=read_golds_alone(model, tokenizer, settled, VARIANT),
        perturbed=shaken_in(tiny, settled, "float32"),
        reference=passages,
        recomputed=computed_again(tiny, settled),
        golds=render_golds_again(settled, tokenizer, tokenizer, answers),
        raw={
            name: raw_digests(evaluation_set.source, adapter=evaluation_set.adapter)
            for name, evaluation_set in settled.evaluation.datasets.items()
        },
    )


def failed(evidence: EvaluationData) -> set[tuple[str, str]]:
    """(what it invalidates, name) of every gate that fails."""
    return {(what, gate.name) for what, gate in evaluation_gates(evidence) if not gate.passed}


def with_rows(
    evidence: EvaluationData, dataset: str, edit, side: str = "predictions"
) -> EvaluationData:
    """The evidence with one set's rows replaced by what `edit` makes of copies of them."""
    rows = edit([dict(row) for row in getattr(evidence, side)[dataset]])
    return replace(evidence, **{side: getattr(evidence, side) | {dataset: rows}})


def each(**changes):
    """Every row with these values, computed from the row where they are callables."""
    return lambda rows: [
        row | {k: v(row) if callable(v) else v for k, v in changes.items()} for row in rows
    ]


def first(**changes):
    return lambda rows: [rows[0] | changes, *rows[1:]]


def answered(text: str, finish: str = "stop"):
    """Every item answered by one text, parsed and scored as an evaluation would."""

    def edit(evidence: EvaluationData, dataset: str, rows: list[dict]) -> list[dict]:
        from helpers.evaluation.scoring import score_text

        adapter = evidence.study.evaluation.datasets[dataset].adapter
        items = {a.item.id: a.item for a in evidence.rendered[dataset]}
        return [
            row | score_text(items[row["id"]], adapter, text, answer="boxed", finish=finish)
            for row in rows
        ]

    return edit


def able(evidence: EvaluationData, dataset: str = "openmath") -> EvaluationData:
    """A baseline and a variant that answer a set rightly and stop."""

    def edit(rows: list[dict]) -> list[dict]:
        made = []
        for row in rows:
            text = f"So it is \\boxed{{{row['golds'][0] if row['golds'] else 'unanswerable'}}}"
            made += answered(text)(evidence, dataset, [row])
        return made

    return with_rows(with_rows(evidence, dataset, edit), dataset, edit, side="baseline")


def saying(evidence: EvaluationData, text: str, finish: str = "stop", dataset: str = "openmath"):
    """The able evidence, its variant saying one thing."""
    edit = answered(text, finish)
    return with_rows(able(evidence, dataset), dataset, lambda rows: edit(evidence, dataset, rows))


def test_a_sound_evaluation_fails_no_gate(sound):
    assert failed(sound) == set()
    assert gates_record(evaluation_gates(sound))["passed"]


def test_an_able_model_fails_none_either(sound):
    evidence = replace(able(sound), alone={k: v for k, v in sound.alone.items()})
    assert failed(evidence) == {
        ("openmath", "answers independent of the batch")
    }  # it was not asked again


ARC_ROWS = {
    "other items": (lambda rows: [rows[0] | {"id": "elsewhere"}, *rows[1:]],
                    {"every item answered once", "prompts match the baseline"}),
    "a row twice": (lambda rows: [*rows, rows[0]], {"every item answered once"}),
    "a row missing": (lambda rows: rows[1:],
                      {"every item answered once", "prompts match the baseline"}),
    "cut short and filled up again": (lambda rows: rows[:-2] + rows[:2],
                                      {"every item answered once", "prompts match the baseline"}),
    "golds of other items": (
        lambda rows: [
            row | {"golds": other["golds"], "score": float(row["parsed"] in other["golds"])}
            for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
        ],
        {"scores recomputed"}),
    "other prompts": (first(prompt_hash="of another wording"),
                      {"prompts match the study", "prompts match the baseline"}),
    "cut prompts": (each(prompt_tokens=lambda row: min(16, row["prompt_tokens"])),
                    {"prompts not truncated", "prompts match the baseline"}),
    "another variant": (each(variant="rtn_w8a8"), {"answers belong to the variant"}),
    "another model": (each(model="base"), {"answers belong to the variant"}),
    "scores edited": (first(score=0.5), {"scores recomputed"}),
    "golds edited": (each(golds=lambda row: [row["parsed"]], score=1.0),
                     {"scores recomputed"}),
    "a parsed answer edited": (
        lambda rows: [row | {"parsed": row["golds"][0], "score": 1.0} for row in rows],
        {"scores recomputed"}),
    "score in percent": (each(score=lambda row: 100 * row["score"]),
                         {"scores in range", "scores recomputed"}),
}  # fmt: skip


@pytest.mark.bank("answers", "answers of a set: {case}", at=ROWS)
@pytest.mark.parametrize("case", ARC_ROWS)
def test_rows_that_are_not_the_variants_own(sound, case):
    edit, names = ARC_ROWS[case]
    failing = failed(with_rows(sound, "arc", edit))
    assert {("arc", name) for name in names} <= failing
    assert {what for what, _ in failing} == {"arc"}


def test_a_prediction_file_of_another_variant_is_told_by_name(sound):
    evidence = with_rows(sound, "arc", each(variant="rtn_w8a8"))
    (gate,) = [g for _, g in evaluation_gates(evidence) if not g.passed]
    assert gate.measured == "12 of tuned/rtn_w8a8"


@pytest.mark.bank("tokens", "another chat template for one variant", at="the tokenizer")
def test_another_chat_template_for_one_variant(tiny, settled, sound):
    """Every item is asked, in other words than the baseline's."""
    import copy

    other = copy.deepcopy(tiny[1])
    other.chat_template = tiny[1].chat_template.replace("assistant", "helper")
    asked = {name: {a.item.id: a.hash for a in rendered} for name, rendered in
             render_items_again(settled, other, other).items()}  # fmt: skip
    edit = each(prompt_hash=lambda row: asked["openmath"][row["id"]])
    assert failed(with_rows(sound, "openmath", edit)) == {
        ("openmath", "prompts match the study"),
        ("openmath", "prompts match the baseline"),
    }


@pytest.mark.bank("answers", "an announced set is missing", at=ROWS)
def test_an_announced_set_that_is_missing(sound):
    without = {k: v for k, v in sound.predictions.items() if k != "squad_v2"}
    assert failed(replace(sound, predictions=without)) == {("squad_v2", "every item answered once")}


@pytest.mark.bank(
    "reading", "a weight that is not a number", "finite logits", at="the loaded model"
)
def test_logits_that_are_not_finite(tiny, settled, sound):
    """A model with one NaN weight, really asked: no gate raises, and the figures are missing."""
    import copy

    from helpers.evaluation.engine import ask_all

    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    rows = ask_all(model, tokenizer, settled)
    passages = shared_text(settled, model, tiny[0], tokenizer)
    metrics = {"datasets": all_metrics(settled, rows), "shared_text": shared_text_metrics(passages)}
    assert metrics["shared_text"]["perplexity"] is metrics["shared_text"]["kl"] is None
    evidence = replace(
        sound,
        predictions={name: each(**OWNER)(of_set) for name, of_set in rows.items()},
        passages=each(**OWNER)(passages),
        metrics=metrics,
    )
    assert (WHOLE_VARIANT, "finite logits") in failed(evidence)


def test_a_perplexity_too_large_for_a_float_is_missing():
    rows = [{"tokens": 2, "nll": 4000.0, "kl": 1.0, "top1_agreements": 0}]
    assert shared_text_metrics(rows)["perplexity"] is None


def in_bfloat16(tiny):
    """A copy of the tiny float model that computes in bfloat16."""
    import copy

    import torch

    return copy.deepcopy(tiny[0]).to(torch.bfloat16)


@pytest.mark.bank(
    "float",
    "a float variant computed in another type",
    "outputs within rounding of float",
    at="the loaded model",
)
def test_a_float_variant_that_is_further_away_than_rounding(tiny, settled, sound):
    """A smoothed model asked in bfloat16 is no longer the function it has to be."""
    moved = each(**OWNER)(shared_text(settled, in_bfloat16(tiny), *tiny))
    shared = shared_text_metrics(moved)
    evidence = replace(sound, passages=moved, metrics=sound.metrics | {"shared_text": shared})
    assert failed(evidence) == {
        (WHOLE_VARIANT, "outputs within rounding of float"),
        (WHOLE_VARIANT, "shared-text figures recomputed"),
    }


def test_the_noise_floor_is_rounding_of_its_own_type_and_no_more(tiny, settled):
    recipe, shaken = Variant(dtype="bfloat16"), shaken_in(tiny, settled, "bfloat16")
    rows = shared_text(settled, in_bfloat16(tiny), *tiny)
    assert [g for g in reference_gates(recipe, rows, shaken) if not g.passed] == []
    twice = [row | {"kl": 20 * row["kl"]} for row in rows]
    names = [g.name for g in reference_gates(recipe, twice, shaken) if not g.passed]
    assert names == ["outputs within rounding of float"]


@pytest.mark.parametrize("recipe", [{"dtype": "bfloat16"}, {"preset": "w8a8"}])
@pytest.mark.bank("model", "the float model is asked in a variant's place", at="the loaded model")
def test_a_variant_that_answers_as_the_float_model_to_the_bit_was_not_asked(
    tiny, settled, sound, recipe
):
    """No quantization at run time, or a float type that was ignored: a flawless null result."""
    gates = reference_gates(Variant(**recipe), sound.passages, sound.perturbed)
    names = {g.name for g in gates if not g.passed}
    assert names == {"outputs differ from float"}


def test_a_distance_that_cannot_be_told_does_not_hold(settled, sound):
    lost = [row | {"kl": None} for row in sound.passages]
    recipe = settled.variants[VARIANT]
    assert not any(g.passed for g in reference_gates(recipe, lost, sound.perturbed))
    assert not any(g.passed for g in reference_gates(recipe, sound.passages, []))


def test_gates_made_where_the_model_was_loaded_count(sound):
    from helpers.core.records import Gate

    broken = Gate("quantized layers in memory", False, "0 of 14 Linears in int8", "14 in int8")
    assert failed(replace(sound, loaded=(broken,))) == {(WHOLE_VARIANT, broken.name)}


@pytest.mark.parametrize("dataset", ["arc", "squad_v2"])
@pytest.mark.bank("answers", "a fraction filed as a percent", at="metrics")
def test_a_fraction_shown_as_a_percent(sound, dataset):
    metrics = sound.metrics["datasets"]
    edited = metrics[dataset] | {"format_success": 50.0}
    evidence = replace(sound, metrics=sound.metrics | {"datasets": metrics | {dataset: edited}})
    assert failed(evidence) == {(dataset, "scores in range")}


@pytest.mark.bank("text", "a top-1 agreement in percent", at="metrics")
def test_a_top1_agreement_in_percent(sound):
    shared = sound.metrics["shared_text"] | {"top1_agreement": 93.0}
    evidence = replace(sound, metrics=sound.metrics | {"shared_text": shared})
    assert failed(evidence) == {
        (WHOLE_VARIANT, "shared-text metrics in range"),
        (WHOLE_VARIANT, "shared-text means recomputed"),
    }


@pytest.mark.bank("text", "the shared text cut elsewhere, or of another variant", at=PASSAGES)
def test_a_shared_text_cut_elsewhere_or_of_another_variant(sound):
    shorter = [row | {"tokens": row["tokens"] - 1} for row in sound.passages]
    assert failed(replace(sound, passages=shorter)) == {
        (WHOLE_VARIANT, "shared text matches the baseline"),
        (WHOLE_VARIANT, "passage token counts"),
        (WHOLE_VARIANT, "shared-text means recomputed"),
    }
    assert failed(replace(sound, passages=each(variant="noquant")(sound.passages))) == {
        (WHOLE_VARIANT, "shared text belongs to the variant")
    }


@pytest.mark.bank(
    "answers",
    "one answer to every question",
    "answers not constant",
    "beats fixed answers",
    at=ROWS,
)
def test_a_model_that_repeats_one_answer(sound):
    failing = failed(saying(sound, r"\boxed{12345}"))
    assert {("openmath", "answers not constant"), ("openmath", "beats fixed answers")} <= failing


def test_a_model_that_nearly_always_said_so_may_lose_its_one_exception(sound):
    """One flip of twelve, by rounding, is no broken run."""
    said = answered(r"\boxed{12345}")

    def edit(rows: list[dict]) -> list[dict]:
        return said(sound, "openmath", rows)

    usual = with_rows(sound, "openmath", edit)
    before = with_rows(usual, "openmath", edit, side="baseline")
    one = with_rows(
        before, "openmath", lambda rows: [*rows[1:], sound.baseline["openmath"][0]], side="baseline"
    )
    assert ("openmath", "answers not constant") not in failed(one)
    assert ("openmath", "answers not constant") in failed(saying(sound, r"\boxed{12345}"))


@pytest.mark.parametrize(
    ("dataset", "text"), [("openmath", r"\boxed{24}"), ("squad_v2", r"\boxed{Rosa Field}")]
)
@pytest.mark.bank(
    "answers", "the worked example's answer given to every question", "examples not echoed", at=ROWS
)
def test_a_model_that_echoes_the_example(sound, dataset, text):
    assert (dataset, "examples not echoed") in failed(saying(sound, text, dataset=dataset))


@pytest.mark.bank(
    "answers",
    "answers that never end",
    "answers within the token limit",
    "answers do not loop",
    "answers parse",
    at=ROWS,
)
def test_a_model_that_never_stops(sound):
    failing = failed(saying(sound, "and so on and so on and so on and so on and so on", "length"))
    names = {"answers within the token limit", "answers do not loop", "answers parse"}
    assert {("openmath", name) for name in names} <= failing


@pytest.mark.bank(
    "answers",
    "abstaining from every question",
    "answers not constant",
    "beats fixed answers",
    at=ROWS,
)
def test_a_model_that_always_abstains(sound):
    failing = failed(saying(sound, r"\boxed{unanswerable}", dataset="squad_v2"))
    assert {("squad_v2", "answers not constant"), ("squad_v2", "beats fixed answers")} <= failing


@pytest.mark.parametrize("use", ["calibration", "training"])
@pytest.mark.bank("items", "an evaluation item in {use}", at="items of calibration and training")
def test_items_the_variant_was_made_from(sound, use):
    """Found by its normalised text: another id, other case and punctuation."""
    item = sound.rendered["openmath"][3].item
    twin = replace(item, id="another", question=f"  {item.question.upper()} !")
    seen = sound.used | {use: [*sound.used[use], twin]}
    assert failed(replace(sound, used=seen)) == {("openmath", "no leakage")}


def crowd_dependent(model):
    """A model whose answers depend on what is read beside them: it adds what all have."""
    import copy

    wrapped = copy.deepcopy(model)

    def mix(_, __, hidden):
        return hidden + 2 * (hidden.mean(1, keepdim=True) - hidden)

    wrapped.model.embed_tokens.register_forward_hook(mix)
    return wrapped


@pytest.mark.bank(
    "reading",
    "answers that depend on their batch mates",
    "answers independent of the batch",
    at="the loaded model",
)
def test_an_answer_that_depends_on_its_batch_mates(tiny, settled, sound):
    from helpers.evaluation.engine import ask_all

    model = crowd_dependent(tiny[0])
    alone, rows = ask_alone(model, tiny[1], settled), ask_all(model, tiny[1], settled)
    mixed = {name: each(**OWNER)(failing) for name, failing in rows.items()}
    failing = failed(replace(sound, predictions=mixed, alone=alone))
    assert {
        (name, "answers independent of the batch") for name in ("squad_v2", "openmath")
    } <= failing


def moved(by: float, *, pattern: int = 1):
    """Rows of rtn_w8a8 whose log-probabilities are off by so much, up and down in turn."""

    def shifted(row):
        return [x + by * (-1) ** (i // pattern) for i, x in enumerate(row["logprobs"])]

    return each(variant="rtn_w8a8", logprobs=shifted)


def test_log_probabilities_have_a_limit_even_where_rounding_cascades(sound):
    """A quantized variant may differ alone by about what separates it from the baseline."""
    simulated = sound.study.runtime.model_copy(update={"quantized": "reference"})
    study = sound.study.model_copy(update={"runtime": simulated})
    batched = replace(with_rows(sound, "arc", moved(0.01)), variant="rtn_w8a8", study=study)
    evidence = with_rows(batched, "arc", moved(0.01, pattern=2), side="alone")
    assert ("arc", "answers independent of the batch") not in failed(evidence)
    far = with_rows(batched, "arc", moved(0.05), side="alone")
    assert ("arc", "answers independent of the batch") in failed(far)


@pytest.mark.bank(
    "reading",
    "log-probabilities in a batch a thousandth off",
    "answers independent of the batch",
    at=ROWS,
)
def test_log_probabilities_alone_are_those_of_the_batch_where_nothing_is_rounded_anew(sound):
    """The answers stay the same; an option's log-probability is a thousandth off."""
    evidence = with_rows(sound, "arc", each(**OWNER, logprobs=moved_by(1e-3)), side="alone")
    assert failed(evidence) == {("arc", "answers independent of the batch")}
    fewer = each(logprobs=lambda row: row["logprobs"][:-1])
    assert ("arc", "answers independent of the batch") in failed(
        with_rows(sound, "arc", fewer, side="alone")
    )


def moved_by(shift: float):
    return lambda row: [x + shift for x in row["logprobs"]]


def rotated(rows: list[dict]) -> list[dict]:
    """Each row with the log-probabilities of the next option, chosen and scored accordingly."""
    return [
        row | {"logprobs": row["logprobs"][1:] + row["logprobs"][:1], "variant": "rtn_w8a8"}
        for row in rows
    ]


def as_scored(evidence: EvaluationData, edit):
    """The edited log-probabilities with the choice and the score that follow from them."""
    from helpers.evaluation.scoring import score_options

    items = {a.item.id: a.item for a in evidence.rendered["arc"]}

    def score(row: dict) -> dict:
        item = items[row["id"]]
        return row | score_options(item, row["logprobs"], item.options, normalize="bytes")

    return lambda rows: [score(row) for row in edit(rows)]


@pytest.mark.bank(
    "reading", "log-probabilities of the next option", "options in the baseline's order", at=ROWS
)
def test_options_whose_probabilities_belong_to_others(sound):
    """Of every item, alone too: only the baseline's order tells."""
    evidence = with_rows(sound, "arc", as_scored(sound, rotated))
    evidence = with_rows(evidence, "arc", as_scored(sound, rotated), side="alone")
    failing = failed(replace(evidence, variant="rtn_w8a8"))
    assert ("arc", "options in the baseline's order") in failing
    assert ("arc", "scores recomputed") not in failing


@pytest.mark.bank(
    "limits", "a batch mixed up widens its own limit", "answers independent of the batch", at=ROWS
)
def test_a_batch_mixed_up_does_not_widen_its_own_limit(sound):
    """Far from the baseline because of the mix-up, near it when asked alone."""
    evidence = with_rows(sound, "arc", as_scored(sound, rotated))
    evidence = with_rows(evidence, "arc", moved(0.01), side="alone")
    failing = failed(replace(evidence, variant="rtn_w8a8"))
    assert ("arc", "answers independent of the batch") in failing


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_a_collapse_keeps_the_order_of_its_options(sound, scale):
    """Noise as large as the differences themselves is another matter than a mix-up."""
    import random

    lot = random.Random(5)
    spread = each(
        variant="rtn_w8a8", logprobs=lambda r: [x + lot.gauss(0, scale) for x in r["logprobs"]]
    )
    failing = failed(replace(with_rows(sound, "arc", spread), variant="rtn_w8a8"))
    assert ("arc", "options in the baseline's order") not in failing


def texts(*words: str):
    """Answers of several words each, one an item."""
    return lambda rows: [
        row | {"output": f"{words[i % len(words)]} of item {i} {'abcdefghijkl'[i]}"}
        for i, row in enumerate(rows)
    ]


@pytest.mark.bank(
    "answers",
    "generated answers filed under other items",
    "answers independent of the batch",
    at=ROWS,
)
def test_generated_answers_filed_under_other_items(sound):
    """Rounding rewords an answer; it does not make it another item's."""
    from helpers.evaluation.checks.numeric_gates import invariance_gate

    rows = texts("so the answer", "then it is")(sound.predictions["openmath"])
    alone = [row for row in rows[:4]]
    sound_gate = invariance_gate(sound.study, "rtn_w8a8", rows, sound.baseline["openmath"], alone)
    assert sound_gate.passed
    outputs = [row["output"] for row in rows]
    shuffled = [r | {"output": o} for r, o in zip(rows, outputs[1:] + outputs[:1], strict=True)]
    shuffled_gate = invariance_gate(
        sound.study, "rtn_w8a8", shuffled, sound.baseline["openmath"], alone
    )
    assert not shuffled_gate.passed


@pytest.mark.bank("reading", "answers drawn by lot", at=ROWS)
def test_answers_drawn_by_lot(sound):
    """A sampled answer is another one when the item is asked once more, alone."""
    drawn = with_rows(sound, "openmath", each(output="another"), side="alone")
    assert failed(drawn) == {("openmath", "answers independent of the batch")}


@pytest.mark.bank("reading", "answers drawn by lot in bfloat16", "answers repeatable", at=ROWS)
def test_answers_drawn_by_lot_where_company_may_change_them(sound):
    """In bfloat16 an answer alone may be another than in the batch; asked again it may not."""
    first = {name: rows[:1] for name, rows in sound.alone.items() if name != "arc"}
    repeated = replace(sound, variant="float_bf16", repeated=first)
    drawn = with_rows(repeated, "openmath", each(output="another"), side="repeated")
    never = replace(repeated, repeated={})
    failing = [
        {what for what, name in failed(evidence) if name == "answers repeatable"}
        for evidence in (repeated, drawn, never)
    ]
    assert failing == [set(), {"openmath"}, {"openmath", "squad_v2"}]


@pytest.mark.bank(
    "text",
    "KL against another model than the baseline",
    "float reference is the baseline",
    at="states of the baseline",
)
def test_a_variant_held_against_another_model_than_the_baseline(tiny, settled, sound):
    """Its KL would be the distance of two models, and look like the price of rounding."""
    from helpers.sources.models import random_model

    other = random_model("llama", seed=4)
    reference = shared_text(settled, other, other, tiny[1])
    assert failed(replace(sound, reference=reference)) == {
        (WHOLE_VARIANT, "float reference is the baseline")
    }
    assert (WHOLE_VARIANT, "float reference is the baseline") in failed(
        replace(sound, reference=[])
    )


@pytest.mark.bank("items", "a worked example that is an evaluation item", at="worked examples")
def test_an_example_of_the_prompt_that_is_an_item(sound):
    item = sound.rendered["openmath"][3].item
    seen = sound.used | {"worked-example": [*sound.used["worked-example"], item]}
    assert failed(replace(sound, used=seen)) == {("openmath", "no leakage")}


def test_a_loop_is_told_from_a_long_answer():
    assert ends_in_loop("The answer is " + "4 + " * 9 + "4")
    assert ends_in_loop("a" * 24)
    assert not ends_in_loop("a" * 23)
    assert not ends_in_loop("First 12 and 15 make 27; then 27 and 8 make 35, so the answer is 35.")
    assert not ends_in_loop("")


def test_the_best_fixed_answer_to_a_passage_may_be_a_text():
    golds = [{"golds": x} for x in (["The Mill"], ["the mill"], [], ["Denby"])]
    assert best_fixed_answer("squad_v2", golds).answer == "answering “mill”"


def swapped(tokenize, letters: str = "qz"):
    """A tokenizer's call that exchanges two ids, as two rows of a vocabulary exchanged would."""

    def call(tokenizer, text: str) -> list[int]:
        one, other = tokenize(tokenizer, letters)
        turn = {one: other, other: one}
        return [turn.get(t, t) for t in tokenize(tokenizer, text)]

    return call


@pytest.mark.bank("tokens", "two token ids swapped for one variant")
def test_two_token_ids_exchanged_for_one_variant(tiny, settled, sound, monkeypatch):
    """The words are the baseline's, and so is their number; only what is handed over is not."""
    from helpers.evaluation import prompts
    from helpers.evaluation.engine import ask_all

    for name in ("tokenize", "plain_tokens"):
        monkeypatch.setattr(prompts, name, swapped(getattr(prompts, name)))
    result = {name: each(**OWNER)(rows) for name, rows in ask_all(*tiny, settled).items()}
    names = failed(replace(sound, predictions=result))
    for dataset in settled.evaluation.datasets:
        assert (dataset, "prompts match the baseline") in names
        assert (dataset, "prompts match the study") in names
        assert (dataset, "prompts not truncated") not in names


def asked_alike(tiny, settled, sound):
    """The evidence of a variant whose baseline was asked by the same code."""
    from helpers.evaluation.engine import ask_all

    answers = ask_all(*tiny, settled)
    rows = {name: each(**OWNER)(of_set) for name, of_set in answers.items()}
    rendered = render_items_again(settled, tiny[1], tiny[1])
    return replace(sound, predictions=rows, baseline=answers, rendered=rendered)


@pytest.mark.bank("tokens", "two token ids swapped for all variants alike")
def test_two_token_ids_exchanged_for_all_variants_alike(tiny, settled, sound, monkeypatch):
    """The baseline shows nothing: only the source's own tokenizer does."""
    from helpers.evaluation import prompts

    for name in ("tokenize", "plain_tokens"):
        monkeypatch.setattr(prompts, name, swapped(getattr(prompts, name)))
    names = failed(asked_alike(tiny, settled, sound))
    for dataset in settled.evaluation.datasets:
        assert (dataset, "prompts match the study") in names
        assert (dataset, "prompts match the baseline") not in names


@pytest.mark.bank("tokens", "other tokens under the same words of a prompt")
def test_hashes_of_words_alone(tiny, settled, sound, monkeypatch):
    """Words have a hash, and tokens have none: every variant could be handed its own."""
    from helpers.evaluation import prompts

    true = prompts.prompt_digest
    monkeypatch.setattr(prompts, "prompt_digest", lambda words, options, *_: true(words, options))
    names = failed(asked_alike(tiny, settled, sound))
    assert {(d, "prompts match the study") for d in settled.evaluation.datasets} <= names
