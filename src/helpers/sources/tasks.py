"""Items and requests of a task of lm-evaluation-harness, built and scored by the harness itself.

The harness's `ConfigurableTask` renders every request, applies its filters and computes its
metrics. Its rows come from this project's sources instead of a download: a local file, or the
cached rows of a pinned commit. The harness is imported when a study first needs it.

Worked examples are those of a whole run of the harness with its default seed. It draws them while
it goes through the split in order, so that the requests of all items are built where examples are
drawn. Templates of a task file of one's own run in a sandbox, unless the study trusts its code.

Without right or wrong options (`loglikelihood`, `loglikelihood_rolling`) an item gets a foil, whose
likelihood is read beside the target's: the target of another item, or the last words of the text in
reverse order.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from typing import Any

from helpers.core.errors import StudyError, one_line
from helpers.core.records import sha256_data
from helpers.sources.items import Item, load_rows, text_of
from helpers.study.inputs import dataset_files, task_sources
from helpers.study.schema import FileDataset, TaskSet
from helpers.study.tasks import is_own_file

EXAMPLES_SEED = 1234  # the harness's default for worked examples
PASSAGES = ("passage", "context", "article", "story")  # fields that several rows may share
FOIL_WORDS = 64
IN_ORDER, REVERSED = "the text in its order", "its words reversed"


@dataclass(frozen=True)
class Request:
    """What the harness asks about one item.

    Attributes:
        text: before the answer, or before every continuation.
        continuations: the texts whose likelihood is asked; empty for a written answer.
        until: texts that end a written answer.
        delimiter: the text between the request and a written answer.
        whole: the continuation is a whole text.
        shared: what the requests of all items begin with: a description, fixed examples.
    """

    text: str
    continuations: tuple[str, ...] = ()
    until: tuple[str, ...] = ()
    delimiter: str = ""
    whole: bool = False
    shared: str = ""


def task_items(task_set: TaskSet) -> tuple[tuple[Item, ...], int]:
    """(items of the evaluated split without repeated ones, number of rows).

    Raises:
        StudyError: the harness cannot read the rows by this task, or an item has no target.
    """
    task = _opened(task_set)
    return task.items, len(task.docs)


def task_request(task_set: TaskSet, item: Item) -> Request:
    """The harness's request for an item.

    Raises:
        StudyError: the task asks in a way that is not asked here.
    """
    return _opened(task_set).request(item.id)


def with_foils(items: Sequence[Item], task_set: TaskSet) -> list[Item]:
    """The items, each with its target and a foil as its options, if the task has no options."""
    kind = task_set.read.output_type
    if kind not in ("loglikelihood", "loglikelihood_rolling"):
        return list(items)
    if kind == "loglikelihood_rolling":
        return [replace(i, options=(i.question, reversed_words(i.question))) for i in items]
    return [
        replace(item, options=(item.golds[0], *_other_target(items, place)))
        for place, item in enumerate(items)
    ]


def reversed_words(text: str) -> str:
    """The last words of a text in reverse order: enough for a mean over tokens."""
    return " ".join(reversed(text.split()[-FOIL_WORDS:]))


def _other_target(items: Sequence[Item], place: int) -> tuple[str, ...]:
    """The target of the next item that has another one; empty if none has."""
    own = items[place].golds[0].strip().casefold()
    following = [*items[place + 1 :], *items[:place]]
    return next(
        ((other.golds[0],) for other in following if other.golds[0].strip().casefold() != own), ()
    )


def harness_metrics(task_set: TaskSet, item: Item, responses: Sequence[Any]) -> dict[str, Any]:
    """The harness's metrics of one item by `metric,filter`, and its filtered answers.

    Args:
        responses: one per request: (log-likelihood, whether it is greedy), a log-likelihood
            for a whole text, or the written answer.

    Returns:
        `metrics` by name, pairs as [sum, count], and `filtered` answers by filter.

    Raises:
        StudyError: the harness cannot score the answer.
    """
    return _opened(task_set).score(item.id, responses)


def _opened(task_set: TaskSet) -> "_Task":
    files = [
        p for s in task_sources(task_set) if isinstance(s, FileDataset) for p in dataset_files(s)
    ]
    return _open_cached(task_set, tuple((str(p), p.stat().st_mtime_ns) for p in files))


@lru_cache(maxsize=8)
def _open_cached(task_set: TaskSet, _files: tuple) -> "_Task":
    return _Task(task_set)


class _Task:
    """A task of the harness on the rows of its sources."""

    def __init__(self, task_set: TaskSet):
        self.task_set, self.label = task_set, f"task {task_set.task}"
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        try:
            self.task = _harness_task(task_set)
            self.docs = list(self.task.eval_docs)
        except StudyError:
            raise
        except Exception as error:  # templates and code of a task may raise anything
            raise StudyError(
                f"{self.label}: the harness cannot read its rows by this task "
                f"({type(error).__name__}: {one_line(error)}); correct the task file or the rows"
            ) from None
        self._row_of: dict[str, int] = {}
        self._contexts: list[Any] = []
        self.items = tuple(self._items())

    def _items(self):
        keys = set()
        for row, doc in enumerate(self.docs):
            try:
                item = self._item(doc)
            except StudyError:
                raise
            except Exception as error:
                raise self._row_error(row, f"{type(error).__name__}: {one_line(error)}") from None
            if not item.golds:
                raise self._row_error(row, "it has no right answer")
            key = (item.question, item.options, item.golds)
            if item.id not in self._row_of and key not in keys:
                keys.add(key)
                self._row_of[item.id] = row
                yield item

    def _row_error(self, row: int, reason: str) -> StudyError:
        return StudyError(f"{self.label}: row {row + 1} is no item ({reason}); correct it")

    def _item(self, doc: dict) -> Item:
        kind, task = self.task_set.read.output_type, self.task
        identifier = sha256_data(_plain(doc))[:16]
        shared = next((doc[k] for k in PASSAGES if isinstance(doc.get(k), str) and doc[k]), "")
        cluster = sha256_data(shared)[:16] if shared else identifier
        target = task.doc_to_target(doc)
        if kind == "loglikelihood_rolling":
            return Item(identifier, text_of(target), (IN_ORDER,), cluster=cluster)
        question = task.doc_to_text(doc)
        if not isinstance(question, str):
            raise StudyError(
                f"{self.label}: its options are contexts of one ending (multiple inputs), which "
                "is not asked here; choose another task"
            )
        if kind != "multiple_choice":
            if task.config.doc_to_choice is not None and isinstance(target, int):
                target = task.doc_to_choice(doc)[target]
            golds = target if isinstance(target, list) else [target]
            golds = tuple(dict.fromkeys(str(gold) for gold in golds if str(gold).strip()))
            return Item(identifier, question, golds, cluster=cluster)
        options = tuple(map(str, task.doc_to_choice(doc)))
        labels = tuple(map(str, range(len(options))))
        golds = tuple(
            labels[place]
            for gold in (target if isinstance(target, list) else [target])
            if (place := _place(gold, options)) is not None
        )
        return Item(identifier, question, golds, "", options, labels, cluster)

    def request(self, item_id: str) -> Request:
        """The harness's request for one item."""
        instances = self._instances(self._row_of[item_id])
        kind, first = self.task_set.read.output_type, instances[0].args
        if kind == "loglikelihood_rolling":
            return Request("", (first[0],), whole=True)
        if kind == "generate_until":
            until = first[1].get("until") or []
            until = [until] if isinstance(until, str) else until
            until = tuple(text for text in until if text)
            delimiter = self.task.config.target_delimiter
            return Request(first[0], (), until, delimiter, shared=self._shared())
        if len({i.args[0] for i in instances}) != 1:
            raise StudyError(
                f"{self.label}: its options have contexts of their own, which is not asked here; "
                "choose another task or metric"
            )
        return Request(first[0], tuple(i.args[1] for i in instances), shared=self._shared())

    def _shared(self) -> str:
        """The worked examples that all requests begin with, up to the end of the last one."""
        contexts = self._contexts
        if not contexts or not all(isinstance(context, str) for context in contexts):
            return ""
        columns = zip(contexts[0], contexts[len(contexts) // 2], contexts[-1], strict=False)
        same = takewhile(lambda column: len(set(column)) == 1, columns)
        common = "".join(column[0] for column in same)
        delimiter = self.task.config.fewshot_delimiter
        return common[: common.rfind(delimiter) + len(delimiter)] if delimiter in common else ""

    def _instances(self, row: int) -> list:
        task, doc = self.task, self.docs[row]
        metadata = (task.config.task, row, 1)
        instances = task.construct_requests(doc=doc, ctx=self._context(row), metadata=metadata)
        return instances if isinstance(instances, list) else [instances]

    def _context(self, row: int) -> str:
        """The text before the answer, with worked examples as a run over all rows draws them."""
        if not self.task_set.shots:
            return self._rendered(self.docs[row])
        if not self._contexts:
            self.task.set_fewshot_seed(EXAMPLES_SEED)
            self._contexts = [self._rendered(doc) for doc in self.docs]
        return self._contexts[row]

    def _rendered(self, doc: dict) -> str:
        shots = self.task_set.shots
        try:
            prefix = self.task.doc_to_prefix(doc)
            return self.task.fewshot_context(doc, num_fewshot=shots, gen_prefix=prefix)
        except Exception as error:
            raise StudyError(
                f"{self.label}: the harness cannot build a request "
                f"({type(error).__name__}: {one_line(error)}); correct the task file"
            ) from None

    def score(self, item_id: str, responses: Sequence[Any]) -> dict[str, Any]:
        """The harness's metrics of one item, and its filtered answers."""
        row = self._row_of[item_id]
        instances = self._instances(row)
        if self.task_set.read.output_type not in ("multiple_choice",):
            responses = responses[:1]
        for instance, response in zip(instances, responses, strict=True):
            instance.resps = [response]
        metrics, filtered = {}, {}
        try:
            for pipeline in self.task._filters:
                pipeline.apply(instances)
            for name in instances[0].filtered_resps:
                answers = [instance.filtered_resps[name] for instance in instances]
                filtered[name] = answers[0]
                values = self.task.process_results(self.docs[row], answers)
                metrics |= {f"{metric},{name}": _number(v) for metric, v in values.items()}
        except Exception as error:
            raise StudyError(
                f"{self.label}: the harness cannot score item {item_id} "
                f"({type(error).__name__}: {one_line(error)}); correct the task file"
            ) from None
        return {"metrics": metrics, "filtered": filtered}


def _place(gold: Any, options: Sequence[str]) -> int | None:
    """The place of a right option, which the harness takes as an index or a text."""
    if isinstance(gold, str):
        return options.index(gold) if gold in options else None
    return int(gold) if 0 <= int(gold) < len(options) else None


def _plain(value: Any) -> Any:
    """A row's value as JSON can hold it, alike for 1 and 1.0, and for null and a missing field.

    The harness's tables give the values of a column one type, and every row all fields.
    """
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    return f"{float(value):.17g}" if isinstance(value, int | float) else str(value)


def _number(value: Any) -> Any:
    """A metric's value for one item: a number, [sum, count], or None for any other."""
    if isinstance(value, tuple | list) and len(value) == 2:
        pair = [_number(v) for v in value]
        return pair if all(isinstance(v, int | float) for v in pair) else None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _harness_task(task_set: TaskSet):
    """The harness's task of a file, on the rows of its sources."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    datasets.disable_progress_bars()
    definition = task_set.read
    config = load_yaml(definition.file)
    own = is_own_file(task_set.task)
    _prepare_templates(sandboxed=own and not task_set.trust_task_code)
    config = {k: v for k, v in config.items() if k not in ("tag", "group", "task_list", "class")}
    config["num_fewshot"] = task_set.shots
    sources = dict(
        zip(definition.splits, (definition.source, definition.shots_source), strict=True)
    )
    rows = {name: load_rows(source) for name, source in sources.items() if name and source}
    rows[definition.splits[0]] = load_rows(definition.source)
    config = _with_these_splits(config, rows)
    tables = {name: _table(datasets, of_split) for name, of_split in rows.items()}

    class TaskOnRows(ConfigurableTask):
        """The harness's task, on rows that this project read."""

        def download(self, dataset_kwargs=None, **_):
            self.dataset = datasets.DatasetDict(tables)

    return TaskOnRows(config=config)


def _with_these_splits(config: dict, rows: dict) -> dict:
    """The settings without splits that are not read, so that the harness opens none of them."""
    splits = ("training_split", "validation_split", "test_split", "fewshot_split")
    kept = {k: v for k, v in config.items() if k not in splits or v in rows}
    examples = dict(kept.get("fewshot_config") or {})
    if examples.get("split") not in (None, *rows):
        del examples["split"]
    if examples:
        kept["fewshot_config"] = examples
    return kept


def _table(datasets, rows: list[dict]):
    """Rows as a dataset; a field that some rows lack is null there."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def _prepare_templates(*, sandboxed: bool) -> None:
    """Keep compiled templates, as the harness compiles each for every row: 0.5 ms instead of 0.02.

    In a sandbox templates reach no Python; outside one they can run any code.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from lm_eval import utils

    environment = utils.env
    if sandboxed and not isinstance(environment, ImmutableSandboxedEnvironment):
        environment = ImmutableSandboxedEnvironment(
            loader=utils.env.loader, undefined=utils.env.undefined, keep_trailing_newline=True
        )
        environment.filters |= utils.env.filters
        utils.env = environment
    if not hasattr(environment.from_string, "cache_info"):
        environment.from_string = lru_cache(maxsize=256)(environment.from_string)
