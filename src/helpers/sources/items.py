"""Items of a study, and the tables they are read from: rows of any source, in one shape each.

Tables are CSV, parquet and Arrow files, and folders saved by `datasets`. The libraries read: `csv`,
`pyarrow` and `datasets`. What they would pass over in silence is an error here: a row with more or
fewer cells than the header, two columns of one name, a quote that is not closed. A cell of CSV is
text; an empty one is empty text, not a missing value.

A study says which column of a user's file holds which field of its adapter (`columns`). Rows are
in the Hub's schemas, shipped, fetched or from local files, so that adapters know one shape only.
No Hub is asked here: its rows were fetched to the project's cache at one commit
(`helpers.sources.fetching`), so that no job needs a network and all read the same rows. A commit
does not change, so a cached file is right as long as its hash is.

An item holds its content, and what makes two items the same; what it is asked lies in
`helpers.sources.chat` and `helpers.evaluation.prompts`. The exact value of a text that is one
number is read here too, as word problems write their answers: it is used to read what a model
answered, and to tell which gold answers are numbers.
"""

import codecs
import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from helpers.core.errors import StudyError, one_line, valid_unicode
from helpers.core.files import cache_root
from helpers.core.records import (
    read_jsonl,
    sha256_data,
    sha256_file,
    sha256_text,
    write_json,
    write_jsonl,
)
from helpers.study.inputs import FETCH, dataset_files, is_commit, saved_dataset
from helpers.study.schema import (
    FIELDS,
    DatasetSource,
    FileDataset,
    FolderDataset,
    HubDataset,
    ShippedDataset,
)

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
FIELDS_OF_ROWS = {field for fields in FIELDS.values() for field in fields}

LONGEST_NUMBER = 400  # characters; a longer text is no answer to a word problem
LONGEST_UNIT = 6  # words; more of them form a sentence, which may negate the number

_FRACTION = re.compile(r"\\[dt]?frac\{(-?[0-9.,]+)\}\{(-?[0-9.,]+)\}")
_DECORATION = re.compile(
    r"\\(?:text|mathrm|mbox)\{([^{}]*)\}|\\[,;!: ]|\\(?:left|right)(?![A-Za-z])|\\?[$€£]|\\?%"
)
_NO_UNIT = re.compile(  # "2 million", "5 and a half" and "7 squared" are not 2, 5 and 7
    r"\b(?:and|or|to|plus|minus|times|over|half|halves|third|fifth|sixth|eighth|tenth|dozen|gross"
    r"|hundred(?:th)?|thousand(?:th)?|[a-z]*illion(?:th)?|squared|cubed|factorial|choose|mod|root"
    r"|sqrt|pi|not|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)s?\b",
    re.IGNORECASE,
)
_NO_LETTER = re.compile(r"(?:[xyznie]|[kKMB]|bn|mn|mil)\b")  # unknowns, constants, "3k" for 3000
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:/[0-9]+(?:\.[0-9]+)?)?")
_GROUPED = re.compile(r"(?<![0-9.,])([1-9][0-9]{0,2}(?:,[0-9]{3})+)(?![0-9,])")


def csv_rows(text: str, place: str, *, separators: Sequence[str] = tuple(SEPARATORS)) -> list[dict]:
    r"""The rows of a table in CSV whose first row names its columns; blank lines are skipped.

    A cell that holds the separator, a quote or a line end stands in double quotes, a quote in it is
    doubled. The separator is the one that divides the header; a header of one column has none.

    Raises:
        StudyError: the header is missing, ambiguous or names a column twice; a row is no CSV, or
            has another number of cells.
    """
    separator = _separator(text, place, separators)
    records = _records(text, separator)
    header: list[str] | None = None
    rows: list[dict] = []
    try:
        for cells in records:
            if not cells:
                continue
            if header is None:
                header = _checked_header(cells, place)
                continue
            if len(cells) != len(header):
                raise StudyError(
                    f"{place}: row {len(rows) + 1} has {len(cells)} cell{'s' * (len(cells) != 1)} "
                    f"but the header names {len(header)} columns ({_listed(header)}); quote cells "
                    f"that hold a {SEPARATORS[separator]} or a line break, or correct the row"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise StudyError(
            f"{place}: row {len(rows) + 1} is not CSV ({one_line(error)}); close every quote, and "
            "double the quotes inside a quoted cell"
        ) from None
    if header is None:
        raise StudyError(f"{place}: is empty; its first row must name the columns")
    return rows


def _records(text: str, separator: str):
    # The csv module needs the line ends as they are: cells may hold them.
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)


def _separator(text: str, place: str, separators: Sequence[str]) -> str:
    """The separator that divides the header into columns."""
    dividing = []
    for separator in separators:
        try:
            header = next(filter(None, _records(text, separator)), [])
        except csv.Error:
            continue
        if len(header) > 1:
            dividing.append(separator)
    if len(dividing) > 1:
        names = " and ".join(SEPARATORS[separator] for separator in dividing)
        raise StudyError(
            f"{place}: its header may be divided by {names}; leave one of them out of the "
            "columns' names, or quote the names"
        )
    return (*dividing, separators[0])[0]


def _checked_header(header: list[str], place: str) -> list[str]:
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise StudyError(
            f"{place}: names the column {one_line(repr(repeated[0]))} more than once; rename one"
        )
    return header


def _listed(names: Sequence[str]) -> str:
    shown = [one_line(repr(name))[:40] for name in names[:12]]
    return ", ".join([*shown, f"{len(names) - 12} more"] if len(names) > 12 else shown)


def parquet_rows(path: Path, place: str) -> list[dict]:
    """The rows of a parquet file.

    Raises:
        StudyError: it is no parquet, or two of its columns have one name.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return _table_rows(pyarrow.parquet.ParquetFile(path).read(), place)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _unreadable(error, place, "parquet") from None


def arrow_rows(path: Path, place: str) -> list[dict]:
    """The rows of an Arrow file: a stream, as `datasets` writes it, or a file, as Feather.

    Raises:
        StudyError: as `parquet_rows`.
    """
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as content:
            try:
                table = pyarrow.ipc.open_stream(content).read_all()
            except pyarrow.ArrowInvalid:
                content.seek(0)
                table = pyarrow.ipc.open_file(content).read_all()
            return _table_rows(table, place)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _unreadable(error, place, "Arrow") from None


def saved_rows(folder: Path, place: str) -> list[dict]:
    """The rows of a dataset that `save_to_disk` wrote into a folder.

    Raises:
        StudyError: `datasets` cannot load it, or two of its columns have one name.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
        return _table_rows(saved.with_format("arrow")[:], place)
    except StudyError:
        raise
    except Exception as error:  # pyarrow, fsspec and datasets each have their own
        raise _unreadable(error, place, "a dataset that save_to_disk wrote") from None


def _unreadable(error: Exception, place: str, description: str) -> StudyError:
    if isinstance(error, StudyError):
        return error
    return StudyError(f"{place}: is not {description} ({one_line(error)[:200]}); mend it")


def _table_rows(table, place: str) -> list[dict]:
    """The rows of a table, each class label of `datasets` by its name instead of its number."""
    _checked_header(table.column_names, place)
    table.validate(full=True)  # offsets of a damaged file may lead out of it
    rows = table.to_pylist()
    for column, labels in _class_labels(table.schema).items():
        for row in rows:
            if row[column] is not None:
                # -1 stands for an unlabelled row
                row[column] = labels.int2str(row[column]) if row[column] >= 0 else None
    return rows


def _class_labels(schema) -> dict[str, Any]:
    """The columns of class labels, of a table that `datasets` wrote; else empty."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    import datasets

    try:
        features = datasets.Features.from_arrow_schema(schema)
    except (KeyError, TypeError, AttributeError) as error:  # metadata that it did not write
        raise ValueError(f"its description is damaged: {error}") from None
    return {n: f for n, f in features.items() if isinstance(f, datasets.ClassLabel)}


def with_fields(rows: list[dict], source: FileDataset | FolderDataset, place: str) -> list[dict]:
    """Rows of a user's file with the adapter's fields, taken from the source's `columns`.

    Fields that `columns` does not name keep the column of their own name. Of `choices` and
    `answers`, a list of texts or several columns become the Hub's lists; an empty cell among
    several columns is no option or answer. Options without labels get those of `labels`, or A, B,
    C, …. Whole numbers become their digits. A row without an id gets a hash of its fields.

    Raises:
        StudyError: no row has the column, or there are more options than labels.
    """
    columns = source.columns or {}
    if source.labels:
        columns = {"choices": "choices"} | columns
    if not columns or not rows:
        return rows
    names = list(dict.fromkeys(name for row in rows for name in row))
    for field, column in columns.items():
        for name in [column] if isinstance(column, str) else column:
            if name not in names:
                raise StudyError(
                    f"{place}: has no column {one_line(repr(name))} for {field}; its columns: "
                    f"{_listed(names)}"
                )
    labels, renamed = source.labels or tuple(ascii_uppercase), []
    for number, row in enumerate(rows, start=1):
        try:
            renamed.append(_with_fields(row, columns, labels))
        except ValueError as error:
            raise StudyError(f"{place}: row {number} {error}") from None
    return renamed


def _with_fields(row: dict, columns: dict, labels: tuple[str, ...]) -> dict:
    fields = dict(row)
    for field, column in columns.items():
        if isinstance(column, str) and column not in row:
            fields.pop(field, None)
            continue
        several = not isinstance(column, str)
        value = [row.get(name) for name in column] if several else row[column]
        match field:
            case "choices":
                fields[field] = _choices(value, labels, several=several)
            case "answers":
                fields[field] = _answers(value, several=several)
            case _:
                fields[field] = _digits(value)
    if "id" not in fields:
        known = {name: value for name, value in fields.items() if name in FIELDS_OF_ROWS}
        fields["id"] = sha256_text(json.dumps(known, sort_keys=True, default=str))[:16]
    return fields


def _digits(value: Any) -> Any:
    """A whole number as text; any other value unchanged."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _choices(value: Any, labels: tuple[str, ...], *, several: bool) -> Any:
    """The options as {label, text}; a value of another shape unchanged, for the adapter."""
    if isinstance(value, dict) and "label" not in value:
        value = value.get("text")
    if not isinstance(value, list | tuple):
        return value
    if len(value) > len(labels):
        raise ValueError(
            f"has {len(value)} options but there are {len(labels)} labels "
            f"({', '.join(labels)}); name as many labels"
        )
    options = [(label, _digits(text)) for label, text in zip(labels, value, strict=False)]
    if several:
        options = [(label, text) for label, text in options if not _is_empty(text)]
    return {"label": [label for label, _ in options], "text": [text for _, text in options]}


def _answers(value: Any, *, several: bool) -> Any:
    """The gold answers as {text: […]}; a value of another shape unchanged, for the adapter."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, list | tuple):
        value, several = [value], True
    texts = [_digits(text) for text in value]
    return {"text": [text for text in texts if not (several and _is_empty(text))]}


def parse_number(text: str) -> Fraction | None:
    r"""The exact value of a text that is one number, with its unit or dollar sign.

    Understands signs, decimals, thousands separators, `3/4`, `\frac{3}{4}` and units
    after the number (`12 \text{ km}`, `12 apples`); anything else is None, as is a word or
    letter after it that may change its value (`2 million`, `7 squared`, `3k`, `3x`).
    """
    if len(text) > LONGEST_NUMBER:
        return None
    plain = re.sub(r",\\!|\{,\}", ",", text)
    plain = _FRACTION.sub(lambda m: f" {m[1]}/{m[2]} ", plain)  # apart from a number beside it
    plain = _DECORATION.sub(lambda m: f" {m[1]}" if m[1] else " ", plain)
    plain = _GROUPED.sub(lambda m: m[1].replace(",", ""), plain)
    plain = re.sub(r"^\s*([+-])\s+", r"\1", plain.strip().rstrip("."))
    numbers = _NUMBER.findall(plain)
    if len(numbers) != 1 or not plain.startswith(numbers[0]):
        return None
    unit = plain[len(numbers[0]) :].strip()
    if unit and not _is_unit(unit):
        return None
    try:
        return Fraction(numbers[0]) if "/" not in numbers[0] else _ratio(numbers[0])
    except (ValueError, ZeroDivisionError):
        return None


def _is_unit(rest: str) -> bool:
    """Whether the text after a number is its unit and does not change its value."""
    if _NO_UNIT.search(rest) or _NO_LETTER.match(rest) or len(rest.split()) > LONGEST_UNIT:
        return False
    return re.fullmatch(r"[A-Za-z][A-Za-z ./^]*", rest) is not None


def _ratio(text: str) -> Fraction:
    above, below = text.split("/")
    return Fraction(above) / Fraction(below)


def gold_number(text: str) -> Fraction | None:
    """As `parse_number` for a gold answer, in which `3x` is an expression and not a unit."""
    return None if re.search(r"[0-9][A-Za-z]+$", text) else parse_number(text)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: the row's own id, or a hash of its content.
        question: the question or problem.
        passage: the text that the question is about, empty if none.
        options: option texts of a multiple-choice item; yes/no for BoolQ.
        labels: the options' labels in the source ("A"…, "1"…).
        golds: gold answers: one label, or several texts of which any is right; empty if
            unanswerable.
        cluster: items with the same value share a passage and are not independent.
        title: the title of the passage's source, empty if none.
        solution: a worked solution to train on, empty if none.
    """

    id: str
    question: str
    golds: tuple[str, ...]
    passage: str = ""
    options: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    cluster: str = ""
    title: str = ""
    solution: str = ""


def normalized_text(text: str) -> str:
    """Case-folded words and operators without punctuation or accents.

    Texts with the same result count as equal; `2 + 3` and `2 - 3` stay different.
    """
    folded = text.casefold() if text.isascii() else "".join(map(_bare, text))
    return " ".join(re.findall(r"\w+|[+*/=<>^%]|-(?=\s*\d)", folded))


@cache
def _bare(character: str) -> str:
    """A character decomposed, case-folded and without accents.

    Characters are normalized one by one: NFKD sorts the accents of a text in quadratic time.
    """
    folded = unicodedata.normalize("NFKD", character).casefold()
    return "".join(c for c in folded if not unicodedata.combining(c))


@lru_cache(maxsize=2**17)  # every draw needs the key of every item
def item_key(item: Item) -> str:
    """A key that is equal for equal questions, regardless of ids and order of options."""
    parts = (item.question, item.passage, *sorted(item.options))
    return sha256_text("\n".join(map(normalized_text, parts)))


def text_of(value) -> str:
    """The value, if it is a non-blank text.

    Raises:
        ValueError: it is no text, blank, or holds an unpaired surrogate.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} stands where a text belongs")
    return _whole(value)


def _whole(value) -> str:
    """The value, if it is a text; empty for None.

    Raises:
        ValueError: it is no text, or holds an unpaired surrogate.
    """
    text = "" if value is None else value
    if not isinstance(text, str):
        raise ValueError(f"{value!r} stands where a text belongs")
    if text != valid_unicode(text):
        raise ValueError(f"{value!r} holds half a character")
    return text


def _texts(values) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{values!r} stands where a list of texts belongs")
    return tuple(text_of(value) for value in values)


def label_key(label: str) -> str:
    """A key that is equal for labels that read alike: `A`, `a` and ` A.`."""
    return label.strip().rstrip(".").casefold()


def adapt_arc(row: dict) -> Item:
    """`allenai/ai2_arc`: three to five options, labelled by letters or digits."""
    labels, options = _texts(row["choices"]["label"]), _texts(row["choices"]["text"])
    if len(labels) != len(options) or len(set(map(label_key, labels))) != len(labels):
        raise ValueError(f"labels {labels} do not name {len(options)} options")
    if row["answerKey"] not in labels:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of the labels {labels}")
    return Item(
        id=text_of(row["id"]),
        question=text_of(row["question"]),
        options=options,
        labels=labels,
        golds=(row["answerKey"],),
        cluster=row["id"],
    )


TRUTH_VALUES = {"true": True, "yes": True, "false": False, "no": False}


def adapt_boolq(row: dict) -> Item:
    """`google/boolq`: rows have no ids, so the id is a hash of the content.

    CSV has texts only; `true`, `false`, `yes` and `no` are read in any case.
    """
    answer = row["answer"]
    if isinstance(answer, str):
        answer = TRUTH_VALUES.get(answer.strip().lower())
    if not isinstance(answer, bool):
        raise ValueError(f"answer {row['answer']!r} is not true or false")
    return Item(
        id=sha256_data([text_of(row["question"]), text_of(row["passage"])])[:16],
        question=row["question"],
        passage=row["passage"],
        options=("yes", "no"),
        labels=("yes", "no"),
        golds=("yes" if answer else "no",),
        cluster=sha256_text(row["passage"])[:16],
    )


def adapt_squad_v2(row: dict) -> Item:
    """`rajpurkar/squad_v2`: keeps every gold answer; without any the item is unanswerable."""
    return Item(
        id=text_of(row["id"]),
        question=text_of(row["question"]),
        passage=text_of(row["context"]),
        golds=tuple(dict.fromkeys(_texts(row["answers"]["text"]))),
        cluster=sha256_text(row["context"])[:16],
        title=_whole(row.get("title")),
    )


def adapt_openmath(row: dict) -> Item:
    """`nvidia/OpenMathInstruct-2`: the expected answer is a string, not always a number."""
    identifier = sha256_data([text_of(row["problem"]), text_of(row["expected_answer"])])[:16]
    return Item(
        id=identifier,
        question=row["problem"],
        golds=(row["expected_answer"],),
        cluster=identifier,
        solution=_whole(row.get("generated_solution")),
    )


ADAPTERS: dict[str, Callable[[dict], Item]] = {
    "arc": adapt_arc,
    "boolq": adapt_boolq,
    "squad_v2": adapt_squad_v2,
    "openmath": adapt_openmath,
}


EXPECTED_ROWS = {
    "arc": "{id: text, question: text, choices: {label: [text], text: [text]}, answerKey: text}",
    "boolq": "{question: text, passage: text, answer: true or false}",
    "squad_v2": "{id: text, question: text, context: text, answers: {text: [text]}}",
    "openmath": "{problem: text, expected_answer: text}",
}
EXPECTED_PASSAGE = "{context: text}"
MOST_KEYS, MOST_CHARACTERS = 8, 24


def describe_value(value: Any, *, depth: int = 2) -> str:
    """The type of a value in words; of a mapping by its keys, of a list by its first value."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "number"
        case str():
            return "text" if value.strip() else "empty text"
        case dict() if depth:
            return _mapping(value, depth)
        case dict():
            return "{…}"
        case list() | tuple() if depth and value:
            return f"[{describe_value(value[0], depth=depth - 1)}]"
        case list() | tuple():
            return "[…]" if value else "[]"
    return type(value).__name__


def _mapping(value: dict, depth: int) -> str:
    keys = [f"{_short(key)}: {describe_value(value[key], depth=depth - 1)}" for key in list(value)]
    more = [f"{len(keys) - MOST_KEYS} more"] if len(keys) > MOST_KEYS else []
    return "{" + ", ".join(keys[:MOST_KEYS] + more) + "}"


def _short(key: Any) -> str:
    text = one_line(key)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"


def rows_file(source: HubDataset) -> Path:
    """The cache file for the rows of a source that is pinned to a commit."""
    label = "-".join((source.hub, source.config or "default", source.split))
    name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', label)}-{sha256_data(source.model_dump())[:12]}"
    return cache_root() / "datasets" / f"{name}.jsonl"


def cache_rows(source: HubDataset, rows: list[dict], **details) -> dict:
    """Write the rows of a source to the cache; return their number, hash and `details`.

    Raises:
        StudyError: JSON cannot hold a value of a row, such as a picture.
    """
    path = rows_file(source)
    try:
        write_jsonl(path, rows)
    except (TypeError, ValueError) as error:
        raise StudyError(
            f"its rows hold values that are no text ({error}); name another dataset"
        ) from None
    info = {"rows": len(rows), **details, "sha256": sha256_file(path)}
    write_json(path.with_suffix(".json"), {"source": source.model_dump(), **info})
    return info


def cached_rows_info(source: HubDataset) -> dict | None:
    """Number and hash of the cached rows of a source; None if they are missing or damaged."""
    path = rows_file(source)
    if not is_commit(source.revision) or not path.is_file():
        return None
    try:
        info = json.loads(path.with_suffix(".json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(info, dict) or info.get("sha256") != sha256_file(path):
        return None
    return {key: value for key, value in info.items() if key != "source"}


def cached_rows(source: HubDataset) -> list[dict]:
    """The rows of a source, from the cache.

    Raises:
        StudyError: the rows were not fetched, or differ from the fetched ones.
    """
    label, remedy = f"{source.hub} ({source.split})", f"run {FETCH} STUDY=… with this study"
    if not is_commit(source.revision):
        raise StudyError(f"{label} at {source.revision!r} is not pinned to a commit; {remedy}")
    if cached_rows_info(source) is None:
        raise StudyError(f"{label}: its rows are not on this machine; {remedy}")
    return read_jsonl(rows_file(source), made_by=FETCH)


EXPECTED_FORMAT = "expected JSON lines: one object per line, as {…}"


def load_rows(source: DatasetSource) -> list[dict]:
    """All rows of a source in its order; several files are read in the order of their names.

    Raises:
        StudyError: the source cannot be read.
    """
    match source:
        case ShippedDataset(shipped=name):
            data = files("helpers.sources").joinpath(f"data/{name}.jsonl").read_bytes()
            return _json_lines(data, name)
        case FileDataset(file=place) | FolderDataset(folder=place):
            return with_fields(local_rows(source), source, place)
        case HubDataset():
            return cached_rows(source)
    raise StudyError(f"{source!r} is not a kind of dataset source")


def local_rows(source: FileDataset | FolderDataset) -> list[dict]:
    """The rows of a local source as its files have them, before `columns` is applied.

    Raises:
        StudyError: a file cannot be read.
    """
    if isinstance(source, FolderDataset):
        if saved := saved_dataset(source):
            return saved_rows(saved, source.folder)
        paths = {path: f"{source.folder}/{path.name}" for path in dataset_files(source)}
    else:
        whole = "*" not in source.file
        paths = {path: source.file if whole else str(path) for path in dataset_files(source)}
    return [row for path, place in paths.items() for row in _file_rows(path, place)]


def _file_rows(path: Path, place: str) -> list[dict]:
    match path.suffix.lower():
        case ".csv":
            return csv_rows(_decoded(path.read_bytes(), place), place)
        case ".tsv":
            return csv_rows(_decoded(path.read_bytes(), place), place, separators=("\t",))
        case ".parquet":
            return parquet_rows(path, place)
        case ".arrow":
            return arrow_rows(path, place)
    return _json_lines(path.read_bytes(), place)


def _json_lines(data: bytes, place: str) -> list[dict]:
    """The objects of JSON lines; blank lines are skipped."""
    text, rows = _decoded(data, place), []
    if not text.strip():
        raise StudyError(f"{place}: line 1 is empty, and so are all; {EXPECTED_FORMAT}")
    # Only \n ends a line: texts may hold other separators that splitlines() would cut at.
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            description = _describe_document(text) or (_describe_table(line) if number == 1 else "")
            problem = f"is {description}" if description else f"line {number} is not JSON ({error})"
            raise StudyError(f"{place}: {problem}; {EXPECTED_FORMAT}") from None
        if not isinstance(row, dict):
            description = _describe_document(text) or f"line {number} is {describe_value(row)}"
            raise StudyError(f"{place}: {description}; {EXPECTED_FORMAT}")
        rows.append(row)
    return rows


def _decoded(data: bytes, place: str) -> str:
    """The bytes decoded from UTF-8.

    Raises:
        StudyError: they are in UTF-16 or not UTF-8.
    """
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if is_utf16 or (b"\0" in data[:64] and b"{" in data[:4]):
        raise StudyError(f"{place}: is in UTF-16; save it in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise StudyError(f"{place}: line {line} is not UTF-8 ({error}); save it in UTF-8") from None


def _describe_document(text: str) -> str:
    """A description of a text that is one JSON value; empty if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if isinstance(value, list):
        return f"one JSON array of {len(value)} values, the first {describe_value(value[:1])[1:-1]}"
    return f"one JSON value over several lines, {describe_value(value)}"


def _describe_table(line: str) -> str:
    """A description of the first line if it looks like a table header; else empty."""
    for separator, name in (("\t", "TSV"), (",", "CSV"), (";", "CSV")):
        if separator in line and not line.lstrip().startswith(("{", "[")):
            return f"a table in {name} ({one_line(line)[:80]})"
    return ""
