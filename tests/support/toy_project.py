"""A copy of the project with notebooks that take no time, for tests of the workflow."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml

from helpers.core.files import PROJECT
from helpers.study import stages
from helpers.workflow.launcher import PLAN_WIDTH

STUDY = {
    "title": "A toy study",
    "seed": 7,
    "runtime": {"device": "cpu", "dtype": "float32", "threads": 1, "quantized": "int8"},
    "models": {
        "base": {"random": "llama"},
        "tuned": {
            "finetune": {
                "start": "base",
                "dataset": {"shipped": "openmath_train"},
                "items": 8,
                "heldout_items": 4,
                "epochs": 1,
                "learning_rate": 1e-4,
                "warmup_fraction": 0.1,
                "batch_items": 2,
                "max_tokens": 64,
                "autocast": "none",
            }
        },
    },
    "calibration": {
        "adapter": "openmath",
        "dataset": {"shipped": "openmath_train"},
        "items": 4,
        "max_tokens": 64,
        "batch_tokens": 128,
    },
    "variants": {
        "noquant": {},
        "rtn": {"preset": "w8a8"},
        "smooth": {"preset": "w8a8", "smooth": {"alpha": 0.5, "targets": ["mlp_input"]}},
    },
    "baseline": "noquant",
    "evaluation": {
        "batch": {"tokens": 128, "rows": 16},
        "datasets": {
            "arc": {
                "adapter": "arc",
                "source": {"shipped": "arc"},
                "items": 5,
                "ask": {"protocol": "loglikelihood", "normalize": "bytes"},
            }
        },
        "shared_text": {"dataset": {"shipped": "squad_v2"}, "passages": 2, "max_tokens": 32},
    },
    "statistics": {
        "confidence": 0.95,
        "power": 0.8,
        "margin": 0.05,
        "resamples": 100,
        "primary": [{"model": "base", "dataset": "arc", "baseline": "noquant", "variant": "rtn"}],
    },
}

# Stands in for papermill where only the workflow is tested: no kernel, no waiting. A stage
# named in KERNEL has a real one.
STUB = """
import json, sys

def execute_notebook(notebook, output, parameters, **more):
    if KERNEL and notebook.stem.endswith(KERNEL):
        del sys.modules["papermill"]
        sys.path.remove(next(p for p in sys.path if __file__ == f"{p}/papermill.py"))
        import papermill
        return papermill.execute_notebook(notebook, output, parameters=parameters, **more)
    text, space = notebook.read_text("utf-8"), {}
    output.write_text(text, "utf-8")
    for index, cell in enumerate(json.loads(text)["cells"]):
        exec("".join(cell["source"]), space)
        if index == 0:
            space.update(parameters)
"""
PARAMETERS = 'study = "toy"\nmodel = "base"\nvariant = "rtn"'
TABLES = "\nfrom helpers.report import tables"
USES = {
    "finetuning": "from helpers.sources import finetuning",
    "rotation": "from helpers.quantization import variants",
    "calibration": "from helpers.quantization import calibration\nimport helpers.report",
    "quantization": "from helpers.quantization import smoothing" + TABLES,
    "cost": "from helpers.core import processes" + TABLES,
    "evaluation": "from helpers.evaluation import engine" + TABLES,
    "analysis": "from helpers.report import tables",
}
WORK = """
import sys
from pathlib import Path
from helpers.study import stages
from helpers.core.errors import StudyError
from helpers.core.files import PROJECT, StudyPaths
from helpers.core.records import write_json
if (PROJECT / "fail").is_file() and (PROJECT / "fail").read_text() in NAME:
    raise StudyError("toy: this run was told to fail; delete the file")
write_json(RUN.record(StudyPaths(study)), {"python": sys.executable, "run": RUN.name})
"""


def notebook(*cells: str, parameters: str = PARAMETERS):
    """A notebook of code cells after a tagged parameters cell."""
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    metadata = {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
    rest = [nbformat.v4.new_code_cell(cell) for cell in cells]
    return nbformat.v4.new_notebook(cells=[first, *rest], metadata=metadata)


def stage_notebook(stage: str):
    """The toy of one stage: names what the real one imports, and writes its record."""
    names = dict.fromkeys(("finetuning", "rotation", "calibration", "cost"), "model")
    names["analysis"] = ""
    given = names.get(stage, "model, variant")
    run = f"RUN = stages.Run({stage!r}, {given})\nNAME = RUN.name"
    uses = "if False:\n    " + USES[stage].replace("\n", "\n    ")
    before, after = WORK.split("if (PROJECT", 1)
    work = f"{before}{run}\nif (PROJECT{after}"
    write = '(StudyPaths(study).root / "{}").write_text("a,b")'
    files = ["summary.csv", "items.html"] if stage == "analysis" else []
    return notebook(uses, work, *map(write.format, files))


def make(folder: Path, *, kernels: bool | str) -> Path:
    """A project with the real code and Snakefile, toy notebooks and the study `toy`.

    Args:
        kernels: whether notebooks run in kernels, or the one stage whose notebooks do.
    """
    shutil.copytree(PROJECT / "src" / "helpers", folder / "src" / "helpers")
    shutil.copy(PROJECT / "Snakefile", folder)
    shutil.copytree(PROJECT / "profiles", folder / "profiles")
    for name in ("notebooks", "params"):
        (folder / name).mkdir()
    tables = folder / "src" / "helpers" / "report" / "tables.py"
    tables.touch()
    for stage, name in stages.NOTEBOOKS.items():
        nbformat.write(stage_notebook(stage), folder / "notebooks" / f"{name}.ipynb")
    write_study(folder, STUDY)
    if kernels is not True:
        (folder / "src" / "papermill.py").write_text(f"KERNEL = {kernels or ''!r}\n{STUB}")
    return folder


def lighten_forks(folder: Path) -> None:
    """Let the project's fork server import what toy notebooks use: no torch, nothing large."""
    module = folder / "src" / "helpers" / "workflow" / "fork_server.py"
    before, after = module.read_text("utf-8").split("\nPACKAGES = (\n")
    light = '\nPACKAGES = ("IPython.core.interactiveshell", "ipykernel.kernelapp", "nbformat")\n'
    module.write_text(before + light + after.partition("\n)\n")[2], "utf-8")


def write_study(folder: Path, study: dict) -> None:
    (folder / "params" / "toy.yaml").write_text(yaml.safe_dump(study, sort_keys=False))


def environment(folder: Path) -> dict[str, str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("STUDY_", "PYTEST_"))}
    places = {"PYTHONPATH": str(folder / "src"), "STUDY_CACHE": str(folder / ".cache")}
    return variables | places | {"STUDY_ESTIMATE": "no", "STUDY_FORKS": "no"}


def jobs(folder: Path, *arguments: str, **more) -> subprocess.CompletedProcess:
    """`python -m helpers.workflow.cli …` in the toy project; what it says is kept as text."""
    process = start(folder, *arguments, **more)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(folder: Path, *arguments: str, **more) -> subprocess.Popen:
    """The same in a process group of its own, as from a terminal, and not waited for."""
    return subprocess.Popen(
        [sys.executable, "-m", "helpers.workflow.cli", *arguments],
        cwd=folder,
        env=environment(folder) | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
        preexec_fn=hear_signals,
    )


def hear_signals() -> None:
    """What a shell starts in the background ignores Ctrl-C; a terminal's own does not."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


WHOLE = ("study", "toy", "--cores", "4", "--job-mb", "100")


def run_study(folder: Path, *options: str, **more) -> subprocess.CompletedProcess:
    return jobs(folder, *WHOLE, "--", *options, **more)


def small() -> dict:
    """The study cut down to six runs: one model, the baseline and one variant."""
    study = copy.deepcopy(STUDY)
    del study["models"]["tuned"], study["variants"]["rtn"]
    study["statistics"]["primary"] = []
    return study


def planned(folder: Path) -> list[str]:
    """What a dry run says would run, such as `evaluation base rtn`."""
    done = run_study(folder, "-n")
    assert done.returncode == 0, done.stderr
    return sorted(line[:PLAN_WIDTH].strip() for line in done.stdout.splitlines())


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))
