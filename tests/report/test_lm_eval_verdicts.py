"""Verdicts on two runs of lm-evaluation-harness: its own files, and everything that is none.

tests/support/lm_eval holds what lm_eval 0.4.13 wrote (`--log_samples`) for SmolLM2-135M-Instruct
and the same model with weights rounded to 4 bits: 30 of this project's science questions by
log-likelihood, 16 opposites written by the model under two filters.
"""

import copy
import json
import random
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from tools import lm_eval_export, lm_eval_verdicts
from tools.lm_eval_samples import paired_samples, read_samples

from conftest import STUDY
from helpers.core.files import PROJECT
from helpers.core.records import sha256_text
from helpers.study.loading import load_study

FOLDER = Path(__file__).parents[1] / "support" / "lm_eval"
SCIENCE = tuple(FOLDER / run / "samples_own_science.jsonl" for run in ("float", "rounded"))
WORDS = tuple(FOLDER / run / "samples_own_words.jsonl" for run in ("float", "rounded"))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def judged(files, *, metric=None, field=None):
    """Rows of the two files by their name, with demo's settings."""
    study = load_study("demo", with_sources=False)
    pairs = paired_samples(*map(read_samples, files))
    metrics = read_samples(files[0]).metrics if metric is None else [metric]
    tests, notes = lm_eval_verdicts.tests_of(pairs, metrics, field)
    rows = lm_eval_verdicts.judged(tests, study.statistics, seed=study.seed)
    return {row.test.name: row for row in rows}, notes


def write(folder: Path, name: str, samples: list[dict]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(s) + "\n" for s in samples), encoding="utf-8")
    return path


def statsmodels_p(before, after) -> float:
    table = np.zeros((2, 2))
    for b, a in zip(before, after, strict=True):
        table[int(b), int(a)] += 1
    return float(mcnemar(table, exact=True).pvalue)


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_accuracies_and_p_are_those_of_the_harness_and_statsmodels(metric):
    rows, _ = judged(SCIENCE, metric=metric)
    before, after = ([s[metric] for s in lines_of(path)] for path in SCIENCE)
    row = rows[metric]
    assert (row.before, row.after) == (np.mean(before), np.mean(after))
    assert row.result.losses == sum(b > a for b, a in zip(before, after, strict=True)) > 0
    assert row.result.p == pytest.approx(statsmodels_p(before, after), abs=1e-12)


def test_p_is_holms_over_all_tests_of_the_page():
    rows, _ = judged(SCIENCE)
    raw = [row.result.p for row in rows.values()]
    adjusted = multipletests(raw, method="holm")[1]
    assert [row.p for row in rows.values()] == pytest.approx(list(adjusted))
    assert len(raw) == 4


def test_graded_scores_are_the_softmax_of_the_logged_log_likelihoods():
    rows, _ = judged(SCIENCE)
    plain, by_length = ([], []), ([], [])
    for side, path in enumerate(SCIENCE):
        for sample in lines_of(path):
            sums = np.array([float(answer[0][0]) for answer in sample["resps"]])
            sizes = np.array([len(text) for text in sample["doc"]["choices"]["text"]])
            right = sample["doc"]["choices"]["label"].index(sample["doc"]["answerKey"])
            plain[side].append(softmax(sums)[right])
            by_length[side].append(softmax(sums / sizes * sizes.mean())[right])
    for name, (before, after) in (
        ("probability of the right option", plain),
        ("probability of the right option, by length", by_length),
    ):
        row = rows[name]
        assert row.before == pytest.approx(np.mean(before))
        assert row.after == pytest.approx(np.mean(after))
        assert row.result.delta == pytest.approx(np.mean(after) - np.mean(before))


def test_every_filter_of_written_answers_is_compared():
    rows, notes = judged(WORDS)
    assert set(rows) == {"exact_match (first-word)", "exact_match (whole-text)"}
    for name, row in rows.items():
        before, after = (
            [s["exact_match"] for s in lines_of(path) if s["filter"] in name] for path in WORDS
        )
        assert row.result.p == pytest.approx(statsmodels_p(before, after), abs=1e-12)
    assert notes == ["No graded scores: the files hold no log-likelihoods of options."]


@pytest.mark.parametrize("seed", range(4))
def test_mcnemar_of_any_flips_is_that_of_statsmodels(tmp_path, seed):
    rng, samples = random.Random(seed), lines_of(SCIENCE[0])
    sides = []
    for side in range(2):
        changed = copy.deepcopy(samples)
        for sample in changed:
            sample["metrics"] = ["solved"]
            sample["solved"] = float(rng.random() < (0.8, 0.3 + 0.15 * seed)[side])
        sides.append(write(tmp_path, f"side{side}", changed))
    rows, _ = judged(sides)
    before, after = ([s["solved"] for s in lines_of(path)] for path in sides)
    assert rows["solved"].result.p == pytest.approx(statsmodels_p(before, after), abs=1e-12)


def test_the_page_lists_every_flip_and_what_it_cannot_know(capsys):
    assert lm_eval_verdicts.main([",".join(map(str, SCIENCE)), "--metric", "acc", "--all"]) == 0
    text = capsys.readouterr().out
    before, after = map(lines_of, SCIENCE)
    lost = [b["doc_id"] for b, a in zip(before, after, strict=True) if b["acc"] > a["acc"]]
    section = text.partition(f"acc: {len(lost)} documents lost\n")[2].partition("acc: ")[0]
    assert [int(n) for n in re.findall(r"^  (\d+)  gold ", section, flags=re.M)] == lost
    for word in ("weights", "tokens", "batch", "calibration", "declared before"):
        assert word in text.rpartition("These files do not show")[2]


def change(name: str):
    """A function that changes one run's samples in the named way."""

    def prompt(samples):
        for request in samples[3]["arguments"].values():
            request["arg_0"] += " "
        samples[3]["prompt_hash"] = sha256_text(samples[3]["arguments"]["gen_args_0"]["arg_0"])

    def later_prompt(samples):  # the harness hashes the first request's only
        samples[3]["arguments"]["gen_args_1"]["arg_0"] += " "

    def target(samples):
        samples[3] |= {"target": "1", "target_hash": sha256_text("1")}

    def metrics(samples):
        for sample in samples:
            sample["metrics"].remove("acc_norm")
            del sample["acc_norm"]

    def option(samples):
        samples[3]["arguments"]["gen_args_2"]["arg_1"] += "!"

    return {
        "other document": lambda s: s[3].update(doc_hash="0" * 64),
        "other prompt": prompt,
        "other later prompt": later_prompt,
        "other target": target,
        "other option": option,
        "fewer documents": lambda s: s.pop(),
        "other metrics": metrics,
        "document twice": lambda s: s.append(s[3]),
        "edited prompt": lambda s: s[3]["arguments"]["gen_args_0"].update(arg_0="x"),
        "edited target": lambda s: s[3].update(target="1"),
        "no hash": lambda s: s[3].pop("prompt_hash"),
        "lost answer": lambda s: s[3]["resps"].pop(),
        "metrics within": lambda s: (s[3]["metrics"].remove("acc"), s[3].pop("acc")),
        "one document": lambda s: s.__delitem__(slice(1, None)),
        "empty": lambda s: s.clear(),
    }[name]


REFUSED = {
    "other document": "document 3 is another one than in",
    "other prompt": "document 3 has another prompt than in",
    "other later prompt": "document 3 has another prompt than in",
    "other target": "document 3 has another target than in",
    "other option": "document 3 has other options than in",
    "fewer documents": "document 29 is in one file alone (29 are in both, 1 in one)",
    "other metrics": "its metrics are acc, those of",
    "document twice": "document 3 is there twice, in lines 4 and 31; the harness appends",
    "edited prompt": "line 4 has a prompt that is not the hashed one",
    "edited target": "line 4 has a target that is not the hashed one",
    "no hash": "line 4 has no prompt_hash: no sample of a harness from 0.4.5 on",
    "lost answer": "line 4 holds no answer to each of its requests",
    "metrics within": "its documents have different metrics (acc)",
    "one document": "document 1 is in one file alone",
    "empty": "holds no samples; give samples_<task>_<date>.jsonl",
}


def refusal(capsys, *arguments: str) -> str:
    assert lm_eval_verdicts.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert "; " in line
    return line


@pytest.mark.parametrize("case", REFUSED)
def test_runs_that_do_not_fit_are_one_line(tmp_path, capsys, case):
    samples = lines_of(SCIENCE[1])
    change(case)(samples)
    other = write(tmp_path, "other", samples)
    line = refusal(capsys, f"{SCIENCE[0]},{other}")
    assert line.startswith(f"{other}: ")
    assert REFUSED[case] in line


def test_other_limits_of_generation_are_one_line(tmp_path, capsys):
    samples = lines_of(WORDS[1])
    for sample in samples:
        sample["arguments"]["gen_args_0"]["arg_1"]["max_gen_toks"] = 64
    other = write(tmp_path, "other", samples)
    assert "was generated with other limits than in" in refusal(capsys, f"{WORDS[0]},{other}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no samples"),
        (b"\xff\xfe\n", "is not UTF-8"),
        (b"question,answer\n", "line 1 is not JSON"),
        (b"[1, 2]\n", "line 1 is no object"),
        (b'{"results": {}, "configs": {}}\n', "line 1 holds aggregated results"),
        (b'{"id": "a", "question": "b"}\n', "line 1 has no doc_id"),
    ],
)
def test_a_file_that_holds_no_samples_is_one_line(tmp_path, capsys, content, expected):
    path = tmp_path / "other.jsonl"
    path.write_bytes(content)
    line = refusal(capsys, f"{path},{SCIENCE[1]}")
    assert expected in line
    assert "give samples_<task>_<date>.jsonl" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a.jsonl"], "names 1 file; give two, the baseline first"),
        (["a,b,c"], "names 3 files; give two"),
        ([f"none.jsonl,{SCIENCE[0]}"], "none.jsonl: is no file"),
        ([",".join(map(str, SCIENCE)), "--metric", "f1"], "the files have acc, acc_norm; name one"),
        ([",".join(map(str, SCIENCE)), "--cluster", "text"], "has no such field; its fields: id"),
        ([",".join(map(str, SCIENCE)), "--settings", "none"], "there is no such study file"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, arguments, expected):
    assert expected in refusal(capsys, *arguments)


def test_a_run_with_one_answer_for_all_is_invalid_and_eases_no_other_test(tmp_path):
    """Its p counts as 1 in Holm's family."""
    samples = lines_of(SCIENCE[1])
    for sample in samples:
        sample["resps"] = [[[str(-1.0 - i), "False"]] for i in range(len(sample["resps"]))]
        right = float(sample["target"] == "0")
        sample |= {"acc": right, "acc_norm": right}
        del sample["acc_norm"]
        sample["metrics"] = ["acc"]
    baseline = [{k: v for k, v in s.items() if k != "acc_norm"} for s in lines_of(SCIENCE[0])]
    for sample in baseline:
        sample["metrics"] = ["acc"]
    rows, _ = judged((write(tmp_path, "a", baseline), write(tmp_path, "b", samples)))
    assert {row.kind for row in rows.values()} == {"invalid"}
    assert rows["acc"].reason == "it gives the same answer to every question"
    assert {row.p for row in rows.values()} == {None}


def test_log_likelihoods_that_are_not_finite_are_invalid(tmp_path):
    samples = lines_of(SCIENCE[1])
    samples[5]["resps"][0][0][0] = "nan"
    rows, _ = judged((SCIENCE[0], write(tmp_path, "b", samples)))
    assert rows["acc"].kind == "invalid"
    assert "not finite" in rows["acc"].reason


def test_accuracies_that_do_not_follow_give_no_graded_scores(tmp_path):
    samples = lines_of(SCIENCE[1])
    samples[5]["acc"] = 1.0 - samples[5]["acc"]
    rows, notes = judged((SCIENCE[0], write(tmp_path, "b", samples)))
    assert set(rows) == {"acc", "acc_norm"}
    assert "does not follow from log-likelihoods and target" in notes[0]


def test_documents_of_one_passage_count_as_one_unit(tmp_path, capsys):
    paths = []
    for path in SCIENCE:
        samples = lines_of(path)
        for n, sample in enumerate(samples):
            sample["doc"]["passage"] = f"Passage {n // 3}: {'a text of some length, ' * 4}"
        paths.append(write(tmp_path, path.parent.name, samples))
    rows, _ = judged(paths, metric="acc", field="passage")
    assert rows["acc"].result.clusters == 10
    assert lm_eval_verdicts.main([",".join(map(str, paths))]) == 0
    assert "add ARGS='--cluster passage'" in capsys.readouterr().out


def test_scores_beyond_0_and_1_get_a_difference_and_no_verdict(tmp_path):
    paths = []
    for shift, path in enumerate(WORDS):
        samples = [s for s in lines_of(path) if s["filter"] == "first-word"]
        for n, sample in enumerate(samples):
            sample |= {"f1": 0.1 * (n % 5) + shift, "metrics": ["f1"]}
        paths.append(write(tmp_path, path.parent.name, samples))
    rows, _ = judged(paths)
    (row,) = rows.values()
    assert (row.kind, row.result.delta) == ("exploratory", pytest.approx(1))


def test_the_export_of_this_project_can_be_read(tmp_path):
    """Its acc_norm divides by bytes; accuracies and graded scores are those of the predictions."""
    (tmp_path / "study.yaml").write_text(STUDY)
    evaluation_set = load_study(tmp_path / "study.yaml").evaluation.datasets["arc"]
    evaluation_set = evaluation_set.model_copy(
        update={"ask": evaluation_set.ask.model_copy(update={"normalize": "bytes"})}
    )
    rng, paths, shares = np.random.default_rng(3), [], []
    options = [["añil", "a longer one", "x"], ["iron", "é", "wood is long"]]
    for run in range(2):
        samples, probabilities = [], []
        for place in range(12):
            texts = options[place % 2]
            logprobs = (-3 * rng.random(3) - np.array([len(t) for t in texts])).tolist()
            lengths = np.array([len(text.encode()) for text in texts])
            chosen = int(np.argmax(logprobs / lengths))
            record = {"id": f"i{place}", "question": f"Which {place}?", "passage": ""}
            record |= {"options": texts, "labels": ["A", "B", "C"]}
            record |= {"prompt": f"Q{place}", "continuations": [f" {text}" for text in texts]}
            score = float(chosen == place % 3)
            row = {"golds": ["ABC"[place % 3]], "score": score, "logprobs": logprobs}
            samples.append(lm_eval_export.sample_line(place, row, record, evaluation_set))
            probabilities.append(softmax(logprobs)[place % 3])
        paths.append(write(tmp_path, f"run{run}", samples))
        shares.append(np.mean(probabilities))
    rows, _ = judged(paths)
    row = rows["probability of the right option"]
    if row.result:
        assert (row.before, row.after) == pytest.approx(tuple(shares))
    assert set(rows) == {
        "acc",
        "acc_norm",
        "probability of the right option",
        "probability of the right option, by length",
    }


def test_make_hands_the_two_files_over():
    command = ["make", "-n", "verdicts", "FROM=a.jsonl,b.jsonl"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "-m tools.lm_eval_verdicts 'a.jsonl,b.jsonl' --settings demo" in done.stdout
