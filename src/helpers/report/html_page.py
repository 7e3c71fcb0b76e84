"""The exported report as one HTML page: contents, cards, figures side by side, tables that scroll.

nbconvert renders the executed notebook to plain HTML. This module puts that into the page
(report.html and report.css beside it): headings get ids and the contents lead to them, the table
"at a glance" becomes a card a model, figures that follow one another stand in one row where the
screen is wide enough, and every table scrolls in a box of its own. Numbers and texts are not
touched. The page has no script and forbids any, because its text comes from models and data sets;
opening it fetches nothing.
"""

import copy
import html
import re
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # every job imports this module's names, and only the export needs the parser
    from bs4 import BeautifulSoup, Tag

FOLDER = Path(__file__).parent
NOTHING_RUNS = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; font-src data:"
NARROW = "application/x-narrow-png"  # of a figure for phones, beside its image/png
AT_A_GLANCE = "at a glance"  # first column of the table that becomes cards
PHONE = "(max-width: 40rem)"  # as in report.css


def report_page(body: str, *, title: str, narrow: dict[str, str]) -> str:
    """The whole page.

    Args:
        body: the notebook as nbconvert renders it, without a page around it.
        title: plain text.
        narrow: data address of a figure to that of the same figure for a phone.
    """
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(body, "html.parser")
    entries = _contents(soup)
    _cards(soup)
    _figures(soup, narrow)
    _scrolling_tables(soup)
    page = Template((FOLDER / "report.html").read_text(encoding="utf-8"))
    return page.substitute(
        policy=NOTHING_RUNS,
        title=html.escape(title),
        style=(FOLDER / "report.css").read_text(encoding="utf-8"),
        contents="\n".join(entries),
        body=str(soup),
    )


def _contents(soup: "BeautifulSoup") -> list[str]:
    """Give every heading an id; returns the entries of the contents, one a chapter."""
    entries, taken = [], set()
    for heading in soup.find_all(re.compile("^h[1-4]$")):
        text = " ".join(heading.get_text().split())
        slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "part"
        name, number = slug, 2
        while name in taken:
            name, number = f"{slug}-{number}", number + 1
        taken.add(name)
        heading["id"] = name
        if heading.name == "h2":
            entries.append(f'<li><a href="#{name}">{html.escape(text)}</a></li>')
    return entries


def _cards(soup: "BeautifulSoup") -> None:
    """Turn each table "at a glance" into a card for each of its columns."""
    for table in soup.find_all("table"):
        if not (all_rows := table.find_all("tr")):
            continue
        head, *rows = all_rows
        subject, *models = head.find_all("th")
        if not subject.get_text().startswith(AT_A_GLANCE):
            continue
        cards = soup.new_tag("div", attrs={"class": "cards"})
        for column, model in enumerate(models, start=1):
            cards.append(_card(soup, subject, model, rows, column))
        table.replace_with(cards)


def _card(
    soup: "BeautifulSoup", subject: "Tag", model: "Tag", rows: "list[Tag]", column: int
) -> "Tag":
    card = soup.new_tag("section", attrs={"class": "card"})
    title = soup.new_tag("h3")
    title.extend([*map(copy.copy, model.contents), " · ", *map(copy.copy, subject.contents[1:])])
    card.append(title)
    pairs = soup.new_tag("dl")
    for row in rows:
        cells = row.find_all("td")
        pair = soup.new_tag("div")
        for name, cell in (("dt", cells[0]), ("dd", cells[column])):
            part = soup.new_tag(name)
            part.extend([*map(copy.copy, cell.contents)])
            pair.append(part)
        pairs.append(pair)
    card.append(pairs)
    return card


def _figures(soup: "BeautifulSoup", narrow: dict[str, str]) -> None:
    """Figures of one cell side by side; one that has a form for phones shows it there."""
    for image in soup.find_all("img"):
        output = image.find_parent("div", class_="output_png")
        if (small := narrow.get(image["src"])) is not None:
            picture = soup.new_tag("picture")
            picture.append(soup.new_tag("source", srcset=small, media=PHONE))
            image.replace_with(picture)
            picture.append(image)
            output["class"] = "wide"
    for area in soup.find_all("div", class_="output_png"):
        outer = area.find_parent("div", class_="output_area")
        if outer.parent is None or outer.parent.get("class") == ["figures"]:
            continue
        row = soup.new_tag("div", attrs={"class": "figures"})
        outer.insert_before(row)
        following = outer
        while following is not None and following.find("div", class_="output_png"):
            after = following.find_next_sibling("div")
            row.append(following.extract())
            following = after


def _scrolling_tables(soup: "BeautifulSoup") -> None:
    """A box around each table, which the keyboard can reach."""
    for number, table in enumerate(soup.find_all("table"), start=1):
        first_row = table.find("tr") or table
        label = " ".join(first_row.get_text(", ", strip=True).split())
        box = {"class": "table", "tabindex": "0", "role": "group"}
        table.wrap(soup.new_tag("div", attrs=box | {"aria-label": f"table {number}: {label}"}))
