"""Which runs a study takes, what each of them reads, and what each depends on.

The Snakefile is made of this. Two things decide whether a run is repeated:

- `depends_on`: everything in the study file the stage uses, as ONE text with sorted
  keys. Snakemake compares parameters as a set of values, so that two swapped values
  would go unseen if they were given one by one.
- `source_files`: the notebook, the helper modules it imports, directly or through
  others, and the local data it reads. What they hold counts, not when they were written
  (`helpers.study.accounts`).

Left out on purpose: modules that only read and check the study file (what they read is
in `depends_on`), those that only run notebooks, and, for every stage but analysis, the
report room, which shows results and makes none.
"""

import ast
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from helpers.study.errors import StudyError
from helpers.study.hashing import canonical_json
from helpers.study.local_files import files_of, resolve
from helpers.study.paths import PROJECT, StudyPaths
from helpers.study.schema import Study
from helpers.study.source_settings import FileDataset, FineTunedModel, FolderModel, ShippedDataset

NOTEBOOKS = {
    "finetuning": "00_finetuning",
    "calibration": "01_calibration",
    "quantization": "02_quantization",
    "cost": "03_cost",
    "evaluation": "03_evaluation",
    "analysis": "04_analysis",
}
HELPERS = Path(__file__).resolve().parents[1]
PLUMBING = ("errors", "loading", "model_folders", "names", "opening", "paths", "pins", "schema")
PLUMBING += ("archive", "cleaning", "execution", "export", "grid", "jobs", "workflow")
PLUMBING += ("yaml_text",)
PLUMBING += ("accounts", "cluster", "locking", "partial", "terminal")
MAKE_NO_NUMBERS = {f"helpers.study.{name}" for name in PLUMBING}


@dataclass(frozen=True)
class Run:
    """One run of one stage's notebook."""

    stage: str
    model: str = ""
    variant: str = ""

    @property
    def name(self) -> str:
        """`02_quantization.base.rtn_w8a8`, the executed notebook's name."""
        return ".".join(filter(None, (NOTEBOOKS[self.stage], self.model, self.variant)))

    def executed(self, paths: StudyPaths) -> Path:
        """The executed notebook that is kept for review."""
        return paths.notebooks / f"{self.name}.ipynb"

    def record(self, paths: StudyPaths) -> Path:
        """What the run leaves for the next stage to find."""
        match self.stage:
            case "finetuning":
                return paths.finetuned_model(self.model) / "record.json"
            case "calibration":
                return paths.calibration(self.model) / "record.json"
            case "quantization":
                return paths.quantization(self.model, self.variant) / "record.json"
            case "cost":
                return paths.cost(self.model) / "record.json"
            case "evaluation":
                return paths.evaluation(self.model, self.variant) / "record.json"
        return paths.root / "summary.json"


def runs(study: Study) -> list[Run]:
    """Every run before the analysis, stage by stage.

    Raises:
        StudyError: two runs would share a name.
    """
    pairs = [(m, v) for m in study.models for v in study.variants]
    found = [Run("finetuning", m) for m in study.models if _is_trained(study, m)]
    found += [Run("calibration", m) for m in study.models]
    found += [Run("quantization", m, v) for m, v in pairs if study.variants[v].changes_model]
    found += [Run("cost", m) for m in timed_models(study)]
    found += [Run("evaluation", m, v) for m, v in pairs]
    names = [run.name for run in found]
    for run in found:
        if names.count(run.name) > 1:
            raise StudyError(
                f"models.{run.model}, variants.{run.variant}: two runs would be called "
                f"{run.name}; leave out the dots in the names"
            )
    return found


def timed_models(study: Study) -> list[str]:
    """The models whose cost is measured: one trained here costs what its start costs."""
    return [m for m in study.models if not _is_trained(study, m)]


def _is_trained(study: Study, model: str) -> bool:
    return isinstance(study.models[model], FineTunedModel)


def before(study: Study, run: Run) -> list[Run]:
    """The runs whose records this one reads."""
    trained = [Run("finetuning", run.model)] if run.model and _is_trained(study, run.model) else []
    match run.stage:
        case "calibration":
            return trained
        case "quantization":
            return [*trained, Run("calibration", run.model)]
        case "cost":
            made = [v for v in study.variants if study.variants[v].changes_model]
            return [Run("quantization", run.model, v) for v in made]
        case "evaluation":
            found = [*trained]
            if study.variants[run.variant].changes_model:
                found.append(Run("quantization", run.model, run.variant))
            if run.variant != study.baseline:  # its gates are held against the baseline
                found.append(Run("evaluation", run.model, study.baseline))
            return found
        case "analysis":
            return runs(study)
    return []


def depends_on(study: Study, run: Run) -> str:
    """All the study file says that this run's result depends on, as one text."""
    if run.stage == "analysis":
        return canonical_json(study.model_dump(mode="json"))
    uses: dict[str, Any] = {
        "seed": study.seed,
        "runtime": study.runtime.model_dump(),
        "model": _model(study, run.model),
    }
    if run.stage in ("finetuning", "calibration"):
        del uses["runtime"]["quantized"]  # both work on the float model
    if study.enable_thinking is not None:
        uses["enable_thinking"] = study.enable_thinking
    if run.variant:
        uses["variant"] = _variant(study, run.variant)
    if run.stage == "cost":
        del uses["runtime"]["threads"]  # it takes all there are
        uses["variants"] = {v: _variant(study, v) for v in study.variants}
        uses["baseline"], uses["batch"] = study.baseline, study.evaluation.batch.model_dump()
    if run.stage in ("calibration", "quantization", "cost") or (
        run.variant and study.variants[run.variant].changes_model
    ):
        uses["calibration"] = study.calibration.model_dump()
        uses["barred_from_calibration"] = _drawn(study)
    if run.stage == "evaluation":
        uses["evaluation"] = study.evaluation.model_dump()
        uses["baseline"] = study.baseline
    return canonical_json(uses)


def _variant(study: Study, variant: str) -> dict:
    wanted = study.variants[variant]
    return {"settings": wanted.model_dump(mode="json"), "scheme": wanted.scheme}


def _model(study: Study, model: str) -> dict:
    """A model's source; for a trained one, all that its training depends on."""
    source = study.models[model]
    uses = {"source": source.model_dump()}
    if isinstance(source, FineTunedModel):
        uses["start"] = study.models[source.finetune.start].model_dump()
        uses["barred_from_training"] = [study.calibration.model_dump(), _drawn(study)]
    return uses


def _drawn(study: Study) -> dict:
    """What decides which items are evaluation items, and so barred elsewhere."""
    return {
        name: [dataset.adapter, dataset.source.model_dump(), dataset.keep, dataset.items]
        for name, dataset in study.evaluation.datasets.items()
    }


def source_files(study: Study, run: Run) -> list[Path]:
    """The notebook, the modules and the local data of one run.

    Raises:
        StudyError: the notebook is missing or holds a cell that is not Python.
    """
    notebook = PROJECT / "notebooks" / f"{NOTEBOOKS[run.stage]}.ipynb"
    files = {notebook, *imported_modules(notebook, with_report=run.stage == "analysis")}
    for source in _data_sources(study, run):
        match source:
            case FileDataset():
                files.update(files_of(source))
            case ShippedDataset(shipped=name):
                files.add(HELPERS / "sources" / "data" / f"{name}.jsonl")
            case FolderModel(folder=folder):
                files.update(p for p in resolve(folder).iterdir() if p.is_file())
    return sorted(files)


def _data_sources(study: Study, run: Run) -> list:
    if run.stage == "analysis":
        return []
    asked = [dataset.source for dataset in study.evaluation.datasets.values()]
    model = study.models[run.model]
    if run.stage == "evaluation":
        return [model, *asked, study.evaluation.shared_text.dataset]
    found = [model, study.calibration.dataset, *asked]
    if run.stage == "finetuning":
        found += [model.finetune.dataset, study.models[model.finetune.start]]
    return found


@cache
def imported_modules(notebook: Path, *, with_report: bool) -> frozenset[Path]:
    """Files of the helper modules a notebook imports, directly or through others.

    Raises:
        StudyError: the notebook is missing or holds a cell that is not Python.
    """
    if not notebook.is_file():
        raise StudyError(f"notebooks/{notebook.name} is missing; restore it")
    waiting, seen = _imports(_code(notebook), notebook.name), set()
    while waiting:
        name = waiting.pop()
        shows_only = name.startswith("helpers.report") and not with_report
        if name in seen or name in MAKE_NO_NUMBERS or shows_only:
            continue
        seen.add(name)
        file = _package_file(name)
        waiting |= _imports(file.read_text("utf-8"), file.name)
    return frozenset(_package_file(name) for name in seen)


def _code(notebook: Path) -> str:
    """The notebook's code; lines of IPython's own syntax are not Python and import nothing."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    lines = "\n".join(code).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def _imports(code: str, place: str) -> set[str]:
    """Names of the `helpers` modules that some code imports, anywhere in it."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        raise StudyError(f"{place}: is not Python ({error.msg}: {error.text}); mend it") from None
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {n for n in names if n.partition(".")[0] == "helpers" and _package_file(n)}


@cache
def _package_file(name: str) -> Path | None:
    """The file of a helper module, None if the name is not one (a function, a class)."""
    path = HELPERS.joinpath(*name.split(".")[1:])
    for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None
