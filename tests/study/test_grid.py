"""What is repeated when something changes: by the grid's own account, and by Snakemake's."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import toy_project
from helpers.core.errors import StudyError
from helpers.core.files import PROJECT, StudyPaths
from helpers.study import stages
from helpers.study import stages as study_stages
from helpers.study.schema import Study
from helpers.study.stages import Run
from helpers.workflow.fork_server import PACKAGES
from toy_project import planned, run_study, write_study


def study(**changes) -> Study:
    """The toy study with some values changed, given as dotted keys with `__`."""
    data = copy.deepcopy(toy_project.STUDY)
    for key, value in changes.items():
        *path, last = key.split("__")
        place = data
        for part in path:
            place = place[part]
        place[last] = value
    return Study.model_validate(data)


def changed(before: Study, after: Study) -> set[str]:
    """Names of the runs whose tracked parameters differ."""
    return {
        run.name
        for run in [*study_stages.runs(before), Run("analysis")]
        if study_stages.settings_text(before, run) != study_stages.settings_text(after, run)
    }


def test_runs_of_a_study():
    names = [run.name for run in study_stages.runs(study())]
    assert len(names) == len(set(names)) == 1 + 2 + 4 + 1 + 6
    assert "00_finetuning.tuned" in names
    assert "00_finetuning.base" not in names
    assert "02_quantization.base.noquant" not in names
    assert "03_evaluation.base.noquant" in names


ROTATED = {"rotate": {"start": "base", "rotations": ["r1", "r2"]}}


def test_everything_of_a_rotated_model_waits_for_its_rotation():
    """Its cost too, which is its own; what its start is quantized to makes no difference."""
    turned = study(models__turned=ROTATED)
    made = Run("rotation", "turned")
    for run in study_stages.runs(turned):
        after = {made} <= _all_upstream(turned, run)
        assert after == (run.model == "turned" and run != made), run
    other_start = study(models__turned=ROTATED, models__base={"random": "qwen2"})
    assert {"00_rotation.turned", "01_calibration.turned"} <= changed(turned, other_start)
    fewer = study(models__turned={"rotate": {"start": "base", "rotations": ["r1"]}})
    assert all("turned" in name or name == "04_analysis" for name in changed(turned, fewer))
    assert changed(study(), turned) == {"04_analysis"}


def _all_upstream(of: Study, run: Run) -> set[Run]:
    before = set(study_stages.upstream_runs(of, run))
    return before.union(*(_all_upstream(of, earlier) for earlier in before))


def test_cost_can_be_left_out_and_nothing_else_is_repeated():
    without = study(runtime__cost=False)
    left = [run for run in study_stages.runs(study()) if run.stage != "cost"]
    assert (
        study_stages.runs(without) == left == study_stages.upstream_runs(without, Run("analysis"))
    )
    assert changed(study(), without) == {"04_analysis"}
    assert changed(study(), study(runtime__cost=True)) == set()


def test_alpha_repeats_exactly_its_variant():
    after = study(variants__smooth__smooth={"alpha": 0.7, "targets": ["mlp_input"]})
    assert changed(study(), after) == {
        "02_quantization.base.smooth",
        "02_quantization.tuned.smooth",
        "03_cost.base",
        "03_evaluation.base.smooth",
        "03_evaluation.tuned.smooth",
        "04_analysis",
    }


def test_another_float_type_needs_no_checkpoint():
    before = study(variants__half={"dtype": "bfloat16"})
    assert Run("quantization", "base", "half") not in study_stages.runs(before)
    assert {r.name for r in study_stages.runs(before)} - {
        r.name for r in study_stages.runs(study())
    } == {
        "03_evaluation.base.half",
        "03_evaluation.tuned.half",
    }
    after = study(variants__half={})
    assert {n for n in changed(before, after) if "half" in n} == {
        "03_evaluation.base.half",
        "03_evaluation.tuned.half",
    }


def test_an_evaluation_waits_for_the_baseline_it_is_held_against():
    baseline = Run("evaluation", "tuned", "noquant")
    assert baseline in study_stages.upstream_runs(study(), Run("evaluation", "tuned", "rtn"))
    assert not [r for r in study_stages.upstream_runs(study(), baseline) if r.stage == "evaluation"]


def test_cost_is_measured_once_for_models_of_the_same_shapes_and_after_all_their_variants():
    timed = [run for run in study_stages.runs(study()) if run.stage == "cost"]
    assert timed == [Run("cost", "base")]
    waits = {run.name for run in study_stages.upstream_runs(study(), timed[0])}
    assert waits == {"02_quantization.base.rtn", "02_quantization.base.smooth"}
    assert timed[0] in study_stages.upstream_runs(study(), Run("analysis"))


def test_how_many_threads_a_job_has_is_nothing_to_a_measurement_that_takes_them_all():
    assert "03_cost.base" not in changed(study(), study(runtime__threads=2))
    assert "03_cost.base" in changed(study(), study(runtime__quantized="reference"))


def test_statistics_and_title_repeat_only_the_analysis():
    assert changed(study(), study(statistics__margin=0.1, title="x")) == {"04_analysis"}


def test_how_items_are_asked_repeats_evaluation_but_not_what_is_calibrated_or_trained():
    after = study(evaluation__datasets__arc__ask={"protocol": "loglikelihood", "normalize": "none"})
    assert {name[:2] for name in changed(study(), after)} == {"03", "04"}


def test_which_items_are_asked_repeats_what_must_not_have_seen_them():
    after = changed(study(), study(evaluation__datasets__arc__items=6))
    assert {"00_finetuning.tuned", "01_calibration.base", "02_quantization.base.rtn"} <= after


def test_calibration_leaves_the_float_base_model_alone():
    after = changed(study(), study(calibration__items=5))
    assert "03_evaluation.base.noquant" not in after
    assert {"03_evaluation.base.rtn", "00_finetuning.tuned"} <= after


def test_training_repeats_only_the_trained_model():
    after = changed(study(), study(models__tuned__finetune__epochs=2))
    assert {name.split(".")[1] for name in after if "." in name} == {"tuned"}


def test_swapped_values_are_seen():
    """As a set of values the two are equal; as one text they are not."""
    before = study(calibration__max_tokens=64, calibration__batch_tokens=128)
    after = study(calibration__max_tokens=128, calibration__batch_tokens=64)
    assert "01_calibration.base" in changed(before, after)


def test_order_of_keys_is_no_change():
    data = toy_project.STUDY
    turned = Study.model_validate(dict(reversed(data.items())))
    assert not changed(study(), turned)


def test_ambiguous_names_are_refused():
    twins = {"a": {"random": "llama"}, "a.b": {"random": "llama"}}
    with pytest.raises(StudyError, match="leave out the dots"):
        study_stages.runs(study(models=twins, variants={"b.c": {}, "c": {}}))


def test_a_stage_is_repeated_for_the_modules_it_uses_and_no_others():
    def modules(*run: str) -> set[str]:
        files = study_stages.source_files(study(), Run(*run))
        return {f"{path.parent.name}/{path.name}" for path in files}

    quantization = modules("quantization", "base", "rtn")
    assert {"quantization/smoothing.py", "sources/models.py", "core/records.py"} <= quantization
    assert "notebooks/02_quantization.ipynb" in quantization
    assert not {name for name in quantization if name.startswith(("report/", "evaluation/"))}
    evaluation = modules("evaluation", "base", "rtn")
    assert {"evaluation/engine.py", "evaluation/scoring.py", "data/arc.jsonl"} <= evaluation
    assert not {"statistics/intervals.py", "report/tables.py", "workflow/cli.py"} & evaluation


IMPORTS = """
import ast, gc, importlib, json, os, sys
packages, *notebooks = sys.argv[1:]
for package in packages.split():  # once, before the processes part
    importlib.import_module(package)
gc.freeze()
for path, shows in ((path, shows) for path in notebooks for shows in (True, False)):
    if (child := os.fork()) == 0:
        cells = json.load(open(path))["cells"]
        code = "\\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        lines = [n for n in ast.parse(code).body if isinstance(n, ast.Import | ast.ImportFrom)]
        if not shows:
            lines = [n for n in lines if "helpers.report" not in ast.unparse(n)]
        exec(compile(ast.Module(lines, []), path, "exec"), {})
        found = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "helpers"]
        print(json.dumps([path, shows, found]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def loaded_modules() -> dict[tuple[str, bool], set[Path]]:
    """By stage: files of the helper modules that Python loads for its notebook's imports.

    With what the notebook takes from helpers.report (True), and without (False).
    """
    stages = {
        str(PROJECT / "notebooks" / f"{n}.ipynb"): s for s, n in study_stages.NOTEBOOKS.items()
    }
    command = [sys.executable, "-c", IMPORTS, " ".join(PACKAGES), *stages]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = map(json.loads, done.stdout.splitlines())
    files_by_stage = {(stages[path], shows): set(map(Path, files)) for path, shows, files in rows}
    assert len(files_by_stage) == 2 * len(study_stages.NOTEBOOKS), done.stderr
    return files_by_stage


@pytest.mark.long
@pytest.mark.parametrize("stage", study_stages.NOTEBOOKS)
def test_a_byte_of_any_module_that_its_notebook_imports_makes_a_result_stale(
    stage, loaded_modules, tmp_path, monkeypatch
):
    """Python's own account of what was imported; the report alone repeats no computation."""
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path))
    paths = StudyPaths("toy")
    toy = study(models__turned=ROTATED)
    model, variant = {"finetuning": "tuned", "rotation": "turned"}.get(stage, "base"), "rtn"
    names = {"analysis": (), "quantization": (model, variant), "evaluation": (model, variant)}
    run = Run(stage, *names.get(stage, (model,)))
    for path in (run.record(paths), run.executed(paths)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    with stages.record_fingerprint(toy, paths, run):
        pass
    assert stages.is_current(toy, paths, run)
    modules = loaded_modules[stage, True]
    as_it_is, stale = stages._file_fingerprint, set()
    for changed in modules:
        edited = {changed: "another byte"}
        monkeypatch.setattr(
            stages, "_file_fingerprint", lambda p, e=edited: e.get(p) or as_it_is(p)
        )
        if not stages.is_current(toy, paths, run):
            stale.add(changed)
    expected = loaded_modules[stage, stage == "analysis"]
    assert len(expected) > 20
    assert expected <= stale
    assert not [path for path in stale - expected if path.parent.name == "report"]


def test_modules_that_are_imported_late_or_run_by_path_count():
    """No import statement names them."""
    named = {
        path.name for path in study_stages.source_files(study(), Run("evaluation", "base", "rtn"))
    }
    assert {"vllm_server.py", "int8_triton.py"} <= named
    named = {path.name for path in study_stages.source_files(study(), Run("cost", "base"))}
    assert "parent_process_preload.py" in named


LIBRARY = {
    "__init__.py": "",
    "a/__init__.py": "",
    "a/first.py": "from importlib import import_module\nimport_module('helpers.b.second')",
    "b/__init__.py": "from helpers.b import of_the_package",
    "b/of_the_package.py": "",
    "b/second.py": "RUN = Path(__file__).with_name('server.py')\nSTYLE = 'page.css'",
    "b/page.css": "import helpers.b.fourth",
    "b/server.py": "def late():\n    import helpers.b.third",
    "b/third.py": "'See helpers.b.fourth, or run python -m helpers.b.fourth'",
    "b/fourth.py": "",
    "report/__init__.py": "",
    "report/shown.py": "import helpers.b.fourth",
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library in place of the project's, and a notebook that imports two modules of it."""
    for name, text in LIBRARY.items():
        path = tmp_path / "helpers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    cells = ["from helpers.a import first", "from helpers.report import shown"]
    cells = [{"cell_type": "code", "source": [cell]} for cell in cells]
    (tmp_path / "notebook.ipynb").write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(stages, "HELPERS", tmp_path / "helpers")
    monkeypatch.setattr(stages, "REPORT", tmp_path / "helpers" / "report")
    caches = (stages._module_files, stages._package_file)
    for memory in caches:
        memory.cache_clear()
    yield tmp_path
    for memory in caches:
        memory.cache_clear()


@pytest.mark.parametrize("with_report", [True, False])
def test_modules_in_texts_files_beside_and_packages_count_and_nothing_else(library, with_report):
    notebook = library / "notebook.ipynb"
    modules = stages.imported_modules(notebook, with_report=with_report)
    named = {path.relative_to(library / "helpers").as_posix() for path in modules}
    left_out = {"report/__init__.py", "report/shown.py", "b/fourth.py"}
    assert named == set(LIBRARY) - (set() if with_report else left_out)


def test_a_relative_import_is_refused_because_its_module_would_go_unseen(library):
    (library / "helpers" / "report" / "shown.py").write_text("from . import other\n")
    with pytest.raises(StudyError, match="has a relative import; name the module in full"):
        stages.imported_modules(library / "notebook.ipynb", with_report=True)


def test_local_files_are_inputs(tmp_path):
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "model"
    rows.write_text("{}\n")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    given = study(
        models={"local": {"folder": str(folder)}},
        evaluation__datasets__arc__source={"file": str(rows)},
    )
    files = study_stages.source_files(given, Run("evaluation", "local", "noquant"))
    assert {rows, folder / "config.json"} <= set(files)


@pytest.mark.long
def test_snakemake_repeats_what_changed_and_never_takes_a_cut_short_run_for_done(tmp_path):
    folder, data = toy_project.make(tmp_path, kernels=False), toy_project.small()
    write_study(folder, data)
    done = run_study(folder)
    assert done.returncode == 0, done.stderr
    assert "[7/7]" in done.stderr

    # A touched module is not a changed one, and a changed report makes no new numbers.
    os.utime(folder / "src" / "helpers" / "quantization" / "smoothing.py")
    with open(folder / "src" / "helpers" / "report" / "tables.py", "a") as stream:
        stream.write("\nEXTRA = 1\n")
    assert planned(folder) == ["analysis", "report"]

    # What decides how a variant is judged is no setting, and yet everything rests on it.
    claims = folder / "src" / "helpers" / "study" / "schema.py"
    as_it_was = claims.read_text()
    claims.write_text(as_it_was.replace('"weights": "tensor"', '"weights": "channel"'))
    assert claims.read_text() != as_it_was
    assert len(planned(folder)) == 7
    claims.write_text(as_it_was)
    assert planned(folder) == ["analysis", "report"]

    # One variant's alpha, and its early job fails.
    data["variants"]["smooth"]["smooth"]["alpha"] = 0.9
    write_study(folder, data)
    (folder / "fail").write_text("02_quantization.base")
    failed = run_study(folder)
    assert failed.returncode == 1
    assert "told to fail" in failed.stderr
    assert "Error in rule" not in failed.stderr
    stale = ["analysis", "cost base", "evaluation base smooth", "quantization base smooth"]
    stale += ["report"]
    assert planned(folder) == stale, "results are stale, and 'nothing to be done'"

    # A report of stale results is refused, not made.
    refused = toy_project.jobs(folder, "study", "toy", "--cores", "1", "--only-report")
    assert refused.returncode == 2
    assert "run make study" in refused.stderr
    for run in ("quantization base smooth", "evaluation base smooth", "cost base"):
        assert run in refused.stderr

    (folder / "fail").unlink()
    assert "[5/5]" in run_study(folder).stderr
    assert planned(folder) == []
    assert not list(folder.glob("outputs/toy/notebooks/*.failed.ipynb"))

    # Without the engine's memory nothing has to be run again, and a change is seen.
    (folder / ".snakemake").rename(folder / "lost")
    assert planned(folder) == []
    data["variants"]["smooth"]["smooth"]["alpha"] = 0.8
    write_study(folder, data)
    assert planned(folder) == stale


@pytest.mark.long
def test_what_all_others_wait_for_goes_first(tmp_path):
    """One after the other, every baseline and what it needs come before anything else."""
    folder = toy_project.make(tmp_path / "project", kernels=False)
    one_core = ("study", "toy", "--cores", "1", "--job-mb", "100")
    done = toy_project.jobs(folder, *one_core)
    assert done.returncode == 0, done.stderr
    started = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("start")]
    first = [["evaluation", "base", "noquant"], ["finetuning", "tuned"]]
    assert sorted(started[:3]) == sorted([*first, ["evaluation", "tuned", "noquant"]])


def test_a_wrong_study_is_one_line(tmp_path):
    folder = toy_project.make(tmp_path, kernels=False)
    for study_name in ("none", "toy"):
        if study_name == "toy":
            write_study(folder, toy_project.STUDY | {"baseline": "nokwant"})
        result = toy_project.jobs(folder, "study", study_name, "--cores", "1")
        assert result.returncode == 2
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert result.stderr.startswith(f"params/{study_name}.yaml: ")
