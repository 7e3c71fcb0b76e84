"""Task files of lm-evaluation-harness with made-up items, one for each output type and more.

The rows have the fields that the Hub's datasets have; every text is put together here from lists
of words with a seed. Tests and the comparison with the harness's own run use the same files.
"""

import json
import random
from pathlib import Path

import yaml

PEOPLE = ["Rosa Field", "Amir Holt", "Lena Marsh", "Tom Birch", "Ines Vale", "Paul Stone"]
PLACES = ["the harbour", "the old mill", "the library", "the orchard", "the station", "the bridge"]
THINGS = ["lantern", "basket", "violin", "ladder", "kettle", "bicycle", "compass", "blanket"]
ACTS = ["carried", "repaired", "painted", "borrowed", "weighed", "sold"]
WEEKDAYS = ["Monday", "Tuesday", "Thursday", "Friday", "Saturday", "Sunday"]

CODE = '''"""Rows of everyday scenes, prepared for a choice of endings."""


def prepare(dataset):
    """Put the two parts of each beginning together."""

    def prepared(row):
        beginning = row["ctx_a"] + " " + row["ctx_b"].capitalize()
        return {
            "query": row["activity_label"] + ": " + beginning,
            "choices": [ending.replace(" [title]", ". ") for ending in row["endings"]],
            "gold": int(row["label"]),
        }

    return dataset.map(prepared)
'''


def scene(rnd: random.Random) -> str:
    """One sentence about who did what, where and when."""
    person, place, thing = rnd.choice(PEOPLE), rnd.choice(PLACES), rnd.choice(THINGS)
    day, number = rnd.choice(WEEKDAYS), rnd.randint(11, 989)
    return f"On {day} {person} {rnd.choice(ACTS)} {thing} number {number} near {place}."


def rows_of(kind: str, count: int, *, seed: int) -> list[dict]:
    """Made-up rows with the fields of a dataset on the Hub."""
    rnd = random.Random(f"{kind}:{seed}")
    return [ROWS[kind](rnd, number) for number in range(count)]


def _arc(rnd: random.Random, number: int) -> dict:
    options = [f"{rnd.choice(PEOPLE)} {a} the {rnd.choice(THINGS)}" for a in rnd.sample(ACTS, 4)]
    return {
        "id": f"made-{number}",
        "question": f"{scene(rnd)} {scene(rnd)} Which of these happened in week {number}?",
        "choices": {"text": options, "label": list("ABCD")},
        "answerKey": rnd.choice("ABCD"),
    }


def _hellaswag(rnd: random.Random, number: int) -> dict:
    endings = [
        f"{act} the {rnd.choice(THINGS)} near {rnd.choice(PLACES)} [title]and went home with it."
        for act in rnd.sample(ACTS, 4)
    ]
    return {
        "activity_label": f"Scene {number}",
        "ctx_a": f"{scene(rnd)} {scene(rnd)}",
        "ctx_b": f"{rnd.choice(PEOPLE)} then",
        "endings": endings,
        "label": str(rnd.randrange(4)),
    }


def _boolq(rnd: random.Random, number: int) -> dict:
    passage = " ".join(scene(rnd) for _ in range(3))
    return {
        "question": f"did {rnd.choice(PEOPLE).lower()} see thing number {number} on the way",
        "passage": passage,
        "answer": rnd.random() < 0.5,
    }


def _squad(rnd: random.Random, number: int) -> dict:
    sentence, answer = scene(rnd), rnd.choice(PLACES)
    known = number == 0 or rnd.random() < 0.7
    texts = [answer, answer.removeprefix("the ")] if known else []
    return {
        "id": f"made-{number}",
        "title": f"Scene {number // 4}",
        "context": f"{sentence} Nobody went further than {answer} in week {number}.",
        "question": f"How far did anybody go in week {number}?",
        "answers": {"text": texts, "answer_start": [0] * len(texts)},
    }


def _gsm8k(rnd: random.Random, number: int) -> dict:
    first, second = rnd.randint(2, 60), rnd.randint(2, 60)
    person, thing = rnd.choice(PEOPLE), rnd.choice(THINGS)
    question = f"{person} has {first} of the {thing}s of lot {number} and buys {second} more. "
    question += "How many are there now?"
    working = f"There are {first} + {second} = <<{first}+{second}={first + second}>> of them."
    return {"question": question, "answer": f"{working}\n#### {first + second}"}


def _lambada(rnd: random.Random, number: int) -> dict:
    thing = rnd.choice(THINGS)
    text = f"{scene(rnd)} Everybody in row {number} talked of the {thing}. {scene(rnd)} "
    return {"text": f"{text}In the end nobody had seen the {thing}"}


def _wikitext(rnd: random.Random, number: int) -> dict:
    sentences = " ".join(scene(rnd) for _ in range(rnd.randint(4, 9)))
    return {"page": f" = Scene {number} = \n\n {sentences} \n"}


def _blimp(rnd: random.Random, number: int) -> dict:
    good = f"{rnd.choice(PEOPLE)} has {rnd.choice(ACTS)} the {rnd.choice(THINGS)} {number}."
    return {"sentence_good": good, "sentence_bad": good.replace(" has ", " have ")}


ROWS = {
    "arc": _arc,
    "blimp": _blimp,
    "hellaswag": _hellaswag,
    "boolq": _boolq,
    "squad_v2": _squad,
    "gsm8k": _gsm8k,
    "lambada": _lambada,
    "wikitext": _wikitext,
}
SHOTS = {"arc": 2, "gsm8k": 2}
CHOICE = {"output_type": "multiple_choice"}
MEAN = {"aggregation": "mean", "higher_is_better": True}
ACCURACY = [{"metric": name, **MEAN} for name in ("acc", "acc_norm")]
MATCH = {"metric": "exact_match", **MEAN}
NUMBER = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
TASKS: dict[str, dict] = {
    "arc": CHOICE
    | {
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": ACCURACY,
    },
    "boolq": CHOICE
    | {
        "doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:",
        "doc_to_target": "{{answer|int}}",
        "doc_to_choice": ["no", "yes"],
        "metric_list": ACCURACY[:1],
    },
    "blimp": CHOICE
    | {
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "metric_list": ACCURACY[:1],
    },
    "squad_v2": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}\nQuestion: {{question}}\nAnswer:",
        "doc_to_target": "{{answers.text if answers.text else ['unanswerable']}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 16},
        "metric_list": [MATCH | {"ignore_case": True, "ignore_punctuation": True}],
    },
    "gsm8k": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Question:", "</s>"], "max_gen_toks": 48},
        "metric_list": [MATCH | {"regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"]}],
        "filter_list": [
            {
                "name": "strict-match",
                "filter": [
                    {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
                    {"function": "take_first"},
                ],
            },
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": NUMBER},
                    {"function": "take_first"},
                ],
            },
        ],
    },
    "lambada": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            *ACCURACY[:1],
        ],
    },
    "wikitext": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [
            {"metric": "word_perplexity"},
            {"metric": "byte_perplexity"},
            {"metric": "bits_per_byte"},
        ],
    },
}
HELLASWAG = """
task: made_hellaswag
output_type: multiple_choice
test_split: test
process_docs: !function scenes.prepare
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def write_tasks(folder: Path, *, items: int, seed: int = 5) -> dict[str, Path]:
    """Write rows and a task file of every kind; the files by kind. `hellaswag` names code."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for kind in ROWS:
        data = {"test": _write_rows(folder / f"{kind}.jsonl", rows_of(kind, items, seed=seed))}
        if kind in SHOTS:
            rows = rows_of(kind, 6, seed=seed + 1)
            data["train"] = _write_rows(folder / f"{kind}-train.jsonl", rows)
        split = {"test_split": "test"} | ({"training_split": "train"} if kind in SHOTS else {})
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": data}}
        files[kind] = folder / f"{kind}.yaml"
        text = HELLASWAG if kind == "hellaswag" else ""
        own = source if text else {"task": f"made_{kind}"} | source | split | TASKS[kind]
        files[kind].write_text(text + yaml.safe_dump(own, sort_keys=False), "utf-8")
    (folder / "scenes.py").write_text(CODE, "utf-8")
    return files


def _write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def task_settings(kind: str, file: Path, *, items: int) -> dict:
    """The evaluation set of a study that names one of these task files."""
    settings = {"task": str(file), "items": items, "shots": SHOTS.get(kind, 0)}
    return settings | ({"trust_task_code": True} if kind == "hellaswag" else {})
