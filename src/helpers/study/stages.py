"""The stages of a study: its runs, what each reads and depends on, and which are current.

The Snakefile is made of this. Two things decide whether a run is repeated:

- `settings_text`: everything in the study file the stage uses, as ONE text with sorted keys.
  Snakemake compares parameters as a set of values, so that two swapped values would go unseen if
  they were given one by one.
- `source_files`: the notebook, every helper module it rests on, and the local data it reads. What
  they hold counts, not when they were written.

Which modules a notebook rests on is read off its code by one rule. A module counts if the
notebook, or a module that counts, imports it anywhere in its code, or names it in a text of its
own: a dotted name is given to `import_module` or to another interpreter, the name of a file beside
the module is run by its path. So do the packages that it lies in. No module is left out by its
name.

One package is left out, and only for notebooks that compute: `helpers.report`, from which they
show things. Nothing that it makes gets into a record (tests/workflow/test_notebooks.py), and no
other package imports it (tests/core/test_layers.py), so that work on the report repeats no
computation.

The workflow engine compares times of files and keeps a memory of its own; a clock that jumps or a
lost memory can make it call stale results current. So every job that ends well leaves an account,
`outputs/<study>/.accounts/<run>.json`: hashes of the settings, modules and data it used, of the
results of the runs before it, and of its own. A finished run whose account is not what would be
written now is stale, and is run again.

When not all runs are complete a report shows the largest complete part. A report compares every
variant with the baseline on every model, so the part is a rectangle: some models, some variants,
the baseline among them, and all of their runs complete. What is left out is named. Declared
comparisons that lack a side get no verdict and stay counted, so that a missing result never eases
the test of another.
"""

import ast
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from helpers.core.errors import StudyError
from helpers.core.files import PROJECT, StudyPaths, draw_name, relative_to_project
from helpers.core.records import (
    cached_digest,
    canonical_json,
    check_checksums,
    sha256_data,
    sha256_file,
    sha256_text,
    write_json,
)
from helpers.study.inputs import dataset_files, resolve_path, task_sources
from helpers.study.loading import Job
from helpers.study.schema import (
    FileDataset,
    FineTunedModel,
    FolderDataset,
    FolderModel,
    GgufModel,
    MadeModel,
    RotatedModel,
    ShippedDataset,
    Study,
    TaskSet,
)

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
    "rotation": "00_rotation",
    "calibration": "01_calibration",
    "quantization": "02_quantization",
    "cost": "03_cost",
    "evaluation": "03_evaluation",
    "analysis": "04_analysis",
}


@dataclass(frozen=True)
class Run:
    """One run of one stage's notebook.

    Attributes:
        variant: of a calibration, the name of one of the study's `calibrations`.
        draw: counts the checkpoints of a variant, and the draws of a calibration, from 1.
    """

    stage: str
    model: str = ""
    variant: str = ""
    draw: int = 1

    @property
    def name(self) -> str:
        """`02_quantization.base.rtn_w8a8`, the executed notebook's name."""
        return draw_name(".".join([NOTEBOOKS[self.stage], *self._names]), self.draw)

    @property
    def label(self) -> str:
        """`quantization base rtn_w8a8`, the job's name in messages."""
        return draw_name(" ".join([self.stage, *self._names]), self.draw)

    @property
    def _names(self) -> list[str]:
        names = list(filter(None, (self.model, self.variant)))
        return ["+".join(names)] if self.stage == "calibration" else names

    def executed(self, paths: StudyPaths) -> Path:
        """The path of the executed notebook."""
        return paths.notebooks / f"{self.name}.ipynb"

    def record(self, paths: StudyPaths) -> Path:
        """The path of the run's record, which the next stages read."""
        paths = replace(paths, draw=self.draw, drawn=self.variant, calibrated="")
        match self.stage:
            case "finetuning" | "rotation":
                return paths.made_model(self.model) / "record.json"
            case "calibration":
                named = replace(paths, calibrated=self.variant)
                return named.calibration(self.model) / "record.json"
            case "quantization":
                return paths.quantization(self.model, self.variant) / "record.json"
            case "cost":
                return paths.cost(self.model) / "record.json"
            case "evaluation":
                return paths.evaluation(self.model, self.variant) / "record.json"
        return paths.root / "summary.json"


def run_of(job: Job, stage: str) -> Run:
    """The run that a job is; a calibration without a variant may be a named one."""
    named = job.calibration if stage == "calibration" else job.variant
    return Run(stage, job.model, named, job.draw)


def runs(study: Study) -> list[Run]:
    """Every run before the analysis, stage by stage.

    Raises:
        StudyError: two runs would share a name.
    """
    pairs = [(m, v) for m in study.models for v in study.variants]
    all_runs = [run for m in study.models for run in making_runs(study, m)]
    all_runs += [Run("calibration", m, c) for c in ("", *study.calibrations) for m in study.models]
    all_runs += [Run("quantization", m, v) for m, v in pairs if study.variants[v].needs_checkpoint]
    all_runs += [Run("cost", m) for m in timed_models(study)]
    all_runs += [Run("evaluation", m, v) for m, v in pairs]
    all_runs += _draw_runs(study)
    names = [run.name for run in all_runs]
    for run in all_runs:
        if names.count(run.name) > 1:
            raise StudyError(
                f"models.{run.model}, variants.{run.variant}: two runs would be called "
                f"{run.name}; leave out the dots in the names"
            )
    return all_runs


def _draw_runs(study: Study) -> list[Run]:
    """The runs of every draw from the second on."""
    draws = [
        (model, variant, draw)
        for model in study.models
        for variant, recipe in study.variants.items()
        for draw in range(2, recipe.repeats + 1)
    ]
    calibrations = dict.fromkeys(
        Run("calibration", m, name, draw)
        for name in ("", *study.calibrations)
        for m in study.models
        for draw in range(2, study.calibration_draws(name) + 1)
    )
    return [*calibrations, *(Run(s, *at) for s in ("quantization", "evaluation") for at in draws)]


def timed_models(study: Study) -> list[str]:
    """The models whose cost is measured; a model trained here costs as much as its start."""
    if not study.runtime.cost:
        return []
    return [m for m in study.models if not isinstance(study.models[m], FineTunedModel)]


def making_runs(study: Study, model: str) -> list[Run]:
    """The run in which the study makes a model itself; none for a given model."""
    match study.models.get(model):
        case FineTunedModel():
            return [Run("finetuning", model)]
        case RotatedModel():
            return [Run("rotation", model)]
    return []


def upstream_runs(study: Study, run: Run) -> list[Run]:
    """The runs whose records this one reads."""
    made = making_runs(study, run.model)
    match run.stage:
        case "calibration":
            return made
        case "quantization":
            name = study.calibration_of(run.variant)
            draws = range(1, run.draw + 1)  # its gates compare it with the earlier ones
            return [*made, *(Run("calibration", run.model, name, draw) for draw in draws)]
        case "cost":
            changed = [v for v in study.variants if study.variants[v].needs_checkpoint]
            return [*made, *(Run("quantization", run.model, v) for v in changed)]
        case "evaluation":
            upstream = [*made]
            if study.variants[run.variant].needs_checkpoint:
                upstream.append(Run("quantization", run.model, run.variant, run.draw))
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
        whole_study = study.model_dump(mode="json", exclude=excluded)
        for variant in whole_study["variants"].values():
            if variant["repeats"] == 1:
                del variant["repeats"]  # absent from older fingerprints
        return canonical_json(whole_study)
    settings: dict[str, Any] = {
        "seed": study.seed,
        "runtime": study.runtime.model_dump(exclude={"cost"}),  # influences only the cost stage
        "model": _model(study, run.model),
    }
    if run.stage in ("finetuning", "rotation", "calibration"):
        del settings["runtime"]["quantized"]  # they work on the float model
    if study.enable_thinking is not None:
        settings["enable_thinking"] = study.enable_thinking
    if run.variant and run.stage != "calibration":
        settings["variant"] = _variant(study, run.variant)
    if run.stage == "cost":
        del settings["runtime"]["threads"]  # it uses all cores
        settings["variants"] = {v: _variant(study, v) for v in study.variants}
        settings["baseline"] = study.baseline
        settings["batch"] = study.evaluation.batch.model_dump()
    named = _calibration_of(study, run)
    if run.stage in ("rotation", "calibration", "quantization", "cost") or (
        run.variant and study.variants[run.variant].needs_checkpoint
    ):
        settings["calibration"] = study.calibration_called(named).model_dump()
        settings["barred_from_calibration"] = _evaluation_draws(study)
    if run.stage == "evaluation":
        answered = study.with_option_sets_only if run.draw > 1 else study
        settings["evaluation"] = answered.evaluation.model_dump()
        settings["baseline"] = study.baseline
    if run.draw > 1:
        settings["draw"] = run.draw
    if run.draw > 1 or named:
        settings["barred_from_calibration"] = [_evaluation_draws(study), _trainings(study)]
        if named:  # its items are no training items, which are none of the study's calibration
            settings["barred_from_calibration"].append(study.calibration.model_dump())
    return canonical_json(settings)


def _calibration_of(study: Study, run: Run) -> str:
    """The name of the calibration that a run makes or rests on; empty for the study's own."""
    if run.stage == "calibration":
        return run.variant
    return study.calibration_of(run.variant) if run.variant else ""


def _variant(study: Study, variant: str) -> dict:
    settings = study.variants[variant]
    settings_of_a_draw = settings.model_dump(mode="json", exclude={"repeats"})
    return {"settings": settings_of_a_draw, "scheme": settings.scheme}


def _model(study: Study, model: str) -> dict:
    """The settings of a model's source; for a model made here, also those of its making."""
    source = study.models[model]
    settings: dict[str, Any] = {"source": source.model_dump()}
    if isinstance(source, MadeModel):
        settings["start"] = study.models[source.start].model_dump()
    if isinstance(source, FineTunedModel):
        barred = [study.calibration.model_dump(), _evaluation_draws(study)]
        settings["barred_from_training"] = barred
    return settings


def _trainings(study: Study) -> dict:
    """The settings that decide which items are drawn for training, by model."""
    return {
        name: model.model_dump()
        for name, model in study.models.items()
        if isinstance(model, FineTunedModel)
    }


def _evaluation_draws(study: Study) -> dict:
    """The settings that decide which items are drawn for evaluation and barred elsewhere."""
    return {
        name: [dataset.adapter, dataset.source.model_dump(), dataset.keep, dataset.items]
        + ([dataset.model_dump()] if isinstance(dataset, TaskSet) else [])
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
            case FileDataset() | FolderDataset():
                files.update(dataset_files(source))
            case ShippedDataset(shipped=name):
                files.add(HELPERS / "sources" / "data" / f"{name}.jsonl")
            case FolderModel(folder=folder):
                files.update(p for p in resolve_path(folder).iterdir() if p.is_file())
            case GgufModel(gguf=path):
                files.add(resolve_path(path))
    return sorted(files)


def _data_sources(study: Study, run: Run) -> list:
    if run.stage == "analysis":
        return []
    evaluated = [
        source
        for dataset in study.evaluation.datasets.values()
        for source in (task_sources(dataset) if isinstance(dataset, TaskSet) else [dataset.source])
    ]
    model = study.models[run.model]
    if run.stage == "evaluation":
        return [model, *evaluated, study.evaluation.shared_text.dataset]
    named = _calibration_of(study, run)
    sources = [model, study.calibration_called(named).dataset, *evaluated]
    if isinstance(model, FineTunedModel) and run.stage == "finetuning":
        sources += [model.finetune.dataset, study.models[model.start]]
    if isinstance(model, RotatedModel) and run.stage == "rotation":
        sources.append(study.models[model.start])
    if run.stage == "quantization" and (given := study.variants[run.variant].checkpoint):
        sources.append(given[run.model])
    if named:
        sources.append(study.calibration.dataset)
    if run.draw > 1 or named:  # its calibration items are no training items of any model
        trained = [m for m in study.models.values() if isinstance(m, FineTunedModel)]
        sources += [source.finetune.dataset for source in trained]
    return sources


_inside = cache(relative_to_project)  # called thousands of times with a few paths
MOST_BYTES = 2**25  # larger files (weights of local models) are identified by size and time


def fingerprint_file(paths: StudyPaths, run: Run) -> Path:
    return paths.root / ".accounts" / f"{run.name}.json"


def dependency_text(study: Study, run: Run) -> str:
    """The settings and file hashes that the run depends on, as one text.

    Results of upstream runs are not in it.
    """
    files = {_inside(path): _file_fingerprint(path) for path in source_files(study, run)}
    return canonical_json({"settings": settings_text(study, run), "files": sha256_data(files)})


def run_fingerprint(study: Study, paths: StudyPaths, run: Run) -> dict:
    """Hashes of everything that the run's results depend on, as it is now."""
    return {
        "depends": sha256_text(dependency_text(study, run)),
        "before": {r.name: _results_hash(r.record(paths)) for r in upstream_runs(study, run)},
    }


@contextmanager
def record_fingerprint(study: Study, paths: StudyPaths, run: Run) -> Iterator[None]:
    """Inside the context the run has no fingerprint on disk; on success it is written.

    It is taken at the beginning, so a file that is edited during the run counts as changed.
    """
    path = fingerprint_file(paths, run)
    path.unlink(missing_ok=True)
    fingerprint = run_fingerprint(study, paths, run)
    yield
    write_json(path, fingerprint | {"results": _results_hash(run.record(paths))})


def is_current(study: Study, paths: StudyPaths, run: Run) -> bool:
    """Whether the run finished, and settings, code, data and results are unchanged since."""
    fingerprint = run_fingerprint(study, paths, run) | {"results": _results_hash(run.record(paths))}
    finished = run.record(paths).is_file() and run.executed(paths).is_file()
    return finished and _read(fingerprint_file(paths, run)) == fingerprint


def outdated_runs(study: Study, paths: StudyPaths) -> list[Run]:
    """The finished runs that are not current; unfinished runs are not listed."""
    every_run = [*runs(study), Run("analysis")]
    finished = [run for run in every_run if run.record(paths).is_file()]
    return [run for run in finished if not is_current(study, paths, run)]


def completed_runs(study: Study, paths: StudyPaths) -> set[Run]:
    """The runs before the analysis that are current and whose upstream runs all are, too."""
    current = {run for run in runs(study) if is_current(study, paths, run)}

    def is_complete(run: Run) -> bool:
        return run in current and all(map(is_complete, upstream_runs(study, run)))

    return {run for run in current if is_complete(run)}


def check_result_checksums(paths: StudyPaths, runs: Iterable[Run]) -> None:
    """Compare all files of some runs with the checksums in their records.

    Weights may be missing, because a report does not need them, and so may a measurement of
    costs, on which no other run depends.

    Raises:
        StudyError: a file is missing or differs; the message names it and the remedy.
    """
    weights = {"finetuning": "", "rotation": "", "quantization": "../checkpoint/"}
    for run in runs:
        if run.stage != "cost" or run.record(paths).is_file():
            made_by, optional = NOTEBOOKS[run.stage], weights.get(run.stage)
            check_checksums(run.record(paths).parent, made_by=made_by, optional=optional)


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _results_hash(record: Path) -> str:
    """Hash of the files that a run wrote, without its times; empty if it has not finished."""
    content = _read(record)
    if not isinstance(content, dict):
        return ""
    return sha256_data(content["files"]) if "files" in content else sha256_file(record)


def _file_fingerprint(path: Path) -> str:
    status = path.stat()
    if status.st_size > MOST_BYTES:
        return f"{status.st_size} bytes of {status.st_mtime_ns}"
    return cached_digest(path, status)


@dataclass(frozen=True)
class Part:
    """A part of a study, or all of it.

    Attributes:
        study: the study with the models and variants of this part.
        runs: the part's completed runs; only measurements of cost may be missing.
        missing: names of the runs that are incomplete or left out.
    """

    study: Study
    runs: tuple[Run, ...]
    missing: tuple[str, ...] = ()

    def of(self, job: Job) -> Job:
        """The job with this part as its study."""
        return replace(job, study=self.study)


def report_folder(paths: StudyPaths, *, partial: str) -> Path:
    """The folder of the report; a partial report never replaces a whole one."""
    return paths.root / "partial" if partial == "yes" else paths.root


def part_to_report(job: Job, *, partial: str) -> Part:
    """The part of a job's study that the report shows.

    Args:
        partial: `yes` for the completed part, `no` for the whole study.

    Raises:
        StudyError: no part is complete yet.
    """
    if partial not in ("yes", "no"):
        raise StudyError(f"partial = {partial!r} is neither yes nor no; give one of them")
    if partial == "no":
        return Part(job.study, tuple(runs(job.study)))
    return largest_complete_part(job.study, completed_runs(job.study, job.paths))


def largest_complete_part(study: Study, completed: Collection[Run]) -> Part:
    """The largest part of the study whose runs are all completed.

    Raises:
        StudyError: no model has its calibration and its baseline.
    """
    models, variants = list(study.models), list(study.variants)
    while missing := _missing_parts(study, models, variants, completed):
        _leave_out(missing, models, variants, study.baseline)
    if not models:
        raise StudyError("no model's calibration and baseline are complete; run make study")
    calibrations = {study.calibration_of(name) for name in variants}
    selected = {
        "models": {name: study.models[name] for name in models},
        "calibrations": {n: c for n, c in study.calibrations.items() if n in calibrations},
        "variants": {
            name: study.variants[name].model_copy(
                update={"repeats": _completed_draws(study, models, name, completed)}
            )
            for name in variants
        },
    }
    part = study.model_copy(update=selected)
    included = tuple(run for run in runs(part) if run in completed)
    left_out = [run for run in runs(study) if run not in included]
    return Part(part, included, tuple(_run_label(run, run in completed) for run in left_out))


def _completed_draws(study: Study, models: list[str], variant: str, completed) -> int:
    """How many draws of a variant are complete for every model, without a gap."""
    draws = range(2, study.variants[variant].repeats + 1)
    gaps = (d for d in draws for m in models if Run("evaluation", m, variant, d) not in completed)
    return next(gaps, study.variants[variant].repeats + 1) - 1


def _run_label(run: Run, completed: bool) -> str:
    return f"{run.label} (complete, but not what it is compared with)" if completed else run.label


def _missing_parts(study: Study, models, variants, completed) -> list[tuple[str, str]]:
    """(model, variant) of every missing run; the variant is empty if the whole model needs it."""
    missing = []
    for run in runs(study):
        if run.stage == "calibration" and run.variant:
            continue  # the variants made from it lack their checkpoints
        required = run.stage != "cost" and run.model in models and run.variant in ("", *variants)
        required &= run.draw == 1  # with fewer draws a recipe is still reported
        if required and run not in completed:
            missing.append((run.model, "" if run.variant == study.baseline else run.variant))
    for model in models:
        source = study.models[model]
        if isinstance(source, MadeModel) and source.start not in models:
            missing.append((model, ""))  # the report compares it with the model it was made from
    return missing


def _leave_out(missing: list[tuple[str, str]], models: list, variants: list, baseline: str) -> None:
    """Drop an unusable model, else the model or variant with the largest share of missing runs."""
    for model, variant in missing:
        if not variant:
            models.remove(model)
            return
    others = [name for name in variants if name != baseline]
    by_model = {m: len({v for x, v in missing if x == m}) / len(others) for m in models}
    by_variant = {v: len({m for m, x in missing if x == v}) / len(models) for v in others}
    model, variant = (
        max(by_model, key=by_model.__getitem__),
        max(others, key=by_variant.__getitem__),
    )
    if by_variant[variant] >= by_model[model]:
        variants.remove(variant)
    else:
        models.remove(model)
