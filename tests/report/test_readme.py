"""The front page: its numbers are the published report's, its tree and commands exist."""

import re
import subprocess

import pytest
from tools.update_readme import REPORT, readme_with_headline, report_headline

from helpers.core.errors import StudyError
from helpers.core.files import PROJECT

README = (PROJECT / "README.md").read_text("utf-8")


def committed(path: str) -> str:
    return subprocess.run(
        ["git", "show", f"HEAD:{path}"], cwd=PROJECT, capture_output=True, check=True
    ).stdout.decode("utf-8")


def test_the_headline_is_that_of_the_published_report():
    """As committed: a study made here writes a report of this machine, another draw of rounding."""
    readme, report = committed("README.md"), committed(str(REPORT))
    assert report_headline(report) in readme
    assert readme_with_headline(readme, report) == readme
    other = report.replace("inconclusive", "worse")
    assert other != report
    assert readme_with_headline(readme, other) != readme


def test_every_local_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("http") or (PROJECT / link).exists(), link


def test_every_make_target_it_names_exists():
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.M))
    known = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), flags=re.M))
    assert {"study", "test"} <= targets
    assert targets <= known


def test_what_is_committed_stays_small_and_without_weights():
    listed = subprocess.run(
        ["git", "ls-files", "outputs"], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout.split()
    files = [PROJECT / name for name in listed]
    assert not [f for f in files if f.suffix in {".safetensors", ".bin", ".pt", ".gguf"}]
    sizes = {"demo": 6_000_000, "seed-replica": 5_000_000}
    sizes |= {"recipes": 9_000_000, "rotation": 7_000_000}  # 58 and 39 notebooks
    for study, most in sizes.items():
        own = [f for f in files if study in f.parts]
        assert sum(f.stat().st_size for f in own if f.is_file()) < most, study


def test_a_readme_without_markers_is_refused():
    with pytest.raises(StudyError, match="put them back"):
        readme_with_headline("no markers", "| a |\n\n![x](y.png)")
