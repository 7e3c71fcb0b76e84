"""A notebook that a fork ran shows what one shows that a process of its own ran."""

import json
import re
import sys

import pytest

from smoke_study import Smoke

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux alone"),
]


def shown(study: Smoke) -> dict[str, list]:
    """By notebook, all outputs but pictures; notebooks that show durations are left out."""
    displayed = {}
    for path in sorted((study.outputs / "notebooks").glob("*.ipynb")):
        if "03_cost" in path.name or "04_analysis" in path.name:
            continue
        cells = json.loads(path.read_text("utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", ())]
        for output in outputs:
            data = output.get("data", {})
            output["data"] = {kind: data[kind] for kind in data if kind.startswith("text/")}
            output["kinds"] = sorted(data)
        displayed[path.name] = outputs
    return displayed


def test_both_show_the_same(without_forks, undisturbed_part):
    one, other = shown(without_forks), shown(undisturbed_part)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == other[name], name


def test_no_line_of_a_library_gets_in(without_forks, undisturbed_part):
    for study in (without_forks, undisturbed_part):
        texts = [str(output) for outputs in shown(study).values() for output in outputs]
        assert not [t for t in texts if re.search(r"%\||INFO|WARNING|\.tmp", t)]
