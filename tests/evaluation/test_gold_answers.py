"""Graded scores of written answers: what is read, whether transformers agrees, and the gates."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from helpers.core.errors import StudyError
from helpers.evaluation.checks.integrity import finite_gate
from helpers.evaluation.checks.numeric_gates import (
    GOLD_SAMPLE,
    LOGPROB_ROUNDING,
    gold_sample_ids,
    sampled_ids,
)
from helpers.evaluation.checks.recomputed_answers import (
    foil_gate,
    gold_invariance_gate,
    golds_gate,
    render_golds,
)
from helpers.evaluation.engine import evaluate, read_golds
from helpers.evaluation.predictions import check_prediction_rows
from helpers.evaluation.prompts import (
    MAX_GOLDS,
    AnswerTokens,
    Prompt,
    PromptTokens,
    TokenizedPrompt,
    answer_tokens,
    choose_foils,
    comparison_key,
    gold_answers,
    gold_digest,
    gold_fields,
    render_prompt,
    tokenize_prompts,
)
from helpers.evaluation.scoring import set_metrics
from helpers.sources.chat import answer_lead, configure_chat_template_, end_of_turn
from helpers.sources.items import Item
from helpers.sources.models import byte_tokenizer, random_model
from helpers.sources.sampling import evaluation_items
from helpers.study.loading import load_study
from helpers.study.schema import Batch, EvaluationSet
from test_chat_template import INST
from test_served import Asked

WRITTEN = {"protocol": "generate", "shots": 1, "max_new_tokens": 4}
SETS = {
    "squad_v2": ("squad_v2", {"answer": "boxed", "stop": "answer"}),
    "turns": ("squad_v2", {"answer": "text", "stop": "turn"}),
    "openmath": ("openmath_eval", {"answer": "boxed", "stop": "answer"}),
    "boolq": ("boolq", {"answer": "boxed", "stop": "turn"}),
    "arc": ("arc", {"answer": "boxed", "stop": "answer"}),
}
LIMITS = [Batch(tokens=1, rows=1), Batch(tokens=900, rows=3), Batch(tokens=9000, rows=64)]


def set_of(name: str, **changes) -> EvaluationSet:
    shipped, ask = SETS[name]
    adapter = {"turns": "squad_v2"}.get(name, name)
    settings = {"adapter": adapter, "source": {"shipped": shipped}, "items": 12}
    return EvaluationSet.model_validate(settings | {"ask": WRITTEN | ask | changes})


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Items of a set, as a study draws them."""
    study = load_study("smoke")

    def of(name: str, count: int = 5) -> list[Item]:
        sets = {name: set_of(name)}
        evaluation = study.evaluation.model_copy(update={"datasets": sets})
        return evaluation_items(study.model_copy(update={"evaluation": evaluation}), name)[:count]

    return of


def one_by_one(model, prompt_tokens: list[int], answers: list[list[int]]) -> list[float]:
    """The summed log-probability of each answer, by transformers' own forward pass."""
    sums = []
    for answer in answers:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt_tokens + answer])).logits[0].double()
        before = logits[len(prompt_tokens) - 1 : -1].log_softmax(-1)
        sums.append(before.gather(1, torch.tensor(answer)[:, None]).sum().item())
    return sums


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_plain_loop_of_transformers_reads_the_same(items, family, name, limits):
    torch.set_num_threads(1)
    model, tokenizer, evaluation_set = random_model(family, seed=3), byte_tokenizer(), set_of(name)
    chosen = items(name)
    golds = gold_answers(chosen, evaluation_set)
    end = [end_of_turn(tokenizer)] if evaluation_set.ask.stop == "turn" else []
    plain = {p["id"]: p for p in evaluate(model, tokenizer, chosen, evaluation_set, limits=limits)}
    for row in list(evaluate(model, tokenizer, chosen, evaluation_set, limits=limits, golds=golds)):
        [item] = [i for i in chosen if i.id == row["id"]]
        text = render_prompt(item, evaluation_set, tokenizer).text
        context = tokenizer(text, add_special_tokens=False).input_ids
        own = golds[item.id]
        texts = [*own.golds, *([own.foil] if own.foil else [])]
        answers = [tokenizer(t, add_special_tokens=False).input_ids + end for t in texts]
        boxed = evaluation_set.ask.answer == "boxed"
        form = tokenizer("\\boxed{" if boxed else "", add_special_tokens=False).input_ids
        whole, of_form = one_by_one(model, context, answers), 0.0
        if form:
            [of_form] = one_by_one(model, context, [form])
        sums = [*row["gold_loglikelihoods"], row["foil_loglikelihood"]][: len(texts)]
        assert sums == pytest.approx([s - of_form for s in whole], abs=2e-4)
        sizes = [*row["gold_tokens"], row["foil_tokens"]][: len(texts)]
        assert sizes == [len(a) - len(form) for a in answers]
        assert row["gold_form_tokens"] == len(form)
        assert row["foil"] == own.foil
        assert plain[item.id] == {k: row[k] for k in plain[item.id]}  # the answer is what it was


def test_a_served_model_reads_the_same(items):
    torch.set_num_threads(1)
    plain, evaluation_set = random_model("llama", seed=3).double(), set_of("squad_v2")
    rows = [
        sorted(
            evaluate(
                model,
                byte_tokenizer(),
                items("squad_v2"),
                evaluation_set,
                limits=LIMITS[1],
                golds=gold_answers(items("squad_v2"), evaluation_set),
            ),
            key=lambda row: row["id"],
        )
        for model in (plain, Asked(plain))
    ]
    for one, other in zip(*rows, strict=True):
        close = pytest.approx(one.pop("gold_loglikelihoods"), abs=1e-5)
        assert other.pop("gold_loglikelihoods") == close
        assert other.pop("foil_loglikelihood") == pytest.approx(one.pop("foil_loglikelihood"))
        assert one == other


def test_a_gold_longer_than_the_model_reads_is_refused(items):
    model, evaluation_set = random_model("llama", seed=3), set_of("squad_v2")
    [item] = items("squad_v2", 1)
    long = replace(item, golds=("many words " * 20,))
    [prompt] = tokenize_prompts([long], evaluation_set, byte_tokenizer())
    model.config.max_position_embeddings = len(prompt.tokens.context) + 100
    options = {"limits": LIMITS[1], "golds": gold_answers([long], evaluation_set)}
    with pytest.raises(StudyError, match="but the model reads"):
        list(evaluate(model, byte_tokenizer(), [long], evaluation_set, **options))


def answered(*golds: tuple[str, ...]) -> list[Item]:
    return [Item(str(i), f"question {i}?", own, passage="text") for i, own in enumerate(golds)]


def foils_of(items: list[Item], adapter: str) -> list[int | None]:
    keys = [
        list(dict.fromkeys(comparison_key(g, adapter) for g in i.golds or ("unanswerable",)))
        for i in items
    ]
    return choose_foils(keys, [item.labels for item in items])


@pytest.mark.parametrize("seed", range(20))
def test_a_foil_is_never_right_and_each_gold_is_one_as_often_as_it_can_be(seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: int(torch.randint(0, n, (), generator=generator))  # noqa: E731
    golds = [(str(draw(3 + seed)),) for _ in range(2 + draw(30))]
    foils = foils_of(answered(*golds), "openmath")
    counts = Counter(gold for (gold,) in golds)
    if len(counts) == 1:
        assert foils == [None] * len(golds)
        return
    assert all(golds[i] != golds[other] for i, other in enumerate(foils))
    if 2 * max(counts.values()) <= len(golds):
        assert sorted(foils) == list(range(len(golds)))


def test_foils_of_several_golds_and_of_questions_without_an_answer():
    items = answered(("Rosa", "a Rosa!", "Field"), ("field",), (), ("the mill",), ())
    foils = foils_of(items, "squad_v2")
    assert foils[0] in (2, 3, 4)  # "field" is one of its own
    assert foils[2] not in (2, 4)
    assert foils[4] not in (2, 4)


def test_a_foil_is_one_of_the_items_own_options():
    labels = [("A", "B"), ("A", "B", "C"), ("1", "2")]
    items = [
        replace(item, labels=own)
        for item, own in zip(answered(("A",), ("C",), ("1",)), labels, strict=True)
    ]
    assert foils_of(items, "arc") == [None, 0, None]


def test_golds_are_written_as_the_prompt_asks_and_each_once():
    golds = ("The Mill", "mill", "a mill.", "Denby", "a flood", "Rosa")
    items = answered(golds, ("x",))
    by_id = gold_answers(items, set_of("squad_v2"))
    assert by_id["0"].golds == (r"\boxed{The Mill}", r"\boxed{Denby}", r"\boxed{a flood}")
    assert len(by_id["0"].golds) == MAX_GOLDS
    assert by_id["1"].foil == r"\boxed{The Mill}"
    assert gold_answers(answered((), ("x",)), set_of("turns"))["0"].golds == ("unanswerable",)
    scored = set_of("arc").model_copy(
        update={"ask": load_study("smoke").evaluation.datasets["arc"].ask}
    )
    assert gold_answers(items, scored) == {}


class Merging:
    """A tokenizer of characters that makes one token of a line's end and what follows it."""

    chat_template = ""
    eos_token_id = 0

    def __init__(self, *, merges: bool):
        self.merges = merges

    def __call__(self, text: str, **_options):
        pieces = text.replace("\n\\", "\x01") if self.merges else text
        return SimpleNamespace(input_ids=[ord(c) for c in pieces])


@pytest.mark.parametrize("merges", [False, True])
def test_the_prompt_keeps_its_tokens_where_the_answer_would_merge_with_it(merges):
    tokenizer, text = Merging(merges=merges), "ask\n"
    context = tokenizer(text).input_ids
    tokens = PromptTokens(context, ())
    prompt = TokenizedPrompt(Prompt(Item("1", "q", ()), text), tokens, "digest")
    read = answer_tokens(tokenizer, prompt, [r"\boxed{a}"], set_of("squad_v2").ask)
    assert tokens.context == tokenizer(text).input_ids
    assert read.answers == [[ord(c) for c in r"\boxed{a}"]]
    assert read.form == [ord(c) for c in r"\boxed{"]


class PairedBrace(Merging):
    """A tokenizer with a token for the opening brace together with a digit."""

    def __call__(self, text, **_):
        for digit in "0123456789":
            text = text.replace(f"{{{digit}", chr(0xE000 + int(digit)))
        return SimpleNamespace(input_ids=[ord(c) for c in text])


@pytest.mark.parametrize(
    ("texts", "answer", "form"),
    [
        ([r"\boxed{4}", r"\boxed{x}"], "boxed", r"\boxed"),  # the brace is part of one answer
        ([r"\boxed{x}", r"\boxed{xy}"], "boxed", r"\boxed{"),  # not what two answers share
        (["red", "read"], "text", ""),
        ([r"\boxed{", r"\boxed{x}"], "boxed", r"\boxed"),  # every answer has a token to score
    ],
)
def test_what_answers_share_is_not_scored_as_far_as_it_is_their_form(texts, answer, form):
    tokenizer = PairedBrace(merges=False)
    tokens = PromptTokens(tokenizer("ask\n").input_ids, ())
    prompt = TokenizedPrompt(Prompt(Item("1", "q", ()), "ask\n"), tokens, "digest")
    ask = set_of("squad_v2").ask.model_copy(update={"answer": answer})
    read = answer_tokens(tokenizer, prompt, texts, ask)
    assert read.form == [ord(c) for c in form]


@pytest.mark.parametrize("template", ["own", "first", "dropped"])
@pytest.mark.parametrize("stop", ["turn", "answer"])
def test_an_answer_stands_where_the_template_puts_one(items, template, stop):
    tokenizer = byte_tokenizer()
    if template != "own":
        tokenizer.chat_template = INST[template]
        configure_chat_template_(tokenizer, enable_thinking=None, place="x")
    evaluation_set = set_of("boolq", stop=stop)
    [item] = items("boolq", 1)
    [prompt] = tokenize_prompts([item], evaluation_set, tokenizer)
    [option] = answer_tokens(tokenizer, prompt, [r"\boxed{yes}"], evaluation_set.ask).answers
    end = tokenizer.decode([end_of_turn(tokenizer)]) if stop == "turn" else ""
    lead = "" if template == "own" else " "
    assert answer_lead(tokenizer) == lead
    assert tokenizer.decode(option) == lead + r"\boxed{yes}" + end
    text = prompt.prompt.text
    expected = render_golds(tokenizer, tokenizer, item, evaluation_set, text, None)
    assert len(expected.tokens[0]) == len(option) - ("no" in item.golds)


def test_an_answer_in_plain_text_stands_after_its_cue(items):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    evaluation_set = set_of("squad_v2", stop="answer")
    [item] = items("squad_v2", 1)
    [prompt] = tokenize_prompts([item], evaluation_set, tokenizer)
    golds = gold_answers([item], evaluation_set)[item.id]
    tokens = answer_tokens(tokenizer, prompt, golds.texts, evaluation_set.ask)
    for text, answer in zip(golds.texts, tokens.answers, strict=True):
        assert tokenizer.decode(answer) == f" {text}"
    expected = render_golds(tokenizer, tokenizer, item, evaluation_set, prompt.prompt.text, None)
    assert gold_digest(golds, tokens) == expected.hash


@pytest.fixture(scope="module")
def rows(items):
    """The evaluation set, its items, its predictions and the golds that they must have."""
    torch.set_num_threads(1)
    model, tokenizer, evaluation_set = (
        random_model("llama", seed=3),
        byte_tokenizer(),
        set_of("squad_v2"),
    )
    chosen = items("squad_v2", 8)
    options = {"limits": LIMITS[2], "golds": gold_answers(chosen, evaluation_set)}
    predictions = list(evaluate(model, tokenizer, chosen, evaluation_set, **options))
    foils = {row["id"]: row["foil"] for row in predictions}
    texts = {i.id: render_prompt(i, evaluation_set, tokenizer).text for i in chosen}
    expected = {
        i.id: render_golds(tokenizer, tokenizer, i, evaluation_set, texts[i.id], foils[i.id])
        for i in chosen
    }
    return evaluation_set, chosen, predictions, expected


def test_metrics_and_rows_hold_graded_scores(rows):
    _, _, predictions, _ = rows
    check_prediction_rows(predictions, kind="squad_v2", place="x")
    values = set_metrics("squad_v2", predictions)
    best = [
        max(s / n for s, n in zip(r["gold_loglikelihoods"], r["gold_tokens"], strict=True))
        for r in predictions
    ]
    assert values["gold_nats_per_token"] == pytest.approx(sum(best) / len(best))
    foils = [r["foil_loglikelihood"] / r["foil_tokens"] for r in predictions]
    above = sum(b > f for b, f in zip(best, foils, strict=True)) / len(predictions)
    assert values["gold_above_foil"] == pytest.approx(above)


def test_rows_without_golds_are_read_as_before(rows):
    _, _, predictions, _ = rows
    fields = ("gold_", "foil")
    old = [{k: v for k, v in row.items() if not k.startswith(fields)} for row in predictions]
    check_prediction_rows(old, kind="squad_v2", place="x")
    values = set_metrics("squad_v2", predictions)
    assert set_metrics("squad_v2", old) == {
        k: v for k, v in values.items() if not k.startswith(fields)
    }


@pytest.mark.parametrize(
    "change",
    [
        {"gold_loglikelihoods": [1.0]},
        {"gold_loglikelihoods": []},
        {"gold_tokens": [0, 3, 2, 1]},
        {"gold_loglikelihoods": [math.inf]},
        {"foil_tokens": None},
        {"foil_loglikelihood": "-3"},
        {"gold_hash": None},
    ],
)
def test_odd_graded_scores_are_refused(rows, change):
    with pytest.raises(StudyError, match="line 1 has"):
        check_prediction_rows([rows[2][0] | change], kind="squad_v2", place="x")


def test_a_row_with_some_of_the_fields_is_refused(rows):
    row = {k: v for k, v in rows[2][0].items() if k != "foil"}
    with pytest.raises(StudyError, match="lacks 'foil'"):
        check_prediction_rows([row], kind="squad_v2", place="x")


def test_sound_rows_pass(rows):
    evaluation_set, chosen, predictions, expected = rows
    assert golds_gate(predictions, expected).passed
    assert foil_gate(evaluation_set, predictions, chosen).passed


@pytest.mark.bank("answers", "golds of other items read after a prompt", "golds belong to the item")
def test_golds_of_another_item(rows):
    _, _, predictions, expected = rows
    shifted = [
        row | {k: other[k] for k in ("gold_loglikelihoods", "gold_tokens", "gold_hash")}
        for row, other in zip(predictions, predictions[1:] + predictions[:1], strict=True)
    ]
    assert not golds_gate(shifted, expected).passed
    assert not golds_gate(predictions, {}).passed


@pytest.mark.bank(
    "answers", "golds read without the token that ends a turn", "golds belong to the item"
)
def test_golds_without_the_end_of_a_turn(items):
    tokenizer, evaluation_set = byte_tokenizer(), set_of("boolq")
    [item] = items("boolq", 1)
    [prompt] = tokenize_prompts([item], evaluation_set, tokenizer)
    golds, text = gold_answers([item], evaluation_set)[item.id], prompt.prompt.text
    own = render_golds(tokenizer, tokenizer, item, evaluation_set, text, None)
    whole = answer_tokens(tokenizer, prompt, golds.texts, evaluation_set.ask)
    short = AnswerTokens([answer[:-1] for answer in whole.answers], whole.form)
    for tokens in (whole, short):
        row = {"id": item.id, "foil": None} | gold_fields(golds, tokens, [0.0, 0.0])
        assert golds_gate([row], {item.id: own}).passed == (tokens is whole)


@pytest.mark.bank("answers", "a gold taken for the foil", "foils are other items' golds")
def test_foils_that_are_right_or_nobodys(rows):
    evaluation_set, chosen, predictions, _ = rows
    own = {i.id: rf"\boxed{{{(i.golds or ('unanswerable',))[0]}}}" for i in chosen}
    for foil in (own[predictions[0]["id"]], r"\boxed{nobody}", None):
        assert not foil_gate(
            evaluation_set, [predictions[0] | {"foil": foil}, *predictions[1:]], chosen
        ).passed


def passes(variant: str, rows: list[dict], baseline: list[dict], alone: list[dict]) -> bool:
    return gold_invariance_gate(load_study("smoke"), variant, rows, baseline, alone).passed


@pytest.mark.bank(
    "reading", "golds in a batch a thousandth off", "gold log-likelihoods independent of the batch"
)
def test_golds_that_depend_on_their_company(rows):
    _, _, predictions, _ = rows
    assert passes("rtn_w8a8", predictions, predictions, predictions[:1])
    moved = predictions[0] | {"foil_loglikelihood": predictions[0]["foil_loglikelihood"] - 1e-3}
    assert not passes("rtn_w8a8", predictions, predictions, [moved])
    assert not passes("rtn_w8a8", predictions, predictions, [])
    broken = predictions[0] | {"gold_loglikelihoods": [None] * len(predictions[0]["gold_tokens"])}
    assert not passes("rtn_w8a8", predictions, predictions, [broken])


def test_where_rounding_cascades_golds_may_move_as_far_as_from_the_baseline(rows):
    _, _, predictions, _ = rows

    def moved(row: dict, by: float) -> dict:
        sums = [s - by for s in row["gold_loglikelihoods"]]
        return row | {
            "gold_loglikelihoods": sums,
            "foil_loglikelihood": row["foil_loglikelihood"] + by,
        }

    there = [moved(row, 0.1) for row in predictions]
    assert passes("noquant_bf16", there, predictions, [moved(predictions[0], 0.2)])
    assert not passes("noquant_bf16", there, predictions, [moved(predictions[0], 0.9)])
    # An item that happens to lie on the baseline says little; with others it raises no alarm.
    by_chance = [predictions[0], *there[1:]]
    alone = [moved(predictions[0], 0.1), *(moved(row, 0.05) for row in there[1:])]
    assert not passes("noquant_bf16", by_chance, predictions, alone[:1])
    assert passes("noquant_bf16", by_chance, predictions, alone)
    # A batch that was mixed up lies far from the baseline and must not widen its own limit.
    mixed_up = [moved(row, 3.0) for row in predictions]
    assert not passes("noquant_bf16", mixed_up, predictions, there)


def test_golds_read_without_an_answer_are_those_read_beside_one(rows):
    """The same texts, tokens and log-likelihoods, up to the stored precision."""
    evaluation_set, chosen, predictions, _ = rows
    model, tokenizer = random_model("llama", seed=3), byte_tokenizer()
    prompts = tokenize_prompts(chosen, evaluation_set, tokenizer)
    golds = gold_answers(chosen, evaluation_set)
    apart = read_golds(model, tokenizer, prompts, evaluation_set, limits=LIMITS[0], golds=golds)
    beside = {row["id"]: row for row in predictions}
    assert [row["id"] for row in apart] == [item.id for item in chosen]
    for row in apart:
        other = beside[row["id"]]
        for key in ("gold_tokens", "foil", "foil_tokens", "gold_hash"):
            assert row[key] == other[key]
        sums, other_sums = (
            [*r["gold_loglikelihoods"], r["foil_loglikelihood"]] for r in (row, other)
        )
        assert sums == pytest.approx(other_sums, rel=0, abs=LOGPROB_ROUNDING)


def test_the_further_golds_are_of_items_that_nobody_asks_alone():
    ids = [f"item-{n}" for n in range(40)]
    further = gold_sample_ids(ids, seed=7)
    assert len(further) == GOLD_SAMPLE
    assert not further & sampled_ids(ids, "generate", seed=7)


@pytest.mark.bank("reading", "a gold whose log-likelihood is not finite", "finite logits")
def test_a_gold_whose_log_likelihood_is_not_finite(rows):
    _, _, predictions, _ = rows
    shared = dict.fromkeys(("perplexity", "kl", "top1_agreement"), 1.0)
    assert finite_gate({"squad_v2": predictions}, shared, []).passed
    for lost in ({"gold_loglikelihoods": [None]}, {"foil_loglikelihood": None}):
        assert not finite_gate({"squad_v2": [predictions[0] | lost]}, shared, []).passed
