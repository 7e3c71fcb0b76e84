"""Every verdict can be made again from the committed answers, and a touched one is caught."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from helpers.core.errors import StudyError
from helpers.core.files import PROJECT
from helpers.core.records import write_json
from helpers.report import summary
from helpers.report.checks.recomputation import main, recompute
from helpers.report.checks.recomputed_chapters import _side_by_side
from helpers.report.results import load_results
from helpers.statistics.checks.recomputed_verdicts import read_answers, write_answers
from helpers.study.loading import load_study, open_job
from test_report import made_up_job, make_job  # noqa: F401 - a fixture

COMMITTED = ("demo", "seed-replica", "recipes", "rotation")
PUBLISHED = [s for s in COMMITTED if (PROJECT / "outputs" / s / "answers").is_dir()]


@pytest.fixture(scope="module")
def as_published(tmp_path_factory):
    """The folder of a made-up study and its summary, as the analysis leaves them."""
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        job = made_up_job(folder, patch)
        summary.write_summary(load_results(job), job.paths.root)
    return folder


@pytest.fixture
def published(as_published, tmp_path, monkeypatch):
    """A copy of that study, the test's own to edit: (job, folder of answers).

    Its items are made up too, so that the texts cannot be read again.
    """
    from helpers.report.checks import recomputation as module

    monkeypatch.setattr(module, "_misread_answers", lambda *_: [])
    monkeypatch.setattr(module, "_misread_passages", lambda *_: [])
    return copy_of(as_published, tmp_path / "copy", monkeypatch)


def copy_of(folder, to, monkeypatch):
    """(job, folder of answers) of a copy of a study's folder."""
    shutil.copytree(folder, to)
    monkeypatch.setenv("STUDY_OUTPUTS", str(to / "outputs"))
    job = open_job(to / "study.yaml")
    return job, job.paths.root / "answers"


def study_path(job) -> str:
    """The study file, which lies beside the outputs folder."""
    return str(job.paths.root.parents[1] / "study.yaml")


def rewrite(path, edit) -> None:
    """Edit one row of a file of answers: `edit` gets the first one, to change in place."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    edit(rows[0])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def answer(row: dict, variant: str = "smoothquant_w8a8") -> dict:
    return row["models"]["base"]["answers"][variant]


def test_samples_show_every_variant_that_rounds_and_no_control():
    """Rulers among them, which are no int8 variants."""
    figures = SimpleNamespace(study=load_study("recipes"))
    assert set(figures.study.variants) - set(_side_by_side(figures)) == {"noquant_bf16"}
    replica = SimpleNamespace(study=load_study("seed-replica"))
    assert "smooth_only" not in _side_by_side(replica)
    assert "seed_recipe" in _side_by_side(replica)


def test_untouched_answers_give_the_published_verdicts(published, capsys):
    job, _ = published
    table, differing = recompute(study_path(job))
    assert differing == []
    assert main([study_path(job)]) == 0
    printed = capsys.readouterr().out
    assert table in printed
    assert "all as published" in printed


def test_answers_come_back_as_the_evaluation_had_them(published):
    job, folder = published
    results = load_results(job)
    read_back = read_answers(folder, job.study)
    for at, variant_answers in results.published.variants.items():
        own = ("model", "variant")
        for name, rows in variant_answers.predictions.items():
            assert read_back.variants[at].predictions[name] == [
                {k: v for k, v in row.items() if k not in own} for row in rows
            ]
        assert [r["nll"] for r in read_back.variants[at].passages] == [
            r["nll"] for r in variant_answers.passages
        ]
        for read, row in zip(
            read_back.variants[at].passages, variant_answers.passages, strict=True
        ):
            for key in ("token_kl", "token_texts"):
                assert read.get(key) == row.get(key)
    assert read_back.control_outcomes == results.control_outcomes


def test_the_texts_of_tokens_are_published_once_a_model(published):
    rows = [json.loads(line) for line in (published[1] / "shared_text.jsonl").open("rb")]
    for of_model in (m for row in rows for m in row["models"].values()):
        assert len(of_model["token_texts"]) == of_model["tokens"]
        assert not any("token_texts" in answer for answer in of_model["answers"].values())
        assert "token_kl" not in of_model["answers"]["noquant"]


@pytest.mark.bank("report", "an edited answer", "make verdicts", at="answers/arc.jsonl")
def test_a_tampered_prediction_is_caught(published, capsys):
    """Right made wrong in one answer: the file, the verdict's counts and its p differ."""
    job, folder = published
    rewrite(folder / "arc.jsonl", lambda row: answer(row).update(parsed="E", score=0.0))
    assert main([study_path(job)]) == 1
    printed = capsys.readouterr().err
    assert "NOT AS PUBLISHED" in printed
    assert "answers/arc.jsonl is not the file the summary was made with" in printed
    assert "base: ARC, smoothquant_w8a8 against noquant: losses is" in printed


@pytest.mark.bank(
    "report", "an edited answer and its hash", "make verdicts", at="answers/arc.jsonl, summary.json"
)
def test_a_prediction_tampered_together_with_its_hash_is_caught_by_its_verdict(published):
    job, folder = published
    rewrite(folder / "arc.jsonl", lambda row: answer(row).update(parsed="E", score=0.0))
    path = job.paths.root / "summary.json"
    told, edited = json.loads(path.read_text("utf-8")), load_results(job)
    told["answers"] = write_answers(folder, job.study, read_answers(folder, job.study).variants)
    write_json(path, told)
    assert edited.verdicts
    _, differing = recompute(study_path(job))
    assert differing
    assert not [line for line in differing if "is not the file" in line]


@pytest.mark.bank("report", "an edited verdict", "make verdicts", at="summary.json")
def test_a_verdict_edited_in_the_summary_is_caught(published):
    job, _ = published
    path = job.paths.root / "summary.json"
    summary_data = json.loads(path.read_text("utf-8"))
    summary_data["comparisons"][0]["verdict"] = "better"
    summary_data["controls"][0]["done"] = not summary_data["controls"][0]["done"]
    write_json(path, summary_data)
    _, differing = recompute(study_path(job))
    assert any("verdict is" in line and "published 'better'" in line for line in differing)
    assert any("control noquant: done is" in line for line in differing)


@pytest.mark.bank(
    "report", "a failed check edited to have passed", "make verdicts", at="answers/gates.json"
)
def test_a_failed_check_taken_out_of_the_gates_is_caught(make_job, monkeypatch):  # noqa: F811
    from helpers.report.checks import recomputation as module

    monkeypatch.setattr(module, "_misread_answers", lambda *_: [])
    job = make_job(failed="smoothquant_w8a8")
    summary.write_summary(load_results(job), job.paths.root)
    path = job.paths.root / "answers" / "gates.json"
    gates = json.loads(path.read_text("utf-8"))
    for gate in gates["base/smoothquant_w8a8"]:
        gate["passed"] = True
    write_json(path, gates)
    _, differing = recompute(study_path(job))
    assert any("published 'invalid'" in line for line in differing)


def test_answers_whose_text_says_otherwise_are_named(as_published, tmp_path, monkeypatch):
    """The made-up rows are about no item of the shipped set, and so each is told."""
    job, _ = copy_of(as_published, tmp_path / "copy", monkeypatch)
    _, differing = recompute(study_path(job))
    assert any("ARC item arc-0 is none of the set's" in line for line in differing)


@pytest.mark.parametrize("name", ["arc.jsonl", "gates.json"])
def test_missing_answers_are_named(published, name, capsys):
    job, folder = published
    (folder / name).unlink()
    assert main([study_path(job)]) == 2
    assert f"answers/{name} is missing; run 04_analysis first" in capsys.readouterr().err


def test_a_variant_without_answers_is_named(published):
    job, folder = published
    rewrite(folder / "arc.jsonl", lambda row: row["models"]["base"]["answers"].pop("static"))
    with pytest.raises(StudyError, match="has no answer of base/static"):
        read_answers(folder, job.study)


def test_items_taken_out_are_named(published):
    job, folder = published
    lines = (folder / "arc.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "arc.jsonl").write_text("".join(lines[1:]), "utf-8")
    with pytest.raises(StudyError, match="has 79 items but the study has 80"):
        read_answers(folder, job.study)


ALONE = """
import sys

BLOCKED = {"torch", "transformers", "llmcompressor", "compressed_tensors", "datasets"}
BLOCKED |= {"safetensors", "huggingface_hub", "tokenizers", "matplotlib", "nbconvert"}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Blocked())
from helpers.report.checks.recomputation import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "study", [s if s == "demo" else pytest.param(s, marks=pytest.mark.long) for s in PUBLISHED]
)
def test_the_published_verdicts_are_made_again_without_torch(study):
    """On the committed files, where nothing of a model can be imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("STUDY_")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, study],
        cwd=PROJECT,
        env=environment | {"PYTHONPATH": str(PROJECT / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "all as published" in done.stdout


def test_both_studies_are_published():
    assert tuple(PUBLISHED) == COMMITTED
