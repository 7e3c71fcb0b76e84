"""The bundled word problems: two JSONL files in the schema of OpenMathInstruct-2.

`python -m tools.word_problems` rewrites both files under data/ from fixed
seeds, byte for byte the same on Python 3.11 and later. The wording and the arithmetic
are in `word_problem_templates`. Reading the files and scoring answers are left out:
the study treats them like any other dataset.

Each template draws from its own stream, so editing one leaves the items of the others
as they were.
"""

import json
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from random import Random

from tools.word_problem_templates import (
    EVAL,
    HARDER,
    ONE_STEP,
    TEMPLATES,
    TRAIN,
    TWO_STEP,
    Template,
    people,
    pick,
    whole,
)

DATA = Path(__file__).parents[1] / "src" / "helpers" / "sources" / "data"
MAX_DRAWS_PER_ITEM = 200

Item = dict[str, str]


@dataclass(frozen=True)
class Split:
    """What one bundled file holds: items per level, from one family of templates."""

    family: str
    seed: int
    items_per_level: dict[str, int]

    @property
    def path(self) -> Path:
        return DATA / f"openmath_{self.family}.jsonl"


SPLITS = (
    Split(TRAIN, 20221118, {ONE_STEP: 585, TWO_STEP: 455, HARDER: 260}),
    Split(EVAL, 20230723, {ONE_STEP: 68, TWO_STEP: 52, HARDER: 30}),
)


def normalised(text: str) -> str:
    """The text in lower case with punctuation and white space folded to blanks."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def boxed(answer: int | Decimal | Fraction) -> str:
    r"""The answer as LaTeX: \boxed{60}, \boxed{2.5} or \boxed{\frac{3}{4}}."""
    if isinstance(answer, Fraction):
        return rf"\boxed{{\frac{{{answer.numerator}}}{{{answer.denominator}}}}}"
    return rf"\boxed{{{answer}}}"


def make_item(template: Template, rng: Random) -> Item:
    """One problem of the template, with its worked solution and answer."""
    values = people(rng, template.family) | template.draw(rng)
    solution = template.solution.format(**values)
    return {
        "problem": pick(rng, template.phrasings).format(**values),
        "generated_solution": f"{solution} The answer is {boxed(values['answer'])}.",
        "expected_answer": str(values["answer"]),
        "problem_source": f"template:{template.name}",
    }


def distinct_items(template: Template, rng: Random, *, n_items: int) -> list[Item]:
    """Items of one template, no two with the same numbers or the same text.

    Raises:
        ValueError: the ranges of the template are too narrow for n_items.
    """
    items: dict[tuple[str, ...], Item] = {}
    for _ in range(MAX_DRAWS_PER_ITEM * n_items):
        item = make_item(template, rng)
        numbers = tuple(re.findall(r"\d+(?:\.\d+)?", item["problem"]))
        items.setdefault((*numbers, item["expected_answer"]), item)
        if len(items) == n_items:
            return list(items.values())
    raise ValueError(
        f"word problem template {template.name} gives {len(items)} distinct items, "
        f"{n_items} are needed; widen the ranges it draws from"
    )


def shuffled(rng: Random, items: list[Item]) -> list[Item]:
    """The items in random order, by Fisher-Yates on draws of `whole`."""
    order = list(items)
    for last in range(len(order) - 1, 0, -1):
        other = whole(rng, 0, last)
        order[last], order[other] = order[other], order[last]
    return order


def build(split: Split) -> list[Item]:
    """The items of a split, the templates of a level used evenly.

    Raises:
        ValueError: a template is too narrow, or two templates give the same text.
    """
    items = []
    for level, n_items in split.items_per_level.items():
        templates = [
            template
            for template in TEMPLATES.values()
            if (template.family, template.level) == (split.family, level)
        ]
        for index, template in enumerate(templates):
            # The first templates of a level take one more when it does not divide.
            share = (n_items + len(templates) - 1 - index) // len(templates)
            rng = Random(f"{split.seed} {template.name}")
            items += distinct_items(template, rng, n_items=share)
    texts = {normalised(item["problem"]) for item in items}
    if len(texts) < len(items):
        raise ValueError(
            f"{len(items) - len(texts)} {split.family} word problems repeat another; "
            "reword one of the templates"
        )
    return shuffled(Random(split.seed), items)


def render(items: list[Item]) -> str:
    """The items as JSON lines."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def main() -> None:
    """Rewrite the bundled files and print what they hold."""
    for split in SPLITS:
        text = render(build(split))
        split.path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{split.path}: {text.count(chr(10))} items, {len(text)} characters")


if __name__ == "__main__":
    main()
