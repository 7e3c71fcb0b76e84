"""Rows of any content become items, or one clear line; so do the bytes of a predictions file."""

import copy
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import STUDY
from helpers.core.errors import StudyError
from helpers.evaluation.predictions import (
    FINISH_REASONS,
    PASSAGES,
    ROW_MODELS,
    read_passage_rows,
    read_predictions,
)
from helpers.evaluation.prompts import loglikelihood_prompt
from helpers.evaluation.scoring import score_options
from helpers.sources.chat import conversation, render, tokenize
from helpers.sources.items import normalized_text
from helpers.sources.sampling import load_items, shared_passages
from helpers.study.loading import load_study
from helpers.study.schema import FileDataset
from test_datasets import ROWS
from test_report import arc_rows, squad_rows, text_rows

repeatable = settings(derandomize=True, deadline=None, max_examples=150)
plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["\ud800", "\x1b[31m", "A", "a ", " ", "٣", "<script>", "{{ x }}", "\x00"])
)
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
LINES = st.lists(
    st.binary(max_size=30)
    | st.sampled_from([b"{}", b"[]", b"7", b"NaN", b'"', b"[" * 9000, b"1" * 9000, b"\xff", b""]),
    max_size=4,
)


def one_line(call, *arguments, **named):
    """What the call returns; None if it refuses, which has to take one plain line."""
    try:
        return call(*arguments, **named)
    except StudyError as error:
        line = str(error)
    assert line.isprintable(), ascii(line)
    assert len(line) < 1000
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def asked(folder):
    """The study the predictions are of."""
    (folder / "study.yaml").write_text(STUDY)
    return load_study(folder / "study.yaml")


def places(row: dict):
    """Every place in a row: its own keys, and those of the mappings in it."""
    for key, value in row.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, inner) for inner in value)


changes = st.sampled_from(sorted(ROWS)).flatmap(
    lambda adapter: st.tuples(
        st.just(adapter), st.sampled_from(sorted(places(ROWS[adapter]))), values
    )
)


@repeatable
@given(changes)
def test_a_row_with_anything_in_it_is_an_item_or_a_line(folder, tokenizer, change):
    """What is taken can be asked and scored; nothing fails later, in a model's company."""
    adapter, place, value = change
    row = copy.deepcopy(ROWS[adapter])
    inner = row[place[0]] if len(place) == 2 else row
    inner[place[-1]] = value
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    for item in one_line(load_items, FileDataset(file=str(path)), adapter=adapter) or ():
        rendered = render(tokenizer, conversation(item, adapter, shots=1))
        assert tokenize(tokenizer, rendered)
        if item.options:
            continuations = loglikelihood_prompt(item, adapter).continuations
            logprobs = [-1.0] * len(continuations)
            assert score_options(item, logprobs, continuations, normalize="bytes")["score"] in (
                0,
                1,
            )


@repeatable
@given(LINES, st.sampled_from(sorted(ROWS)), st.sampled_from(["jsonl", "csv", "tsv", "arrow"]))
def test_any_bytes_are_items_or_a_line(folder, lines, adapter, extension):
    path = folder / f"bytes.{extension}"
    path.write_bytes(b"\n".join(lines))
    one_line(load_items, FileDataset(file=str(path)), adapter=adapter)


@repeatable
@given(st.data())
def test_a_damaged_parquet_file_is_items_or_a_line(folder, data):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    sound = folder / "sound.parquet"
    if not sound.is_file():
        parquet.write_table(pyarrow.Table.from_pylist([ROWS["arc"]] * 3), sound)
    content = bytearray(sound.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "damaged.parquet"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] or content)
    one_line(load_items, FileDataset(file=str(path)), adapter="arc")


@repeatable
@given(values)
def test_passages_of_any_content_are_read_or_refused(folder, asked, change):
    path = folder / "passages.jsonl"
    path.write_text(
        json.dumps({"context": "a passage"}) + "\n" + json.dumps({"context": change}) + "\n"
    )
    shared_text = asked.evaluation.shared_text.model_copy(
        update={"dataset": FileDataset(file=str(path)), "passages": 1}
    )
    evaluation = asked.evaluation.model_copy(update={"shared_text": shared_text})
    one_line(shared_passages, asked.model_copy(update={"evaluation": evaluation}))


def test_a_megabyte_of_accents_is_folded_in_linear_time():
    """Putting accents in order is quadratic in a run of them; here order does not matter."""
    text = "e" + "\u0301\u0316" * 250_000
    started = time.process_time()
    assert normalized_text(text) == "e"
    assert time.process_time() - started < 3


@pytest.mark.parametrize("labels", [["A", "a"], ["A", "A."], ["1", " 1 "], ["K", "\u212a"]])
def test_labels_that_are_read_alike_are_refused(folder, labels):
    row = ROWS["arc"] | {"choices": {"text": ["x", "y"], "label": labels}, "answerKey": labels[1]}
    path = folder / "alike.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert one_line(load_items, FileDataset(file=str(path)), adapter="arc") is None


def sound_rows() -> dict[str, list[dict]]:
    import numpy as np

    rng = np.random.default_rng(1)
    return {
        "arc": arc_rows(rng, 0.5)[:3],
        "squad_v2": squad_rows(rng, 0.5)[:3],
        "shared_text": text_rows(rng, 0.1)[:3],
    }


SOUND = sound_rows()
KINDS = {"arc": "arc", "squad_v2": "squad_v2", "shared_text": PASSAGES}


def written(folder, rows: dict[str, list]) -> None:
    (folder / "predictions").mkdir(exist_ok=True)
    for name, found in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (folder / "predictions" / f"{name}.jsonl").write_text(text)


def read(folder, asked):
    return one_line(read_predictions, folder, asked), one_line(read_passage_rows, folder)


def refusal(folder, asked, name: str) -> str:
    """The line one damaged file is refused with."""
    with pytest.raises(StudyError) as caught:
        read_passage_rows(folder) if name == "shared_text" else read_predictions(folder, asked)
    return str(caught.value)


def test_sound_predictions_are_read_as_written(folder, asked):
    written(folder, SOUND)
    predictions, passages = read(folder, asked)
    assert {**predictions, "shared_text": passages} == SOUND


@repeatable
@given(st.sampled_from(sorted(SOUND)), LINES)
def test_any_bytes_are_predictions_or_a_line(folder, asked, name, lines):
    written(folder, SOUND)
    (folder / "predictions" / f"{name}.jsonl").write_bytes(b"\n".join(lines))
    read(folder, asked)


@repeatable
@given(st.sampled_from(sorted(SOUND)), st.integers(0, 2), st.data())
def test_a_prediction_with_anything_in_it_can_be_scored_or_is_a_line(
    folder, asked, name, number, data
):
    from helpers.evaluation.scoring import all_metrics, shared_text_metrics

    rows = copy.deepcopy(SOUND)
    field = data.draw(st.sampled_from(sorted(ROW_MODELS[KINDS[name]].model_fields)))
    rows[name][number][field] = data.draw(values)
    written(folder, rows)
    predictions, passages = read(folder, asked)
    if predictions is not None:
        all_metrics(asked, predictions)
    if passages is not None:
        shared_text_metrics(passages)


@pytest.mark.parametrize("name", SOUND)
def test_a_prediction_that_lacks_a_field_is_refused_by_line_and_field(folder, asked, name):
    fields = ROW_MODELS[KINDS[name]].model_fields
    for field in [key for key, field in fields.items() if field.is_required()]:
        rows = copy.deepcopy(SOUND)
        del rows[name][1][field]
        written(folder, rows)
        assert f"{name}.jsonl: line 2 lacks {field!r}" in refusal(folder, asked, name)


@pytest.mark.parametrize("name", SOUND)
def test_an_item_that_is_answered_twice_is_refused(folder, asked, name):
    written(folder, SOUND | {name: [*SOUND[name], SOUND[name][0]]})
    assert "line 4 repeats the id of line 1" in refusal(folder, asked, name)


def test_a_score_that_is_not_one_is_refused(folder, asked):
    for score in (1.5, -0.1, float("nan"), True, "1"):
        rows = copy.deepcopy(SOUND)
        rows["arc"][0]["score"] = score
        written(folder, rows)
        with pytest.raises(StudyError, match="line 1 has score = "):
            read_predictions(folder, asked)


@pytest.mark.parametrize("field", ["token_kl", "token_texts"])
def test_a_list_without_one_entry_a_token_is_refused(folder, asked, field):
    rows = copy.deepcopy(SOUND)
    rows["shared_text"][2][field].pop()
    written(folder, rows)
    assert f"line 3 has 49 {field} for 50 tokens" in refusal(folder, asked, "shared_text")
    rows["shared_text"][2][field].append(float("nan"))
    written(folder, rows)
    assert f"line 3 has {field} = " in refusal(folder, asked, "shared_text")


def test_every_way_an_answer_can_end_is_known_to_its_row():
    """Or a finished evaluation could not be read back."""
    from helpers.inference.protocols import AnswerInProgress, StopRules

    ends = StopRules(
        max_new_tokens=2, stop_tokens=frozenset({0}), complete=lambda tokens: 7 in tokens
    )
    tokens = {"nonfinite": (1, False), "stop": (0, True), "answer": (7, True)}
    reasons = {AnswerInProgress(0).append_token(*given, ends) for given in tokens.values()}
    reasons |= {AnswerInProgress(0, tokens=[1]).append_token(1, True, ends), "scored"}
    assert reasons == {*tokens, "length", "scored"}
    assert reasons <= set(FINISH_REASONS)
