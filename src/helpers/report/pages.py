"""Pages that open in a browser: report.html, and items.html with every answer to search.

report.html: nbconvert renders the executed notebook to plain HTML. This module puts that into the
page (report.html and report.css beside it): headings get ids and the contents lead to them, the
table "at a glance" becomes a card a model, figures that follow one another stand in one row where
the screen is wide enough, and every table scrolls in a box of its own. Numbers and texts are not
touched. The page has no script and forbids any, because its text comes from models and data sets;
opening it fetches nothing.

items.html: every item with its prompt and all answers side by side, to search and filter. One file
that needs no network. Its only script is items.js beside this module; the page's policy allows it
by its hash and nothing else. Texts of models and data sets lie in the page as JSON, in a block that
no browser runs, and the script shows them as text. Characters that act on a display are replaced
beforehand, as everywhere in the report. The same records make the same bytes.
"""

import base64
import copy
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import takewhile
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from helpers.core.errors import one_line, printable
from helpers.core.files import write_atomically

if TYPE_CHECKING:  # every job imports a name of this module, and is to wait for none of these
    from bs4 import BeautifulSoup, Tag

    from helpers.report.results import Results

FOLDER = Path(__file__).parent

NOTHING_RUNS = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; font-src data:"
NARROW = "application/x-narrow-png"  # of a figure for phones, beside its image/png
AT_A_GLANCE = "at a glance"  # first column of the table that becomes cards
PHONE = "(max-width: 40rem)"  # as in report.css

PAGE = "items.html"
POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; base-uri 'none'; "
    "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
# Inside a script element `<` could end it, and old parsers end lines at U+2028 and U+2029.
_IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}

DIFFERENCES = {"lost": "▼ lost", "gained": "▲ gained", "changed": "≠ changed"}
# A word, a number or one other character, with the space before it.
WORD = re.compile(r"\s*(?:[^\W_]+(?:[.,'’-][^\W_]+)*|\S)|\s+$")
MOST_PAIRS = 4_000_000  # of words that are compared with one another
LABEL_LENGTH = 110  # characters of an item in the list


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


def seen_from_notebook(partial: str) -> str:
    """The page's address in the executed analysis, which lies in the folder `notebooks`.

    Args:
        partial: `yes` for a partial report, whose notebook lies beside its page.
    """
    return PAGE if partial == "yes" else f"../{PAGE}"


def write_items_page(results: "Results", folder: Path) -> None:
    """Write items.html beside the report."""
    page = items_page(results)
    write_atomically(folder / PAGE, lambda path: path.write_text(page, encoding="utf-8"))


def items_page(results: "Results") -> str:
    """The whole page: template, style, data and script."""
    style, script = (_file(name) for name in ("items.css", "items.js"))
    policy = POLICY.format(script=_allowed(script), style=_allowed(style))
    return Template(_file(PAGE)).substitute(
        policy=policy,
        title=html.escape(one_line(results.study.title)),
        style=style,
        data=json_block(page_data(results)),
        script=script,
    )


def _file(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _allowed(content: str) -> str:
    """A source expression of a Content-Security-Policy that allows exactly this content."""
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def json_block(data: dict) -> str:
    """JSON that can stand in a script element: nothing in it ends the element."""
    text = json.dumps(_visible(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_IN_SCRIPT)


def _visible(value):
    """The data with every text made safe to show; line ends and tabs stay."""
    match value:
        case str():
            return printable(value, keep="\n\t")
        case list():
            return [_visible(part) for part in value]
        case dict():
            return {_visible(key): _visible(part) for key, part in value.items()}
    return value


def page_data(results: "Results") -> dict:
    """Everything that the page shows. Of each item and model, equal answers stand once."""
    return {
        "baseline": results.study.baseline,
        "models": results.models,
        "variants": results.variants,
        "sets": [_set(results, name) for name in results.study.evaluation.datasets],
    }


def _set(results: "Results", dataset: str) -> dict:
    """One evaluation set: what its prompts have in common, its invalid variants, its items."""
    from helpers.report.markdown import dataset_name

    texts = [
        row["prompt"]
        for model in results.models
        for row in results.prompts[model, dataset].values()
    ]
    opening = _shared_lines(texts)
    rows = {
        model: [{p["id"]: p for p in e.predictions[dataset]} for e in results.variants_of(model)]
        for model in results.models
    }
    order = list(rows[results.models[0]][0])
    return {
        "name": dataset,
        "label": dataset_name(dataset),
        "opening": opening,
        "invalid": _invalid(results, dataset),
        "items": [_item(results, dataset, item, rows, len(opening)) for item in order],
    }


def _shared_lines(texts: list[str]) -> str:
    """The whole lines that all texts begin with."""
    columns = zip(*(text.split("\n")[:-1] for text in texts), strict=False)
    shared = takewhile(lambda lines: len(set(lines)) == 1, columns)
    return "".join(f"{lines[0]}\n" for lines in shared)


def _invalid(results: "Results", dataset: str) -> dict[str, dict[str, str]]:
    """The failed check that invalidates a variant on this set, by model and variant."""
    return {
        model: {
            e.variant: p for e in results.variants_of(model) if (p := e.failed_check_on(dataset))
        }
        for model in results.models
    }


def _item(results: "Results", dataset: str, item: str, rows: dict, shared: int) -> dict:
    """One item.

    Args:
        rows: by model, the predictions of every variant by item id, the baseline's first.
        shared: characters of the prompt that all items of the set have in common.
    """
    prompt_record = results.prompts[results.models[0], dataset].get(item, {})
    shown = {"id": item, "golds": rows[results.models[0]][0][item]["golds"]}
    if prompt_record:
        prompts = [
            results.prompts[m, dataset].get(item, prompt_record)["prompt"][shared:]
            for m in results.models
        ]
        same = len(set(prompts)) == 1
        shown |= {
            "question": prompt_record["question"],
            "prompts": prompts[:1] if same else prompts,
        }
    if prompt_record.get("continuations"):
        shown["options"] = [
            list(option)
            for option in zip(_labels(prompt_record), prompt_record["options"], strict=True)
        ]
    ask = results.study.evaluation.datasets[dataset].ask
    normalize = getattr(ask, "normalize", None)
    shown["answers"] = [
        _distinct([_answer(by_id[item], prompt_record, normalize) for by_id in rows[model]])
        for model in results.models
    ]
    return shown


def _labels(prompt_record: dict) -> list[str]:
    """The options' labels; a given target and its foil have names instead."""
    names = ["target", "foil"][: len(prompt_record["options"])]
    return prompt_record["labels"] or names


def _answer(prediction: dict, prompt_record: dict, normalize: str | None) -> dict:
    """What the page shows of one prediction; what is as usual is left out."""
    from helpers.statistics.graded import option_probabilities

    shown = {"parsed": prediction["parsed"], "score": _short(prediction["score"])}
    if prediction["output"] != prediction["parsed"]:
        shown["output"] = prediction["output"]
    if prediction["status"] != "answered":
        shown["status"] = prediction["status"]
    if prediction["finish_reason"] in ("length", "nonfinite"):
        shown["end"] = prediction["finish_reason"]
    if prediction.get("f1", prediction["score"]) != prediction["score"]:
        shown["f1"] = round(prediction["f1"], 3)
    continuations = prompt_record.get("continuations")
    if continuations and all(map(math.isfinite, prediction.get("logprobs", [math.nan]))):
        sizes = [len(text.strip().encode("utf-8")) for text in continuations]
        lengths = sizes if normalize == "bytes" else None
        shares = option_probabilities(prediction["logprobs"], lengths)
        shown["shares"] = [round(share, 3) for share in shares.tolist()]
    return shown


def _short(score: float) -> float:
    return int(score) if score == int(score) else round(score, 3)


def _distinct(answers: list[dict]) -> dict:
    """The answers of all variants, each different one once, and which of them a variant gave."""
    different: list[dict] = []
    for answer in answers:
        if answer not in different:
            different.append(answer)
    return {"different": different, "of": [different.index(answer) for answer in answers]}


def inert(text: str, *, keep: str = "\n\t") -> str:
    """A text as HTML that shows it; characters that act on a display are replaced."""
    return html.escape(printable(text, keep=keep))


def differing_items(pages: dict, model: str, variant: str) -> list[dict]:
    """The items that a variant answers otherwise than the baseline.

    Args:
        pages: `page_data` of a study.

    Returns:
        `kind` (lost or gained by a lower or higher score, changed if only the answer differs),
        `page` (the item's set), `item`, `answers` (the baseline's, the variant's), `prompt` (the
        item's own part of it; None if none is on record), `invalid` (the failed check, or None).
    """
    m, v = pages["models"].index(model), pages["variants"].index(variant)
    differing = []
    for page in pages["sets"]:
        for item in page["items"]:
            different, of = item["answers"][m]["different"], item["answers"][m]["of"]
            answers = different[of[0]], different[of[v]]
            if kind := difference(*answers):
                prompts = item.get("prompts") or [None]
                row = {"kind": kind, "page": page, "item": item, "answers": answers}
                row |= {"prompt": prompts[m if len(prompts) > 1 else 0]}
                differing.append(row | {"invalid": page["invalid"][model].get(variant)})
    return differing


def difference(before: dict, after: dict) -> str | None:
    """lost, gained or changed; None for the same answer with the same score."""
    if before["score"] != after["score"]:
        return "lost" if after["score"] < before["score"] else "gained"
    same = answer_text(before) == answer_text(after) and before.get("status") == after.get("status")
    return None if same else "changed"


def item_label(row: dict) -> str:
    """One line on a differing item, for the list."""
    text = one_line(row["item"].get("question") or row["item"]["id"])
    text = text if len(text) <= LABEL_LENGTH else f"{text[:LABEL_LENGTH]}…"
    return f"{DIFFERENCES[row['kind']]}   {one_line(row['page']['label'])}   {text}"


def differing_item_html(row: dict, *, baseline: str, variant: str) -> str:
    """A differing item: prompt, right answer, both answers with the words that differ marked."""
    item, page = row["item"], row["page"]
    options = dict(item.get("options", []))
    parts = [
        f"<h4>{DIFFERENCES[row['kind']]}: {inert(page['label'])}, item {inert(item['id'])}</h4>"
    ]
    if row["invalid"]:
        reason = f"{variant} is invalid on this set: {row['invalid']}"
        parts.append(f'<p class="problem">{inert(reason)}</p>')
    if page["opening"] and row["prompt"] is not None:
        summary = "<summary>Beginning of the prompt, the same for all items of the set</summary>"
        parts.append(f"<details>{summary}<pre>{inert(page['opening'])}</pre></details>")
    prompt = "No prompt is on record." if row["prompt"] is None else row["prompt"]
    parts.append(f"<pre>{inert(prompt)}</pre>")
    golds = "; ".join(with_option_text(gold, options) for gold in item["golds"])
    parts.append(f"<p>Right answer: <b>{inert(golds or 'none, the passage does not say')}</b></p>")
    texts = [with_option_text(answer_text(answer), options) for answer in row["answers"]]
    marked = marked_differences(*texts)
    cards = zip((baseline, variant), row["answers"], marked, strict=True)
    parts.append(f'<div class="two">{"".join(answer_card(*card) for card in cards)}</div>')
    parts.append(option_table(item, row["answers"], (baseline, variant)))
    return f'<div class="explore">{"".join(parts)}</div>'


def answer_text(answer: dict) -> str:
    """The answer as written, or the chosen option."""
    return answer.get("output", answer["parsed"]) or ""


def with_option_text(answer: str, options: dict[str, str]) -> str:
    """`B: its text` for an option's label; any other answer unchanged."""
    text = options.get(answer, answer)
    return answer if text == answer else f"{answer}: {text}"


def answer_card(name: str, answer: dict, marked: str) -> str:
    """One variant's answer, its score, and how it was read."""
    notes = []
    if answer.get("status") == "unparsed":
        notes.append("no answer could be read")
    if answer.get("status") == "abstained":
        notes.append("read as: there is no answer")
    if "output" in answer and answer["parsed"] is not None:
        notes.append(f"read as: {answer['parsed']}")
    if answer.get("end") == "length":
        notes.append("cut off at the longest length")
    if answer.get("end") == "nonfinite":
        notes.append("ended by a number that is not finite")
    if "f1" in answer:
        notes.append(f"F1 {answer['f1']:.2f}")
    mark = "✓" if answer["score"] > 0 else "✗"
    text = marked or '<span class="note">(empty)</span>'
    return (
        f'<div><b>{mark} {inert(name)}</b><p class="text">{text}</p>'
        f'<p class="note">{inert(" · ".join(notes))}</p></div>'
    )


def option_table(item: dict, answers: Sequence[dict], names: Sequence[str]) -> str:
    """Probability of every option by both; empty where options were not scored."""
    if not item.get("options") or not all("shares" in answer for answer in answers):
        return ""
    head = "".join(f"<th>{inert(name)}</th>" for name in names)
    rows = [
        f"<tr><td>{inert(with_option_text(label, {label: text}))}</td>"
        + "".join(f'<td class="number">{100 * a["shares"][place]:.1f} %</td>' for a in answers)
        + "</tr>"
        for place, (label, text) in enumerate(item["options"])
    ]
    return f"<table><tr><th>probability of the option</th>{head}</tr>{''.join(rows)}</table>"


def marked_differences(before: str, after: str) -> tuple[str, str]:
    """Both texts as HTML: words only in the first are in <del>, only in the second in <mark>."""
    words = [[match[0] for match in WORD.finditer(text)] for text in (before, after)]
    kept = common_places(*([word.strip() for word in text] for text in words))
    return tuple(
        "".join(
            inert(word) if place in places else marked_word(word, tag)
            for place, word in enumerate(text)
        )
        for text, places, tag in zip(words, kept, ("del", "mark"), strict=True)
    )


def marked_word(word: str, tag: str) -> str:
    """A word in an element; the space before it stays outside."""
    bare = word.lstrip()
    space = inert(word[: len(word) - len(bare)])
    return f"{space}<{tag}>{inert(bare)}</{tag}>" if bare else space


def common_places(before: list[str], after: list[str]) -> tuple[set[int], set[int]]:
    """Places of the words that both lists have, in one order.

    Beyond what they begin and end with, lists with too many pairs of words are not compared.
    """
    shortest = min(len(before), len(after))
    start = sum(1 for _ in takewhile(lambda i: before[i] == after[i], range(shortest)))
    end = sum(1 for _ in takewhile(lambda i: before[~i] == after[~i], range(shortest - start)))
    places = [{*range(start), *range(len(words) - end, len(words))} for words in (before, after)]
    middles = [words[start : len(words) - end] for words in (before, after)]
    if len(middles[0]) * len(middles[1]) <= MOST_PAIRS:
        matcher = SequenceMatcher(None, *middles, autojunk=False)
        for block in matcher.get_matching_blocks():
            for place, first in zip(places, (block.a, block.b), strict=True):
                place.update(range(start + first, start + first + block.size))
    return places[0], places[1]
