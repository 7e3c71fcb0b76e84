"""The stages of a study: which runs it takes, what each reads, and what each depends on.

The Snakefile is made of this. Two things decide whether a run is repeated:

- `settings_text`: everything in the study file the stage uses, as ONE text with sorted keys.
  Snakemake compares parameters as a set of values, so that two swapped values would go unseen if
  they were given one by one.
- `source_files`: the notebook, every helper module it rests on, and the local data it reads. What
  they hold counts, not when they were written (`helpers.study.fingerprints`).

Which modules a notebook rests on is read off its code by one rule. A module counts if the
notebook, or a module that counts, imports it anywhere in its code, or names it in a text of its
own: a dotted name is given to `import_module` or to another interpreter, the name of a file beside
the module is run by its path. So do the packages that it lies in. No module is left out by its
name.

One package is left out, and only for notebooks that compute: `helpers.report`, from which they
show things. Nothing that it makes gets into a record (tests/workflow/test_notebooks.py), and no
other package imports it (tests/core/test_layers.py), so that work on the report repeats no
computation.
"""

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from helpers.core.errors import StudyError
from helpers.core.files import PROJECT, StudyPaths
from helpers.core.records import canonical_json
from helpers.study.inputs import dataset_files, resolve_path
from helpers.study.schema import FileDataset, FineTunedModel, FolderModel, ShippedDataset, Study

HELPERS = Path(__file__).resolve().parents[1]
REPORT = HELPERS / "report"
# Files that a module runs by their path, or shows: the parts of a page.
BESIDE = (".py", ".html", ".css", ".js")


@cache
def imported_modules(notebook: Path, *, with_report: bool) -> frozenset[Path]:
    """Files of the helper modules that a notebook imports, directly or through others.

    Raises:
        StudyError: the notebook is missing or holds a cell that is not Python.
    """
    if not notebook.is_file():
        raise StudyError(f"notebooks/{notebook.name} is missing; restore it")
    pending, visited = set(_named_files(_parsed(_code(notebook), notebook.name), notebook)), set()
    while pending:
        file = pending.pop()
        if file in visited or (file.is_relative_to(REPORT) and not with_report):
            continue
        visited.add(file)
        pending |= _files_named_in(file)
    return frozenset(visited)


def _code(notebook: Path) -> str:
    """The notebook's Python code, without lines of IPython's own syntax, which import nothing."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    lines = "\n".join(code).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def _parsed(code: str, place: str) -> ast.Module:
    try:
        return ast.parse(code)
    except SyntaxError as error:
        raise StudyError(f"{place}: is not Python ({error.msg}: {error.text}); mend it") from None


@cache
def _files_named_in(file: Path) -> frozenset[Path]:
    """The files that one module imports or names, and of its packages; a page names none."""
    if file.suffix != ".py":
        return frozenset()
    return frozenset(_named_files(_parsed(file.read_text("utf-8"), file.name), file))


def _named_files(tree: ast.Module, importer: Path) -> Iterator[Path]:
    for node in ast.walk(tree):
        names: list[str] = []
        text = None
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.module is None or node.level:
                raise StudyError(f"{importer.name}: has a relative import; name the module in full")
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names, text = [node.value], node.value
        for name in names:
            yield from _module_files(name)
        if text and text.endswith(BESIDE) and importer.is_relative_to(HELPERS):
            yield from filter(Path.is_file, [importer.parent / text])


@cache
def _module_files(name: str) -> tuple[Path, ...]:
    """The files of a helper module and of each package around it; empty for other names."""
    parts = name.split(".")
    if parts[0] != HELPERS.name or not all(map(str.isidentifier, parts)):
        return ()
    if (file := _package_file(name)) is None:
        return ()
    around = (_package_file(".".join(parts[:n])) for n in range(1, len(parts)))
    return (file, *filter(None, around))


@cache
def _package_file(name: str) -> Path | None:
    """The file of a helper module, None if the name is not one (a function, a class)."""
    module_path = HELPERS.joinpath(*name.split(".")[1:])
    for file in (module_path.with_name(f"{module_path.name}.py"), module_path / "__init__.py"):
        if file.is_file():
            return file
    return None


NOTEBOOKS = {
    "finetuning": "00_finetuning",
    "calibration": "01_calibration",
    "quantization": "02_quantization",
    "cost": "03_cost",
    "evaluation": "03_evaluation",
    "analysis": "04_analysis",
}


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
        """The path of the executed notebook."""
        return paths.notebooks / f"{self.name}.ipynb"

    def record(self, paths: StudyPaths) -> Path:
        """The path of the run's record, which the next stages read."""
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
    all_runs = [Run("finetuning", m) for m in study.models if _is_trained(study, m)]
    all_runs += [Run("calibration", m) for m in study.models]
    all_runs += [Run("quantization", m, v) for m, v in pairs if study.variants[v].needs_checkpoint]
    all_runs += [Run("cost", m) for m in timed_models(study)]
    all_runs += [Run("evaluation", m, v) for m, v in pairs]
    names = [run.name for run in all_runs]
    for run in all_runs:
        if names.count(run.name) > 1:
            raise StudyError(
                f"models.{run.model}, variants.{run.variant}: two runs would be called "
                f"{run.name}; leave out the dots in the names"
            )
    return all_runs


def timed_models(study: Study) -> list[str]:
    """The models whose cost is measured; a model trained here costs as much as its start."""
    if not study.runtime.cost:
        return []
    return [m for m in study.models if not _is_trained(study, m)]


def _is_trained(study: Study, model: str) -> bool:
    return isinstance(study.models[model], FineTunedModel)


def upstream_runs(study: Study, run: Run) -> list[Run]:
    """The runs whose records this one reads."""
    trained = [Run("finetuning", run.model)] if run.model and _is_trained(study, run.model) else []
    match run.stage:
        case "calibration":
            return trained
        case "quantization":
            return [*trained, Run("calibration", run.model)]
        case "cost":
            changed = [v for v in study.variants if study.variants[v].needs_checkpoint]
            return [Run("quantization", run.model, v) for v in changed]
        case "evaluation":
            upstream = [*trained]
            if study.variants[run.variant].needs_checkpoint:
                upstream.append(Run("quantization", run.model, run.variant))
            if run.variant != study.baseline:  # its gates compare it with the baseline
                upstream.append(Run("evaluation", run.model, study.baseline))
            return upstream
        case "analysis":
            return runs(study)
    return []


def settings_text(study: Study, run: Run) -> str:
    """All settings of the study file that this run's result depends on, as one text."""
    if run.stage == "analysis":
        excluded = (
            {"runtime": {"cost"}} if study.runtime.cost else None
        )  # absent from older fingerprints
        return canonical_json(study.model_dump(mode="json", exclude=excluded))
    settings: dict[str, Any] = {
        "seed": study.seed,
        "runtime": study.runtime.model_dump(exclude={"cost"}),  # influences only the cost stage
        "model": _model(study, run.model),
    }
    if run.stage in ("finetuning", "calibration"):
        del settings["runtime"]["quantized"]  # both work on the float model
    if study.enable_thinking is not None:
        settings["enable_thinking"] = study.enable_thinking
    if run.variant:
        settings["variant"] = _variant(study, run.variant)
    if run.stage == "cost":
        del settings["runtime"]["threads"]  # it uses all cores
        settings["variants"] = {v: _variant(study, v) for v in study.variants}
        settings["baseline"] = study.baseline
        settings["batch"] = study.evaluation.batch.model_dump()
    if run.stage in ("calibration", "quantization", "cost") or (
        run.variant and study.variants[run.variant].needs_checkpoint
    ):
        settings["calibration"] = study.calibration.model_dump()
        settings["barred_from_calibration"] = _evaluation_draws(study)
    if run.stage == "evaluation":
        settings["evaluation"] = study.evaluation.model_dump()
        settings["baseline"] = study.baseline
    return canonical_json(settings)


def _variant(study: Study, variant: str) -> dict:
    settings = study.variants[variant]
    return {"settings": settings.model_dump(mode="json"), "scheme": settings.scheme}


def _model(study: Study, model: str) -> dict:
    """The settings of a model's source; for a trained model, also those of its training."""
    source = study.models[model]
    settings: dict[str, Any] = {"source": source.model_dump()}
    if isinstance(source, FineTunedModel):
        settings["start"] = study.models[source.finetune.start].model_dump()
        barred = [study.calibration.model_dump(), _evaluation_draws(study)]
        settings["barred_from_training"] = barred
    return settings


def _evaluation_draws(study: Study) -> dict:
    """The settings that decide which items are drawn for evaluation and barred elsewhere."""
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
                files.update(dataset_files(source))
            case ShippedDataset(shipped=name):
                files.add(HELPERS / "sources" / "data" / f"{name}.jsonl")
            case FolderModel(folder=folder):
                files.update(p for p in resolve_path(folder).iterdir() if p.is_file())
    return sorted(files)


def _data_sources(study: Study, run: Run) -> list:
    if run.stage == "analysis":
        return []
    evaluated = [dataset.source for dataset in study.evaluation.datasets.values()]
    model = study.models[run.model]
    if run.stage == "evaluation":
        return [model, *evaluated, study.evaluation.shared_text.dataset]
    sources = [model, study.calibration.dataset, *evaluated]
    if isinstance(model, FineTunedModel) and run.stage == "finetuning":
        sources += [model.finetune.dataset, study.models[model.finetune.start]]
    return sources
