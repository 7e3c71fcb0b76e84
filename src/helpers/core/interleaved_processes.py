"""Measurements taken in turns, each in a process of its own that does nothing else.

A machine's speed drifts over minutes, by heat and by neighbours. So what is to be compared
is measured in rounds, one thing after the other, and every round begins one place further
on: a drift then falls on all alike. A process that is given to one measurement holds only
what that measurement needs, so that its peak of memory says something.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from helpers.core.activity import Bar
from helpers.core.errors import StudyError
from helpers.core.parent_process import die_with_parent


def interleaved_order(names: Sequence[str], rounds: int) -> list[str]:
    """The order of measurements: every name once a round, each round starting one name later."""
    order = list(names)
    starts = [r % len(order) for r in range(rounds)]
    return [name for start in starts for name in order[start:] + order[:start]]


def interleaved_rounds(
    tasks: dict[str, Callable[[], dict]], *, rounds: int, preload: Sequence[str] = ()
) -> dict[str, list[dict]]:
    """The results of each task, round by round.

    Args:
        tasks: by name; each task and its result can be pickled.
        rounds: how often each is run.
        preload: modules that are imported once, before the processes are forked.

    Raises:
        StudyError: a process died.
    """
    results: dict[str, list[dict]] = {name: [] for name in tasks}
    order = Bar(interleaved_order(list(tasks), rounds), desc="measuring", unit="measurement")
    for name in order:
        results[name].append(_run_in_own_process(name, tasks[name], preload))
    return results


def _run_in_own_process(name: str, task: Callable[[], dict], preload: Sequence[str]) -> dict:
    try:
        options = {"mp_context": _context(preload), "initializer": _end_with_all}
        with ProcessPoolExecutor(1, **options) as process:
            return process.submit(task).result()
    except BrokenProcessPool:
        raise StudyError(
            f"{name}: the process that measured it died; most often memory ran out"
        ) from None


def _end_with_all() -> None:
    """End this process with the fork server, which ends with the process that started it."""
    die_with_parent()
    asking = multiprocessing.parent_process()
    if (
        asking is not None and not asking.is_alive()
    ):  # the parent ended before die_with_parent took effect
        os._exit(1)


def _context(preload: Sequence[str]):
    """Processes forked from a server that has imported the modules; spawned without fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    os.environ["STUDY_MEASURING_PARENT"] = str(os.getpid())
    context.set_forkserver_preload(["helpers.core.parent_process_preload", *preload])
    return context
