"""Items are held to their raw rows; questions in other words are neither independent nor new."""

import json
from dataclasses import replace

import pytest

from helpers.evaluation.checks.item_gates import (
    clusters_gate,
    leakage_gate,
    near_pairs,
    raw_digests,
    raw_rows_gate,
)
from helpers.sources import items as sources_items
from helpers.sources import sampling
from helpers.sources.items import ADAPTERS
from helpers.sources.sampling import (
    Index,
    calibration_items,
    cluster_near_duplicates,
    evaluation_items,
    load_items,
    training_items,
)
from helpers.study.loading import load_study
from helpers.study.schema import FileDataset, ShippedDataset

SHIPPED = {"arc": "arc", "boolq": "boolq", "squad_v2": "squad_v2", "openmath": "openmath_eval"}
THINGS = [
    *("apples", "pears", "plums", "cherries", "figs"),
    *("dates", "olives", "lemons", "limes", "quinces"),
    *("melons", "grapes", "nuts", "seeds", "beans"),
    *("peas", "lentils", "carrots", "beets", "leeks"),
    *("onions", "radishes", "turnips", "kale", "chard"),
]
WORDINGS = (
    "{q}",
    "Please think about this carefully. {q}",
    "{q} Give only the final number as the answer.",
    "Here is a question for you: {q}",
)


def problem(i: int) -> str:
    """A problem that shares no four words with another one."""
    thing, other = THINGS[i], THINGS[(7 * i + 3) % 25]
    return (
        f"Basket{i} holds {i + 2} {thing} beside {other}{i} and cook{i} removes {i + 1} {thing}. "
        f"What{i} count of {thing} stays inside basket{i} then{i}?"
    )


def rows_of(wordings=WORDINGS, count: int = 25) -> list[dict]:
    return [
        {"problem": w.format(q=problem(i)), "expected_answer": str(i), "generated_solution": "So."}
        for w in wordings
        for i in range(count)
    ]


@pytest.fixture
def reworded(study_settings, write_study, write_rows):
    """A study of 25 questions, each asked in four wordings."""
    settings = study_settings
    settings["evaluation"]["datasets"] = {
        "mine": {
            "adapter": "openmath",
            "source": {"file": write_rows(rows_of())},
            "items": 100,
            "ask": {"protocol": "generate", "answer": "boxed", "stop": "answer", "shots": 0,
                    "max_new_tokens": 8},
        }
    }  # fmt: skip
    settings["statistics"]["primary"] = []
    return load_study(write_study(settings))


def as_rows(items) -> list[dict]:
    return [{"id": i.id, "cluster": i.cluster, "golds": list(i.golds)} for i in items]


def test_four_wordings_of_a_question_are_one_cluster(reworded):
    items = evaluation_items(reworded, "mine")
    assert len(items) == 100
    assert len({item.cluster for item in items}) == 25
    for item in items:
        group = {i.golds for i in items if i.cluster == item.cluster}
        assert group == {item.golds}
    assert clusters_gate(as_rows(items), items).passed


@pytest.mark.bank("items", "25 items in four wordings counted as 100")
def test_wordings_counted_as_independent_items_are_caught(reworded, monkeypatch):
    monkeypatch.setattr(sampling, "cluster_near_duplicates", list)
    items = evaluation_items(reworded, "mine")
    gate = clusters_gate(as_rows(items), items)
    assert not gate.passed
    assert gate.measured.startswith("100 clusters of 100 items")


def test_the_order_of_items_changes_no_cluster(reworded):
    items = evaluation_items(reworded, "mine")
    by_id = {item.id: item.cluster for item in cluster_near_duplicates(reversed(items))}
    assert by_id == {item.id: item.cluster for item in items}


@pytest.mark.parametrize("name", ["arc", "squad_v2", "boolq"])
def test_shipped_questions_are_in_words_of_their_own(name):
    items = load_items(ShippedDataset(shipped=name), adapter=name)
    assert [i.cluster for i in cluster_near_duplicates(items)] == [i.cluster for i in items]


@pytest.mark.bank(
    "items", "questions on one passage counted as independent", at="rows of the answers"
)
def test_two_passages_cut_apart_into_clusters_are_caught():
    items = load_items(ShippedDataset(shipped="squad_v2"), adapter="squad_v2")[:6]
    assert clusters_gate(as_rows(items), items).passed
    apart = [row | {"cluster": row["id"]} for row in as_rows(items)]
    assert not clusters_gate(apart, items).passed


def test_two_ways_to_near_duplicates_agree():
    items = load_items(ShippedDataset(shipped="openmath_eval"), adapter="openmath")[:150]
    index = Index(items)
    one = {(a, b) for a, item in enumerate(items) for b in index.near(item) if a != b}
    places = {id(item): place for place, item in enumerate(items)}
    assert {(places[id(a)], places[id(b)]) for a, b in near_pairs(items, items)} == one
    assert one


@pytest.fixture
def training_reworded(study_settings, write_study, write_rows):
    """(study, rewordings): the training file holds its evaluation items in other words."""
    settings = study_settings
    mine = {"adapter": "openmath", "source": {"file": write_rows(rows_of(WORDINGS[:1]), "a.jsonl")}}
    mine |= {"items": 25, "ask": {"protocol": "generate", "answer": "boxed", "stop": "answer",
                                  "shots": 0, "max_new_tokens": 8}}  # fmt: skip
    settings["evaluation"]["datasets"] = {"mine": mine}
    settings["statistics"]["primary"] = []
    others = load_items(ShippedDataset(shipped="openmath_train"), adapter="openmath")[:40]
    rows = [
        {"problem": i.question, "expected_answer": i.golds[0], "generated_solution": i.solution}
        for i in others
    ]
    path = write_rows(rows_of(WORDINGS[1:2]) + rows, "b.jsonl")
    settings["models"]["tuned"]["finetune"]["dataset"] = {"file": path}
    settings["calibration"]["dataset"] = {"file": path}
    study = load_study(write_study(settings))
    items = load_items(FileDataset(file=path), adapter="openmath")
    return study, {item.id for item in items[:25]}


def test_evaluation_items_in_other_words_are_not_drawn(training_reworded):
    study, reworded_ids = training_reworded
    drawn = [
        *calibration_items(study),
        *(i for part in training_items(study, "tuned") for i in part),
    ]
    assert len(drawn) == 6 + 8 + 4
    assert not reworded_ids & {item.id for item in drawn}


@pytest.mark.parametrize("use", ["training", "calibration"])
@pytest.mark.bank("items", "{use} on reworded evaluation items")
def test_drawing_them_all_the_same_is_named_and_counted(training_reworded, monkeypatch, use):
    study, reworded_ids = training_reworded
    monkeypatch.setattr(sampling, "near_duplicate_keys", lambda *_: frozenset())
    drawn = calibration_items(study)
    if use == "training":
        drawn = [item for part in training_items(study, "tuned") for item in part]
    reworded_items = [item for item in drawn if item.id in reworded_ids]
    gate = leakage_gate(evaluation_items(study, "mine"), {use: drawn})
    assert reworded_items
    assert not gate.passed
    assert f"{len(reworded_items)} in other words" in gate.measured
    assert f"in other words in {use}" in gate.measured


@pytest.mark.parametrize("adapter", SHIPPED)
def test_shipped_items_are_those_of_their_rows(adapter):
    source = ShippedDataset(shipped=SHIPPED[adapter])
    items = load_items(source, adapter=adapter)
    digests = raw_digests(source, adapter=adapter)
    assert raw_rows_gate(as_rows(items), items, digests).passed


def shifted(adapter: str):
    """An adapter that gives every item the golds of the row before."""
    true, before = ADAPTERS[adapter], []

    def adapt(row: dict):
        item = true(row)
        golds = before[-1] if before else item.golds
        before.append(item.golds)
        return replace(item, golds=golds)

    return adapt


@pytest.mark.parametrize("adapter", SHIPPED)
@pytest.mark.bank("items", "golds shifted by a row in the adapter", at="sources.items.ADAPTERS")
def test_golds_shifted_by_a_row_in_the_adapter_are_caught(adapter, monkeypatch):
    """Questions and golds are all there, scores follow from them, and nothing else notices."""
    source = ShippedDataset(shipped=SHIPPED[adapter])
    monkeypatch.setitem(ADAPTERS, adapter, shifted(adapter))
    items, digests = load_items(source, adapter=adapter), raw_digests(source, adapter=adapter)
    assert not raw_rows_gate(as_rows(items), items, digests).passed


@pytest.mark.bank("items", "golds shifted by a row as rows are read")
def test_golds_shifted_by_a_row_before_the_adapter_are_caught(monkeypatch):
    true = sources_items._json_lines

    def shifted_rows(data, place):
        result = true(data, place)
        golds = [row["answer"] for row in result]
        return [
            row | {"answer": gold}
            for row, gold in zip(result, golds[-1:] + golds[:-1], strict=True)
        ]

    monkeypatch.setattr(sources_items, "_json_lines", shifted_rows)
    source = ShippedDataset(shipped="boolq")
    items, digests = load_items(source, adapter="boolq"), raw_digests(source, adapter="boolq")
    assert not raw_rows_gate(as_rows(items), items, digests).passed


@pytest.mark.bank(
    "items", "options turned round, or golds edited in the answers", at="rows of the answers"
)
def test_texts_exchanged_or_golds_edited_in_the_answers_are_caught():
    source = ShippedDataset(shipped="arc")
    items = load_items(source, adapter="arc")[:10]
    digests = raw_digests(source, adapter="arc")
    turned = [replace(i, options=i.options[::-1]) for i in items]
    assert not raw_rows_gate(as_rows(items), turned, digests).passed
    edited = [row | {"golds": ["A"]} for row in as_rows(items)]
    assert not raw_rows_gate(edited, items, digests).passed
    assert not raw_rows_gate(as_rows(items), items, {}).passed


def test_no_row_is_known_by_its_place(write_rows):
    """Rows in another order, with other spaces, are the same rows."""
    rows = rows_of(WORDINGS[:1])
    spaced = [json.loads(json.dumps(row).replace(" ", "  ")) for row in rows[::-1]]
    one, other = (
        raw_digests(FileDataset(file=write_rows(r, f"{k}.jsonl")), adapter="openmath")
        for k, r in enumerate((rows, spaced))
    )
    assert {d for result in one.values() for d in result} == {
        d for result in other.values() for d in result
    }
