"""A study and all its records, made up, with given texts wherever a text can stand."""

import json

import pytest
import yaml

import test_report
from conftest import STUDY
from helpers.core.files import PROJECT
from helpers.core.records import checksums, read_json, write_json, write_jsonl
from helpers.evaluation.predictions import prompt_digest
from helpers.study.loading import open_job
from helpers.workflow.cli import export_report, run_notebook
from hostile_text import HOSTILE, PLAIN

FILE_NAMES = {HOSTILE: "rows|`x`<b>$y$ [z](w).jsonl", PLAIN: "rows.jsonl"}


def answers(texts):
    """Replacements for the made-up study's rows: ids, golds and answers hold the texts."""

    def arc_rows(rng, accuracy):
        rows = TRUE_ARC_ROWS(rng, accuracy)
        return [row | {"id": f"{i} {texts[i % len(texts)]}"} for i, row in enumerate(rows)]

    def squad_rows(rng, accuracy):
        found = []
        for i in range(60):
            text = texts[i % len(texts)]
            golds = [] if i % 3 == 0 else [text]
            right = rng.random() < accuracy
            said = text if right and golds else texts[(i + 1) % len(texts)]
            row = test_report.scored(f"{i} {text}", f"passage-{i // 2}", golds, said, said)
            if i % 10 == 9:
                row |= {"parsed": None, "status": "unparsed", "score": 0.0}
            if not golds and right:
                row |= {"parsed": None, "status": "abstained", "score": 1.0}
            found.append(row | {"f1": row["score"]})
        return found

    return {"arc_rows": arc_rows, "squad_rows": squad_rows}


TRUE_ARC_ROWS = test_report.arc_rows


def write_items(path, texts) -> None:
    """The SQuAD items the predictions are about, so that their questions are shown."""
    rows = [
        {
            "id": f"{i} {text}",
            "title": text,
            "context": f"passage {i // 2} {text}",
            "question": f"question {i}: {text}",
            "answers": {"text": [text], "answer_start": [0]},
        }
        for i, text in ((i, texts[i % len(texts)]) for i in range(60))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_up_study(folder, texts, edit=lambda settings: None):
    """(study file, job): its records lie where STUDY_OUTPUTS says.

    Args:
        edit: changes the settings before anything is written.
    """
    settings = yaml.safe_load(STUDY)
    settings["title"] = f"A study {' '.join(texts)}"[:1500]
    settings["variants"]["static"] = {
        "preset": "o3",
        "smooth": {"alpha": 0.5, "targets": ["attention_input", "mlp_input"]},
    }
    items = folder / FILE_NAMES[texts]
    write_items(items, texts)
    datasets = settings["evaluation"]["datasets"]
    datasets["arc"]["items"], datasets["squad_v2"]["items"] = 80, 60
    datasets["squad_v2"]["source"] = {"file": str(items)}
    settings["evaluation"]["shared_text"]["passages"] = 12
    edit(settings)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    job = open_job(path)
    test_report.write_outputs(job)
    for model in job.study.models:
        _put_prompts(job, model, texts)
        for place, variant in enumerate(job.study.variants):
            text = texts[place % len(texts)]
            _put_gates(job, model, variant, text, failed=variant == "static")
    for record in job.paths.root.rglob("record.json"):
        found = read_json(record, made_by="the test")
        write_json(record, found | {"files": checksums(record.parent)})
    return path, job


def _put_prompts(job, model, texts) -> None:
    """What the baseline was asked: SQuAD's items have their questions on record."""
    folder = job.paths.evaluation(model, job.study.baseline) / "prompts"
    rows = []
    for i in range(60):
        text = texts[i % len(texts)]
        row = {"id": f"{i} {text}", "question": f"question {i}: {text}", "passage": text}
        row |= {"options": [], "labels": [], "prompt": f"asked {i} {text}", "continuations": []}
        rows.append(row | {"prompt_hash": prompt_digest(row["prompt"], [])})
    write_jsonl(folder / "squad_v2.jsonl", rows)


def _put_gates(job, model, variant, text, *, failed: bool) -> None:
    folder = job.paths.evaluation(model, variant)
    guarded = ["whole variant", *job.study.evaluation.datasets]
    broken = "arc" if failed else ""
    found = test_report.gates_of(folder, model, variant, guarded, broken)
    for gate in found["gates"]:
        gate |= {"name": f"a gate {text}", "measured": text, "limit": text}
    write_json(folder / "gates.json", found)


def analysed(folder, texts):
    """The study's root after the analysis and the export have been run on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUDY_OUTPUTS", str(folder / "outputs"))
        for name, replacement in answers(texts).items():
            patch.setattr(test_report, name, replacement)
        path, job = made_up_study(folder, texts)
        root, executed = job.paths.root, job.paths.notebooks / "04_analysis.ipynb"
        run_notebook(PROJECT / "notebooks" / "04_analysis.ipynb", executed, {"study": str(path)})
        export_report(executed, str(path), root)
    return root
