"""Rows that are no items, and sets too small to draw from: a line for each, before any job."""

from collections.abc import Callable, Iterator

from helpers.core.errors import StudyError
from helpers.sources.hub_rows import cached_rows_info
from helpers.sources.sampling import (
    calibration_items,
    evaluation_items,
    shared_passages,
    training_items,
)
from helpers.study.local_files import study_sources
from helpers.study.schema import Study
from helpers.study.schema_sources import FineTunedModel, HubDataset


def row_problems(study: Study) -> Iterator[str]:
    """A line for each invalid row or too small set among the rows on this machine."""
    draws: list[tuple[str, list, Callable]] = []
    for name, settings in study.evaluation.datasets.items():
        draw = lambda name=name: evaluation_items(study, name)  # noqa: E731
        draws.append((f"evaluation.datasets.{name}", [settings.source], draw))
    sets = [source for _, sources, _ in draws for source in sources]
    calibration = [study.calibration.dataset, *sets]
    text_source = study.evaluation.shared_text.dataset
    draws.append(("evaluation.shared_text", [text_source], lambda: shared_passages(study)))
    draws.append(("calibration", calibration, lambda: calibration_items(study)))
    for name, model in study.models.items():
        if isinstance(model, FineTunedModel):
            draw = lambda name=name: training_items(study, name)  # noqa: E731
            sources = [model.finetune.dataset, *calibration]
            draws.append((f"models.{name}.finetune", sources, draw))
    reported: set[str] = set()
    for key, sources, draw in draws:
        if not _are_here(sources):
            continue
        try:
            draw()
        except StudyError as error:
            if (
                str(error) not in reported
            ):  # all draws exclude the evaluation sets, so they repeat its error
                reported.add(str(error))
                yield str(error) if str(error).startswith(key) else f"{key}: {error}"


def rows_are_here(study: Study) -> bool:
    """Whether all rows that a study names on a Hub have been fetched."""
    return _are_here([source for _, source in study_sources(study)])


def _are_here(sources: list) -> bool:
    return all(cached_rows_info(source) for source in sources if isinstance(source, HubDataset))
