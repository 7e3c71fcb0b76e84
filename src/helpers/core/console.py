"""What a run of a study says: one line when a job starts, one when it ends.

The lines go to the terminal and, while `make study` runs, to a file in the outputs folder
that all its jobs share, wherever they run: `STUDY_PROGRESS`. Its first line is the number
of jobs, each other one is JSON. From it a job knows how many are done, `make study` shows
what jobs on other machines say, and at the end it is known which ended without a word.
"""

import json
import os
import sys
from pathlib import Path

from helpers.core.file_locking import wait_for_lock

START, DONE, FAILED, STOPPED, NOTE = "start", "done", "failed", "stopped", "note"
LOST = "lost"  # written by Snakemake for every job that failed
ENDS = (DONE, FAILED, STOPPED, LOST)


def report_event(word: str, label: str, details: str = "") -> None:
    """Print and record an event of a job; `[ 3/18]` replaces `done` where jobs are counted."""
    shared = progress_file()
    if not shared.is_file():
        sys.stderr.write(_lines(word, label, details))  # one write: jobs share the terminal
        return
    with wait_for_lock(shared):
        total, events = read_events(shared)
        status = word
        if word == DONE:
            done = 1 + sum(event["word"] == DONE for event in events)
            status = f"[{done:>{len(total)}}/{total}]"
        text = _lines(status, label, details)
        _append(shared, word, label, text)
        sys.stderr.write(text)


def report_lost_job(label: str) -> None:
    """Record that a job failed, in case the job itself reported nothing."""
    shared = progress_file()
    if shared.is_file():
        with wait_for_lock(shared):
            _append(shared, LOST, label, "")


def progress_file() -> Path:
    """The file that all jobs of a run share; os.devnull outside of `make study`."""
    return Path(os.environ.get("STUDY_PROGRESS") or os.devnull)


def _append(shared: Path, word: str, label: str, text: str) -> None:
    with open(shared, "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"word": word, "label": label, "text": text}) + "\n")


def _lines(status: str, label: str, details: str) -> str:
    first_line, *further_lines = details.split("\n")
    lines = [
        f"{status:<8} {label}  {first_line}".rstrip(),
        *(f"         {line}" for line in further_lines),
    ]
    return "\n".join(lines) + "\n"


def format_duration(seconds: float) -> str:
    """`3 min 07 s`, or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def read_events(shared: Path) -> tuple[str, list[dict]]:
    """(number of jobs, their events so far), without a line that is still being written."""
    total, *lines = shared.read_text(encoding="utf-8").split("\n")
    return total or "0", [json.loads(line) for line in lines[:-1]]


def jobs_without_result(events: list[dict]) -> list[str]:
    """Names of the jobs that started or were lost and reported no result: they were killed."""
    ended = {event_job(event) for event in events if event["word"] in (DONE, FAILED, STOPPED)}
    started = dict.fromkeys(event_job(event) for event in events if event["word"] in (START, LOST))
    return [job for job in started if job not in ended]


def event_job(event: dict) -> str:
    """The name of the job of an event, such as `evaluation base noquant`."""
    return " ".join(event["label"].split())
