"""What models do to their head's products is discovered, applied, and checked by its other name."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from helpers.core.architectures import Logits
from helpers.evaluation.checks.forward_passes import named_form
from helpers.inference import packed_attention
from helpers.inference.protocols import OptionTokens, option_loglikelihoods
from helpers.runtime.discovery import architecture, head_logits
from helpers.runtime.twins import build_twin, twin_config

FORMS = {
    "gemma2": ({}, Logits(cap=30.0)),
    "cohere": ({}, Logits(scale=0.0625)),
    "granite": ({"logits_scaling": 8.0}, Logits(scale=0.125)),
    "nanochat": ({}, Logits(cap=15.0)),
    "llama": ({}, Logits()),
}


def tiny(family):
    config = twin_config(CONFIG_MAPPING[family](**FORMS[family][0]), layers=2)
    model = build_twin(config).float().eval()
    model.get_output_embeddings().weight.data *= 40  # logits that a cap bends
    return model


@torch.inference_mode()
@pytest.mark.parametrize("family", FORMS)
def test_logits_are_those_of_transformers(family):
    model, form = tiny(family), FORMS[family][1]
    assert architecture(model.config).logits == form
    ids = torch.randint(3, 250, (1, 20), generator=torch.Generator().manual_seed(1))
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    expected = model(input_ids=ids, use_cache=False).logits[0]
    torch.testing.assert_close(head_logits(model, hidden), expected)
    products = model.get_output_embeddings()(hidden)
    torch.testing.assert_close(named_form(products.double(), model.config).float(), expected)
    assert (form == Logits()) == torch.allclose(products, expected, atol=0.01)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["nanochat", "granite"])
def test_an_engine_that_forgets_the_form_reads_otherwise_than_transformers(family, monkeypatch):
    """The difference is what the second opinion of an evaluation compares, to 0.001 nats."""
    model, context = tiny(family), list(range(5, 25))

    def apart() -> float:
        [(_, sums)] = option_loglikelihoods(
            model, [OptionTokens(context, [[9, 8]])], batch_tokens=64
        )
        logits = model(input_ids=torch.tensor([[*context, 9, 8]])).logits[0].double()
        logprobs = logits.log_softmax(-1)
        return abs(sums[0] - float(logprobs[-3, 9] + logprobs[-2, 8]))

    assert apart() < 1e-4
    monkeypatch.setattr(
        packed_attention, "head_logits", lambda model, x: model.get_output_embeddings()(x)
    )
    assert apart() > 0.01
