"""What `auto` becomes on machines this one is not: their answers are put in torch's mouth."""

import pytest
import torch

from helpers.core.errors import StudyError
from helpers.runtime import devices
from helpers.runtime.devices import describe_runtime, place_on_device, prepare, resolve_runtime
from helpers.sources.models import random_model
from helpers.study.loading import open_job
from helpers.study.schema import Runtime
from helpers.workflow import display

OPEN = Runtime(device="auto", dtype="auto", threads=1, quantized="int8", device_map="auto")


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=…, bf16=…, mps=…): how many GPUs of which kind there are."""

    def has(*, cuda: int = 0, bf16: bool = True, mps: bool = False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {i}")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return has


def words(runtime: Runtime) -> tuple:
    return runtime.device, runtime.dtype, runtime.quantized, runtime.device_map


def test_without_a_gpu_it_is_float32_on_the_cpu(machine):
    machine()
    assert words(resolve_runtime(OPEN)) == ("cpu", "float32", "int8", None)


def test_with_gpus_it_is_bfloat16_over_all_of_them(machine):
    machine(cuda=2)
    assert words(resolve_runtime(OPEN)) == ("cuda", "bfloat16", "int8", "auto")
    assert describe_runtime(resolve_runtime(OPEN), OPEN)["device_name"] == "card 0, card 1"


def test_one_gpu_holds_the_whole_model(machine):
    machine(cuda=1)
    assert words(resolve_runtime(OPEN)) == ("cuda", "bfloat16", "int8", None)
    assert "nothing to spread over" in describe_runtime(resolve_runtime(OPEN), OPEN)["notes"][0]


def test_a_card_without_bfloat16_computes_in_float32(machine):
    machine(cuda=1, bf16=False)
    assert resolve_runtime(OPEN).dtype == "float32"


def test_where_there_is_no_int8_product_it_is_simulated_and_said(machine, monkeypatch):
    machine(mps=True)
    monkeypatch.setattr(devices, "best_dtype", lambda device: "bfloat16")
    runtime = resolve_runtime(OPEN)
    assert words(runtime) == ("mps", "bfloat16", "reference", None)
    assert "no int8 product" in describe_runtime(runtime, OPEN)["notes"][0]


def test_what_the_study_says_is_kept(machine):
    machine(cuda=1)
    given = Runtime(device="cpu", dtype="bfloat16", threads=2, quantized="reference")
    assert resolve_runtime(given) == given


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(machine, device):
    machine()
    with pytest.raises(StudyError, match=rf"runtime.device = '{device}' but .* use 'auto' or"):
        resolve_runtime(OPEN.model_copy(update={"device": device}))


def test_a_job_is_prepared_for_this_machine(machine, study_settings, write_study):
    machine()
    study_settings["runtime"] |= {"device": "auto", "dtype": "auto"}
    job = prepare(open_job(write_study(study_settings), model="base", variant="noquant"))
    assert words(job.study.runtime) == ("cpu", "float32", "int8", None)
    assert job.runtime["device"] == "cpu"
    assert job.runtime["device_name"]
    expected = [] if devices.has_bfloat16_units() else [devices.NO_BFLOAT16]
    assert job.runtime["notes"] == expected


def test_a_spread_model_computes_what_a_whole_one_does():
    """All its parts on one device, but by the same hooks that move tensors between several."""
    model, ids = random_model("llama", seed=1), torch.arange(3, 40)[None]
    with torch.inference_mode():
        hidden = model.base_model(ids).last_hidden_state
        expected = model.get_output_embeddings()(hidden)
        spread = place_on_device(model, OPEN.model_copy(update={"device": "cuda"}))
        assert hasattr(spread.base_model.layers[0], "_hf_hook") or hasattr(spread, "_hf_hook")
        hidden = spread.base_model(ids).last_hidden_state
        torch.testing.assert_close(spread.get_output_embeddings()(hidden), expected)


def test_a_part_answers_on_the_device_it_was_asked_on():
    inputs = {"input_ids": torch.zeros(1, device="meta"), "use_cache": False}
    output = devices._to_input_device(None, (), inputs, {"last_hidden_state": torch.zeros(2)})
    assert output["last_hidden_state"].device.type == "meta"


def test_the_engine_knows_what_may_take_a_gpu(monkeypatch, tmp_path):
    assert [display.may_take_gpu(device) for device in ("cpu", "cuda", "mps")] == [
        False,
        True,
        True,
    ]
    monkeypatch.setattr(display.platform, "system", lambda: "Linux")
    monkeypatch.setattr(display, "DRIVERS", (str(tmp_path / "none"),))
    assert not display.may_take_gpu("auto")
    monkeypatch.setattr(display, "DRIVERS", (str(tmp_path),))
    assert display.may_take_gpu("auto")
