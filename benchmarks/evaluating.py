"""A whole evaluation, INT8 against the float models; and how its cost grows with the items."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from benchmarks.agreement import Agreement
from benchmarks.material import Material
from benchmarks.turns import Comparison, Turns, take_turns
from helpers.evaluation.engine import evaluate
from helpers.inference.perplexity import read_passages
from helpers.sources.items import Item
from helpers.sources.sampling import draw_items, load_items

SIZES = (50, 100, 200)
GROWING = ("arc", "openmath")  # a set of each protocol
LINEAR = 0.9  # of the cost an item at the smallest size, that each larger size has to stay at


def compare(material: Material) -> list[Comparison]:
    """Compare runtimes on all evaluation sets and the shared text of the study."""
    models = _models(material) | {"bfloat16": material.float_model("bfloat16")}
    ways = {name: partial(whole, model, material) for name, model in models.items()}
    turns = take_turns(ways, rounds=material.rounds)
    return [_row(turns, "float32", 1.5), _row(turns, "bfloat16", 1.0)]


def _models(material: Material) -> dict:
    return {"float32": material.float_model(), "INT8": material.int8_model()}


def _row(turns: Turns, peer: str, goal: float) -> Comparison:
    pairs = list(zip(turns.answers["INT8"][0], turns.answers[peer][0], strict=True))
    same = sum(a["parsed"] == b["parsed"] for a, b in pairs)
    return Comparison(
        what=f"a whole evaluation: {len(pairs)} items in four sets, and the shared text",
        ours="INT8",
        peer=f"ours in {peer}",
        ours_spent=turns.seconds["INT8"],
        peer_spent=turns.seconds[peer],
        goal=goal,
        agreement=Agreement(f"{same} of {len(pairs)} items read alike; another model"),
    )


def whole(model, material: Material, _turn: int) -> list[dict]:
    """The predictions of all sets; the shared text is read too."""
    settings = material.study.evaluation
    predictions = material.ask(model, settings.datasets, None)
    read_passages(model, material.passages(None), batch_tokens=settings.batch.tokens)
    return predictions


def growth(material: Material) -> list[Comparison]:
    """Milliseconds an item at several sizes, against the smallest of them."""
    sizes = [min(size, material.most * (i + 1)) for i, size in enumerate(SIZES)]
    ways = {
        (name, size): partial(ask_items, model, material, size)
        for name, model in _models(material).items()
        for size in sizes
    }
    turns = take_turns(ways, rounds=material.rounds)
    each = {
        key: [1000 * s / (len(GROWING) * key[1]) for s in seconds]
        for key, seconds in turns.seconds.items()
    }
    return [
        Comparison(
            what=f"an item of {size} in each of {' and '.join(GROWING)}{_said(material, size)}",
            ours=name,
            peer=f"at {sizes[0]} items a set",
            ours_spent=each[name, size],
            peer_spent=each[name, sizes[0]],
            goal=LINEAR if size > sizes[0] else None,
            agreement=_same_beginning(turns, name, sizes[0], size),
            unit="ms",
        )
        for name, size in ways
    ]


def _said(material: Material, size: int) -> str:
    again = [sum(i.id.endswith(AGAIN) for i in items) for _, items in _sets(material, size)]
    return f" ({sum(again)} of {len(GROWING) * size} drawn again)" if any(again) else ""


def _same_beginning(turns: Turns, name: str, small: int, size: int) -> Agreement:
    """Check that the items of the smallest evaluation get the same answers in larger ones."""
    a, b = (turns.answers[name, s][-1] for s in (small, size))
    same = sum(p == b[key] for key, p in a.items())
    return Agreement(f"{same} of {len(a)} items of the smallest answered alike", same == len(a))


def ask_items(model, material: Material, size: int, _turn: int) -> dict[tuple[str, str], str]:
    """(set, item id) → answer, for so many items of each set."""
    limits, answers = material.study.evaluation.batch, {}
    for name, items in _sets(material, size):
        evaluation_set = material.study.evaluation.datasets[name]
        for p in evaluate(model, material.tokenizer, items, evaluation_set, limits=limits):
            answers[name, p["id"]] = (p["output"], p.get("logprobs"))
    return answers


AGAIN = "-again"


def _sets(material: Material, size: int) -> Iterator[tuple[str, list[Item]]]:
    """So many items of each set; beyond the shipped ones, copies with changed wording.

    A word before question and passage keeps a repeated item from sharing anything that
    was read for the first one.
    """
    study = material.study
    for name in GROWING:
        evaluation_set = study.evaluation.datasets[name]
        known = load_items(evaluation_set.source, adapter=evaluation_set.adapter)
        items = draw_items(known, min(size, len(known)), seed=study.seed, excluding=(), label=name)
        items += [_again(item) for item in items[: size - len(items)]]
        yield name, items


def _again(item: Item) -> Item:
    passage = item.passage and f"Again: {item.passage}"
    question = f"Again: {item.question}"
    return replace(item, id=item.id + AGAIN, passage=passage, question=question)
