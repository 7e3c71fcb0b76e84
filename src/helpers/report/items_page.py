"""items.html: every item with its prompt and all answers side by side, to search and filter.

One file that needs no network. Its only script is items.js beside this module; the page's policy
allows it by its hash and nothing else. Texts of models and data sets lie in the page as JSON, in
a block that no browser runs, and the script shows them as text. Characters that act on a display
are replaced beforehand, as everywhere in the report. The same records make the same bytes.
"""

import base64
import hashlib
import html
import json
import math
from itertools import takewhile
from pathlib import Path
from string import Template

from helpers.core.errors import one_line, printable
from helpers.core.files import write_atomically
from helpers.report.markdown import dataset_name
from helpers.report.results import Results
from helpers.statistics.graded import option_probabilities

PAGE = "items.html"
FOLDER = Path(__file__).parent
POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; base-uri 'none'; "
    "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
# Inside a script element `<` could end it, and old parsers end lines at U+2028 and U+2029.
_IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def write_items_page(results: Results, folder: Path) -> None:
    """Write items.html beside the report."""
    page = items_page(results)
    write_atomically(folder / PAGE, lambda path: path.write_text(page, encoding="utf-8"))


def items_page(results: Results) -> str:
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


def page_data(results: Results) -> dict:
    """Everything that the page shows. Of each item and model, equal answers stand once."""
    return {
        "baseline": results.study.baseline,
        "models": results.models,
        "variants": results.variants,
        "sets": [_set(results, name) for name in results.study.evaluation.datasets],
    }


def _set(results: Results, dataset: str) -> dict:
    """One evaluation set: what its prompts have in common, its invalid variants, its items."""
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


def _invalid(results: Results, dataset: str) -> dict[str, dict[str, str]]:
    """The failed check that invalidates a variant on this set, by model and variant."""
    return {
        model: {
            e.variant: p for e in results.variants_of(model) if (p := e.failed_check_on(dataset))
        }
        for model in results.models
    }


def _item(results: Results, dataset: str, item: str, rows: dict, shared: int) -> dict:
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
            list(o) for o in zip(prompt_record["labels"], prompt_record["options"], strict=True)
        ]
    ask = results.study.evaluation.datasets[dataset].ask
    normalize = getattr(ask, "normalize", None)
    shown["answers"] = [
        _distinct([_answer(by_id[item], prompt_record, normalize) for by_id in rows[model]])
        for model in results.models
    ]
    return shown


def _answer(prediction: dict, prompt_record: dict, normalize: str | None) -> dict:
    """What the page shows of one prediction; what is as usual is left out."""
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
