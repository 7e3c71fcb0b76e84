"""What `make serve-check` calls agreement, on made-up figures that are off."""

import pytest
from benchmarks.serve_check import FLOAT_TOLERANCE, LAYER_TOLERANCE, disagreements, not_served
from benchmarks.vllm_linears import INT8_KERNEL

from helpers.study.loading import load_study

DRAWS = {"kl_from_float": [0.0250, 0.0262, 0.0255, 0.0271, 0.0248, 0.0259]}
INT8 = {
    "quantized": True,
    "kernels": {f"CPU{INT8_KERNEL}": 210},
    "layer_difference": LAYER_TOLERANCE / 10,
    "kl_vllm": 0.0260,
    "draws": DRAWS,
}
FLOAT = {
    "quantized": False,
    "kernels": {"UnquantizedLinearMethod": 210},
    "logprob_difference": FLOAT_TOLERANCE / 10,
    "items": {"arc": {"items": 8, "same": 8}},
}


@pytest.mark.parametrize("sound", [INT8, FLOAT])
def test_what_is_sound_agrees(sound):
    assert disagreements(sound) == []


@pytest.mark.parametrize(
    "off",
    [
        {"kl_vllm": 0.0400},
        {"kl_vllm": 0.0150},
        {"kl_vllm": float("nan")},
        {"layer_difference": 2 * LAYER_TOLERANCE},
        {"layer_difference": float("nan")},
        {"kernels": {"UnquantizedLinearMethod": 210}},
    ],
)
def test_an_int8_model_that_is_another_is_told(off):
    assert len(disagreements(INT8 | off)) == 1


@pytest.mark.parametrize(
    "off",
    [
        {"logprob_difference": 2 * FLOAT_TOLERANCE},
        {"logprob_difference": float("nan")},
        {"items": {"arc": {"items": 8, "same": 7}}},
        {"kernels": {f"CPU{INT8_KERNEL}": 210}},
    ],
)
def test_a_float_model_that_is_another_is_told(off):
    assert len(disagreements(FLOAT | off)) == 1


def test_simulated_variants_are_named_instead_of_compared():
    reasons = {name: not_served(v) for name, v in load_study("recipes").variants.items()}
    served = {name for name, reason in reasons.items() if not reason}
    assert {"noquant", "rtn_w8a8", "smoothquant_gptq", "o3_down"} <= served
    assert not served & {"noquant_bf16", "smoothquant_kv8", "w4a16", "fp8"}
