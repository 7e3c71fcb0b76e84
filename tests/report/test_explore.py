"""The widgets of notebooks/explore.ipynb show what the records hold, and show it inertly."""

import itertools
import random
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from bs4 import BeautifulSoup

from helpers.core.errors import StudyError
from helpers.report import explore
from helpers.report.pages import marked_differences, page_data
from hostile_text import HOSTILE
from test_items_page import MadeUp

TAGS = {"div", "h4", "p", "b", "pre", "details", "summary", "span", "mark", "del"}
TAGS |= {"table", "tbody", "tr", "th", "td"}
LINEARS = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    return MadeUp(tmp_path_factory.mktemp("explored"), HOSTILE)


@pytest.fixture(scope="module")
def pages(made_up):
    return page_data(made_up.results)


def checked(value: str) -> BeautifulSoup:
    """The parsed HTML of a widget, which has only the elements and attributes it should have."""
    soup = BeautifulSoup(value, "html.parser")
    for element in soup.find_all(True):
        assert element.name in TAGS
        assert set(element.attrs) <= {"class", "style", "title", "colspan"}
    return soup


def shown(text: str) -> str:
    """The text with U+FFFD for each character that acts on a display."""
    acting = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return "".join("\ufffd" if unicodedata.category(c) in acting and c not in "\n\t" else c
                   for c in text)  # fmt: skip


# --- Lost and gained items -----------------------------------------------------------------


def test_items_that_changed_are_those_of_the_predictions(made_up, pages):
    study = made_up.results.study
    for model, variant in itertools.product(study.models, made_up.results.compared):
        flips = explore.differing_items(pages, model, variant)
        listed = {(f["kind"], f["page"]["name"], f["item"]["id"]) for f in flips}
        expected = set()
        for name in study.evaluation.datasets:
            before, after = (made_up.rows[model, name, v] for v in (study.baseline, variant))
            for key in before:
                change = after[key]["score"] - before[key]["score"]
                texts = [
                    (row["output"] or row["parsed"], row["status"])
                    for row in (before[key], after[key])
                ]
                if change:
                    expected.add(("lost" if change < 0 else "gained", name, key))
                elif texts[0] != texts[1]:
                    expected.add(("changed", name, key))
        assert listed == expected
        assert len(flips) == len(listed)


def test_the_table_counts_what_the_verdicts_count(made_up):
    table = explore.flip_table(made_up.results)
    baseline = made_up.results.study.baseline
    for comparison, verdict in made_up.results.verdicts.items():
        if comparison.baseline == baseline and verdict.paired:
            cell = table.loc[(comparison.model, comparison.dataset), comparison.variant]
            assert cell == f"{verdict.paired.losses} / {verdict.paired.gains}"


def test_an_item_shows_its_prompt_and_both_answers_inertly(made_up, pages):
    baseline, variant = made_up.results.study.baseline, made_up.results.compared[0]
    flips = explore.differing_items(pages, "base", variant)
    assert {flip["page"]["name"] for flip in flips} == {"arc", "squad_v2"}
    for flip in flips:
        soup = checked(explore.differing_item_html(flip, baseline=baseline, variant=variant))
        name, key = flip["page"]["name"], flip["item"]["id"]
        assert shown(flip["prompt"]).strip() in soup.find_all("pre")[-1].get_text()
        cards = soup.find("div", class_="two").find_all("div")
        for card, of in zip(cards, (baseline, variant), strict=True):
            row = made_up.rows["base", name, of][key]
            assert card.find("b").get_text() == f"{'✓' if row['score'] else '✗'} {of}"
            if name == "squad_v2" and row["output"]:
                text = card.find("p", class_="text").get_text()
                assert text.split() == shown(row["output"]).split()  # bs4 shortens white space


def test_a_browser_lists_chooses_and_filters(made_up):
    variant = made_up.results.compared[0]
    browser = explore.ItemBrowser(made_up.results, model="base", variant=variant)
    first = browser.item.value
    assert len(browser.items.options) == len(browser.rows) > 2
    browser.items.value = 1
    assert browser.item.value != first
    browser.kind_choice.value, browser.set_choice.value = ("lost",), "squad_v2"
    assert {(f["kind"], f["page"]["name"]) for f in browser.rows} == {("lost", "squad_v2")}
    assert "▼ lost: SQuAD v2" in browser.item.value
    assert not browser.problem.value


def test_a_variant_that_answers_the_same_shows_no_item(made_up, monkeypatch):
    monkeypatch.setattr(explore, "differing_items", lambda *_: [])
    browser = explore.ItemBrowser(made_up.results, model="base", variant="")
    assert (browser.items.value, browser.item.value) == (None, "")
    assert "lost 0 items and gained 0" in browser.counts.value


def words_of(marked: str, tag: str) -> tuple[str, list[str]]:
    """The text of marked HTML, and its words outside the marks."""
    soup = checked(f"<div>{marked}</div>")
    text = soup.get_text()
    for element in soup.find_all(tag):
        element.replace_with(" ")
    return text, soup.get_text().split()


def test_marks_keep_both_texts_and_leave_the_same_words_unmarked():
    draw = random.Random(5)
    for _ in range(300):
        texts = [" ".join(draw.choices(["a", "b", "c,", "<d>"], k=draw.randrange(9))) for _ in "12"]
        (before, kept_before), (after, kept_after) = (
            words_of(marked, tag)
            for marked, tag in zip(marked_differences(*texts), ("del", "mark"), strict=True)
        )
        assert [before, after] == texts
        assert "".join(kept_before) == "".join(kept_after)


def test_only_words_that_differ_are_marked():
    before, after = marked_differences("It is \\boxed{64}.", "It is \\boxed{65}.")
    assert before == "It is \\boxed{<del>64</del>}."
    assert after == "It is \\boxed{<mark>65</mark>}."
    assert marked_differences("the same", "the same") == ("the same", "the same")


def test_two_answers_of_200_kilobytes_are_compared_at_once():
    texts = (f"start {pair * 50_000}end" for pair in ("a b ", "b c "))
    before, after = marked_differences(*texts)
    assert before.startswith("start <del>a</del> <del>b</del>")
    assert after.endswith("<mark>c</mark> end")


# --- Smoothing -----------------------------------------------------------------------------


class TwoChannels:
    """Linears with inputs up to (16, 1) and weights up to (0.25, 1), smoothed by hand."""

    names = property(lambda self: list(LINEARS))
    siblings = staticmethod(lambda name: LINEARS)
    producer = staticmethod(lambda name: "a norm")
    unfoldable_reason = staticmethod(lambda name: None)

    def of(self, model):
        return self

    def smoothing(self, name, *, alpha):
        act, weight = np.array([16.0, 1.0]), np.array([0.25, 1.0])
        s = np.ones(2) if alpha is None else act**alpha / weight ** (1 - alpha)
        maxima = {"act_absmax": act, "act_after": act / s}
        maxima |= {"weight_absmax": weight, "weight_after": weight * s}
        return SimpleNamespace(alpha=alpha, channel=0, scales=s, **maxima)

    def sqnr(self, name, *, alpha, variant):
        return 30.0 if alpha is None else 40 - 10 * abs(alpha - 0.5)


@pytest.fixture
def smoothing(made_up, monkeypatch):
    """A panel over two channels; smoothquant_w8a8 has α = 0.5 there and measured 33 dB."""
    measured = {"without smoothing": {LINEARS[0]: 28.0}, "with smoothing": {LINEARS[0]: 33.0}}
    record = {"sqnr_db": measured, "losses": {"alpha": {"alphas": {LINEARS[0]: 0.5}}}}
    monkeypatch.setattr(explore.SmoothingPanel, "quantization", lambda self: record)
    calibrations = {"base": SimpleNamespace(absmax=dict.fromkeys(LINEARS, np.array([16.0, 1.0])))}
    results = SimpleNamespace(
        study=made_up.results.study,
        models=["base"],
        compared=made_up.results.compared,
        calibrations=calibrations,
    )
    return explore.SmoothingPanel(
        results, TwoChannels(), model="base", variant=made_up.results.compared[0]
    )


def cells(panel) -> list[list[str]]:
    rows = checked(panel.table.value).find_all("tr")[1:]
    return [[cell.get_text() for cell in row.find_all("td")] for row in rows]


def test_the_slider_begins_at_the_variants_alpha_beside_what_was_measured(smoothing):
    assert smoothing.alpha.value == 0.5
    before, after = cells(smoothing)
    assert before == ["16.0", "1.9", "1.00", "1.00", "30.0 dB", "28.0 dB"]
    assert after == ["2.00", "1.3", "2.00", "8.00", "40.0 dB", "33.0 dB"]  # s = √16 / √¼ = 8


def test_moving_the_slider_changes_numbers_and_figure(smoothing):
    figure = smoothing.figure.value
    smoothing.alpha.value = 1.0
    assert cells(smoothing)[1] == ["1.00", "1.0", "4.00", "16.0", "35.0 dB", "–"]
    assert smoothing.figure.value != figure
    assert bytes(smoothing.figure.value).startswith(b"\x89PNG")
    assert not smoothing.problem.value


def test_an_error_takes_the_place_of_the_last_result(smoothing, monkeypatch):
    monkeypatch.setattr(TwoChannels, "sqnr", lambda *_, **__: 1 / 0)
    smoothing.alpha.value = 0.9
    assert "division by zero" in smoothing.problem.value
    assert (smoothing.table.value, smoothing.figure.value) == ("", b"")


# --- A text, token by token ----------------------------------------------------------------


class Reader:
    """Splits a text at spaces; the KL goes up and down, the last is not a number."""

    def read(self, text, *, model, variant):
        if not text.strip():
            raise StudyError("the text has 0 tokens; <b>give</b> more")
        pieces = text.split(" ")
        kls = [None, *(10.0 ** (k * 3 % 4 - 3) for k in range(1, len(pieces) - 1)), float("nan")]
        tops = tuple((piece, 0.1) for piece in (pieces * 5)[:5])
        return [
            SimpleNamespace(text=piece, kl=kl, float_top=tops, variant_top=tops[::-1])
            for piece, kl in zip(pieces, kls, strict=False)
        ]


@pytest.fixture
def text(made_up):
    return explore.TextPanel(
        made_up.results, Reader(), model="base", variant=made_up.results.compared[0], text="a b c"
    )


def test_every_token_is_shown_as_text_with_its_colour_and_both_top_fives(text):
    text.text.value = "\n".join(HOSTILE)
    text.button.click()
    rows = Reader().read(text.text.value, model="base", variant="")
    spans = checked(text.tokens.value).find("div", class_="tokens").find_all("span")
    assert [s.get_text().replace("↵", "") for s in spans] == [shown(row.text) for row in rows]
    assert "style" not in spans[0].attrs
    assert all("rgba" in span["style"] for span in spans[1:])
    assert len(spans[1]["title"].split("\n")) == 2 + 5
    for option in text.token.options:
        text.token.value = option[1]
        assert len(checked(text.tops.value).find_all("td")) == 20
    assert not text.problem.value


def test_tokens_are_offered_by_their_kl_what_is_no_number_first(text):
    text.text.value = "first k1 k2 k3 last"
    text.button.click()
    assert [place for _, place in text.token.options] == [4, 1, 2, 3]


def test_a_larger_kl_has_a_deeper_colour():
    values = [0.0, 1e-5, 1e-3, 1e-2, 0.1, 1.0, 50.0, float("inf")]
    depths = [explore.opacity(value) for value in values]
    assert depths == sorted(depths)
    assert depths[0] == 0 < depths[3] < depths[5] == depths[-1] < 1
    assert explore.opacity(float("nan")) == depths[-1]


def test_a_text_that_cannot_be_read_says_why_inertly(text):
    assert text.tokens.value
    text.text.value = " "
    text.button.click()
    assert checked(text.problem.value).get_text() == "the text has 0 tokens; <b>give</b> more"
    assert text.tokens.value == text.tops.value == text.summary.value == ""
    text.text.value = "a b c"
    text.button.click()
    assert text.tokens.value
    assert not text.problem.value


def test_the_first_text_fails_the_notebook_if_it_cannot_be_read(made_up):
    with pytest.raises(StudyError):
        explore.TextPanel(made_up.results, Reader(), model="base", variant="", text="")
