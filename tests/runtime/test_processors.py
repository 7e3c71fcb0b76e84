"""A run kept to less than the processor has, and bfloat16 where there are no units for it."""

import os
import subprocess
import sys

import pytest
import torch

from helpers.core.errors import StudyError
from helpers.core.files import PROJECT
from helpers.inference.packed_attention import Segment, read, use_packed_attention
from helpers.runtime import devices
from helpers.runtime.devices import product, use_onednn
from helpers.sources import models


@pytest.fixture
def no_units(monkeypatch):
    """A processor that has AVX2 and nothing above it, as far as this project's choices go."""
    monkeypatch.setattr(devices, "features", lambda: ("avx2",))


def test_a_restriction_leaves_what_the_processor_has_of_it(monkeypatch):
    monkeypatch.setattr(devices, "_cpu_features", lambda: devices.FEATURES)
    monkeypatch.setenv("STUDY_PROCESSOR", "avx2")
    assert devices.features() == ("avx2",)
    assert devices.processor_class() == "AVX2"
    assert not devices.has_int8_units()
    assert not devices.has_bfloat16_units()
    assert devices.processor_name().endswith("(kept to avx2)")
    monkeypatch.setenv("STUDY_PROCESSOR", "vnni")
    assert devices.processor_class() == "AVX-512 VNNI"
    assert devices.has_int8_units()
    assert devices.has_bfloat16_units()
    monkeypatch.delenv("STUDY_PROCESSOR")
    assert devices.processor_class() == "AMX"


def test_an_unknown_restriction_is_one_line(monkeypatch):
    monkeypatch.setenv("STUDY_PROCESSOR", "sse2")
    with pytest.raises(StudyError, match=r"PROCESSOR = 'sse2' is not one of avx2, vnni"):
        devices.features()


def test_the_setting_reaches_torch_onednn_and_our_own_choice():
    """`make PROCESSOR=avx2` in a process of its own: each library is seen to obey."""
    environment = os.environ | {"STUDY_PROCESSOR": "avx2", "ATEN_CPU_CAPABILITY": "avx2"}
    code = (
        "import torch; from helpers.quantization import int8_matmul; "
        "print(torch.backends.cpu.get_cpu_capability(), int8_matmul.cpu_product().name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split(maxsplit=1) == ["AVX2", "float32 in blocks\n"]
    makefile = (PROJECT / "Makefile").read_text("utf-8")
    for name in ("STUDY_PROCESSOR", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "NUMBA_CPU_NAME"):
        assert f"export {name} :=" in makefile


def test_an_emulated_product_is_float32s_rounded_once(no_units):
    x, weight, bias = (torch.randn(*s).bfloat16() for s in ((40, 96), (24, 96), (24,)))
    expected = (x.double() @ weight.double().t() + bias.double()).float().bfloat16()
    result = product(x, weight, bias)
    assert result.dtype == torch.bfloat16
    off = (result.float() - expected.float()).abs() > 0  # float32's own rounding tips a few
    assert off.float().mean() < 0.01
    torch.testing.assert_close(result.float(), expected.float(), rtol=2**-7, atol=1e-6)


def test_where_there_are_units_they_are_used(monkeypatch):
    monkeypatch.setattr(devices, "features", lambda: ("avx2", "avx512f", "avx512_bf16"))
    x, weight = torch.randn(20, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    assert torch.equal(product(x, weight), torch.nn.functional.linear(x, weight))


def test_a_bfloat16_model_is_itself_to_rounding_without_units(model, monkeypatch):
    """The engine's packed pass: every product of Linears and attention goes another way."""
    model = use_onednn(model.bfloat16())
    segments = lambda: [Segment([5, 9, 2, 7, 30, 11]), Segment([8, 3, 1])]  # noqa: E731
    with use_packed_attention(model):
        expected = read(model, segments())
        monkeypatch.setattr(devices, "features", lambda: ("avx2",))
        assert devices.is_emulated(expected)
        states = read(model, segments())
    assert states.dtype == torch.bfloat16
    distance = (states.float() - expected.float()).norm() / expected.float().norm()
    assert distance < 0.02


@pytest.mark.parametrize(("autocast", "casts"), [("bfloat16", False), ("none", False)])
def test_training_does_not_cast_without_units(no_units, autocast, casts):
    assert models.uses_bfloat16(autocast, "cpu") is casts


def test_training_casts_where_it_gains(monkeypatch, no_units):
    assert models.uses_bfloat16("bfloat16", "cuda")
    monkeypatch.setattr(devices, "features", lambda: ("avx512_bf16",))
    assert models.uses_bfloat16("bfloat16", "cpu")


def test_the_record_says_what_is_missing(no_units, study):
    from helpers.runtime.devices import describe_runtime

    assert any(
        "no bfloat16 units" in note
        for note in describe_runtime(study.runtime, study.runtime)["notes"]
    )
