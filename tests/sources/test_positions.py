"""Rope that depends on a text's length: nothing a text is given depends on its company."""

import pytest
import torch

from helpers.core.errors import StudyError
from helpers.inference.perplexity import read_passages
from helpers.inference.protocols import OptionTokens, generate_greedy, option_loglikelihoods
from helpers.quantization.calibration import run_calibration
from helpers.quantization.simulation import DivergenceProbe
from helpers.sources.model_files import length_independent_up_to
from helpers.sources.models import answer_loss, random_model
from helpers.study.schema import Variant
from helpers.verification.checkpoint_files import input_maxima
from quantized_run import QuantizedRun, lived_in

LIMIT = 30  # tokens up to which positions are fixed
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0, 1.02, 1.05, 1.1, 1.1, 1.1, 1.1, 1.1],
    "long_factor": [1.1, 1.5, 3.0, 6.0, 12.0, 24.0, 40.0, 60.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
MODELS = {
    "phi3 longrope": ("phi3", {"rope_parameters": LONGROPE, "sliding_window": None}),
    "llama longrope": ("llama", {"rope_parameters": LONGROPE}),
    "llama dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
}
LENGTHS = (3, 44, LIMIT - 1, 12, LIMIT, LIMIT + 1, 25, 60)
CAP = 9


def tokens(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (length,), generator=generator).tolist()


TEXTS = [tokens(i, n) for i, n in enumerate(LENGTHS)]
ITEMS = [OptionTokens(t, [tokens(50 + i, 1 + i), tokens(60, 4)]) for i, t in enumerate(TEXTS)]


def fresh(case: str):
    """In float64, and without a memory of any text."""
    family, changes = MODELS[case]
    if case.startswith("phi3"):
        changes = changes | {"original_max_position_embeddings": LIMIT}
    model = lived_in(random_model(family, seed=9, **changes)).double()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(params=MODELS)
def case(request) -> str:
    torch.set_num_threads(1)
    return request.param


@torch.inference_mode()
def logprobs_of(case: str, ids: list[int]) -> torch.Tensor:
    """(tokens, vocabulary) by transformers' own pass of a model that has read nothing else."""
    return fresh(case)(torch.tensor([ids])).logits[0].log_softmax(-1)


def plain(case: str, context: list[int], option: list[int]) -> float:
    logprobs, at = logprobs_of(case, context + option), len(context) - 1
    return sum(logprobs[at + i, token].item() for i, token in enumerate(option))


def test_the_length_from_which_it_matters_is_known(case):
    assert length_independent_up_to(fresh(case).config) == LIMIT
    assert length_independent_up_to(random_model("llama", seed=1).config) is None
    assert length_independent_up_to(random_model("opt", seed=1).config) is None


def test_company_matters_to_transformers(case):
    """Or there would be nothing to avoid: a padded batch is read at the longest one's positions."""
    short, long = tokens(1, LIMIT - 10), tokens(2, LIMIT + 30)
    padded = torch.tensor([short + [0] * 40, long])
    mask = (torch.arange(len(long)) < torch.tensor([[len(short)], [len(long)]])).long()
    with torch.inference_mode():
        beside = fresh(case)(padded, attention_mask=mask).logits[0, : len(short)].log_softmax(-1)
    assert (beside - logprobs_of(case, short)).abs().max() > 1e-2


@pytest.mark.parametrize("batch_tokens", [1, 10**6])
def test_options_are_scored_as_each_alone(case, batch_tokens):
    model = fresh(case)
    scored = dict(option_loglikelihoods(model, ITEMS, batch_tokens=batch_tokens))
    for index, item in enumerate(ITEMS):
        expected = [plain(case, item.context, option) for option in item.options]
        assert scored[index] == pytest.approx(expected, abs=1e-3)


def test_what_is_read_after_a_prompt_is_what_whole_passes_give(case):
    """Also where a text after the prompt goes beyond the limit and the answer does not."""
    prompts = [tokens(70 + i, n) for i, n in enumerate((5, LIMIT - 4, LIMIT + 12))]
    options = [[tokens(40 + i, n) for n in (1, 9)] for i in range(len(prompts))]
    ends = {"max_new_tokens": 2, "stop_tokens": set(), "batch_tokens": 10**6, "batch_rows": 16}
    found = dict(generate_greedy(fresh(case), prompts, options=options, **ends))
    for index, prompt in enumerate(prompts):
        due = []
        for option in options[index]:
            logprobs = logprobs_of(case, prompt + option)
            places = range(len(prompt) - 1, len(prompt) + len(option) - 1)
            due.append(sum(float(logprobs[p, t]) for p, t in zip(places, option, strict=True)))
        assert found[index].loglikelihoods == pytest.approx(due, abs=1e-3)


def test_passages_are_read_as_each_alone(case):
    model = fresh(case)
    states = read_passages(model, TEXTS, batch_tokens=10**6)
    logprobs = states.head(states.hidden).log_softmax(-1)
    expected = torch.cat([logprobs_of(case, text)[:-1] for text in TEXTS])
    assert (logprobs.double() - expected).abs().max() < 1e-3


def greedy(case: str, prompt: list[int]) -> list[int]:
    """One whole pass of a fresh model for every token."""
    generated: list[int] = []
    while len(generated) < CAP:
        generated.append(int(logprobs_of(case, prompt + generated)[-1].argmax()))
    return generated


def answers(model, prompts) -> list[list[int]]:
    limits = {"batch_tokens": 10**6, "batch_rows": 16}
    generated = dict(
        generate_greedy(model, prompts, max_new_tokens=CAP, stop_tokens=set(), **limits)
    )
    return [generated[i].tokens for i in range(len(prompts))]


def test_answers_are_those_of_whole_passes(case):
    """Also of a prompt that grows beyond the limit while it is answered."""
    prompts = [tokens(70 + i, n) for i, n in enumerate((5, LIMIT - 4, LIMIT + 12))]
    assert answers(fresh(case), prompts) == [greedy(case, prompt) for prompt in prompts]


@torch.inference_mode()
def test_answers_are_those_of_generate():
    """Without its cache: with it, transformers 5.17 forgets the prompt where positions change."""
    model = fresh("phi3 longrope")
    prompts = [tokens(80 + i, n) for i, n in enumerate((LIMIT - 4, LIMIT + 12))]
    expected = [
        fresh("phi3 longrope")
        .generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=CAP,
            do_sample=False,
            use_cache=False,
            pad_token_id=0,
        )[0, len(prompt) :]
        .tolist()
        for prompt in prompts
    ]
    assert answers(model, prompts) == expected


def test_every_check_passes_on_a_checkpoint_of_such_a_model(tmp_path, study_settings):
    """Probes are whole texts, since a beginning is read otherwise."""
    family, changes = MODELS["phi3 longrope"]
    run = QuantizedRun(tmp_path / "run", study_settings, "smoothquant_w8a8")
    run.save_source(family, original_max_position_embeddings=LIMIT, **changes)
    run.calibrate()
    run.quantize()
    assert run.failed() == set()


def test_texts_beyond_the_context_are_refused():
    model = random_model("llama", seed=1, max_position_embeddings=50)
    with pytest.raises(StudyError, match="calibration: a text has 60 tokens but the model reads"):
        run_calibration(model, TEXTS, batch_tokens=64)


def test_calibration_sees_each_text_as_it_is_alone():
    case = "phi3 longrope"
    together = run_calibration(fresh(case).float(), TEXTS, batch_tokens=10**6)
    alone = input_maxima(fresh(case).float(), TEXTS)
    for name, statistics in together.items():
        torch.testing.assert_close(statistics.absmax, alone[name])


def test_a_probe_reads_each_text_alone():
    case = "phi3 longrope"
    probe = DivergenceProbe(fresh(case), TEXTS[:3], Variant(preset="w8a8"))
    expected = torch.cat([logprobs_of(case, TEXTS[i]) for i in (1, 2, 0)])  # the longest first
    assert (torch.cat(probe.expected).double() - expected).abs().max() < 1e-3


def test_a_training_loss_is_the_mean_over_texts_alone():
    """An example's last token is predicted and not read: there is one of LIMIT + 1 less."""
    case = "phi3 longrope"
    batch = [(text[:-2], text[-2:]) for text in TEXTS if len(text) not in (3, LIMIT + 1)]
    with torch.inference_mode():
        loss = answer_loss(fresh(case), batch, autocast="none").item()
    expected = [plain(case, *example) for example in batch]
    assert loss == pytest.approx(-sum(expected) / (2 * len(batch)), abs=1e-3)
