"""Text from models, data sets and the study file is shown as text, wherever it is shown.

The analysis is run twice on a made-up study, once with plain answers and once with
answers that try to act on the page, the table, the notebook or the terminal. Apart from
the text itself, the two must come out the same.
"""

import json
import re
import subprocess

import mistune
import pytest
from bs4 import BeautifulSoup
from markdown_it import MarkdownIt

import test_report
from chromium import CHROMIUM, QUIET, WHY_NOT
from helpers.core.errors import one_line, printable
from helpers.report import markdown, tables
from hostile_text import HOSTILE, PLAIN
from made_up_study import analysed

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Both reports as the analysis and the export write them: {texts: folder}."""
    folders = {texts: tmp_path_factory.mktemp("made-up") for texts in (HOSTILE, PLAIN)}
    return {texts: analysed(folder, texts) for texts, folder in folders.items()}


def skeleton(page: str) -> list:
    """All elements of a page in order, with the names of their attributes; no texts.

    Of addresses the scheme is kept, since that decides what a click or a load does.
    """
    elements = []
    for element in BeautifulSoup(page, "html.parser").find_all(True):
        if element.name == "wbr":  # where an address is broken
            continue
        attributes = {k: "" for k in element.attrs}
        for key in ("href", "src", "action"):
            if key in element.attrs:
                attributes[key] = re.match(r"#|[a-z]*:?", element[key])[0]
        elements.append((element.name, sorted(attributes.items())))
    return elements


def same_skeleton(hostile: str, plain: str) -> None:
    """As an assertion that shows the first difference, not two pages."""
    pairs = zip(skeleton(hostile), skeleton(plain), strict=False)
    for number, (one, other) in enumerate(pairs):
        assert one == other, f"element {number}"
    assert len(skeleton(hostile)) == len(skeleton(plain))


def test_the_page_is_the_same_but_for_its_texts(reports):
    pages = [(reports[texts] / "report.html").read_text("utf-8") for texts in (HOSTILE, PLAIN)]
    same_skeleton(*pages)
    shown = BeautifulSoup(pages[0], "html.parser").get_text()
    assert "<script>document.title = 'owned'</script>" in shown
    assert r"\boxed{7}" in shown


def test_the_page_holds_nothing_that_runs_or_is_fetched(reports):
    page = BeautifulSoup((reports[HOSTILE] / "report.html").read_text("utf-8"), "html.parser")
    assert not page.find_all(["script", "iframe", "object", "embed", "form", "base", "link"])
    for element in page.find_all(True):
        assert not [name for name in element.attrs if name.startswith("on")], element.name
        for key in ("href", "src"):
            named = element.attrs.get(key, "#")
            assert named == "items.html" or re.match(r"#|data:image/png;base64,", named), element
    policy = page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


def test_the_report_leads_to_the_page_of_all_items(reports):
    """What that page does with such texts is tested in test_items_page.py."""
    page = BeautifulSoup((reports[HOSTILE] / "report.html").read_text("utf-8"), "html.parser")
    linked = [a["href"] for a in page.find_all("a") if not a["href"].startswith("#")]
    assert linked == ["items.html"]
    assert "[items.html](items.html)" in (reports[HOSTILE] / "report.md").read_text("utf-8")
    assert (reports[HOSTILE] / "items.html").is_file()


def renderings(markdown: str) -> dict[str, str]:
    """The Markdown as readers with different habits render it."""
    common = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    plugins = ["strikethrough", "footnotes", "table", "url", "task_lists", "def_list", "abbr"]
    plugins += ["mark", "superscript", "math"]
    greedy = mistune.create_markdown(escape=False, plugins=plugins)
    return {"commonmark": common.render(markdown), "mistune": greedy(markdown)}


def test_the_markdown_is_the_same_but_for_its_texts(reports):
    texts = [(reports[texts] / "report.md").read_text("utf-8") for texts in (HOSTILE, PLAIN)]
    hostile, plain = map(renderings, texts)
    for reader, page in hostile.items():
        same_skeleton(page, plain[reader])
        assert "evil.example" not in str(BeautifulSoup(page, "html.parser").find_all("a"))
    tables = [[x.count("|") for x in text.splitlines() if x.startswith("|")] for text in texts]
    assert tables[0] == tables[1]


def test_nothing_in_the_outputs_acts_on_a_terminal(reports):
    """Bytes as `cat` would send them: no escape, no control, nothing that reorders."""
    for path in reports[HOSTILE].rglob("*"):
        if path.suffix in (".md", ".html", ".csv", ".ipynb"):
            text = path.read_text("utf-8")
            assert not CONTROL.search(text), path.name
            if path.suffix == ".ipynb":
                assert not CONTROL.search("".join(notebook_texts(path))), path.name


def notebook_texts(path):
    """Every text of a notebook's outputs, as a front end gets it."""
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            for value in (output.get("text", []), *output.get("data", {}).values()):
                yield from ([value] if isinstance(value, str) else map(str, value))


def test_the_executed_notebook_is_the_same_but_for_its_texts(reports):
    """Each Markdown and HTML output of it, as JupyterLab and GitHub get them."""
    pages = []
    for texts in (HOSTILE, PLAIN):
        path = reports[texts] / "notebooks" / "04_analysis.ipynb"
        cells = json.loads(path.read_text("utf-8"))["cells"]
        outputs = [o.get("data", {}) for c in cells for o in c.get("outputs", [])]
        texts = ["".join(o.get("text/markdown", o.get("text/html", ""))) for o in outputs]
        pages.append([renderings(text) for text in texts])
    assert len(pages[0]) == len(pages[1])
    for hostile, plain in zip(*pages, strict=True):
        for reader in hostile:
            same_skeleton(hostile[reader], plain[reader])


def test_the_evaluation_notebooks_tables_show_answers_as_text():
    """What 03_evaluation displays of the answers and of the gates."""
    shown = {}
    for texts in (HOSTILE, PLAIN):
        rows = [test_report.scored(f"i{i}", "c", [t], t, t) for i, t in enumerate(texts)]
        frames = [tables.sample_answers_table({"arc": rows}, each=len(rows))]
        gates = [{"name": "g", "passed": True, "measured": t, "limit": "x"} for t in texts]
        frames.append(tables.gate_table({"gates": gates}))
        shown[texts] = frames
    for hostile, plain in zip(shown[HOSTILE], shown[PLAIN], strict=True):
        same_skeleton(hostile.to_html(), plain.to_html())
        assert not CONTROL.search(hostile.to_html() + hostile.to_string())
        assert "tex2jax_ignore" in hostile.to_html()  # "$5 and $6" is no formula


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_keeps_its_words_when_it_is_made_safe(text):
    page = renderings(markdown.escape(text))["commonmark"]
    shown = BeautifulSoup(page, "html.parser").get_text().strip()
    assert shown == one_line(text).strip()
    assert not BeautifulSoup(page, "html.parser").find_all(lambda e: e.name not in ("p", "wbr"))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_name_that_is_none_is_quoted(text):
    page = renderings(f"a {markdown.code(text)} z")["commonmark"]
    names = [e.name for e in BeautifulSoup(page, "html.parser").find_all(True) if e.name != "wbr"]
    assert names == ["p", "code"]


def test_line_ends_stay_where_they_are_wanted():
    assert printable("a\nb\x1b[1m", keep="\n") == "a\nb�[1m"
    assert one_line("a\n b\u2028c\x00") == "a b c�"


@pytest.mark.skipif(not CHROMIUM, reason=WHY_NOT)
@pytest.mark.parametrize("policy", [True, False], ids=["with its policy", "by its text alone"])
def test_a_browser_runs_nothing_of_it(reports, tmp_path, policy):
    """Opened in Chromium, the page still has its own title and no element more."""
    page = (reports[HOSTILE] / "report.html").read_text("utf-8")
    if not policy:
        page = re.sub(r"<meta http-equiv=.Content-Security-Policy.[^>]*>", "", page)
    path = tmp_path / "page.html"
    path.write_text(page, "utf-8")
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    title = BeautifulSoup(done.stdout, "html.parser").title.get_text()
    assert title.startswith("A study ")
    same_skeleton(done.stdout, page)
