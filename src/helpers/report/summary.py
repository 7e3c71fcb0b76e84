"""Files for other programs and people: summary.json, summary.csv, answers, items.html, model cards.

In the summary fractions are 0–1. No times and no durations: the same records make the same bytes.
The answers lie beside it, named by their content hashes, so that
`helpers.report.checks.recomputation` can make every verdict again.

A model card is a checkpoint's README.md in the Hub's style, beside the weights it is about. What
it says of the checkpoint is read back: the scheme from its config, the Linears from its tensors,
the sizes from its files, the checks from `verification.json`, never from what was asked for. It is
written before the checkpoint is evaluated, so that the hash by which an evaluation names the
checkpoint is that of the folder with its card. Verdicts come later, in the report, to which it
points.

items.html shows every item with its prompt and all answers side by side, to search and filter. One
file that needs no network. Its only script is items.js beside this module; the page's policy
allows it by its hash and nothing else. Texts of models and data sets lie in the page as JSON, in a
block that no browser runs, and the script shows them as text. Characters that act on a display are
replaced beforehand, as everywhere in the report. The same records make the same bytes.
"""

import base64
import csv
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import takewhile
from pathlib import Path
from string import Template

import yaml
from safetensors import safe_open

from helpers.core.errors import one_line, printable
from helpers.core.files import draw_name, write_atomically
from helpers.core.records import WHOLE_VARIANT, read_json, write_json
from helpers.report import sensitivity, tables
from helpers.report.draws_chapter import draws_block
from helpers.report.estimates import Estimate, VariantResults, main_metric
from helpers.report.graded_chapter import graded_blocks
from helpers.report.markdown import (
    Rows,
    code,
    count,
    dataset_name,
    escape,
    listed,
    markdown_table,
    megabytes,
    percent,
)
from helpers.report.results import Results
from helpers.statistics.graded import option_probabilities
from helpers.statistics.published_answers import write_answers
from helpers.statistics.verdicts import ControlOutcome, Verdict
from helpers.study.loading import Job
from helpers.study.schema import BundledModel, Comparison, FineTunedModel, HubModel, Study

COLUMNS = ("model", "variant", "dataset", "metric", "value", "low", "high", "n")
SHARED = "shared_text"
CLUSTERS = "items on one passage, and near-duplicates"
ANSWERS = "answers"


def write_summary(results: Results, folder: Path, *, missing: tuple[str, ...] = ()) -> None:
    """Write the answers and summary.csv, then summary.json, whose presence marks completion.

    Args:
        missing: the runs that a partial report lacks; summary.json names them.
    """
    published = results.published
    hashes = write_answers(folder / ANSWERS, results.study, published.variants, published.draws)
    table = csv_text(results)
    write_atomically(folder / "summary.csv", lambda p: p.write_text(table, encoding="utf-8"))
    partial = {"missing": list(missing)} if missing else {}
    write_json(folder / "summary.json", partial | summary(results) | {ANSWERS: hashes})


def summary(results: Results) -> dict:
    """All headline numbers, and every verdict with its inputs."""
    study, s = results.study, results.study.statistics
    return {
        "study": results.name,
        "title": study.title,
        "seed": study.seed,
        "baseline": study.baseline,
        "statistics": {
            "confidence": s.confidence,
            "power": s.power,
            "margin": s.margin,
            "resamples": s.resamples,
            "primary_comparisons": len(s.primary),
        },
        "clusters": CLUSTERS,
        "best_fixed_answers": {
            name: {"answer": best.answer, "score": best.score}
            for name, best in tables.best_fixed_answers(results).items()
        },
        "controls": [control_row(at, outcome) for at, outcome in results.control_outcomes.items()],
        "models": {model: _model_summary(results, model) for model in results.models},
        "comparisons": [comparison_row(study, c, v) for c, v in results.verdicts.items()],
        **graded_blocks(results.graded),
        **draws_block(results.recipes),
    }


def _model_summary(results: Results, model: str) -> dict:
    fields = {}
    if model in results.training:
        training = results.training[model]["results"]
        keys = ("training_items", "heldout_loss_before", "heldout_loss_after")
        fields["finetuning"] = {key: training[key] for key in keys}
    worst = sensitivity.linear_inputs(results.calibrations[model])[:8]
    fields["largest_outliers"] = [vars(i) for i in worst]
    fields["variants"] = {
        e.variant: _variant_summary(results, e) for e in results.variants_of(model)
    }
    return fields


def _variant_summary(results: Results, e: VariantResults) -> dict:
    fields = {"passed": e.passed, "failed_gates": [_gate_label(gate) for gate in e.failed_gates]}
    if e.quantization:
        quantization = e.quantization["results"]
        keys = ("scheme", "quantized_linears", "smoothed_groups", "bytes_before", "bytes_after")
        fields |= {key: quantization[key] for key in keys}
    tokens = results.token_estimates[e.key]
    fields[SHARED] = {name: _estimate_fields(estimate) for name, estimate in tokens.items()}
    if kl := e.kl_by_token:
        fields["kl_by_token"] = {"nonfinite": kl.nonfinite, "tail": [vars(at) for at in kl.tail]}
    fields["datasets"] = {
        dataset: {
            n: _estimate_fields(x) for n, x in results.dataset_estimates[*e.key, dataset].items()
        }
        for dataset in results.study.evaluation.datasets
    }
    return fields


def _gate_label(gate: dict) -> str:
    """The gate's name, with the evaluation set that it guards, if it guards only one."""
    guarded = gate.get("invalidates", WHOLE_VARIANT)
    return gate["name"] if guarded == WHOLE_VARIANT else f"{gate['name']} ({guarded})"


def _estimate_fields(estimate: Estimate) -> dict:
    low, high = _interval_limits(estimate)
    return {"value": estimate.value, "low": low, "high": high, "n": estimate.n}


def _interval_limits(estimate: Estimate) -> tuple[float | None, float | None]:
    interval = estimate.interval
    return (interval.low, interval.high) if interval else (None, None)


def control_row(at: tuple[str, str], outcome: ControlOutcome) -> dict:
    """One control's outcome as plain data."""
    row = {"model": at[0], "variant": at[1], "role": outcome.role}
    return row | {"must": outcome.expected, "found": outcome.observed, "done": outcome.ok}


def comparison_row(study: Study, c: Comparison, verdict: Verdict) -> dict:
    """One verdict and its inputs as plain data."""
    paired, invalid = verdict.paired, verdict.kind == "invalid"
    adapter = study.evaluation.datasets[c.dataset].adapter
    return {
        **c.model_dump(),
        "metric": main_metric(adapter),
        "primary": verdict.primary,
        "verdict": verdict.kind,
        "reason": verdict.reason,
        "n": paired.n,
        "clusters": paired.clusters,
        "losses": paired.losses,
        "gains": paired.gains,
        "delta": paired.delta,
        "low": paired.interval.low,
        "high": paired.interval.high,
        "equivalence_low": paired.equivalence.low,
        "equivalence_high": paired.equivalence.high,
        "p": None if invalid else paired.p,
        "holm_p": verdict.holm_p,
        "smallest_detectable_loss": paired.detectable,
        "identical_answers": paired.identical,
        "method": paired.method,
    }


def csv_text(results: Results) -> str:
    """Long form: one line per figure."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for e in (results.evaluations[m, v] for m in results.models for v in results.variants):
        by_dataset = {SHARED: results.token_estimates[e.key]}
        for dataset in results.study.evaluation.datasets:
            by_dataset[dataset] = results.dataset_estimates[*e.key, dataset]
        for dataset, estimates in by_dataset.items():
            for metric, x in estimates.items():
                writer.writerow(
                    [e.model, e.variant, dataset, metric, x.value, *_interval_limits(x), x.n]
                )
    return stream.getvalue()


CARD = "README.md"
BUNDLED = {"smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
MADE_BY = "02_quantization"


def write_card(job: Job, before: dict[str, int], after: dict[str, int]) -> Path:
    """Write the card of the job's checkpoint and return its path.

    Args:
        before, after: bytes on disk by part, of the source's files and of the checkpoint's.

    Raises:
        StudyError: the checkpoint has not been verified, or its model not calibrated.
    """
    folder = job.paths.checkpoint(job.model, job.variant)
    config = read_json(folder / "config.json", made_by=MADE_BY)
    scheme = config.get("quantization_config", {})
    verified = read_json(folder.parent / "verification.json", made_by=MADE_BY)
    path = job.paths.calibration(job.model) / "record.json"
    calibration = read_json(path, made_by="01_calibration")
    parts = [
        front_matter(job.study, job.model, card_tags(job, scheme, verified)),
        f"# {job.model}, {draw_name(job.variant, job.draw)}",
        origin_sentence(job, calibration),
        markdown_table(facts_table(folder, scheme, before, after)),
        "## Checks",
        checks_section(verified),
        "## Quality",
        f"The report of the study {code(job.name)} compares its answers with those of its "
        "controls: `../../../report.md`. Its metrics are in `../evaluation/metrics.json`. Without "
        "that report its quality is unknown.",
        "## Use",
        usage_text(folder.name, bool(scheme)),
        "## Limits",
        LIMITS,
    ]
    write_atomically(folder / CARD, lambda p: p.write_text("\n\n".join(parts) + "\n", "utf-8"))
    return folder / CARD


def card_tags(job: Job, scheme: dict, verified: dict) -> list[str]:
    """The Hub's tags; `smoothquant` only if the checks on the checkpoint passed."""
    smoothed = ["smoothquant"] if job.recipe.smooth and verified["passed"] else []
    return [*smoothed, *(["w8a8", "int8", "compressed-tensors"] if scheme else [])]


def front_matter(study: Study, model: str, tags: list[str]) -> str:
    """The Hub's metadata: YAML between two lines of dashes; only known fields."""
    fields = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    source, tuned = study.models[model], False
    if isinstance(source, FineTunedModel):
        source, tuned = study.models[source.finetune.start], True
    if isinstance(source, BundledModel):
        fields["base_model"], fields["license"] = BUNDLED[source.bundled]
    elif isinstance(source, HubModel):
        fields["base_model"] = source.hub
    if "base_model" in fields:
        fields["base_model_relation"] = "finetune" if tuned else "quantized"
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def origin_sentence(job: Job, calibration: dict) -> str:
    """One sentence on the source model and the calibration."""
    source, description = job.study.models[job.model], "The model"
    if isinstance(source, FineTunedModel):
        description = f"The model {code(source.finetune.start)}, fine-tuned here by full training"
        source = job.study.models[source.finetune.start]
    name = next(iter(source.model_dump().values()))
    results = calibration["results"]
    return (
        f"{description} ({code(str(name))}), its files "
        f"{code(calibration['inputs']['model'][:12])}, calibrated "
        f"on {count(len(results['items']), 'item')} of {results['tokens']:,} tokens, "
        "and written by llmcompressor."
    )


def facts_table(folder: Path, scheme: dict, before: dict[str, int], after: dict[str, int]) -> Rows:
    """Scheme, Linears and bytes as read from the files."""
    rows = []
    for name, group in scheme.get("config_groups", {}).items():
        for key in ("weights", "input_activations"):
            if scheme_part := group.get(key):
                rows.append(
                    {
                        "part": f"{key.replace('_', ' ')} ({name})",
                        "read back": _scheme_words(scheme_part),
                    }
                )
    int8 = [n for n, dtype in stored_dtypes(folder).items() if dtype == "I8"]
    rows.append({"part": "tensors in int8", "read back": str(len(int8))})
    if kept := scheme.get("ignore", []):
        rows.append({"part": "kept float", "read back": ", ".join(kept)})
    for part, size in after.items():
        scheme_part = f"{megabytes(size)}, {megabytes(before[part])} before"
        rows.append({"part": part, "read back": scheme_part})
    share = percent(sum(after.values()) / sum(before.values()))
    return [*rows, {"part": "all", "read back": f"{share} of the model it was made from"}]


def _scheme_words(scheme: dict) -> str:
    kind = f"{scheme['type']}{scheme['num_bits']} per {scheme['strategy']}"
    timing = ", dynamic" if scheme.get("dynamic") else ""
    return f"{kind}{timing}{', symmetric' if scheme.get('symmetric') else ''}"


def stored_dtypes(folder: Path) -> dict[str, str]:
    """Dtype of every tensor in a folder's safetensors files, by tensor name."""
    dtypes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as tensors:
            names = list(tensors.keys())
            dtypes |= {name: tensors.get_slice(name).get_dtype() for name in names}
    return dtypes


def checks_section(verified: dict) -> str:
    """Every gate with its measured value; failed gates come first in the summary."""
    gates = verified["gates"]
    failed = [escape(gate["name"]) for gate in gates if not gate["passed"]]
    summary = f"All {len(gates)} checks on these files pass."
    if failed:
        summary = (
            f"**Not to be used.** {len(failed)} of {len(gates)} checks fail: {listed(failed)}."
        )
    rows = [
        {"check": gate["name"], "result": "passes" if gate["passed"] else "FAILS"}
        | {"measured": gate["measured"], "limit": gate["limit"]}
        for gate in gates
    ]
    return f"{summary}\n\n{markdown_table(rows)}"


def usage_text(folder: str, quantized: bool) -> str:
    """How to run the checkpoint, and which engines compute in int8."""
    if not quantized:
        return "transformers loads it like any float model; smoothing does not change its function."
    return (
        f"`vllm serve {folder}` runs it on int8 kernels. transformers loads it with "
        "compressed-tensors, which only simulates int8 and is slower than the float model."
    )


LIMITS = (
    "- It has the limits of the model that it was made from, whose license and terms apply.\n"
    "- Two correct int8 implementations give different numbers: single answers differ between "
    "them, the average quality does not."
)


PAGE = "items.html"
FOLDER = Path(__file__).parent
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


def seen_from_notebook(partial: str) -> str:
    """The page's address in the executed analysis, which lies in the folder `notebooks`.

    Args:
        partial: `yes` for a partial report, whose notebook lies beside its page.
    """
    return PAGE if partial == "yes" else f"../{PAGE}"


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
