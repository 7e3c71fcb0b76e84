"""The report is about the records and nothing else: it recomputes, refuses and escapes."""

import csv
import functools
import html
import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import yaml
from IPython.display import Markdown
from safetensors.numpy import save_file

from conftest import STUDY
from helpers.core.errors import StudyError
from helpers.core.records import read_json, sha256_file, write_json, write_jsonl
from helpers.evaluation.predictions import prediction_digests, write_predictions
from helpers.evaluation.scoring import all_metrics, shared_text_metrics
from helpers.report import chapters, cost_chapter, graded_chapter, markdown, summary
from helpers.report import results as report_results
from helpers.report.checks.recomputed_chapters import wrong_records
from helpers.report.results import load_results
from helpers.study.loading import open_job
from helpers.study.stages import timed_models
from made_up_cost import write_cost

LAYERS = [
    f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")
]
NASTY = [
    r"The answer is $x^2$ and \boxed{24}. \(y\) $$z$$",
    "a | b || c\n| --- | --- |\n`code` ``more``",
    "<script>alert('x')</script><img src=x onerror=alert(1)> & &lt;b&gt;",
    "**bold** _it_ [link](javascript:alert(1)) ![i](x) # head ~~s~~ {{ template }} None nan",
    "\x1b[31m\u202eright to left\u2066\x00 \ufffd",
    "</code></td></table>",
]


def scored(item: str, cluster: str, golds: list[str], said: str | None, output: str) -> dict:
    """One prediction of a set that is scored 0 or 1."""
    status = "unparsed" if said is None else "answered"
    return {
        "id": item,
        "cluster": cluster,
        "golds": golds,
        "output": output,
        "parsed": said,
        "status": status,
        "finish_reason": "stop",
        "prompt_hash": f"hash of {item}",
        "prompt_tokens": 10,
        "output_tokens": 3,
        "score": float(said in golds),
    }


def arc_rows(rng, accuracy: float) -> list[dict]:
    rows = []
    for i in range(80):
        gold = "ABCD"[i % 4]
        answer = gold if rng.random() < accuracy else "ABCD"[(i + 1 + i // 4 % 3) % 4]
        rows.append(scored(f"arc-{i}", f"arc-{i}", [gold], answer, answer))
    return rows


def squad_rows(rng, accuracy: float) -> list[dict]:
    """Two questions a passage, every third one unanswerable; some answers are nasty."""
    rows = []
    for i in range(60):
        golds, lucky = ([] if i % 3 == 0 else [f"gold {i}"]), rng.random() < accuracy
        answer = f"gold {i}" if lucky else NASTY[i % len(NASTY)]
        row = scored(f"squad-{i}", f"passage-{i // 2}", golds, answer, answer)
        if i % 10 == 9:
            row |= {"parsed": None, "status": "unparsed", "score": 0.0}
        if not golds and lucky:
            row |= {"parsed": None, "status": "abstained", "score": 1.0}
        rows.append(row | {"f1": row["score"]})
    return rows


def text_rows(rng, noise: float) -> list[dict]:
    """Rows of the shared text; some tokens are nasty, and the baseline has no KL by token."""
    rows = [
        {
            "id": f"passage-{i}",
            "tokens": 50,
            "nll": 150 + float(rng.normal(0, 1)) + 20 * noise,
            "kl": noise * float(rng.uniform(1, 2)),
            "top1_agreements": 50 - int(20 * noise),
            "token_texts": [NASTY[k % len(NASTY)] if k % 9 == 8 else f" w{k}" for k in range(50)],
        }
        for i in range(12)
    ]
    if not noise:
        return rows
    shares = np.random.default_rng(0).dirichlet(np.full(50, 0.1), 12)
    return [
        row | {"token_kl": [float(f"{row['kl'] * part:.6g}") for part in parts]}
        for row, parts in zip(rows, shares.tolist(), strict=True)
    ]


def record(stage: str, parameters: dict, inputs: dict, results: dict) -> dict:
    return {
        "stage": stage,
        "parameters": parameters,
        "inputs": inputs,
        "results": results,
        "started": "2026-01-01T00:00:00+00:00",
        "duration_s": 12.5,
        "peak_memory_bytes": 10**9,
        "machine": {"cpu_count": 2, "architecture": "x86_64"},
        "packages": {"python": "3.11.7", "torch": "2.13.0"},
    }


def write_calibration(job, model: str, outlier: float, median: float | None):
    folder = job.paths.calibration(model)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    absmax = {layer: rng.uniform(1, 2, 64).astype("float32") for layer in LAYERS}
    if median is not None:
        absmax[LAYERS[3]][:] = median
    absmax[LAYERS[3]][5] = outlier
    save_file({f"{k}.absmax": v for k, v in absmax.items()}, folder / "activations.safetensors")
    surface = rng.uniform(0, 1, (20, 64)).astype("float32")
    surface[4, 5] = outlier
    save_file({LAYERS[3]: surface}, folder / "surface.safetensors")
    results = {"items": ["a", "b"], "tokens": 1234, "linears": len(LAYERS)}
    results["maxima"] = [{"name": layer} for layer in LAYERS]
    write_json(
        folder / "record.json",
        record("calibration", {"model": model}, {"model": f"files of {model}"}, results),
    )


def write_quantization(job, model: str, variant: str, passed: bool):
    activations = job.paths.calibration(model) / "activations.safetensors"
    inputs = {"model": f"files of {model}", "calibration": sha256_file(activations)}
    ways = {"without smoothing": dict.fromkeys(LAYERS, 30.0) | {LAYERS[3]: 2.5}}
    if job.study.variants[variant].smooth:
        ways["with smoothing"] = dict.fromkeys(LAYERS, 35.0) | {LAYERS[3]: 2.5}
    sizes = {"Linears": 4_000_000, "embeddings and head": 1_000_000}
    results = {"scheme": "int8 weights | in $words$", "quantized_linears": 4}
    results |= {"smoothed_groups": 2, "sqnr_db": ways, "passed": passed}
    results |= {"bytes_before": sizes, "bytes_after": sizes | {"Linears": 1_000_000}}
    parameters = {"study": job.name, "model": model, "variant": variant}
    stage_record = record("quantization", parameters, inputs, results)
    write_json(job.paths.quantization(model, variant) / "record.json", stage_record)
    gates = [
        {
            "name": "quantized layers as declared",
            "passed": passed,
            "measured": "4 | of 5",
            "limit": "4, by name",
        },
        {"name": "weights on the grid", "passed": True, "measured": "0.5", "limit": "0.5"},
    ]
    owner = {"model": model, "variant": variant, "checkpoint": f"checkpoint of {variant}"}
    verified = owner | {"passed": passed, "gates": gates}
    write_json(job.paths.variant(model, variant) / "verification.json", verified)


def write_evaluation(job, model: str, variant: str, seed: int, accuracy: float, noise: float):
    rng = np.random.default_rng(seed)
    makers = {"arc": arc_rows, "squad_v2": squad_rows}
    datasets = job.study.evaluation.datasets
    predictions = {name: makers[name](rng, accuracy) for name in datasets}
    passages = text_rows(rng, noise)
    folder = job.paths.evaluation(model, variant)
    write_predictions(folder, predictions, passages, model=model, variant=variant)
    metrics = {"datasets": all_metrics(job.study, predictions)}
    write_json(folder / "metrics.json", metrics | {"shared_text": shared_text_metrics(passages)})
    parameters = {"study": job.name, "model": model, "variant": variant}
    has_checkpoint = job.study.variants[variant].needs_checkpoint
    inputs = {"variant": f"checkpoint of {variant}" if has_checkpoint else f"files of {model}"}
    inputs["float_states"] = f"states of {model}"
    write_json(folder / "record.json", record("evaluation", parameters, inputs, {"items": {}}))
    guarded = ["whole variant", *datasets]
    write_json(folder / "gates.json", gates_of(folder, model, variant, guarded))


def gates_of(folder, model: str, variant: str, guarded: list[str], broken: str = "") -> dict:
    """One gate on each; the one on `broken` fails."""
    gates = [
        {"name": "a gate", "passed": what != broken, "measured": "1 | x", "limit": "none"}
        | {"invalidates": what}
        for what in guarded
    ]
    digests = prediction_digests(folder, guarded[1:])
    checks = {"model": model, "variant": variant, "passed": not broken, "gates": gates}
    return checks | {"predictions": digests}


def write_outputs(job, *, outlier: float = 900.0, median: float | None = None, failed: str = ""):
    """The records of a whole study, as its stages would leave them."""
    for seed, model in enumerate(job.study.models):
        write_calibration(job, model, outlier, median)
        for place, (variant, recipe) in enumerate(job.study.variants.items()):
            if recipe.needs_checkpoint:
                write_quantization(job, model, variant, variant != failed)
            write_evaluation(job, model, variant, 10 * seed + place, 0.8, 0.1 * place)
        if model in timed_models(job.study):
            write_cost(job, model, record("cost", {"model": model}, {}, {}))
        if model == "tuned":
            start = "files of base"
            results = {"training_items": 8, "heldout_loss_before": 2.5, "heldout_loss_after": 1.5}
            training = record("finetuning", {"model": model}, {"source_model": start}, results)
            write_json(job.paths.made_model(model) / "record.json", training)


def made_up_job(folder, patch, edit=lambda settings: None, **options):
    """A study in this folder with made-up records of all its stages; STUDY_OUTPUTS is set.

    Args:
        edit: changes the settings before anything is written.
        options: of `write_outputs`.
    """
    patch.setenv("STUDY_OUTPUTS", str(folder / "outputs"))
    settings = yaml.safe_load(STUDY)
    settings["variants"]["static"] = {
        "preset": "o3",
        "smooth": {"alpha": 0.5, "targets": ["attention_input", "mlp_input"]},
    }
    settings["evaluation"]["datasets"]["arc"]["items"] = 80
    settings["evaluation"]["datasets"]["squad_v2"]["items"] = 60
    settings["evaluation"]["shared_text"]["passages"] = 12
    edit(settings)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    job = open_job(path)
    write_outputs(job, **options)
    return job


@pytest.fixture
def make_job(tmp_path, monkeypatch):
    """Open a study edited by the test, with its own outputs folder."""
    return functools.partial(made_up_job, tmp_path, monkeypatch)


def one_model(settings):
    settings["models"].pop("tuned")


def other_names(settings):
    one_model(settings)
    settings["variants"] = {"float": {}, "mine-1.0": {"preset": "o1"}}
    settings["baseline"] = "float"
    settings["statistics"]["primary"] = []


def one_set_two_baselines(settings):
    settings["evaluation"]["datasets"].pop("squad_v2")
    pair = {"baseline": "rtn_w8a8", "variant": "smoothquant_w8a8"}
    settings["statistics"]["primary"].append({"model": "tuned", "dataset": "arc", **pair})


def float_only(settings):
    one_model(settings)
    settings["variants"] = {"noquant": {}}
    settings["statistics"]["primary"] = []


def with_controls(settings):
    """A noise floor, smoothing alone and the broken recipe, under names that tell nothing."""
    smooth = {"smooth": {"alpha": 0.5, "targets": ["mlp_input"]}}
    settings["variants"] |= {"x1": {"dtype": "bfloat16"}, "x2": smooth}
    settings["variants"]["x3"] = {"recipe": "seed", **smooth}


def whole_report(results) -> str:
    """All Markdown of the report, as the notebook displays it."""
    parts = chapters.opening(results) + chapters.outlier_pictures(results)
    parts += chapters.model_comparisons(results) + graded_chapter.chapter(results)
    parts += chapters.dataset_chapters(results, page="items.html")
    parts += cost_chapter.cost_chapter(results)
    parts += [chapters.technical_details(results), chapters.conclusion(results)]
    return "\n\n".join(part.data for part in parts if isinstance(part, Markdown))


def told(text: str) -> str:
    """The report without what models wrote and without code names."""
    return re.sub(r"<code>.*?</code>|`[^`]*`", "X", text)


@pytest.mark.parametrize(
    ("edit", "options"),
    [
        (lambda settings: None, {}),
        (one_model, {}),
        (other_names, {}),
        (one_set_two_baselines, {}),
        (float_only, {}),
        (with_controls, {}),
        (with_controls, {"failed": "x3"}),
        (lambda settings: None, {"failed": "smoothquant_w8a8"}),
        (lambda settings: None, {"outlier": 2.0}),
    ],
    ids=[
        *("whole", "one model", "other names", "two baselines", "float"),
        *("controls", "controls held", "failed", "no outliers"),
    ],
)
def test_every_mixture_reads_without_unrendered_marks(make_job, edit, options):
    text = told(whole_report(load_results(make_job(edit, **options))))
    assert not re.search(r"[{}]|\bnan\b|\bNone\b|\binf\b|\.\.|,\s*\.|\(\)|  \S*\| \|", text)
    assert "/tmp" not in text
    for line in text.splitlines():
        assert not re.search(r"[a-z] (,|\.|;)( |$)", line), line


def test_a_failed_check_is_told_first_and_never_ranked(make_job):
    results = load_results(make_job(failed="smoothquant_w8a8"))
    text = whole_report(results)
    assert "2 of 36 checks fail" in text
    assert "**FAILS**" in text
    (_, verdict), *_ = results.declared_verdicts()
    assert verdict.kind == "invalid"
    assert "**Invalid**: ARC of `base`" in text


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_controls_are_shown_as_what_they_are_whatever_their_names(make_job):
    results = load_results(make_job(with_controls))
    text = whole_report(results)
    headline = text.split("Scores of every variant")[1].split("</details>")[0]
    assert "`x1` (noise floor)" in headline
    assert "`x2`" not in headline
    assert (
        "Rounding alone changes answers. `x1` computes with the weights of `noquant`, in " in text
    )
    assert "noise floor: flips by rounding alone" in text
    assert "control: expected to equal the baseline" in text
    place = line_of(text, "| variant | model | perplexity |").split("|").index(" KL / noise floor ")
    assert (
        line_of(text, "| `x1` (noise floor) | `base` |").split("|")[place].strip() == "1.0"
    )  # its unit
    kl = [results.evaluations["base", v].shared_text["kl"] for v in ("static", "x1")]
    shown = line_of(text, "| `static` | `base` | 2").split("|")[place].strip()
    assert shown.startswith(f"{kl[0] / kl[1]:.2f}")


def test_the_noise_floor_is_counted_from_the_answers(make_job):
    results = load_results(make_job(with_controls))
    parts = whole_report(results).split("\n- ")
    (sentence,) = (x.splitlines()[0] for x in parts if x.startswith("Rounding alone"))
    for model in results.models:
        before, after = (results.evaluations[model, v].predictions for v in ("noquant", "x1"))
        changed = sum(
            (b["status"], b["parsed"]) != (a["status"], a["parsed"])
            for name in before
            for b, a in zip(before[name], after[name], strict=True)
        )
        assert re.search(rf"changes .*\b{changed}\b.* of 140 answers", sentence)


def test_a_control_with_another_outcome_is_shouted(make_job):
    """A broken recipe that no check has seen; smoothing's outcome is tested in test_controls."""
    text = whole_report(load_results(make_job(with_controls)))
    shout = line_of(text, "- **⚠")
    assert shout.startswith("- **⚠ 2 of 10 controls FAILED")
    assert "`x2`" not in shout
    assert "`x3` of `tuned` was expected to fail a check, but all " in shout
    assert text.index(shout) < text.index("**Answer.**")


def test_a_broken_recipe_that_is_flagged_alarms_nobody(make_job):
    text = whole_report(load_results(make_job(with_controls, failed="x3")))
    fails = "1 of 5 checks in `base` and 1 of 5 checks in `tuned`"
    assert f"`x3`, broken on purpose, fails {fails}." in text
    assert "checks fail (first failure" not in text
    assert not [x for x in text.splitlines() if "x3" in x and x.startswith("- **⚠")] or (
        "`x3`" not in line_of(text, "- **⚠")
    )


def test_the_report_quotes_what_the_predictions_give(make_job):
    """Counted again here, by hand, for the first declared comparison and two cells."""
    job = make_job()
    text = whole_report(load_results(job))
    rows = {}
    for variant in ("noquant", "smoothquant_w8a8"):
        path = job.paths.evaluation("base", variant) / "predictions" / "arc.jsonl"
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        rows[variant] = {p["id"]: p["parsed"] in p["golds"] for p in lines}
        share = f"{100 * sum(rows[variant].values()) / 80:.1f} %"
        line = next(x for x in text.splitlines() if x.startswith(f"| `base` | `{variant}`"))
        assert share in line
    lost = sum(rows["noquant"][k] > rows["smoothquant_w8a8"][k] for k in rows["noquant"])
    gained = sum(rows["noquant"][k] < rows["smoothquant_w8a8"][k] for k in rows["noquant"])
    line = next(x for x in text.splitlines() if x.startswith("| ARC | `smoothquant_w8a8`"))
    assert f"| 80 | {lost} | {gained} |" in line


def test_every_estimate_is_computed_once_a_report(make_job, tmp_path, monkeypatch):
    """Bootstraps take most of a report's time: tables, figures, text and summary share them."""
    results, calls = load_results(make_job()), Counter()
    for name in ("token_estimates", "dataset_estimates"):
        compute = getattr(report_results, name)

        def counted(*args, compute=compute, name=name):
            calls[name] += 1
            return compute(*args)

        monkeypatch.setattr(report_results, name, counted)
    whole_report(results)
    summary.write_summary(results, tmp_path)
    variants, datasets = len(results.evaluations), len(results.study.evaluation.datasets)
    assert calls == {"token_estimates": variants, "dataset_estimates": variants * datasets}


def test_the_summary_repeats_to_the_byte_and_holds_fractions(make_job):
    job = make_job()
    written = []
    for _ in range(2):
        summary.write_summary(load_results(job), job.paths.root)
        written.append([(job.paths.root / f"summary.{x}").read_bytes() for x in ("json", "csv")])
    assert written[0] == written[1]
    summary_data = json.loads(written[0][0])
    assert "duration" not in written[0][0].decode() + written[0][1].decode()
    for c in summary_data["comparisons"]:
        assert c["delta"] == pytest.approx((c["gains"] - c["losses"]) / c["n"])
        assert -1 <= c["low"] <= c["delta"] <= c["high"] <= 1
        assert (c["p"] is None) == (c["verdict"] == "invalid")
    rows = list(csv.DictReader(written[0][1].decode().splitlines()))
    stored = read_json(job.paths.evaluation("tuned", "static") / "metrics.json", made_by="")
    for dataset, metric in (("arc", "accuracy"), ("squad_v2", "has_answer_f1")):
        at = {"model": "tuned", "variant": "static", "dataset": dataset, "metric": metric}
        (row,) = [r for r in rows if at.items() <= r.items()]
        assert float(row["value"]) == pytest.approx(stored["datasets"][dataset][metric])


def test_the_culprits_are_found_in_the_records_and_not_known_beforehand(make_job):
    text = whole_report(load_results(make_job()))
    counts = "1 of 4 Linear inputs of `base` and 1 of 4 Linear inputs of `tuned`"
    assert f"One outlier channel dominates in {counts}." in text
    assert "| `1.mlp.down_proj` | `base` | 5 | 900 |" in text
    reach = "smoothing in `static` does not reach `1.mlp.down_proj`"
    assert f"In `base` and `tuned`, {reach}" in text
    assert "one scale rounds 19 of 20 tokens at `1.mlp.down_proj` of `base` and" in text


def test_an_input_whose_median_channel_is_zero_has_no_ratio(make_job, tmp_path):
    """Such a Linear is named, has no ratio anywhere, and JSON and the checks can take it."""
    results = load_results(make_job(median=0))
    text = whole_report(results)
    assert "| `1.mlp.down_proj` | `base` | 5 | 900 | 0 | – |" in text
    assert "inf" not in re.findall(r"[a-z]+", text)
    summary.write_summary(results, tmp_path / "written")
    written = json.loads((tmp_path / "written" / "summary.json").read_text())
    (row,) = [
        row
        for row in written["models"]["base"]["largest_outliers"]
        if row["linear"] == "model.layers.1.mlp.down_proj"
    ]
    assert (row["median"], row["ratio"]) == (0, None)
    assert wrong_records(text, None, tmp_path / "no notebooks") == []


def test_an_announced_set_without_predictions_names_the_notebook(make_job):
    job = make_job()
    (job.paths.evaluation("base", "noquant") / "predictions" / "squad_v2.jsonl").unlink()
    with pytest.raises(StudyError, match=r"squad_v2\.jsonl is missing; run 03_evaluation"):
        load_results(job)


@pytest.mark.bank(
    "report", "metrics edited after the answers", "refused in one line", at="metrics.json"
)
def test_metrics_that_do_not_follow_from_the_predictions_are_refused(make_job):
    job = make_job()
    path = job.paths.evaluation("base", "static") / "metrics.json"
    stored = read_json(path, made_by="")
    stored["datasets"]["arc"]["accuracy"] += 0.1
    write_json(path, stored)
    with pytest.raises(StudyError, match=r"base/static: metrics\.json does not follow"):
        load_results(job)


@pytest.mark.bank(
    "report", "an answer taken out", "refused in one line", at="predictions/arc.jsonl"
)
def test_fewer_predictions_than_items_are_refused(make_job):
    job = make_job()
    path = job.paths.evaluation("base", "static") / "predictions" / "arc.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(StudyError, match="arc has 79 predictions but the study has 80"):
        load_results(job)


@pytest.mark.parametrize(
    ("stage", "key", "remedy"),
    [
        ("quantization", "model", "01_calibration and 02_quantization"),
        ("quantization", "calibration", "02_quantization"),
        ("evaluation", "variant", "01_calibration and 03_evaluation"),
    ],
)
@pytest.mark.bank(
    "report", "a record of other files ({stage}, {key})", "refused in one line", at="record.json"
)
def test_results_of_other_files_are_refused(make_job, stage, key, remedy):
    """The hashes in the records lead from stage to stage, or nothing is reported."""
    job = make_job()
    variant = "static" if stage == "quantization" else "noquant"
    path = getattr(job.paths, stage)("base", variant) / "record.json"
    stored_record = read_json(path, made_by="")
    stored_record["inputs"][key] = "files of something else"
    write_json(path, stored_record)
    with pytest.raises(StudyError, match=rf"base/{variant}: .*run {remedy}"):
        load_results(job)


@pytest.mark.bank(
    "report",
    "another checkpoint evaluated than verified",
    "refused in one line",
    at="verification.json",
)
def test_a_checkpoint_other_than_the_verified_one_is_refused(make_job):
    job = make_job()
    path = job.paths.variant("base", "static") / "verification.json"
    write_json(path, read_json(path, made_by="") | {"checkpoint": "another"})
    with pytest.raises(StudyError, match="the evaluated checkpoint is not the verified one"):
        load_results(job)


def test_the_verification_of_another_variant_is_refused(make_job):
    job = make_job()
    other = job.paths.variant("base", "rtn_w8a8") / "verification.json"
    (job.paths.variant("base", "static") / "verification.json").write_bytes(other.read_bytes())
    with pytest.raises(StudyError, match=r"base/static: its verification\.json is of another run"):
        load_results(job)


@pytest.mark.bank(
    "report",
    "a KL against other states than the baseline's",
    "refused in one line",
    at="record.json",
)
def test_a_kl_against_other_states_than_the_baselines_is_refused(make_job):
    job = make_job()
    path = job.paths.evaluation("base", "static") / "record.json"
    stored_record = read_json(path, made_by="")
    stored_record["inputs"]["float_states"] = "states of something else"
    write_json(path, stored_record)
    with pytest.raises(StudyError, match="base/static: its KL was computed against other states"):
        load_results(job)


@pytest.mark.bank(
    "report",
    "a fine-tuned model that reads as its start does",
    "refused in one line",
    at="predictions/shared_text.jsonl",
)
def test_a_training_that_changed_nothing_is_refused(make_job):
    """The same losses on every passage, to the last bit: the start was saved, not the result."""
    job = make_job()
    rows = (job.paths.evaluation("base", "noquant") / "predictions/shared_text.jsonl").read_text()
    folder = job.paths.evaluation("tuned", "noquant")
    text = rows.replace('"model":"base"', '"model":"tuned"')
    (folder / "predictions" / "shared_text.jsonl").write_text(text)
    stored = read_json(folder / "metrics.json", made_by="")
    passages = [json.loads(line) for line in text.splitlines()]
    write_json(folder / "metrics.json", stored | {"shared_text": shared_text_metrics(passages)})
    break_gate(job, "tuned", "noquant", "nothing")
    with pytest.raises(StudyError, match="tuned: reads every passage exactly as base does"):
        load_results(job)


def test_durations_are_no_finding(make_job):
    """An edited clock changes a table of times and nothing else."""
    job = make_job()
    before = summary.summary(load_results(job))
    for path in job.paths.root.rglob("record.json"):
        write_json(path, read_json(path, made_by="") | {"duration_s": 1e6})
    assert summary.summary(load_results(job)) == before


@pytest.mark.bank(
    "report",
    "a checkpoint changed after its evaluation",
    "refused in one line",
    at="checkpoint/config.json",
)
def test_answers_of_another_checkpoint_are_refused(make_job):
    job = make_job()
    write_json(job.paths.checkpoint("base", "static") / "config.json", {"made": "later"})
    with pytest.raises(StudyError, match="base/static: its checkpoint changed since"):
        load_results(job)


@pytest.mark.bank(
    "report", "a model trained from other files", "refused in one line", at="record.json"
)
def test_a_model_trained_from_other_files_is_refused(make_job):
    job = make_job()
    path = job.paths.made_model("tuned") / "record.json"
    stored_record = read_json(path, made_by="")
    stored_record["inputs"]["source_model"] = "files of something else"
    write_json(path, stored_record)
    with pytest.raises(StudyError, match="tuned: was fine-tuned from other model files"):
        load_results(job)


def break_gate(job, model: str, variant: str, broken: str):
    folder = job.paths.evaluation(model, variant)
    guarded = ["whole variant", *job.study.evaluation.datasets]
    write_json(folder / "gates.json", gates_of(folder, model, variant, guarded, broken))


def test_a_failed_gate_on_one_set_invalidates_that_set_alone(make_job):
    job = make_job()
    break_gate(job, "base", "smoothquant_w8a8", "arc")
    results = load_results(job)
    subject = ("base", "smoothquant_w8a8")
    kinds = {c.dataset: v for c, v in results.verdicts.items() if (c.model, c.variant) == subject}
    assert kinds["arc"].kind == "invalid"
    assert "a gate (1 | x; limit: none)" in kinds["arc"].reason
    assert kinds["squad_v2"].kind != "invalid"
    text = whole_report(results)
    assert "**FAILS** on ARC" in text
    assert "1 of 36 checks fail" in text
    assert not summary.summary(results)["models"]["base"]["variants"]["smoothquant_w8a8"]["passed"]


def test_a_failed_gate_on_the_variant_invalidates_all_its_sets(make_job):
    job = make_job()
    break_gate(job, "base", "static", "whole variant")
    verdicts = load_results(job).verdicts.items()
    kinds = {v.kind for c, v in verdicts if (c.model, c.variant) == ("base", "static")}
    assert kinds == {"invalid"}


@pytest.mark.bank(
    "report",
    "answers changed after their checks",
    "refused in one line",
    at="predictions/arc.jsonl",
)
def test_answers_changed_after_their_checks_are_refused(make_job):
    job = make_job()
    path = job.paths.evaluation("base", "static") / "predictions" / "arc.jsonl"
    path.write_text(path.read_text("utf-8").replace('"output":"A"', '"output":"B"'), "utf-8")
    with pytest.raises(StudyError, match="base/static: arc changed since its checks"):
        load_results(job)


@pytest.mark.bank("report", "the gates of another variant", "refused in one line", at="gates.json")
def test_gates_of_another_variant_are_refused(make_job):
    job = make_job()
    other = job.paths.evaluation("base", "noquant") / "gates.json"
    path = job.paths.evaluation("base", "static") / "gates.json"
    path.write_bytes(other.read_bytes())
    with pytest.raises(StudyError, match=r"base/static: its gates\.json is of another run"):
        load_results(job)


def test_a_shared_text_without_finite_figures_is_shown_as_missing(make_job):
    job = make_job()
    folder = job.paths.evaluation("base", "static")
    rows = [json.loads(x) for x in (folder / "predictions/shared_text.jsonl").open()]
    rows = [row | {"nll": None, "kl": None} for row in rows]
    write_jsonl(folder / "predictions" / "shared_text.jsonl", rows)
    stored = read_json(folder / "metrics.json", made_by="")
    write_json(folder / "metrics.json", stored | {"shared_text": shared_text_metrics(rows)})
    break_gate(job, "base", "static", "whole variant")
    results = load_results(job)
    line = next(
        x for x in whole_report(results).splitlines() if x.startswith("| `base` | `static`")
    )
    assert "| – | – |" in line
    assert summary.summary(results)


@pytest.mark.parametrize("written", NASTY)
def test_what_a_model_wrote_is_shown_and_does_nothing(written):
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    table = markdown.markdown_table([{"answer": markdown.quoted(written, limit=500), "n": "1"}])
    assert not re.search(r"[$\\{}`*~\[\]]|<(?!/?code>)", table)
    assert [line.count("|") for line in table.splitlines()] == [3, 3, 3]
    page = markdown2html_mistune(table)
    (cell,) = re.findall(r"<code>(.*?)</code>", page)
    visible = " ".join("".join(c if c.isprintable() else "\ufffd" for c in written).split())
    assert "<" not in cell
    assert html.unescape(cell).replace("\ufffd", " ").split() == (
        visible.replace("\ufffd", " ").split()
    )


def test_our_own_texts_are_escaped_in_tables_too():
    table = markdown.markdown_table([{"gate": "a | b <i> $x$ `c` {d}\nnext"}])
    assert table.splitlines()[2].count("|") == 2
    assert not re.search(r"[<$`{}]", table)


@pytest.mark.parametrize("cell", [None, "", float("nan"), 3])
def test_an_unformatted_cell_is_refused(cell):
    with pytest.raises(ValueError, match="format it"):
        markdown.markdown_table([{"a": cell}])


def test_numbers_have_one_format():
    assert markdown.percent(0.45) == "45.0 %"
    assert markdown.points(-0.02) == "−2.0"
    assert markdown.points(-0.0001) == "0.0"
    assert markdown.p_value(0.0004) == "< 0.001"
    assert markdown.listed(["a", "b", "c"]) == "a, b and c"


def test_a_report_needs_no_torch():
    code = (
        "import sys, helpers.report.chapters, helpers.report.summary; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
