"""Which commits a study's names on a Hub meant: `outputs/<study>/sources.json`.

A branch moves; a study must not. The first fetch writes the commit behind every revision,
and from then on a loaded study holds that commit wherever its file names the revision.
Of a dataset the rows that were read are on record too, by number and hash. To follow a
branch that has moved is a decision: fetch with `--renew`, or name another revision.

Nothing is looked up here; that is `helpers.sources.fetching`.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from helpers.core.errors import StudyError
from helpers.core.paths import StudyPaths
from helpers.core.records import read_json, write_json
from helpers.study.schema import Study
from helpers.study.schema_fields import Count, Strict
from helpers.study.schema_sources import HubDataset, HubModel, Stream

COMMIT = r"^[0-9a-f]{40}$"
FETCH = "make fetch"
HubSource = HubModel | HubDataset


class PinnedModel(Strict):
    """A model repository, and the commit of its revision at the first fetch."""

    hub: str
    revision: str
    commit: Annotated[str, Field(pattern=COMMIT)]


class PinnedDataset(Strict):
    """One split of a dataset, the commit of its revision, and the rows that were read.

    `rows` of the split's `of_rows` were read; if `stream` drew them, `pieces` holds the number
    of pieces that were read and the number in the split.
    """

    hub: str
    revision: str
    commit: Annotated[str, Field(pattern=COMMIT)]
    config: str | None
    split: str
    stream: Stream | None
    rows: Count
    of_rows: Count
    pieces: tuple[int, int] | None
    sha256: str


class Pins(Strict):
    """The content of a study's `sources.json`."""

    models: tuple[PinnedModel, ...] = ()
    datasets: tuple[PinnedDataset, ...] = ()

    def commit(self, source: HubSource) -> str | None:
        """The commit of a source that the study file names; None if it is not pinned."""
        if is_commit(source.revision):
            return source.revision
        pins = self.models if isinstance(source, HubModel) else self.datasets
        names = (source.hub, source.revision)
        return next((pin.commit for pin in pins if (pin.hub, pin.revision) == names), None)

    def pinned_rows(self, source: HubDataset) -> PinnedDataset | None:
        """The record of the rows of one split; `source` has the revision of the study file."""
        settings = source.model_dump()
        for pin in self.datasets:
            if pin.model_dump(include=set(settings)) == settings:
                return pin
        return None


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit already, which needs no lookup."""
    return re.match(COMMIT, revision) is not None


def pins_file(paths: StudyPaths) -> Path:
    return paths.root / "sources.json"


def read_pins(paths: StudyPaths) -> Pins:
    """The pins of a study; empty before its first fetch.

    Raises:
        StudyError: the file is damaged, or pins one name to two commits.
    """
    path = pins_file(paths)
    place = f"outputs/{paths.study}/{path.name}"
    if not path.is_file():
        return Pins()
    remedy = f"restore it, or delete it and run {FETCH} STUDY={paths.study} to pin again"
    try:
        pins = Pins.model_validate(read_json(path, made_by=FETCH))
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        raise StudyError(f"{place}: {key} is damaged; {remedy}") from None
    for kind in (pins.models, pins.datasets):
        commits: dict = {}
        for pin in kind:
            if commits.setdefault((pin.hub, pin.revision), pin.commit) != pin.commit:
                raise StudyError(f"{place}: {pin.hub} at {pin.revision} has two commits; {remedy}")
    return pins


def write_pins(paths: StudyPaths, pins: Pins) -> None:
    write_json(pins_file(paths), pins.model_dump(mode="json"))


def hub_sources(study: Study) -> list[tuple[str, HubSource]]:
    """Every source on a Hub with its dotted key in the study file, each source once."""
    sources: dict[HubSource, str] = {}
    for key, source in _walk(study, ""):
        sources.setdefault(source, key)
    return [(key, source) for source, key in sources.items()]


def _walk(value: Any, key: str) -> Iterator[tuple[str, HubSource]]:
    if isinstance(value, HubSource):
        yield key, value
        return
    members = value if isinstance(value, dict) else {n: getattr(value, n) for n in _fields(value)}
    for name, member in members.items():
        yield from _walk(member, f"{key}.{name}".lstrip("."))


def _fields(value: Any) -> tuple[str, ...]:
    return tuple(type(value).model_fields) if isinstance(value, BaseModel) else ()


def with_pinned_commits(study: Study, pins: Pins) -> Study:
    """The study with every known revision replaced by its commit."""

    def pin(source: HubSource) -> HubSource:
        return source.model_copy(update={"revision": pins.commit(source) or source.revision})

    return _mapped(study, pin)


def _mapped(value: Any, change: Callable[[HubSource], HubSource]) -> Any:
    if isinstance(value, HubSource):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(member, change) for name, member in value.items()}
    if fields := _fields(value):
        return value.model_copy(update={n: _mapped(getattr(value, n), change) for n in fields})
    return value
