"""`results.frame()` holds every answer that is on disk, and nothing else."""

import json
import math

from helpers.report.results import load_results
from helpers.report.tables import readable
from hostile_text import HOSTILE
from test_report import make_job  # noqa: F401 - a fixture


def test_the_frame_agrees_with_the_answers_on_disk(make_job):  # noqa: F811
    job = make_job()
    frame = load_results(job).frame()
    lines = {}
    for path in job.paths.root.glob("*/*/evaluation/predictions/*.jsonl"):
        if path.stem == "shared_text":
            continue
        variant = path.parents[2]
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            lines[variant.parent.name, variant.name, path.stem, row["id"]] = row
    rows = frame.to_dict("records")
    assert len(rows) == len(lines)
    for row in rows:
        stored = lines.pop((row["model"], row["variant"], row["dataset"], row["id"]))
        for name in set(stored) & set(row):
            assert row[name] == stored[name], name
        assert ("f1" in stored) != math.isnan(row["f1"])
    assert lines == {}
    own = {"id", "cluster", "golds", "output", "parsed", "status", "score", "f1"}
    assert own | {"finish_reason", "prompt_tokens", "output_tokens"} <= set(frame.columns)


def test_a_slice_has_the_accuracy_that_the_report_has(make_job):  # noqa: F811
    results = load_results(make_job())
    means = results.frame().groupby(["model", "variant", "dataset"])["score"].mean()
    for (model, variant), evaluated in results.evaluations.items():
        accuracy = evaluated.metrics["arc"]["accuracy"]
        assert abs(means[model, variant, "arc"] - accuracy) < 1e-12


def test_answers_that_failed_a_check_are_marked(make_job):  # noqa: F811
    frame = load_results(make_job(failed="static")).frame()
    assert set(frame[~frame["valid"]]["variant"]) == {"static"}


def test_what_is_shown_of_it_acts_on_no_terminal(make_job):  # noqa: F811
    frame = load_results(make_job()).frame().head()
    frame["output"] = (HOSTILE * 5)[:5]
    shown = readable(frame)
    assert shown.shape == frame.shape
    assert not any(c in "".join(shown["output"]) for c in "\x1b\x00\u202e\n")
