"""`make fetch`: everything a study names on a Hub, pinned to commits and brought to this machine.

The one place where a network is used. `make study` does it before its first job, and asks
no Hub if all is here already; the jobs themselves read from the cache alone. What a branch
or tag meant when it was first fetched is written to the study's `sources.json` and is
meant ever after; `--renew` asks anew, and says what moved.
"""

import argparse
import sys
from collections.abc import Callable

from huggingface_hub.utils import logging as client_logging

from helpers.core.errors import StudyError
from helpers.core.paths import StudyPaths
from helpers.sources.hub import Unreachable, cached_model, commit_of, fetch_model
from helpers.sources.hub_rows import cache_rows, cached_rows_info
from helpers.study.loading import read_study, study_file, study_file_label
from helpers.study.pins import (
    HubSource,
    PinnedDataset,
    PinnedModel,
    Pins,
    hub_sources,
    read_pins,
    write_pins,
)
from helpers.study.schema import Study
from helpers.study.schema_sources import HubDataset, HubModel

Say = Callable[[str], None]


def fetch(study: Study, pins: Pins, *, place: str, renew: bool, say: Say) -> Pins:
    """Fetch every Hub source of a study to this machine; return their pins.

    Args:
        study: as its file has it, with revisions instead of commits.
        pins: the recorded commits; kept unless they are renewed or no longer named.
        place: the study file, for messages.
        renew: whether to look up recorded revisions again.
        say: prints a line about each step.

    Raises:
        StudyError: a line for each source that cannot be fetched; if the Hub is
            unreachable, only for the first.
    """
    fetched: list[PinnedModel | PinnedDataset] = []
    problems: list[str] = []
    commits: dict[tuple, str] = {}  # one commit per name, even if the branch moves meanwhile
    for key, source in hub_sources(study):
        name = (type(source), source.hub, source.revision)
        commit = commits.get(name) or (None if renew else pins.commit(source))
        try:
            fetched.append(_fetch_and_pin(source, commit, pins, say))
        except StudyError as error:
            source_label = f"{key} = {source.hub!r} at {source.revision!r}"
            problems.append(f"{place}: {source_label}: {error}")
            if isinstance(error, Unreachable):
                break
            continue
        commits[name] = fetched[-1].commit
    if problems:
        raise StudyError("\n".join(problems))
    return Pins(
        models=tuple(pin for pin in fetched if isinstance(pin, PinnedModel)),
        datasets=tuple(pin for pin in fetched if isinstance(pin, PinnedDataset)),
    )


def _fetch_and_pin(source: HubSource, recorded_commit: str | None, pins: Pins, say: Say):
    """Fetch one source if necessary; returns its pin."""
    kind = "model" if isinstance(source, HubModel) else "dataset"
    commit = recorded_commit or commit_of(kind, source.hub, source.revision)
    old_commit = pins.commit(source)
    if old_commit != commit:
        note = f" (was {old_commit[:12]})" if old_commit else ""
        say(f"pinned   {source.hub}  {source.revision} is {commit[:12]}{note}")
    if isinstance(source, HubModel):
        _fetch_model_once(source.hub, commit, say)
        return PinnedModel(hub=source.hub, revision=source.revision, commit=commit)
    rows = _fetch_rows_once(source.model_copy(update={"revision": commit}), say)
    pin = PinnedDataset(**source.model_dump(), commit=commit, **rows)
    recorded = pins.pinned_rows(source)
    if recorded and recorded.commit == commit and recorded.sha256 != pin.sha256:
        raise StudyError(
            f"its {pin.rows} rows of commit {commit[:12]} are not the {recorded.rows} that "
            "sources.json has on record; remove it from there to accept them"
        )
    return pin


def _fetch_model_once(name: str, commit: str, say: Say) -> None:
    if cached_model(name, commit):
        return
    say(f"fetch    {name}  {commit[:12]}")
    fetch_model(name, commit)


def _fetch_rows_once(source: HubDataset, say: Say) -> dict:
    if (info := cached_rows_info(source)) is None:
        from helpers.sources.hub_streaming import read_split  # takes seconds to import

        note = f", a sample of at most {source.stream.rows} rows" if source.stream else ""
        say(f"fetch    {source.hub}  {source.revision[:12]} ({source.split}{note})")
        split = read_split(source)
        info = cache_rows(source, split.rows, of_rows=split.of_rows, pieces=split.pieces)
    return info


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 if all sources are here, 2 after a line for each that is not."""
    parser = argparse.ArgumentParser(prog="python -m helpers.sources.fetching", description=__doc__)
    parser.add_argument("study")
    parser.add_argument(
        "--renew", action="store_true", help="look up the commits of all revisions again"
    )
    args = parser.parse_args(argv)
    client_logging.set_verbosity_error()  # hides retries; an error is one line
    paths = StudyPaths(study_file(args.study).stem)
    try:
        study, pins = read_study(args.study), read_pins(paths)
        place = study_file_label(args.study)
        fetched = fetch(study, pins, place=place, renew=args.renew, say=_say)
        if fetched != pins:
            write_pins(paths, fetched)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
