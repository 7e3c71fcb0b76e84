"""A plain text begins as the tokenizer begins it, once, wherever it is scored or read."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from helpers.evaluation import prompts
from helpers.evaluation.checks.evaluation_data import render_items_again
from helpers.evaluation.checks.integrity import length_gate, prompts_gate
from helpers.evaluation.checks.numeric_gates import recomputed_gates
from helpers.evaluation.checks.second_opinion import Passes, recompute
from helpers.evaluation.engine import evaluate
from helpers.evaluation.prompts import option_tokens, render_prompt
from helpers.evaluation.scoring import shared_text_metrics
from helpers.inference import perplexity
from helpers.inference.perplexity import (
    first_scored_token,
    passage_rows,
    passage_tokens,
    read_passages,
    read_shared_text,
    token_texts,
)
from helpers.sources.chat import beginning_tokens, conversation, plain_tokens, render, tokenize
from helpers.sources.models import byte_tokenizer, load_model, load_tokenizer, random_model
from helpers.sources.sampling import evaluation_items, shared_passages
from helpers.study.loading import open_job
from helpers.study.schema import Batch

FIRST, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
POST = {  # what is put around a text, and how many tokens come before it
    "nothing": ("$A", 0),
    "a first token": (f"{FIRST} $A", 1),
    "a first token, and a last": (f"{FIRST} $A {END}", 1),
    "two first tokens": (f"{FIRST} {START} $A", 2),
}


def tokenizer_with(post: str):
    tokenizer = byte_tokenizer()
    core = tokenizer.backend_tokenizer
    special = [(name, core.token_to_id(name)) for name in (FIRST, START, END)]
    core.post_processor = TemplateProcessing(single=POST[post][0], special_tokens=special)
    return tokenizer


@pytest.fixture(params=POST)
def tokenizer(request):
    return tokenizer_with(request.param)


def as_transformers(tokenizer, text: str) -> list[int]:
    """What the tokenizer itself makes of a text, without the token it may end it with."""
    ids = tokenizer(text).input_ids
    return ids[:-1] if ids[-1] == tokenizer.convert_tokens_to_ids(END) else ids


@pytest.mark.parametrize("text", ["Question: how?\nAnswer:", " ", "ä", "a text"])
def test_plain_tokens_are_the_tokenizers_own(tokenizer, text):
    assert plain_tokens(tokenizer, text) == as_transformers(tokenizer, text)


@pytest.mark.parametrize("post", POST)
def test_the_beginning_is_there_once(post):
    tokenizer = tokenizer_with(post)
    assert len(beginning_tokens(tokenizer)) == POST[post][1]
    already = tokenizer.decode(beginning_tokens(tokenizer)) + "a text"
    assert plain_tokens(tokenizer, already) == plain_tokens(tokenizer, "a text")


def test_a_rendered_chat_gets_nothing_before_it(study, tokenizer):
    """Its template has written what belongs there."""
    item = evaluation_items(study, "squad_v2")[0]
    text = render(tokenizer, conversation(item, "squad_v2", shots=1))
    assert tokenizer.decode(tokenize(tokenizer, text)) == text


@torch.inference_mode()
def plain_logprobs(model, ids: list[int]) -> torch.Tensor:
    """(tokens - 1,) float64 log-probability of every token after the first."""
    logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_options_are_scored_as_transformers_scores_them(exact_model, study, tokenizer):
    settings, items = study.evaluation.datasets["arc"], evaluation_items(study, "arc")
    limits = Batch(tokens=512, rows=16)
    predictions = {
        p["id"]: p for p in evaluate(exact_model, tokenizer, items, settings, limits=limits)
    }
    for item in items:
        scored_prompt = render_prompt(item, settings, tokenizer)
        context = as_transformers(tokenizer, scored_prompt.text)
        expected = []
        for continuation in scored_prompt.continuations:
            whole = as_transformers(tokenizer, scored_prompt.text + continuation)
            assert whole[: len(context)] == context
            scores = plain_logprobs(exact_model, whole)
            expected.append(scores[len(context) - 1 :].sum().item())
        assert predictions[item.id]["logprobs"] == pytest.approx(expected, abs=1e-4)
        assert predictions[item.id]["prompt_tokens"] == len(context)


def test_what_prompts_share_is_counted_with_the_beginning(study_settings, study, tokenizer):
    settings = study.evaluation.datasets["arc"].model_copy(update={"adapter": "boolq"})
    item = evaluation_items(study, "squad_v2")[0]
    tokens = option_tokens(tokenizer, render_prompt(item, settings, tokenizer))
    shared = as_transformers(tokenizer, item.passage)
    assert tokens.cuts == (len(shared),)
    assert tokens.context[: len(shared)] == shared


def test_the_shared_text_is_read_as_transformers_reads_it(exact_model, study, tokenizer):
    """Every token of the text is predicted that has one before it, and none of the beginning."""
    passages = shared_passages(study)
    tokens = passage_tokens(tokenizer, passages, max_tokens=64)
    states = read_passages(exact_model, tokens, batch_tokens=512)
    first = first_scored_token(tokenizer)
    rows = passage_rows(passages, tokens, states, states, first=first)
    for row, passage in zip(rows, passages, strict=True):
        ids = as_transformers(tokenizer, passage)[:64]
        scores = plain_logprobs(exact_model, ids)[max(1, len(beginning_tokens(tokenizer))) - 1 :]
        assert row["tokens"] == len(scores) == row["top1_agreements"]
        assert row["nll"] == pytest.approx(-scores.sum().item(), abs=1e-3)
        assert row["kl"] == pytest.approx(0, abs=1e-9)


BEGUN = [post for post, (_, before) in POST.items() if before]
LOST = "plain text without the first token that the tokenizer puts there"


@pytest.mark.bank("beginnings", LOST)
@pytest.mark.parametrize("post", BEGUN)
def test_options_asked_without_their_beginning_are_caught(model, study, monkeypatch, post):
    """For baseline and variants alike, so that only the tokenizer itself tells."""
    tokenizer, settings = tokenizer_with(post), study.evaluation.datasets["arc"]
    items, limits = evaluation_items(study, "arc"), Batch(tokens=512, rows=16)
    rendered = render_items_again(study, tokenizer, tokenizer)["arc"]

    def gates():
        rows = list(evaluate(model, tokenizer, items, settings, limits=limits))
        return [prompts_gate(rows, rendered), length_gate(rows, rendered)]

    assert all(gate.passed for gate in gates())
    monkeypatch.setattr(prompts, "plain_tokens", tokenize)
    assert not any(gate.passed for gate in gates())


@pytest.mark.bank("beginnings", LOST)
@pytest.mark.parametrize("post", BEGUN)
def test_a_shared_text_without_its_beginning_is_caught(
    study_settings, write_study, tmp_path, monkeypatch, post
):
    random_model("llama", seed=3).save_pretrained(tmp_path / "model")
    tokenizer_with(post).save_pretrained(tmp_path / "model")
    study_settings["models"]["base"] = {"folder": str(tmp_path / "model")}
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path / "outputs"))
    job = open_job(write_study(study_settings), model="base", variant="noquant")
    tokenizer = load_tokenizer(tmp_path / "model", enable_thinking=None)
    model = load_model(tmp_path / "model", job.study.runtime)

    def failed() -> set[str]:
        passes = Passes(model)
        rows = read_shared_text(job, model, tokenizer)
        again = recompute(job, model, passes)
        gates = recomputed_gates(rows, shared_text_metrics(rows), again, is_baseline=True)
        return {gate.name for gate in gates if not gate.passed}

    assert failed() == set()
    monkeypatch.setattr(perplexity, "plain_tokens", tokenize)
    assert "passages tokenized by the source" in failed()


def metaspace_tokenizer():
    """Words with a mark in front, which is dropped where a text begins; unknown bytes as such."""
    pieces = ["▁the", "▁cat", "s", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True)
    core = Tokenizer(model)
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=core), pieces


def test_the_texts_of_tokens_are_the_scored_text(tokenizer):
    """A character of several tokens stands at its last one."""
    text = "naïve 漢字 🙂 end"
    tokens, first = plain_tokens(tokenizer, text), first_scored_token(tokenizer)
    texts = token_texts(tokenizer, tokens, first=first)
    assert len(texts) == len(tokens) - first
    assert "".join(texts) == tokenizer.decode(tokens[first:])
    assert texts[texts.index("🙂") - 3 : texts.index("🙂")] == ["", "", ""]
    cut = token_texts(tokenizer, tokens[: first + texts.index("漢") - 1], first=first)
    assert len(cut) == texts.index("漢") - 1  # the last character lacks its end


def test_a_token_that_begins_a_text_otherwise_keeps_its_space():
    tokenizer, pieces = metaspace_tokenizer()
    tokens = [pieces.index(p) for p in ("▁the", "▁cat", "s", "▁", "<0xC3>", "<0xA9>", "▁the")]
    assert tokenizer.decode(tokens[1:]) == "cats é the"
    assert token_texts(tokenizer, tokens, first=1) == [" cat", "s", " ", "", "é", " the"]
