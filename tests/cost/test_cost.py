"""What is measured of a model is what it does: every operation, token and byte accounted for."""

import struct
from dataclasses import replace
from functools import partial
from json import loads
from operator import attrgetter

import pytest
import torch

from helpers.core.architectures import HEAD
from helpers.cost import measurement
from helpers.cost.measurement import Workload, measure, workload
from helpers.quantization.variants import load_int8, variant_digest
from helpers.runtime.discovery import linear_names
from helpers.sources.model_files import load_config
from helpers.study.schema import Runtime

WORK = Workload([[5, 6, 7] * 20, [8, 9] * 10], [[i, i + 1, i + 2] for i in range(4)], 6)
DURATIONS = ("load_s", "prefill_s", "linears_s", "decode_s")


def linears(model) -> list:
    return [model.get_submodule(n) for n in linear_names(model.config) if n != HEAD]


def test_every_operation_and_token_is_counted(model):
    before = [dict(m._forward_hooks) for m in linears(model)]
    measured = measure(lambda: (model, None), WORK, threads=1)
    weights = sum(m.weight.numel() for m in linears(model))
    assert measured["linear_operations"] == 2 * weights * WORK.row_tokens
    assert measured["decode_tokens"] == 4 * 5  # the first token of each is the prompt's
    assert measured["linear_bytes"] == sum(p.nbytes for m in linears(model) for p in m.parameters())
    assert all(measured[key] > 0 for key in DURATIONS)
    assert measured["linears_s"] < measured["prefill_s"]
    assert [dict(m._forward_hooks) for m in linears(model)] == before


def test_an_int8_model_does_the_same_work_and_holds_a_quarter(sound_run, model, family):
    run = sound_run(family, "rtn_w8a8")
    with run.outputs():
        folder = run.job.paths.checkpoint("base", "rtn_w8a8")
        load = partial(load_int8, folder, dtype=torch.float32, device="cpu")
        measured = measure(lambda: (load(), None), WORK, threads=1)
    plain = measure(lambda: (model, None), WORK, threads=1)
    assert measured["linear_operations"] == plain["linear_operations"]
    assert measured["decode_tokens"] == plain["decode_tokens"]
    sizes = [(m.out_features, m.in_features, m.bias) for m in linears(model)]
    scales = sum(4 * out + (4 * out if bias is not None else 0) for out, _, bias in sizes)
    assert measured["linear_bytes"] == sum(out * inner for out, inner, _ in sizes) + scales


def test_what_shares_a_scale_is_read_alone(model, monkeypatch):
    """A simulated per-tensor scale is evaluated one text at a time, and measured so."""
    rows = []
    read = measurement.read
    monkeypatch.setattr(measurement, "read", lambda m, s: rows.append(len(s)) or read(m, s))
    model.scale_scope = "pass"
    measured = measure(lambda: (model, None), WORK, threads=1)
    assert set(rows) == {1}
    assert measured["decode_tokens"] == 5


@pytest.mark.parametrize("budget", [64, 512, 4096])
def test_the_workload_fills_one_row_with_texts_of_the_study(study, tokenizer, budget):
    batch = study.evaluation.batch.model_copy(update={"tokens": budget})
    evaluation = study.evaluation.model_copy(update={"batch": batch})
    work = workload(study.model_copy(update={"evaluation": evaluation}), tokenizer)
    assert work.row_tokens == min(budget, measurement.ROW_TOKENS)
    assert all(work.texts)
    assert {len(p) for p in work.prompts} == {measurement.PROMPT_TOKENS}
    assert len(work.prompts) == measurement.PROMPTS


def of(job, quantized: str):
    """The job on a settled runtime of one thread."""
    runtime = Runtime(device="cpu", dtype="float32", threads=1, quantized=quantized)
    study = job.study.model_copy(update={"runtime": runtime})
    return replace(job, study=study, runtime={"device_name": "this"})


def test_every_variant_is_a_way_under_its_true_name(sound_run):
    run = sound_run("llama", "rtn_w8a8")
    kinds = {
        w.name: (w.arithmetic, w.simulated)
        for w in measurement.measured_configurations(of(run.job, "int8")).values()
    }
    assert list(kinds)[:2] == ["noquant float32", "noquant bfloat16"]
    assert kinds["noquant bfloat16"] == ("bfloat16", False)
    assert kinds["o2 float32"] == ("int8", False)
    floats = {"smooth_only", "smooth_only_down", "seed_recipe"}  # run as the baseline does
    left_out = measurement.skipped_variants(of(run.job, "int8"))
    assert floats <= left_out.keys()
    assert len(kinds) + len(left_out) == len(run.job.study.variants) + 1
    simulated = measurement.measured_configurations(of(run.job, "reference"))["o3_optional float32"]
    assert (simulated.arithmetic, simulated.simulated) == ("float32", True)
    assert list(measurement.measured_configurations(of(run.job, "vllm"))) == [
        "noquant float32",
        "noquant bfloat16",
    ]


def test_variants_that_run_alike_are_measured_once(sound_run):
    job = of(sound_run("llama", "rtn_w8a8").job, "int8")
    variants, left_out = job.study.variants, measurement.skipped_variants(job)
    key = attrgetter("scheme", "ignore", "protect")
    for name, recipe in variants.items():
        if recipe.quantized and name in left_out:
            twin = left_out[name].removeprefix("multiplies and scales as ").removesuffix(" does")
            assert twin not in left_out
            assert key(variants[twin]) == key(recipe)
    measured = [variants[n] for n in variants if variants[n].quantized and n not in left_out]
    assert len({key(r) for r in measured}) == len(measured)
    assert not {"down_float", "protected"} & set(left_out)  # the same scheme on fewer Linears


def bytes_in_headers(folder) -> int:
    """Of all tensors, by the safetensors headers themselves."""
    total = 0
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        header = loads(raw[8 : 8 + size])
        header.pop("__metadata__", None)
        total += sum(b - a for a, b in (t["data_offsets"] for t in header.values()))
    return total


def test_the_account_is_complete_and_its_bytes_are_the_files(sound_run):
    run = sound_run("llama", "rtn_w8a8")
    with run.outputs():
        job = of(run.job, "int8")
        alone = {name: job.study.variants[name] for name in ("noquant", "rtn_w8a8")}
        job = replace(job, study=job.study.model_copy(update={"variants": alone}))
        by_name = measurement.measured_configurations(job)
        rounds = {name: [measure(w.load, WORK, threads=1)] * 3 for name, w in by_name.items()}
        shapes = measurement.linear_shapes(job)
        rounds[measurement.PEAKS] = [
            measurement.gemm_peaks(shapes, rows=16, threads=1, device="cpu")
        ] * 3
        report = measurement.cost_report(job, by_name, rounds, measurement.workload_sizes(WORK))
        checkpoint, source = job.paths.checkpoint("base", "rtn_w8a8"), run.root / "source"
        sizes = [bytes_in_headers(f) for f in (source, source, checkpoint)]
        digest = variant_digest(replace(job, variant="rtn_w8a8"))
        assert variant_digest(replace(job, variant="noquant")) != digest
    assert [sum(w["file_bytes"].values()) for w in report["ways"]] == sizes
    assert {len(w[key]) for w in report["ways"] for key in (*DURATIONS, "peak_memory_bytes")} == {3}
    assert {len(values) for values in report["peaks"].values()} == {3}
    assert report["ways"][1]["linear_bytes"][0] * 2 == report["ways"][0]["linear_bytes"][0]
    assert len(shapes) == len(linear_names(load_config(source))) - 1


def test_the_limit_is_the_best_of_the_models_own_shapes_and_a_square(monkeypatch):
    """Else a Linear could stand above the limit that it is held to."""
    speeds = {}

    def speed(rows, inner, outer, kind, _device):
        speeds[kind, rows, inner, outer] = len(speeds) + 1.0
        return speeds[kind, rows, inner, outer]

    monkeypatch.setattr(measurement, "_operations_a_second", speed)
    limits = measurement.gemm_peaks([(256, 512), (512, 256)], rows=96, threads=1, device="cpu")
    for kind, limit in limits.items():
        own = {sizes[1:]: value for sizes, value in speeds.items() if sizes[0] == kind}
        assert {(96, 256, 512), (96, 512, 256), (measurement.SQUARE,) * 3} == own.keys()
        assert limit == max(own.values())


def test_both_libraries_multiply_alike():
    """What the peak counts as a product is one."""
    x, weight = torch.randn(33, 40), torch.randn(24, 40)
    for multiply in measurement._products("float32"):
        torch.testing.assert_close(multiply(x, weight.t()), x @ weight.t())


def test_a_device_without_the_product_has_no_limit_in_it(monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no such product here")

    monkeypatch.setattr(measurement.int8_matmul, "multiply", refuse)
    monkeypatch.setattr(measurement, "SECONDS_A_SHAPE", 0)
    monkeypatch.setattr(measurement, "SQUARE", 32)
    peaks = measurement.gemm_peaks([(16, 32)], rows=16, threads=1, device="cpu")
    assert peaks["int8"] is None
    assert peaks["float32"] > 0
    assert peaks["bfloat16"] > 0
