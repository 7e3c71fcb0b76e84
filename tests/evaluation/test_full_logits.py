"""The figures of the shared text, computed a second time: sound ones agree, wrong ones do not."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from helpers.evaluation.checks import second_opinion
from helpers.evaluation.checks.integrity import finite_gate
from helpers.evaluation.checks.numeric_gates import recomputed_gates
from helpers.evaluation.scoring import shared_text_metrics
from helpers.inference import perplexity
from helpers.inference.perplexity import (
    passage_rows,
    passage_tokens,
    read_passages,
    read_shared_text,
    token_texts,
)
from helpers.sources.models import byte_tokenizer, load_model, load_tokenizer, model_folder
from helpers.sources.sampling import shared_passages
from helpers.statistics.graded import token_kl
from helpers.study.loading import open_job

AGAIN = "shared-text figures recomputed"


def job_of(study_path, variant: str):
    return open_job(study_path, model="base", variant=variant)


@pytest.fixture
def evaluated(study_path, monkeypatch, tmp_path):
    """read(variant): (stored rows, gates) of the shared text, the baseline's states kept before."""
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setattr(perplexity, "check_checksums", lambda *_, **__: None)
    torch.set_num_threads(1)
    job = job_of(study_path, "noquant")
    folder = model_folder(job.study, "base", job.paths)
    model = load_model(folder, job.study.runtime)
    tokenizer = load_tokenizer(folder, enable_thinking=None)
    read_shared_text(job, model, tokenizer)

    def read(variant: str = "rtn_w8a8"):
        asked, job = (
            (model if variant == "noquant" else rounded(model)),
            job_of(study_path, variant),
        )
        passes = second_opinion.Passes(asked)
        rows = read_shared_text(job, asked, tokenizer)
        again = second_opinion.recompute(job, asked, passes)
        means = shared_text_metrics(rows)
        return rows, recomputed_gates(rows, means, again, is_baseline=variant == "noquant")

    return read


def rounded(model):
    """A model as far from the float one as a coarse grid of weights takes it."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "proj" in name:
                step = weight.abs().amax() / 12
                weight.copy_((weight / step).round() * step)
    return other


def failed(gates) -> set[str]:
    return {gate.name for gate in gates if not gate.passed}


@pytest.mark.parametrize("variant", ["noquant", "rtn_w8a8"])
def test_sound_figures_agree(evaluated, variant):
    rows, gates = evaluated(variant)
    assert failed(gates) == set()
    assert (sum(row["kl"] for row in rows) > 1) == (variant != "noquant")


def kl_the_wrong_way_round(passages, tokens, states, reference, **options):
    rows = passage_rows(passages, tokens, states, reference, **options)
    turned = passage_rows(passages, tokens, reference, states, **options)
    return [row | {"kl": other["kl"]} for row, other in zip(rows, turned, strict=True)]


def loss_on_the_token_before(passages, tokens, states, reference, **options):
    shifted = [[t[0], *t[:-1]] for t in tokens]
    return passage_rows(passages, shifted, states, reference, **options)


def agreements_of_half(passages, tokens, states, reference, **options):
    rows = passage_rows(passages, tokens, states, reference, **options)
    return [row | {"top1_agreements": row["top1_agreements"] // 2} for row in rows]


def kl_one_token_late(passages, tokens, states, reference, **options):
    """The KL of each token stands at the next one; the sums are right."""
    rows = passage_rows(passages, tokens, states, reference, **options)
    return [row | {"token_kl": [*row["token_kl"][-1:], *row["token_kl"][:-1]]} for row in rows]


WRONG = {
    kl_one_token_late: "KL of a token at the next one",
    kl_the_wrong_way_round: "KL the wrong way round",
    loss_on_the_token_before: "loss on the wrong token",
    agreements_of_half: "half of the top-1 agreements",
}


@pytest.mark.parametrize(
    "wrong", [pytest.param(f, marks=pytest.mark.bank("text", w, AGAIN)) for f, w in WRONG.items()]
)
def test_figures_made_wrongly_are_caught(evaluated, monkeypatch, wrong):
    monkeypatch.setattr(perplexity, "passage_rows", wrong)
    _, gates = evaluated()
    assert AGAIN in failed(gates)


@pytest.mark.bank("text", "KL of tokens that is not the passage's", "shared-text means recomputed")
def test_tokens_that_do_not_add_up_to_their_passage_are_caught(evaluated):
    rows, _ = evaluated()
    halved = [row | {"token_kl": [kl / 2 for kl in row["token_kl"]]} for row in rows]
    means = shared_text_metrics(rows)
    assert "shared-text means recomputed" in failed(
        recomputed_gates(halved, means, None, is_baseline=False)
    )
    assert "shared-text means recomputed" not in failed(
        recomputed_gates(rows, means, None, is_baseline=False)
    )


@pytest.mark.bank("text", "a token without a finite KL", "finite logits")
def test_a_token_without_a_finite_kl_is_named(evaluated, monkeypatch):
    """One hidden state is no number: its passage has no sum and its token is named."""
    read = perplexity.read_passages

    def broken(model, tokens, **options):
        states = read(model, tokens, **options)
        states.hidden[len(tokens[0]) - 1 + 5] = torch.nan  # of the second passage, token 5
        return states

    monkeypatch.setattr(perplexity, "read_passages", broken)
    rows, gates = evaluated()
    assert [place for place, kl in enumerate(rows[1]["token_kl"]) if kl is None] == [5]
    assert None not in rows[0]["token_kl"]
    assert "shared-text means recomputed" in failed(gates)
    gate = finite_gate({}, shared_text_metrics(rows), rows)
    assert not gate.passed
    assert f"1 tokens without a finite KL, first token 5 of {rows[1]['id']}" in gate.measured


def test_rounding_that_cancels_in_the_sum_still_widens_the_limit():
    """Two readings of the baseline whose tokens differ and whose passages have one KL."""
    first, logits = torch.randn(2, 2, 9, generator=torch.Generator().manual_seed(0))
    row = second_opinion.compare_passage([1, 2, 3], first, first.flip(0), logits[:1].repeat(2, 1))
    difference = abs(row["token_kl"][0] - row["token_kl"][1])
    assert difference > 0.01
    assert row["token_kl_blur"] == pytest.approx([difference] * 2)
    assert row["kl_blur"] == pytest.approx(difference * math.sqrt(2))


def test_the_kl_of_each_token_is_that_of_float64_distributions(exact_model, study):
    """By transformers' forward pass and scipy, and a planted outlier stands at its place."""
    tokenizer, passages = byte_tokenizer(), shared_passages(study)
    tokens = passage_tokens(tokenizer, passages, max_tokens=64)
    other = rounded(exact_model)
    both = [read_passages(m, tokens, batch_tokens=512) for m in (other, exact_model)]
    rows = passage_rows(passages, tokens, *both)
    for row, ids in zip(rows, tokens, strict=True):
        with torch.inference_mode():
            logits = [
                m(input_ids=torch.tensor([ids[:-1]])).logits[0].double().numpy()
                for m in (exact_model, other)
            ]
        before, after = (log_softmax(x, axis=-1) for x in logits)
        expected = (np.exp(before) * (before - after)).sum(-1)
        assert row["token_kl"] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
        assert math.fsum(row["token_kl"]) == pytest.approx(row["kl"], rel=1e-5)
    start = sum(len(ids) - 1 for ids in tokens[:2])  # of the third passage
    both[0].hidden[start + 17] *= -1
    rows = passage_rows(passages, tokens, *both)
    kl = token_kl({row["id"]: row["token_kl"] for row in rows}, shown=1)
    assert (kl.tail[0].passage, kl.tail[0].token) == (rows[2]["id"], 17)
    assert token_texts(tokenizer, tokens[2], first=1)[17] == passages[2][18]  # a byte a token


@pytest.mark.bank("text", "loss on the wrong token", AGAIN)
def test_the_baselines_loss_on_the_wrong_token_is_caught(evaluated, monkeypatch):
    monkeypatch.setattr(perplexity, "passage_rows", loss_on_the_token_before)
    assert failed(evaluated("noquant")[1]) == {AGAIN}


@pytest.mark.bank("text", "reference shifted by one for quantized variants", AGAIN)
def test_a_reference_shifted_by_one_is_caught(evaluated, monkeypatch):
    load = perplexity.load_states

    def shifted(*arguments):
        states = load(*arguments)
        return perplexity.HiddenStates(states.hidden.roll(1, 0), states.head)

    monkeypatch.setattr(perplexity, "load_states", shifted)
    assert AGAIN in failed(evaluated()[1])


@pytest.mark.bank("text", "passages cut short by a token", "passage token counts")
def test_a_passage_cut_short_has_another_count(evaluated, monkeypatch):
    cut = perplexity.passage_tokens
    monkeypatch.setattr(
        perplexity,
        "passage_tokens",
        lambda *a, max_tokens: cut(*a, max_tokens=max_tokens - 1),
    )
    assert "passage token counts" in failed(evaluated("noquant")[1])


@pytest.mark.bank("text", "states of two passages exchanged", AGAIN)
def test_states_of_other_passages_are_caught(evaluated, monkeypatch):
    """The rows of two passages were exchanged on their way from the model to the figures."""
    read = perplexity.read_passages

    def exchanged(model, tokens, **options):
        states = read(model, tokens, **options)
        return perplexity.HiddenStates(states.hidden.flip(0), states.head)

    monkeypatch.setattr(perplexity, "read_passages", exchanged)
    assert AGAIN in failed(evaluated()[1])


@pytest.mark.bank(
    "text", "a baseline apart from itself", "baseline agrees with itself", at="rows of the passages"
)
@pytest.mark.bank(
    "text", "means over passages instead of tokens", "shared-text means recomputed", at="metrics"
)
def test_a_baseline_apart_from_itself_and_wrong_means_are_caught(evaluated):
    rows, _ = evaluated("noquant")
    apart = [row | {"kl": 1e-3} for row in rows]
    means = shared_text_metrics(rows)
    failing = failed(recomputed_gates(apart, means, None, is_baseline=True))
    assert {"baseline agrees with itself", "shared-text means recomputed", AGAIN} <= failing
    by_passage = sum(row["nll"] / row["tokens"] for row in rows) / len(rows)
    other = means | {"perplexity": 2.718281828 ** (1.01 * by_passage)}
    assert "shared-text means recomputed" in failed(
        recomputed_gates(rows, other, None, is_baseline=True)
    )


def test_the_hook_is_taken_off_again(evaluated, study_path):
    job = job_of(study_path, "noquant")
    model = load_model(model_folder(job.study, "base", job.paths), job.study.runtime)
    passes = second_opinion.Passes(model)
    assert model.base_model._forward_hooks
    passes.end()
    assert not model.base_model._forward_hooks


@pytest.mark.bank(
    "tokens", "two token ids swapped in the shared text", "passages tokenized by the source"
)
def test_two_token_ids_exchanged_in_the_shared_text_are_caught(evaluated, monkeypatch):
    """The passage has as many tokens as it has to, and they are others."""
    from test_silent_evaluation_failures import swapped

    turned = swapped(perplexity.plain_tokens, "ez")
    monkeypatch.setattr(perplexity, "plain_tokens", turned)
    failing = failed(evaluated("noquant")[1])
    assert "passages tokenized by the source" in failing
    assert "passage token counts" not in failing
