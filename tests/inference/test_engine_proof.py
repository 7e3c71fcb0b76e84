"""The engine finds out, when a model is loaded, whether it reads it as the model reads itself."""

import math

import pytest
import torch
from transformers import CONFIG_MAPPING

from helpers.inference import packed_attention, protocols
from helpers.inference.protocols import (
    OptionTokens,
    generate_greedy,
    option_loglikelihoods,
    prove_engine,
    reading_record,
)
from helpers.quantization.variants import load_int8
from helpers.runtime.devices import use_onednn
from helpers.runtime.discovery import linear_experts
from helpers.runtime.twins import build_twin, twin_config
from helpers.sources.models import random_model


def bloom():
    """A model with ALiBi in an attention of its own, which knows nothing of packed rows."""
    return use_onednn(build_twin(twin_config(CONFIG_MAPPING["bloom"](), layers=2)).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gemma3_text", "opt", "qwen3_moe"])
def test_known_families_are_read_in_packed_rows(family, dtype):
    model = random_model(family, seed=2).to(dtype)
    prove_engine(model)
    assert (model.packing_problem, model.cache_problem) == ("", "")
    assert reading_record(model) == {}


def test_an_int8_checkpoint_is_read_in_packed_rows(sound_runs):
    folder = sound_runs("llama", "rtn_w8a8").checkpoint
    model = load_int8(folder, dtype=torch.float32, device="cpu")
    prove_engine(model)
    assert (model.packing_problem, model.cache_problem) == ("", "")


@torch.inference_mode()
def test_a_model_that_mixes_packed_texts_is_read_one_text_at_a_time():
    model = bloom()
    prove_engine(model)
    assert "states differ by" in model.packing_problem
    assert "one text at a time" in reading_record(model)["reading"]
    generator = torch.Generator().manual_seed(1)
    contexts = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in (9, 30)]
    items = [OptionTokens(context, [[5, 6], [7]]) for context in contexts]
    sums = dict(option_loglikelihoods(model, items, batch_tokens=512))
    for index, context in enumerate(contexts):
        for option, value in zip(([5, 6], [7]), sums[index], strict=True):
            logits = model(torch.tensor([context + option])).logits[0]
            logprobs, first = logits.double().log_softmax(-1), len(context) - 1
            own = sum(logprobs[first + i, t].item() for i, t in enumerate(option))
            assert value == pytest.approx(own, abs=1e-4)
    options = {"max_new_tokens": 4, "stop_tokens": set(), "batch_tokens": 512, "batch_rows": 4}
    written = dict(generate_greedy(model, contexts, **options))
    for index, context in enumerate(contexts):
        text = list(context)
        for _ in range(4):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        assert written[index].tokens == text[len(context) :]


def test_rounding_does_not_hide_a_state_that_crosses_texts(monkeypatch):
    """In bfloat16 a recurrent block's error looks like rounding; its twin in float32 tells."""
    config = twin_config(CONFIG_MAPPING["qwen3_next"](), layers=4)
    with linear_experts(config):
        model = use_onednn(build_twin(config).to(torch.bfloat16))
    prove_engine(model)
    assert model.packing_problem
    monkeypatch.setattr(protocols, "SHARP", math.inf)
    prove_engine(model)
    assert not model.packing_problem


def test_rows_that_mix_their_texts_are_noticed(monkeypatch):
    def attend_to_all(batch, layer, query, key, value, **how):
        whole = packed_attention.Segment([0] * query.shape[2])
        return original(packed_attention.PackedBatch([whole]), layer, query, key, value, **how)

    original = packed_attention.PackedBatch.attend
    monkeypatch.setattr(packed_attention.PackedBatch, "attend", attend_to_all)
    model = random_model("llama", seed=2)
    prove_engine(model)
    assert model.packing_problem


def test_slots_that_forget_their_beginning_are_noticed(monkeypatch):
    original = packed_attention.KVCache.fill
    monkeypatch.setattr(
        packed_attention.KVCache, "fill", lambda slots, slot, s: original(slots, 0, s)
    )
    model = random_model("llama", seed=2)
    prove_engine(model)
    assert model.packing_problem


def test_a_cache_that_loses_a_token_is_noticed_and_not_used(monkeypatch):
    from helpers.inference import protocols

    class Forgetful(protocols.DynamicCache):
        def get_seq_length(self, layer_idx: int = 0) -> int:
            return max(0, super().get_seq_length(layer_idx) - 1)

    monkeypatch.setattr(protocols, "DynamicCache", Forgetful)
    model = random_model("llama", seed=2)
    prove_engine(model)
    assert model.cache_problem
    sequence, tokens = protocols.CachedSequence(model), list(range(5, 20))
    expected = protocols.hidden_states(model, tokens)[-1:]
    assert torch.equal(sequence.last_state(tokens), expected)
