"""Copies the published demo's answer into README.md: its executive summary and first figure.

`python -m tools.update_readme` rewrites what stands between the two markers; a test
holds README.md to the report, so that the front page cannot tell of another run.
"""

import re

from helpers.core.errors import StudyError
from helpers.core.files import PROJECT

REPORT = "outputs/demo/report.md"
BEGIN, END = "<!-- headline:begin -->", "<!-- headline:end -->"


# The front page is short: the rows that its sentences give too, or that ask for the report.
LEFT_OUT = ("largest loss not excluded", "KL, against rounding alone", "checks")
CAPTION = re.compile(r"(?m)^Change (?:in|of) .*\n\n")


def report_headline(report: str) -> str:
    """A report's executive summary with its cards, and its first figure, linked from the root.

    Raises:
        StudyError: the report has no executive summary or no figure.
    """
    summary = re.search(r"^## Executive summary\n(.*?)^### ", report, re.S | re.M)
    figure = re.search(r"!\[(.*?)\]\((.+?)\)", report)
    if not summary or not figure:
        raise StudyError(f"{REPORT} has no executive summary or no figure; run make study first")
    folder = REPORT.rpartition("/")[0]
    text = CAPTION.sub("", summary[1].replace(figure[0], ""))
    text = text.replace("\n\n**By right or wrong.**", "\n**By right or wrong.**")
    rows = tuple(f"| {name} |" for name in LEFT_OUT)
    kept = "\n".join(line for line in text.splitlines() if not line.startswith(rows))
    kept = re.sub(r"\n{3,}", "\n\n", kept).strip()
    return f"{kept}\n\n![{figure[1]}]({folder}/{figure[2]})\n"


def readme_with_headline(readme: str, report: str) -> str:
    """The README with the report's headline between its markers.

    Raises:
        StudyError: a marker is missing.
    """
    before, after = split_at_markers(readme, (BEGIN, END), page="README.md")
    return before + report_headline(report) + after


def split_at_markers(text: str, markers: tuple[str, str], *, page: str) -> tuple[str, str]:
    """(text up to the first marker's line, text from the second marker on) of a page.

    Raises:
        StudyError: a marker is missing.
    """
    before, begin, rest = text.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not begin or not end:
        raise StudyError(f"{page} lacks {' or '.join(markers)}; put them back")
    return f"{before}{begin}\n", end + after


def main() -> None:
    """Rewrite README.md from the published report."""
    readme = PROJECT / "README.md"
    report = (PROJECT / REPORT).read_text("utf-8")
    readme.write_text(readme_with_headline(readme.read_text("utf-8"), report), "utf-8")


if __name__ == "__main__":
    main()
