"""Experts with Linears of their own: transformers' stacked experts, computed another way."""

import torch
from transformers import AutoModelForCausalLM

from helpers.quantization.variants import read_checkpoint_tensors
from helpers.runtime.devices import LinearExperts, every_expert_reads
from helpers.runtime.discovery import linear_experts
from helpers.sources.model_files import load_config
from helpers.sources.models import load_model, random_model
from helpers.study.schema import Runtime

RUNTIME = Runtime(device="cpu", dtype="float32", threads=1, quantized="int8")


def both(folder):
    """(transformers' own model, the same with Linears) from one folder."""
    random_model("qwen3_moe", seed=2).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder), load_model(folder, RUNTIME)


def test_the_function_is_that_of_the_stacked_experts(tmp_path):
    stacked, ours = both(tmp_path)
    ids = torch.randint(3, 259, (3, 21), generator=torch.Generator().manual_seed(0))
    expected = stacked(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert type(stacked.model.layers[0].mlp.experts).__name__ == "Qwen3MoeExperts"
    assert isinstance(ours.model.layers[0].mlp.experts, LinearExperts)


def test_every_expert_may_read_every_token_without_changing_the_answer(tmp_path):
    _, model = both(tmp_path)
    ids, seen = torch.randint(3, 259, (1, 21), generator=torch.Generator().manual_seed(0)), []
    expert = model.model.layers[1].mlp.experts[3]
    expert.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    expected = model(ids).logits
    with every_expert_reads(model):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    routed, everything = seen
    assert routed < everything == 21
    model(ids)
    assert seen[-1] == routed


def test_files_are_those_of_transformers(tmp_path):
    """Written by either, read by either."""
    stacked, ours = both(tmp_path / "source")
    stacked.save_pretrained(tmp_path / "stacked")
    ours.save_pretrained(tmp_path / "ours")
    expected = read_checkpoint_tensors(tmp_path / "stacked")
    for folder in ("source", "ours"):
        stored = read_checkpoint_tensors(tmp_path / folder)
        assert set(stored) == set(expected)
        assert all(torch.equal(stored[name], expected[name]) for name in expected)


def test_transformers_is_left_as_it_was(tmp_path):
    """Also when loading fails inside."""
    stacked, _ = both(tmp_path)
    try:
        with linear_experts(load_config(tmp_path)):
            raise KeyError
    except KeyError:
        pass
    ids = torch.tensor([[5, 9, 77]])
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, stacked(ids).logits)
