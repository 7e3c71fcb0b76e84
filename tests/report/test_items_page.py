"""items.html holds what the predictions hold, acts on nothing they say, and is good to use."""

import base64
import copy
import hashlib
import html
import itertools
import json
import math
import random
import re
import unicodedata

import pytest
from bs4 import BeautifulSoup

import test_report
from chromium import CHROMIUM, WHY_NOT, Chromium
from helpers.core.records import write_jsonl
from helpers.evaluation.predictions import prompt_digest
from helpers.report.pages import PAGE, items_page, write_items_page
from helpers.report.results import load_results
from helpers.study import stages
from hostile_text import HOSTILE, PLAIN
from made_up_study import answers, made_up_study

VERDICTS = ("lost", "gained", "right", "wrong", "changed")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason=WHY_NOT)


class MadeUp:
    """The page of a made-up study, and the records that it was made from."""

    def __init__(self, folder, texts):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STUDY_OUTPUTS", str(folder / "outputs"))
            makers = answers(texts)
            patch.setattr(test_report, "squad_rows", makers["squad_rows"])
            patch.setattr(test_report, "arc_rows", with_logprobs(makers["arc_rows"]))
            _, self.job = made_up_study(folder, texts)
            self.arc_prompts = put_arc_prompts(self.job, texts)
            self.results = load_results(self.job)
            self.rows = read_predictions(self.job)
        self.path = folder / PAGE
        write_items_page(self.results, folder)
        self.text = self.path.read_text("utf-8")
        self.soup = BeautifulSoup(self.text, "html.parser")
        self.data = json.loads(self.soup.find("script", id="data").string)


def with_logprobs(arc_rows):
    """Rows of a scored set: log-probabilities of options; the chosen one has the most a byte."""

    def rows(rng, accuracy):
        found = arc_rows(rng, accuracy)
        for row in found:
            sums = -rng.uniform(5, 9, 4)
            sums["ABCD".index(row["parsed"])] = -rng.uniform(1, 2)
            sums[1] *= 2  # its text is twice as long
            row["logprobs"] = [round(float(s), 6) for s in sums]
        return found

    return rows


def put_arc_prompts(job, texts) -> dict[str, dict]:
    """Questions of the scored set; the second option is twice as long as the others."""
    path = job.paths.evaluation("base", job.study.baseline) / "predictions" / "arc.jsonl"
    rows = []
    for i, line in enumerate(path.read_text("utf-8").split("\n")[:-1]):
        text = texts[i % len(texts)]
        options = [f"{text} {letter}" * (1 + (letter == "b")) for letter in "abcd"]
        row = {"id": json.loads(line)["id"], "question": f"which {i}: {text}", "passage": ""}
        row |= {"options": options, "labels": list("ABCD"), "prompt": f"Question: {text}\nAnswer:"}
        row["continuations"] = [f" {option}" for option in options]
        row["prompt_hash"] = prompt_digest(row["prompt"], row["continuations"])
        rows.append(row)
    for model in job.study.models:
        write_jsonl(job.paths.evaluation(model, job.study.baseline) / "prompts/arc.jsonl", rows)
    return {row["id"]: row for row in rows}


def read_predictions(job) -> dict[tuple[str, str, str], dict[str, dict]]:
    """Predictions by item id, by (model, dataset, variant), as they lie on disk."""
    found = {}
    for at in itertools.product(job.study.models, ("arc", "squad_v2"), job.study.variants):
        model, dataset, variant = at
        path = job.paths.evaluation(model, variant) / "predictions" / f"{dataset}.jsonl"
        lines = map(json.loads, path.read_bytes().split(b"\n")[:-1])
        found[at] = {row["id"]: row for row in lines}
    return found


def inert(text: str) -> str:
    """The text with every character replaced that acts on a display."""
    acting = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    kept = (c if unicodedata.category(c) not in acting or c in "\n\t" else "\ufffd" for c in text)
    return "".join(kept)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return MadeUp(tmp_path_factory.mktemp("hostile"), HOSTILE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return MadeUp(tmp_path_factory.mktemp("plain"), PLAIN)


@pytest.fixture(params=["hostile", "plain"])
def made_up(request):
    return request.getfixturevalue(request.param)


# --- The file ------------------------------------------------------------------------------


def sources(policy: str) -> dict[str, list[str]]:
    """The policy's source lists by directive."""
    parts = (part.split() for part in policy.split(";"))
    return {name: values for name, *values in parts}


def test_the_policy_allows_the_script_and_the_style_by_their_hashes_and_nothing_else(made_up):
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', made_up.text)
    allowed = sources(policy)
    for element, directive in (("script", "script-src"), ("style", "style-src")):
        [content] = re.findall(rf"<{element}>(.*?)</{element}>", made_up.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert allowed.pop(directive) == [f"'sha256-{digest}'"]
    assert allowed.pop("require-trusted-types-for") == ["'script'"]
    assert set(allowed) == {"default-src", "base-uri", "form-action", "trusted-types"}
    assert all(values == ["'none'"] for values in allowed.values())


def test_the_policy_stands_before_all_that_it_governs(made_up):
    before = made_up.text[: made_up.text.index("Content-Security-Policy")]
    elements = BeautifulSoup(before, "html.parser").find_all(True)
    assert {e.name for e in elements} <= {"html", "head", "meta"}


def test_the_file_has_one_script_and_asks_for_nothing(made_up):
    scripts = made_up.soup.find_all("script")
    assert [s.get("type") for s in scripts] == ["application/json", None]
    assert not made_up.soup.find_all(["iframe", "object", "embed", "form", "base", "link", "img"])
    for element in made_up.soup.find_all(True):
        assert not [name for name in element.attrs if name.startswith("on")], element.name
        assert "src" not in element.attrs
        assert element.attrs.get("href", "report.html") == "report.html"


def test_two_pages_differ_in_their_title_and_data_alone(hostile, plain):
    """So texts add nothing to the page that a browser reads as its structure."""
    shells = []
    for page in (hostile, plain):
        shell = re.sub(r'(?<=type="application/json">).*?(?=</script>)', "", page.text)
        title = html.escape(inert(" ".join(page.results.study.title.split())))
        assert shell.count(title) == 2
        shells.append(shell.replace(title, ""))
    assert shells[0] == shells[1]


def test_nothing_in_the_data_block_can_end_it(hostile):
    block = re.search(r'type="application/json">(.*?)</script>', hostile.text)[1]
    assert json.loads(block) == hostile.data
    assert not set("<>&\u2028\u2029") & set(block)
    assert "</script>" in json.dumps(hostile.data)


def test_the_same_records_make_the_same_bytes(made_up):
    assert items_page(load_results(made_up.job)) == made_up.text


@pytest.fixture(autouse=True)
def outputs(request, monkeypatch):
    """A made-up study's records lie in its own folder."""
    if "made_up" in request.fixturenames:
        folder = request.getfixturevalue("made_up").path.parent
        monkeypatch.setenv("STUDY_OUTPUTS", str(folder / "outputs"))


def test_the_data_are_the_predictions_on_disk(made_up):
    """Each answer of each variant, put together again from what the page keeps once."""
    data, compared = made_up.data, 0
    assert data["variants"][0] == data["baseline"] == "noquant"
    for (model, dataset, variant), rows in made_up.rows.items():
        [items] = [s["items"] for s in data["sets"] if s["name"] == dataset]
        assert [item["id"] for item in items] == [inert(key) for key in rows]
        for item, row in zip(items, rows.values(), strict=True):
            kept = item["answers"][data["models"].index(model)]
            answer = kept["different"][kept["of"][data["variants"].index(variant)]]
            parsed = row["parsed"] if row["parsed"] is None else inert(row["parsed"])
            assert answer["parsed"] == parsed
            assert answer.get("output", parsed) == inert(row["output"])
            assert answer.get("status", "answered") == row["status"]
            assert answer["score"] == row["score"]
            assert answer.get("f1", row["score"]) == row.get("f1", row["score"])
            assert item["golds"] == [inert(gold) for gold in row["golds"]]
            compared += 1
    assert compared == len(data["models"]) * len(data["variants"]) * (80 + 60)


def test_prompts_are_what_was_asked(made_up):
    """The beginning that all items of a set share is kept once."""
    for dataset in made_up.data["sets"]:
        path = made_up.job.paths.evaluation("tuned", "noquant") / f"prompts/{dataset['name']}.jsonl"
        asked = list(map(json.loads, path.read_bytes().split(b"\n")[:-1]))
        for item, row in zip(dataset["items"], asked, strict=True):
            assert dataset["opening"] + item["prompts"][-1] == inert(row["prompt"])
            assert item["question"] == inert(row["question"])


def test_shares_are_the_probabilities_among_the_options(made_up):
    """Held to a softmax of nats a byte, the form of the choice, in options of the mean length."""
    [arc] = [s for s in made_up.data["sets"] if s["name"] == "arc"]
    for item, (key, row) in zip(arc["items"], made_up.arc_prompts.items(), strict=True):
        lengths = [len(option.strip().encode()) for option in row["options"]]
        for variant, answer in enumerate(item["answers"][0]["of"]):
            shown = item["answers"][0]["different"][answer]["shares"]
            prediction = made_up.rows["base", "arc", made_up.data["variants"][variant]][key]
            rates = [s / n for s, n in zip(prediction["logprobs"], lengths, strict=True)]
            odds = [math.exp(math.fsum(lengths) / 4 * rate) for rate in rates]
            assert shown == pytest.approx([x / math.fsum(odds) for x in odds], abs=5.1e-4)


def test_answers_that_are_equal_stand_once(plain):
    squad = plain.data["sets"][1]["items"]
    kept = [answers["different"] for item in squad for answers in item["answers"]]
    assert all(len({json.dumps(a) for a in different}) == len(different) for different in kept)
    assert sum(map(len, kept)) < 60 * len(plain.data["models"]) * len(plain.data["variants"])


def test_older_records_without_prompts_make_a_page(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_OUTPUTS", str(tmp_path / "outputs"))
    _, job = made_up_study(tmp_path, PLAIN)
    for path in job.paths.root.rglob("prompts/*.jsonl"):
        path.unlink()
    data = re.search(r'type="application/json">(.*?)</script>', items_page(load_results(job)))[1]
    for dataset in json.loads(data)["sets"]:
        assert not any({"question", "prompts", "options"} & set(i) for i in dataset["items"])


def test_the_analysis_is_repeated_when_a_part_of_the_page_changes(plain):
    study = plain.job.study
    analysis = {path.name for path in stages.source_files(study, stages.Run("analysis"))}
    assert {"pages.py", "items.html", "items.css", "items.js"} <= analysis
    evaluation = stages.source_files(study, stages.Run("evaluation", "base", "noquant"))
    assert "pages.py" not in {path.name for path in evaluation}
    assert not {path.name for path in evaluation if path.name.startswith("items")} - {"items.py"}


# --- In a browser --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Chromium(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def open_page(browser):
    """Open a page at a width; the browser then has heard of nothing before it."""

    def opened(path, fragment: str = "", *, width: int = 1280, **look) -> Chromium:
        browser.look(width=width, **look)
        browser.trouble.clear()
        browser.requests.clear()
        browser.open(path, fragment)
        return browser

    return opened


ELEMENTS = """[...document.querySelectorAll('*')].map(e =>
  [e.localName, ...[...e.attributes].map(a => a.name)].join(' '))"""


def opened_whole(browser) -> None:
    """Every item unfolded, with its prompt and right answer."""
    while browser.evaluate("!document.getElementById('more').hidden"):
        browser.click("#more")
    browser.click("#open-all")
    browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")


@needs_chromium
@pytest.mark.parametrize("policy", [True, False], ids=["with its policy", "by its script alone"])
def test_hostile_texts_are_shown_and_do_nothing(hostile, plain, open_page, tmp_path, policy):
    """No element, attribute, request or dialog more than with plain texts."""
    kinds = []
    for page in (plain, hostile):
        text = page.text if policy else re.sub(r"<meta http-equiv[^>]*>", "", page.text)
        path = tmp_path / PAGE
        path.write_text(text, "utf-8")
        browser = open_page(path)
        title = browser.evaluate("document.title")
        opened_whole(browser)
        kinds.append(set(browser.evaluate(ELEMENTS)) - {"mark", "del"})
        assert browser.evaluate("document.querySelectorAll('#items > li').length") == 140
        assert browser.evaluate("document.title") == title
        assert browser.trouble == []
        assert browser.requests == [path.as_uri()]
        assert browser.evaluate("document.querySelectorAll('a').length") == 1
    assert kinds[0] == kinds[1]
    assert title.startswith("Items: A study <script>")
    assert HOSTILE[0] in browser.evaluate("document.body.innerText")


@needs_chromium
@pytest.mark.parametrize(
    "put_in",
    [
        "<script>document.title = 'owned'</script>",
        '<img src="x" onerror="document.title = \'owned\'">',
        '<button id="it" onclick="document.title = \'owned\'">it</button>',
        "<iframe srcdoc=\"<script>parent.document.title = 'owned'</script>\"></iframe>",
        '<img src="http://127.0.0.1:9/x.png">',
        "<style>* { display: none }</style>",
    ],
)
def test_the_policy_holds_against_what_is_put_into_the_file(plain, open_page, tmp_path, put_in):
    path = tmp_path / PAGE
    path.write_text(plain.text.replace("<main>", f"<main>{put_in}", 1), "utf-8")
    browser = open_page(path)
    if "id=" in put_in:
        browser.click("#it")
    assert browser.evaluate("document.title").startswith("Items:")
    assert any("Content Security Policy" in text for text in browser.trouble)
    assert browser.evaluate("getComputedStyle(document.getElementById('items')).display") != "none"
    assert browser.evaluate("document.querySelectorAll('#items > li').length") == 140


@needs_chromium
def test_another_script_than_the_projects_does_not_run(plain, open_page, tmp_path):
    path = tmp_path / PAGE
    path.write_text(plain.text.replace('"use strict";', '"use strict"; ', 1), "utf-8")
    browser = open_page(path)
    assert browser.evaluate("document.querySelectorAll('#items > li').length") == 0
    assert any("Content Security Policy" in text for text in browser.trouble)


@needs_chromium
def test_no_text_can_become_markup_in_it(plain, open_page):
    """The policy has the browser refuse to parse a text into elements, whoever asks."""
    browser = open_page(plain.path)
    with pytest.raises(RuntimeError, match="TrustedHTML"):
        browser.evaluate("document.body.innerHTML = '<b>x</b>'")


def verdicts_of(before: dict, after: dict) -> set[str]:
    """Of one answer beside the baseline's."""
    change = after["score"] - before["score"]
    same = "right" if after["score"] else "wrong"
    found = {"gained" if change > 0 else "lost" if change < 0 else same}
    if (before["status"], before["parsed"]) != (after["status"], after["parsed"]):
        found.add("changed")
    return found


def fitting(page: MadeUp, dataset: str, model: str, variant: str) -> dict[str, set]:
    """The items with each verdict in any chosen model and variant, counted from the files."""
    found = {verdict: set() for verdict in VERDICTS}
    for (m, d, v), rows in page.rows.items():
        chosen = (dataset in ("", d), model in ("", m), variant in ("", v), v != "noquant")
        for key, row in rows.items() if all(chosen) else ():
            for verdict in verdicts_of(page.rows[m, d, "noquant"][key], row):
                found[verdict].add((d, key))
    return found


@needs_chromium
def test_filters_show_the_items_that_the_files_name(plain, open_page):
    browser = open_page(plain.path)
    for choice in itertools.product(
        ("", "arc", "squad_v2"), ("", "base", "tuned"), ("", "rtn_w8a8", "static")
    ):
        for name, value in zip(("set", "model", "variant"), choice, strict=True):
            choose(browser, name, value)
        named = fitting(plain, *choice)
        for verdict in VERDICTS:
            browser.evaluate(f"document.querySelector('input[value={verdict}]').click()")
            number = browser.evaluate(f"document.querySelector('[data-of={verdict}]').textContent")
            assert int(number) == len(named[verdict]), (choice, verdict)
            status = browser.evaluate("document.getElementById('count').textContent")
            assert status == f"{len(named[verdict])} of 140 items"
            assert shown_items(browser) == named[verdict], (choice, verdict)


def choose(browser, name: str, value: str) -> None:
    """Choose an option as a user does: the page hears of it by an event."""
    browser.evaluate(
        f"(e => {{ e.value = '{value}'; e.dispatchEvent(new Event('input', {{bubbles: true}})) }})"
        f"(document.getElementById('{name}'))"
    )


def shown_items(browser) -> set[tuple[str, str]]:
    pairs = browser.evaluate("shown.entries.map(e => [e.set.name, e.item.id])")
    return set(map(tuple, pairs))


def with_data(page: MadeUp, path, data: dict):
    """The page with other data, which its policy does not bind."""
    block = json.dumps(data).replace("<", "\\u003c")
    kept = r'(?<=type="application/json">).*?(?=</script>)'
    path.write_text(re.sub(kept, lambda _: block, page.text), "utf-8")
    return path


@needs_chromium
def test_a_study_of_the_baseline_alone_has_no_verdicts_to_filter_by(plain, open_page, tmp_path):
    data = copy.deepcopy(plain.data) | {"variants": ["noquant"]}
    for of_model in (a for s in data["sets"] for item in s["items"] for a in item["answers"]):
        of_model["of"] = of_model["of"][:1]
    browser = open_page(with_data(plain, tmp_path / PAGE, data))
    opened_whole(browser)
    assert browser.evaluate("document.getElementById('verdicts').hidden")
    assert browser.evaluate("document.querySelectorAll('#items > li').length") == 140
    assert browser.trouble == []


@needs_chromium
def test_long_lists_are_shown_in_parts_and_read_to_their_end(plain, open_page, tmp_path):
    data = copy.deepcopy(plain.data)
    for dataset in data["sets"]:
        many = [item | {"id": f"{item['id']} {n}"} for n in range(3) for item in dataset["items"]]
        dataset["items"] = many
    browser = open_page(with_data(plain, tmp_path / PAGE, data))
    lines = "document.querySelectorAll('#items > li').length"
    assert browser.evaluate(lines) == 200
    browser.evaluate("shown.rows[199].head.focus()")
    browser.press("j")  # past the last one shown
    assert browser.evaluate(lines) == 400
    browser.click("#more")
    assert browser.evaluate(lines) == 420
    assert browser.evaluate("document.getElementById('more').hidden")


@needs_chromium
def test_losses_and_gains_are_those_of_the_verdicts(plain, open_page):
    """The numbers of the report's own comparisons, by the page's filters."""
    browser = open_page(plain.path)
    for comparison, verdict in plain.results.verdicts.items():
        for name, value in (("set", "dataset"), ("model", "model"), ("variant", "variant")):
            choose(browser, name, getattr(comparison, value))
        numbers = [
            int(browser.evaluate(f"document.querySelector('[data-of={of}]').textContent"))
            for of in ("lost", "gained")
        ]
        assert numbers == [verdict.paired.losses, verdict.paired.gains]


@needs_chromium
@pytest.mark.parametrize("words", ["answer 7", "QUESTION 41", "passage", "Right", "no such words"])
def test_search_finds_the_items_whose_question_or_answers_hold_all_words(plain, open_page, words):
    browser = open_page(plain.path)
    browser.press("/")
    browser.write(words)
    named = set()
    for dataset in plain.data["sets"]:
        for item in dataset["items"]:
            rows = [
                row[item["id"]] for (_, d, _), row in plain.rows.items() if d == dataset["name"]
            ]
            options = plain.arc_prompts.get(item["id"], {}).get("options", [])
            texts = [item["id"], item["question"], *options, "ABCD" if options else ""]
            for row in rows:
                texts += [row["output"], row["parsed"] or "", *row["golds"]]
            whole = "\n".join(texts).lower()
            if all(word in whole for word in words.lower().split()):
                named.add((dataset["name"], item["id"]))
    assert shown_items(browser) == named


FOCUS = "document.activeElement.closest('li')?.querySelector('.question').textContent"
OPEN = "[...document.querySelectorAll('li.open .question')].map(e => e.textContent)"


@needs_chromium
def test_the_keyboard_is_enough(plain, open_page):
    browser = open_page(plain.path, "#set=squad_v2")
    questions = [item["question"] for item in plain.data["sets"][1]["items"]]
    browser.press("j")
    assert browser.evaluate(FOCUS) == questions[0]
    browser.press("j", "j", "k")
    assert browser.evaluate(FOCUS) == questions[1]
    browser.press("Enter")
    assert browser.evaluate(OPEN) == [questions[1]]
    browser.press("j")  # reading on: the next item opens, this one closes
    assert browser.evaluate(OPEN) == [questions[2]]
    browser.press("g")
    assert browser.evaluate("document.querySelector('li.open .gold').open")
    assert not browser.evaluate("document.querySelector('li.open .prompt').open")
    browser.press("p", "k")  # and so is the next one
    assert browser.evaluate("document.querySelector('li.open .prompt').open")
    browser.press("Escape")
    assert browser.evaluate(OPEN) == []
    assert browser.evaluate(FOCUS) == questions[1]
    browser.press("/", "j", "k")  # letters, where one writes
    assert browser.evaluate("document.getElementById('words').value") == "jk"
    assert browser.evaluate("document.querySelectorAll('#items > li').length") == 0
    browser.press("Escape")
    assert browser.evaluate("document.getElementById('words').value") == ""
    browser.press("Escape", "k", "k")
    assert browser.evaluate(FOCUS) == questions[0]
    assert browser.trouble == []


@needs_chromium
def test_single_keys_can_be_turned_off(plain, open_page):
    browser = open_page(plain.path)
    assert browser.evaluate("document.getElementById('keys').innerText").split()[0] == "Keys"
    browser.click("#use-keys")
    browser.press("j", "/")
    assert browser.evaluate("document.activeElement.id") == "use-keys"


@needs_chromium
def test_the_address_keeps_filters_and_the_open_item(plain, open_page):
    browser = open_page(plain.path, "#set=squad_v2&model=tuned&verdict=changed")
    browser.press("j", "j", "Enter")
    told = browser.evaluate("location.hash"), browser.evaluate(OPEN), shown_items(browser)
    assert told[1]
    browser = open_page(plain.path, told[0])
    assert (told[1], told[2]) == (browser.evaluate(OPEN), shown_items(browser))
    browser = open_page(plain.path, "#set=<img>&verdict=__proto__&item=x&words=%22")
    assert browser.evaluate("location.hash && document.getElementById('set').value") == ""
    assert browser.trouble == []


@needs_chromium
def test_an_open_item_shows_every_answer_whole(plain, open_page):
    browser = open_page(plain.path, "#set=squad_v2")
    browser.click("#open-all")
    cards = browser.evaluate(
        """[...document.querySelectorAll('#items > li')].map(li =>
             [...li.querySelectorAll('.cards')].map(cards => [...cards.children].map(card => [
               card.querySelector('h4').textContent,
               card.querySelector('.same')?.textContent ?? '',
               [...card.querySelector('.text').childNodes].filter(n => n.localName !== 'del')
                 .map(n => n.textContent).join('').trim()])))"""
    )
    for item, of_models in zip(plain.data["sets"][1]["items"], cards, strict=True):
        for model, of_model in zip(plain.data["models"], of_models, strict=True):
            told = {}
            for name, same, text in of_model:
                equal = same.removeprefix("The same answer: ").split(", ") if same else []
                told |= dict.fromkeys([name, *equal], text)
            rows = {v: plain.rows[model, "squad_v2", v][item["id"]] for v in plain.data["variants"]}
            assert told == {variant: row["output"] for variant, row in rows.items()}


@needs_chromium
def test_a_scored_item_shows_every_options_probability_and_the_choice(plain, open_page):
    browser = open_page(plain.path, "#set=arc&model=base")
    browser.press("j", "Enter")
    table = browser.evaluate(
        """[...document.querySelectorAll('tbody tr')].map(tr => [
             tr.querySelector('.name').textContent,
             [...tr.querySelectorAll('td')].map(td => parseFloat(td.textContent)),
             [...tr.querySelectorAll('td')].findIndex(td => td.matches('.chosen'))])"""
    )
    item = next(iter(plain.arc_prompts))
    assert [name for name, _, _ in table] == plain.data["variants"]
    for name, shares, place in table:
        assert sum(shares) == pytest.approx(100, abs=0.3)
        row = plain.rows["base", "arc", name][item]
        assert "ABCD"[place] == row["parsed"]
        assert shares[place] == max(shares)


def longest_common(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence, by the textbook's recursion over columns."""
    column = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for j, known in enumerate(other, start=1):
            before, column[j] = (
                column[j],
                max(column[j], column[j - 1], before + 1 if word == known else 0),
            )
    return column[-1]


@needs_chromium
def test_marked_words_are_those_that_differ(plain, open_page):
    """Every word of the new text stays; as few are marked as can be."""
    browser, draw = open_page(plain.path), random.Random(5)
    cases = [
        ([draw.choice("abcd") for _ in range(draw.randrange(14))] for _ in (0, 1))
        for _ in range(200)
    ]
    for before, after in cases:
        pieces = browser.evaluate(f"aligned({json.dumps(before)}, {json.dumps(after)})")
        kinds = {kind: [w for k, w in pieces if k == kind] for kind in ("same", "mark", "del")}
        assert [w for kind, w in pieces if kind != "del"] == after
        assert [w for kind, w in pieces if kind != "mark"] == before
        assert len(kinds["same"]) == longest_common(before, after)


@needs_chromium
@pytest.mark.parametrize(
    ("before", "after", "pieces"),
    [
        ("It is 64.", "It is 64.", [["same", "It is 64."]]),
        (r"\boxed{64}.", r"\boxed{65}.", [["same", r"\boxed{"], ["mark", "65"], ["same", "}."]]),
        ("a b c", "a c", [["same", "a"], ["del", " b"], ["same", " c"]]),
        ("a c", "a b c", [["same", "a"], ["mark", " b"], ["same", " c"]]),
        ("1,250.5 m", "1,250.6 m", [["mark", "1,250.6"], ["same", " m"]]),
        ("naïve 日本", "naive 日本", [["mark", "naive"], ["same", " 日本"]]),
        ("", "new", [["mark", "new"]]),
        ("gone", "", [["del", "gone"]]),
        ("a  b", "a\nb", [["same", "a\nb"]]),
    ],
)
def test_words_are_compared_and_spaces_are_not(plain, open_page, before, after, pieces):
    browser = open_page(plain.path)
    assert browser.evaluate(f"differing({json.dumps(before)}, {json.dumps(after)})") == pieces


@needs_chromium
def test_a_text_keeps_all_its_characters(hostile, open_page):
    browser = open_page(hostile.path)
    for before, after in itertools.pairwise(map(inert, HOSTILE)):
        pieces = browser.evaluate(f"differing({json.dumps(before)}, {json.dumps(after)})")
        assert "".join(text for kind, text in pieces if kind != "del") == after


@needs_chromium
def test_two_answers_of_a_megabyte_are_compared_at_once(plain, open_page):
    browser = open_page(plain.path)
    count = browser.evaluate(
        "differing(...['a b ', 'b c '].map(x => `start ${x.repeat(250000)} end`))"
        ".map(([kind, text]) => [kind, text.length])"
    )
    assert [kind for kind, _ in count] == ["same", "mark", "same"]


@needs_chromium
@pytest.mark.parametrize("width", [1280, 768, 390])
def test_nothing_is_wider_than_the_screen(hostile, open_page, width):
    browser = open_page(hostile.path, width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    opened_whole(browser)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


TEXT_ON = {  # WCAG 2.2, 1.4.3: 4.5 to 1
    "ink": ("page", "card", "mark"),
    "soft": ("page", "card"),
    "link": ("page",),
    **dict.fromkeys(("lost", "gained", "changed"), ("page", "card")),
}


def luminance(color: str) -> float:
    """WCAG's relative luminance of a colour written as #rrggbb."""
    levels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in levels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_it_stands_on(plain, open_page, scheme):
    browser = open_page(plain.path, scheme=scheme)
    style = "getComputedStyle(document.documentElement).getPropertyValue('--{}').trim()"
    names = {*TEXT_ON, *itertools.chain(*TEXT_ON.values())}
    colors = {name: browser.evaluate(style.format(name)) for name in names}
    for text, grounds in TEXT_ON.items():
        for ground in grounds:
            low, high = sorted(luminance(colors[name]) for name in (text, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
    page = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (page == "rgb(255, 255, 255)") == (scheme == "light")


@needs_chromium
def test_every_control_has_a_name(plain, open_page):
    browser = open_page(plain.path)
    fields = "[...document.querySelectorAll('input, select')]"
    assert browser.evaluate(f"{fields}.every(e => e.labels[0])")
    buttons = "[...document.querySelectorAll('button:not([hidden])')]"
    assert browser.evaluate(f"{buttons}.every(e => e.innerText.trim())")
    assert browser.evaluate("document.documentElement.lang") == "en"


@needs_chromium
def test_on_paper_controls_are_left_out_and_open_items_are_not(plain, open_page):
    browser = open_page(plain.path, "#set=squad_v2", width=794, media="print", scheme="dark")
    browser.evaluate("document.querySelector('h2 button').click()")
    display = "getComputedStyle(document.querySelector('{}')).display"
    for name in ("#filters", "#keys", "#open-all"):
        assert browser.evaluate(display.format(name)) == "none"
    assert browser.evaluate(display.format(".card")) == "block"
    page = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert page == "rgb(255, 255, 255)"
