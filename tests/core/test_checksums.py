"""A file that is not what its stage wrote is an error naming it, before it is used."""

import json
import os
import subprocess
import sys

import pytest

from helpers.core.errors import StudyError
from helpers.core.files import PROJECT, StudyPaths, replace_folder
from helpers.core.records import Record, cached_folder, check_checksums, read_json, sha256_text
from helpers.quantization.variants import variant_digest
from helpers.sources import models
from helpers.study.loading import open_job
from helpers.study.stages import Run, check_result_checksums


@pytest.fixture
def stage(tmp_path):
    """A finished stage: one file beside its record, and a folder elsewhere."""
    folder, checkpoint = tmp_path / "quantization", tmp_path / "checkpoint"
    record = Record(folder, stage="quantization", parameters={})
    replace_folder(checkpoint, lambda p: (p / "weights").write_bytes(b"\0" * 1000))
    folder.mkdir()
    (folder / "table.json").write_text("{}")
    record.add_outputs(checkpoint)
    record.write({})
    return folder


def refused(folder) -> str:
    with pytest.raises(StudyError) as caught:
        check_checksums(folder, made_by="02_quantization")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_record_holds_the_checksum_of_every_file_its_job_wrote(stage):
    files = read_json(stage / "record.json", made_by="")["files"]
    assert set(files) == {"table.json", "../checkpoint/weights"}
    assert files["table.json"] == sha256_text("{}")
    check_checksums(stage, made_by="02_quantization")


@pytest.mark.parametrize("name", ["table.json", "../checkpoint/weights"])
def test_one_changed_byte_is_named_with_the_remedy(stage, name):
    path = stage / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    error = refused(stage)
    assert f"{path.resolve().name} is not what 02_quantization wrote" in error
    assert "quantization/record.json and run make study" in error


def test_the_time_of_a_file_says_nothing(stage):
    """A disk that returns other bytes does not change a file's times."""
    path = stage / "../checkpoint/weights"
    check_checksums(stage, made_by="02_quantization")
    before = path.stat()
    path.write_bytes(b"\1" * 1000)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns - 1))
    assert "weights is not what" in refused(stage)


def test_a_missing_file_is_named_unless_it_may_be_missing(stage):
    (stage / "../checkpoint/weights").unlink()
    assert "weights is missing, though 02_quantization wrote it" in refused(stage)
    check_checksums(stage, made_by="02_quantization", optional="../checkpoint/")


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b"[]", b"{}", b'{"files": 3}'])
def test_a_damaged_record_vouches_for_nothing(stage, damage):
    (stage / "record.json").write_bytes(damage)
    assert "record.json is damaged or lacks checksums; delete" in refused(stage)


def test_all_results_of_a_study_are_held_against_their_records(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path))
    paths, run = StudyPaths("s"), Run("calibration", "base")
    folder = paths.calibration("base")
    record = Record(folder, stage="calibration", parameters={})
    folder.mkdir(parents=True)
    (folder / "activations.safetensors").write_bytes(b"1")
    record.write({})
    check_result_checksums(paths, [run])
    (folder / "activations.safetensors").write_bytes(b"2")
    with pytest.raises(StudyError, match=r"activations\.safetensors is not what 01_calibration"):
        check_result_checksums(paths, [run])


def test_a_damaged_cached_model_is_named_and_made_anew_once_it_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path))
    folder = models.random_model_folder("llama", size="tiny", seed=1)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        StudyError, match=r"model\.safetensors .* run again to recreate it"
    ) as caught:
        models.random_model_folder("llama", size="tiny", seed=1)
    assert f"delete {folder} and run again" in str(caught.value)
    weights.unlink()
    (folder / "record.json").unlink()  # as after `rm -r`, but for what a power cut left
    again = models.random_model_folder("llama", size="tiny", seed=1)
    assert (again / weights.name).read_bytes() == whole


def test_two_that_need_the_same_cached_folder_make_it_once(tmp_path):
    script = f"""
import time
from pathlib import Path
from helpers.study.stages import check_result_checksums
from helpers.core.records import cached_folder
def fill(folder):
    time.sleep(1)
    (folder / "made").write_text("")
    with open({str(tmp_path / "times")!r}, "a") as stream:
        stream.write("x")
cached_folder(Path({str(tmp_path / "folder")!r}), fill)
"""
    environment = os.environ | {"PYTHONPATH": str(PROJECT / "src")}
    both = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    assert (tmp_path / "times").read_text() == "x"
    assert cached_folder(tmp_path / "folder", None).joinpath("made").is_file()


@pytest.mark.bank(
    "checkpoint",
    "a checkpoint with one weight changed after its verification",
    "refused in one line",
    at="a file of the checkpoint",
)
def test_a_damaged_checkpoint_is_refused_before_it_is_evaluated(sound_run):
    run = sound_run("llama", "rtn_w8a8")
    with run.outputs():
        job = run.job
        record = Record(
            job.paths.quantization("base", run.variant), stage="quantization", parameters={}
        )
        record.add_outputs(run.checkpoint)
        record.write({})
        variant_digest(job)
        with run.edited() as tensors:
            tensors["model.norm.weight"] += 1e-3
        with pytest.raises(StudyError, match=r"model\.safetensors is not what 02_quantization"):
            variant_digest(job)


@pytest.mark.bank(
    "model", "a trained model with one byte changed", "refused in one line", at="model.safetensors"
)
def test_a_damaged_trained_model_is_refused(study_path, tmp_path, monkeypatch):
    from helpers.sources.models import model_folder

    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path))
    job = open_job(study_path, model="tuned")
    folder = job.paths.made_model("tuned")
    record = Record(folder, stage="finetuning", parameters={})
    replace_folder(folder, lambda p: (p / "model.safetensors").write_bytes(b"1"))
    record.write({})
    assert model_folder(job.study, "tuned", job.paths) == folder
    stored_record = json.loads((folder / "record.json").read_text())
    stored_record["files"]["model.safetensors"] = sha256_text("2")
    (folder / "record.json").write_text(json.dumps(stored_record))
    with pytest.raises(StudyError, match=r"not what 00_finetuning wrote .*run make study"):
        model_folder(job.study, "tuned", job.paths)
