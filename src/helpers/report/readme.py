"""Copies the published demo's headline into README.md: its table and its first figure.

`python -m helpers.report.readme` rewrites what stands between the two markers; a test
holds README.md to the report, so that the front page cannot tell of another run.
"""

import re

from helpers.study.errors import StudyError
from helpers.study.paths import PROJECT

REPORT = "outputs/demo/report.md"
BEGIN, END = "<!-- headline:begin -->", "<!-- headline:end -->"


def headline(report: str) -> str:
    """The first table of a report and its first figure, linked from the project's root.

    Raises:
        StudyError: the report has no table or no figure.
    """
    table = re.search(r"(?:^\|.*\n)+", report, flags=re.MULTILINE)
    figure = re.search(r"!\[(.*?)\]\((.+?)\)", report)
    if not table or not figure:
        raise StudyError(f"{REPORT} has no table or no figure; run make study first")
    folder = REPORT.rpartition("/")[0]
    return f"{table[0]}\n![{figure[1]}]({folder}/{figure[2]})\n"


def with_headline(readme: str, report: str) -> str:
    """The README with the report's headline between its markers.

    Raises:
        StudyError: a marker is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise StudyError(f"README.md lacks {BEGIN} or {END}; put them back")
    return f"{before}{begin}\n{headline(report)}{end}{after}"


def main() -> None:
    """Rewrite README.md from the published report."""
    readme = PROJECT / "README.md"
    report = (PROJECT / REPORT).read_text("utf-8")
    readme.write_text(with_headline(readme.read_text("utf-8"), report), "utf-8")


if __name__ == "__main__":
    main()
