"""The report as a reader has it: short in front, nothing said twice, and good in any browser."""

import base64
import html
import io
import json
import re
from collections import Counter
from importlib.resources import files

import nbformat
import pytest
from bs4 import BeautifulSoup
from PIL import Image

import test_report
from chromium import CHROMIUM, WHY_NOT, Chromium
from helpers.core.files import PROJECT
from helpers.report.figures import Picture, variant_looks
from helpers.report.pages import report_page
from helpers.workflow.cli import clean_notebook, export_report
from hostile_text import PLAIN
from made_up_study import made_up_study
from test_graded_study import graded_makers

AXE = files("axe_core_python") / "axe.min.js"
FRONT_WORDS, SUMMARY_WORDS = 300, 700
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason=WHY_NOT)


# --- A report, without a kernel --------------------------------------------------------------


def executed(settings: dict[str, str]) -> nbformat.NotebookNode:
    """The analysis with its outputs, its cells run in this process."""
    notebook = nbformat.read(PROJECT / "notebooks" / "04_analysis.ipynb", as_version=4)
    outputs: list = []
    names = {"display": lambda *parts: outputs.extend(map(as_output, parts))}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        source = cell.source.replace("from IPython.display import display\n", "")
        exec(source, names)
        names |= settings if "parameters" in cell.metadata.get("tags", ()) else {}
        cell.outputs, outputs[:] = list(outputs), []
    return nbformat.from_dict(clean_notebook(json.loads(nbformat.writes(notebook))))


def as_output(part) -> nbformat.NotebookNode:
    data, metadata = {"text/markdown": getattr(part, "data", "")}, {}
    if isinstance(part, Picture):
        data, metadata = part._repr_mimebundle_()
    return nbformat.v4.new_output("display_data", data=data, metadata=metadata)


def as_in_the_demo(settings: dict) -> None:
    """The demo's controls and a title of its length."""
    settings["title"] = "What SmoothQuant W8A8 costs SmolLM2-135M-Instruct"
    variants = settings["variants"]
    settings["variants"] = {"noquant": {}, "noquant_bf16": {"dtype": "bfloat16"}} | variants
    pairs = [(m, d) for m in settings["models"] for d in ("arc", "squad_v2")]
    settings["statistics"]["primary"] = [
        {"model": m, "dataset": d, "baseline": "noquant", "variant": "smoothquant_w8a8"}
        for m, d in pairs
    ]


VARIANTS = ("noquant", "noquant_bf16", "rtn_w8a8", "smoothquant_w8a8", "static")
LOSSES = {"noquant_bf16": 0.0, "rtn_w8a8": 0.1, "smoothquant_w8a8": 0.02, "static": 1.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of a study with graded scores, analysed and exported."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUDY_OUTPUTS", str(folder / "outputs"))
        for name, rows in graded_makers(VARIANTS, LOSSES, noise=0.02).items():
            patch.setattr(test_report, name, rows)
        study, job = made_up_study(folder, PLAIN, as_in_the_demo)
        assert tuple(job.study.variants) == VARIANTS
        path = job.paths.notebooks / "04_analysis.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(executed({"study": str(study)}), path)
        export_report(path, str(study), root := job.paths.root)
    return root


@pytest.fixture(scope="module")
def page(root):
    return BeautifulSoup((root / "report.html").read_text("utf-8"), "html.parser")


@pytest.fixture(scope="module")
def markdown(root):
    return (root / "report.md").read_text("utf-8")


# --- Its length and its words ----------------------------------------------------------------


def words(markdown: str) -> int:
    """Words that a reader sees: what is folded, links' targets and figures' texts are not."""
    text = re.sub(r"(?s)</summary>.*?</details>", "</summary>", markdown)
    text = re.sub(r"(?m)^!\[.*$|^\| :?---.*$", "", text)
    text = html.unescape(re.sub(r"<[^>]*>", " ", text))
    return sum(any(c.isalnum() for c in word) for word in text.replace("|", " ").split())


def front(markdown: str) -> str:
    """All up to the first figure, which it includes."""
    return markdown[: markdown.index("\n![")]


def summary(markdown: str) -> str:
    """All up to the chapters."""
    return markdown[: markdown.index("\n## 1. ")]


def check_lengths(markdown: str) -> None:
    assert words(front(markdown)) <= FRONT_WORDS
    assert words(summary(markdown)) <= SUMMARY_WORDS


def said_twice(markdown: str, models: str = "base|tuned|finetuned") -> list[str]:
    """Sentences that occur again, whatever their numbers and models; tables say other things."""
    prose = [line for line in markdown.splitlines() if not line.startswith(("|", "!", "#", "<"))]
    text = re.sub(rf"`(?:{models})`|[+−]?\d[\d.,]*", "X", "\n".join(prose))
    sentences = [" ".join(x.split()) for x in re.split(r"(?<=[.:])\s", text)]
    seen = Counter(x for x in sentences if len(x.split()) > 5)
    return [sentence for sentence, times in seen.items() if times > 1]


def test_the_front_and_the_summary_are_short(markdown):
    check_lengths(markdown)


def test_no_sentence_is_said_twice(markdown):
    assert said_twice(markdown) == []


def test_each_model_has_a_card_and_they_stand_in_front(markdown, page):
    lines = front(markdown).splitlines()
    [header] = [line for line in lines if line.startswith("| at a glance")]
    assert [c.strip() for c in header.split("|")[2:-1]] == ["`base`", "`tuned`"]
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")][2:]
    cards = page.find_all("section", class_="card")
    assert [card.h3.get_text() for card in cards] == [
        f"{model} · smoothquant_w8a8" for model in ("base", "tuned")
    ]
    for place, card in enumerate(cards, start=2):
        shown = [(dt.get_text(), dt.find_next("dd").get_text()) for dt in card.find_all("dt")]
        cells = [line.split("|")[place].strip() for line in lines if line.startswith("| ")][2:]
        assert [name for name, _ in shown] == rows
        assert [value for _, value in shown] == [cell.replace("**", "") for cell in cells]


def test_the_question_on_fine_tuning_is_answered_in_front(markdown):
    [line] = [x for x in front(markdown).splitlines() if x.startswith("**Does fine-tuning raise")]
    assert re.match(r"\*\*Does fine-tuning raise the cost\?\*\* (Yes|No)\b", line), line


def test_what_is_folded_is_folded_in_both(markdown, page):
    titles = [x.get_text() for x in page.find_all("summary")]
    in_markdown = re.findall(r"<summary>(.*?)</summary>", markdown)
    assert [re.sub(r"<[^>]*>", "", title) for title in in_markdown] == titles
    folded = ("Scores of every variant", "Controls", "Packages", "Calibration")
    assert set(folded) <= set(titles)
    for name in folded:
        assert page.find("summary", string=name).parent.find("table")
    assert markdown.count("<details>") == markdown.count("</details>")


def test_models_stand_in_neighbouring_rows(page):
    """Of every table of variants, but those that group their rows by model."""
    for first in ("dataset", "variant", "Linear", "graded score"):
        tables = [t for t in page.find_all("table") if t.th.get_text() == first]
        tables = [t for t in tables if "model" in [x.get_text() for x in t.find_all("th")[:3]]]
        for table in tables:
            names = [x.get_text() for x in table.find_all("th")]
            column = names.index("model")
            models = [row.find_all("td")[column].get_text() for row in table.find_all("tr")[1:]]
            if first != "variant" or "perplexity" in names:
                assert models == ["base", "tuned"] * (len(models) // 2), names


# --- Figures and links -----------------------------------------------------------------------


def test_every_figure_says_what_it_shows_with_numbers(markdown, page):
    images = page.find_all("img")
    assert images
    texts = re.findall(r"(?m)^!\[(.*)\]\(report_files/", markdown)
    assert [image["alt"] for image in images] == texts
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert len(text) > 40, text
        assert re.search(r"\d", text), text


def test_the_first_figure_has_a_form_for_phones(page):
    picture = page.find("picture")
    assert picture.find("img") is page.find("img")
    wide, narrow = (
        Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        for address in (picture.img["src"], picture.source["srcset"])
    )
    assert wide.width > wide.height * 0.8
    assert narrow.width < 0.6 * wide.width
    assert narrow.height > wide.height


def links(text: str) -> set[str]:
    targets = re.findall(r"\]\(([^)]+)\)|(?:href|src)=\"([^\"#]+)\"", text)
    return {a or b for a, b in targets if not (a or b).startswith("data:")}


def test_links_lead_somewhere_from_where_they_stand(root, markdown):
    notebook = root / "notebooks" / "04_analysis.ipynb"
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    shown = [o["data"].get("text/markdown", "") for c in cells for o in c.get("outputs", ())]
    places = {
        notebook: "".join(map("".join, shown)),
        root / "report.md": markdown,
        root / "report.html": (root / "report.html").read_text("utf-8"),
    }
    for path, text in places.items():
        assert any(target.endswith("items.html") for target in links(text)), path.name
        for target in links(text):
            assert (path.parent / target).is_file(), (path.name, target)


def test_colours_and_markers_are_told_apart_in_grey():
    """Of six variants: no two share a marker, whatever becomes of their colours."""
    looks = variant_looks([f"v{i}" for i in range(6)]).values()
    assert len({marker for _, marker in looks}) == 6


# --- In a browser ----------------------------------------------------------------------------

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# What sticks out of the page and lies in no box that scrolls.
STICKS_OUT = """[...document.querySelectorAll('main *')].filter(e =>
  !e.closest('.table') && e.getBoundingClientRect().right > innerWidth + 1).length"""
VIOLATIONS = "axe.run().then(r => r.violations.map(v => `${v.id}: ${v.nodes[0].html}`))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = Chromium(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


def look(browser, root, width: int, scheme: str) -> None:
    browser.look(width=width, scheme=scheme)
    browser.open(root / "report.html")
    assert browser.evaluate(OVERFLOW) == 0
    assert browser.evaluate(STICKS_OUT) == 0
    assert browser.evaluate("[...document.images].every(i => i.alt && i.naturalWidth > 0)")


@needs_chromium
def test_a_phone_shows_all_in_its_width(browser, root):
    """With the folded tables opened; the figure at a glance is the one for phones."""
    look(browser, root, 390, "light")
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate(OVERFLOW) == 0
    assert browser.evaluate(STICKS_OUT) == 0
    first = "document.images[0]"
    assert browser.evaluate(f"{first}.currentSrc !== {first}.src")
    assert browser.trouble == []
    assert {address.partition(":")[0] for address in browser.requests} <= {"about", "file", "data"}


@needs_chromium
def test_contents_stay_in_view_on_a_wide_screen(browser, root):
    look(browser, root, 1440, "light")
    assert browser.evaluate("document.images[0].currentSrc === document.images[0].src")
    browser.evaluate("scrollTo(0, 3000)")
    browser.wait("scrollY > 2000")
    top = browser.evaluate("document.querySelector('nav').getBoundingClientRect().top")
    assert 0 <= top < 100
    targets = "[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href').slice(1))"
    assert browser.evaluate(f"{targets}.every(id => document.getElementById(id).tagName === 'H2')")
    lefts = "[...document.querySelectorAll('.card')].map(c => c.getBoundingClientRect().left)"
    left, right = browser.evaluate(lefts)
    assert left < right  # side by side


@pytest.mark.long
@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1440])
def test_axe_finds_nothing_to_complain_of(browser, root, width, scheme):
    look(browser, root, width, scheme)
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.evaluate(f"{AXE.read_text('utf-8')}; 0")
    assert browser.evaluate(VIOLATIONS) == []


@needs_chromium
def test_on_paper_all_is_black_on_white_and_unfolded(browser, root):
    browser.look(width=794, scheme="dark", media="print")
    browser.open(root / "report.html")
    style = "getComputedStyle(document.{}).{}"
    assert browser.evaluate(style.format("body", "backgroundColor")) == "rgb(255, 255, 255)"
    assert browser.evaluate(style.format("querySelector('nav')", "display")) == "none"
    folded = "document.querySelector('details .table').getBoundingClientRect().height"
    assert browser.evaluate(folded) > 20


def test_a_page_needs_no_figure_and_no_card():
    """A study of the float model alone compares nothing."""
    made = report_page("<h2>One & only</h2><p>x</p>", title="a < b", narrow={})
    soup = BeautifulSoup(made, "html.parser")
    assert soup.title.get_text() == "a < b"
    assert soup.nav.a["href"] == f"#{soup.h2['id']}"
    assert not soup.find("section")
