"""The bundled word problems are right, distinct, and what the generator writes.

Answers are recomputed from the problem text alone, with fractions, by solvers that
share nothing with the templates.
"""

import json
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from random import Random

import pytest
from tools import word_problems
from tools.word_problem_templates import EVAL, ONE_STEP, PEOPLE, TEMPLATES, TRAIN, template
from tools.word_problems import (
    SPLITS,
    Item,
    Split,
    build,
    distinct_items,
    make_item,
    normalised,
    render,
)

KEYS = ["problem", "generated_solution", "expected_answer", "problem_source"]
N_ITEMS = {TRAIN: 1300, EVAL: 150}
MAX_GOLD_SHARE = 0.08

SPELLED = {
    "half": Fraction(1, 2),
    "a third": Fraction(1, 3),
    "a quarter": Fraction(1, 4),
    "a fifth": Fraction(1, 5),
    "twice": Fraction(2),
    "three times": Fraction(3),
    "four times": Fraction(4),
}
QUANTITY = re.compile(rf"\b(?:{'|'.join(SPELLED)})\b|\d+(?:\.\d+)?", re.IGNORECASE)
NAME = re.compile("|".join(name for family in PEOPLE.values() for name, *_ in family))
NUMBER = r"-?\d+(?:\.\d+)?(?:/\d+)?"
EQUATION = re.compile(rf"({NUMBER}(?: [-+*/] {NUMBER})+) = ({NUMBER})")

# The quantities arrive in the order of the text.
SOLVERS = {
    # train, one step
    "marble_gift": lambda had, more: had + more,
    "bus_stop": lambda people, off: people - off,
    "egg_boxes": lambda boxes, eggs: boxes * eggs,
    "candy_shares": lambda candies, friends: candies / friends,
    "ribbon_lengths": lambda red, blue: red - blue,
    "lesson_minutes": lambda start, end: end - start,
    "night_temperature": lambda day, fall: day - fall,
    "notebook_price": lambda price, count: price * count,
    "lunch_change": lambda price, bill: bill - price,
    "garden_area": lambda length, width: length * width,
    "club_walkers": lambda members, share: members * share,
    "bicycle_ride": lambda speed, hours: speed * hours,
    "theater_seats": lambda seats, percent: seats * percent / 100,
    "sibling_age": lambda age, older: age + older,
    # train, two steps
    "toy_change": lambda count, price, bill: bill - count * price,
    "roll_trays": lambda trays, rolls, sold: trays * rolls - sold,
    "museum_tickets": lambda adult, child, children: adult + child * children,
    "film_length": lambda hours, minutes: hours * 60 + minutes,
    "two_games": lambda first, second: (first + second) / 2,
    "field_border": lambda length, width: 2 * length + 2 * width,
    "weekly_savings": lambda start, weekly, weeks: start + weekly * weeks,
    "coat_sale": lambda price, percent: price * (100 - percent) / 100,
    "pencil_boxes": lambda pencils, box: pencils % box,
    "stamp_pages": lambda stamps, gone, pages: (stamps - gone) / pages,
    "bottle_machine": lambda bottles, minutes, longer: bottles * longer / minutes,
    "flour_bags": lambda bags, weight, used: bags * weight - used,
    "factory_chairs": lambda daily, days, shipped: daily * days - shipped,
    "shell_walk": lambda shells, times: shells * (1 + times),
    # train, harder
    "red_marbles": lambda marbles, red: red / marbles,
    "three_tests": lambda a, b, c: (a + b + c) / 3,
    "pens_and_books": lambda n, p, m, q, bill: bill - n * p - m * q,
    "road_trip": lambda way, hours, speed, days: (way - hours * speed) / days,
    "choir_adults": lambda n, percent, gone: n * (100 - percent) / 100 - gone,
    "yard_fence": lambda length, width, price: (length + width) * 2 * price,
    "apple_bags": lambda apples, share, bag: apples * (1 - share) / bag,
    "violin_hours": lambda minutes, days, sunday: (minutes * days + sunday) / 60,
    "floor_tiles": lambda a, b, cover, price: price * (a * b / cover),
    # eval, one step
    "orchard_trees": lambda old, new: old + new,
    "library_atlases": lambda owned, lent: owned - lent,
    "ferry_trips": lambda trips, cars: trips * cars,
    "rope_pieces": lambda meters, pieces: meters / pieces,
    "freezer_reading": lambda before, drop: before - drop,
    "parcel_weights": lambda one, other: one + other,
    "pool_cover": lambda length, width: length * width,
    "cake_eggs": lambda eggs, share: eggs * share,
    "printer_pages": lambda rate, minutes: rate * minutes,
    "solar_roofs": lambda houses, percent: houses * percent / 100,
    "bread_timer": lambda total, passed: total - passed,
    "zoo_tickets": lambda paid, tickets: paid / tickets,
    # eval, two steps
    "honey_jars": lambda daily, days, given: daily * days - given,
    "fair_rides": lambda entrance, rides, price: entrance + rides * price,
    "hike_minutes": lambda hours, minutes: hours * 60 + minutes,
    "snail_average": lambda first, second: (first + second) / 2,
    "picture_edges": lambda width, height: 2 * width + 2 * height,
    "concert_hall": lambda rows, seats, balcony: rows * seats + balcony,
    "tree_growth": lambda height, percent: height * (100 + percent) / 100,
    "rose_bunches": lambda roses, bunch: roses % bunch,
    "camp_teams": lambda girls, boys, teams: (girls + boys) / teams,
    "soup_kettle": lambda soup, bowls, size: soup - bowls * size,
    "tap_flow": lambda liters, minutes, longer: liters * longer / minutes,
    # eval, harder
    "sock_drawer": lambda white, black: white / (white + black),
    "rain_gauge": lambda a, b, c: (a + b + c) / 3,
    "wall_paint": lambda a, b, cover, price: price * (a * b / cover),
    "market_stall": lambda n, p, m, q, cost: n * p + m * q - cost,
    "canoe_tour": lambda way, hours, speed, rest: (way - hours * speed) / rest,
    "melon_crates": lambda n, percent, crates: n * (100 - percent) / 100 / crates,
    "kiln_hours": lambda batches, minutes, heat: (batches * minutes + heat) / 60,
}

# Answers that count things nobody cuts: whatever the template, not a fraction of one.
DIVISIBLE = re.compile(r"dollars|kilograms|liters|hours|fraction|what part")


def quantities(problem: str) -> list[Fraction]:
    """The numbers of a text in order, in figures or in words."""
    found = QUANTITY.findall(problem.lower())
    return [SPELLED[text] if text in SPELLED else Fraction(text) for text in found]


def evaluated(expression: str) -> Fraction:
    """The exact value of e.g. "2 + 3 * 1.5"; the operators are Python's own."""
    exact = re.sub(NUMBER, r"Fraction('\g<0>')", expression)
    return eval(exact, {"Fraction": Fraction})


def unboxed(solution: str) -> Fraction:
    """The value in the last sentence of a solution."""
    box = re.search(r"[.] The answer is \\boxed\{(.+)\}[.]$", solution).group(1)
    return Fraction(re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", box))


def template_name(item: Item) -> str:
    return item["problem_source"].removeprefix("template:")


def faults(item: Item) -> list[str]:
    """What is wrong with the arithmetic of an item; empty if nothing is."""
    found = []
    expected = Fraction(item["expected_answer"])
    solver = SOLVERS[template_name(item)]
    if solver(*quantities(item["problem"])) != expected:
        found.append("answer")
    if unboxed(item["generated_solution"]) != expected:
        found.append("box")
    equations = EQUATION.findall(item["generated_solution"])
    if len(equations) != item["generated_solution"].count("="):
        found.append("unread equation")
    if any(evaluated(left) != Fraction(right) for left, right in equations):
        found.append("equation")
    if not equations or Fraction(equations[-1][1]) != expected:
        found.append("last equation")
    return found


def masked(problem: str) -> str:
    """The normalised text with names and numbers (figures and words) replaced."""
    return normalised(NAME.sub(" name ", QUANTITY.sub(" number ", problem)))


@pytest.fixture(scope="module")
def bundled() -> dict[str, list[Item]]:
    """The committed items by family."""
    return {
        split.family: [
            json.loads(line) for line in split.path.read_text(encoding="utf-8").splitlines()
        ]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def fresh() -> list[Item]:
    """Items nobody has seen: 100 of every template, from another seed."""
    rng = Random(5)
    return [make_item(t, rng) for t in TEMPLATES.values() for _ in range(100)]


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.family)
def test_regenerating_equals_the_committed_file(split):
    assert render(build(split)).encode("utf-8") == split.path.read_bytes()


def test_every_template_has_a_solver_and_is_used(bundled):
    assert set(SOLVERS) == set(TEMPLATES)
    for family, items in bundled.items():
        used = {template_name(item) for item in items}
        assert used == {n for n, t in TEMPLATES.items() if t.family == family}


@pytest.mark.parametrize("family", N_ITEMS)
def test_committed_arithmetic_is_right(bundled, family):
    wrong = [(item, faults(item)) for item in bundled[family] if faults(item)]
    assert not wrong


def test_arithmetic_is_right_for_other_draws(fresh):
    wrong = [(item, faults(item)) for item in fresh if faults(item)]
    assert not wrong


@pytest.mark.parametrize(
    ("key", "old", "new", "fault"),
    [
        ("problem", "8 houses", "9 houses", "answer"),
        ("expected_answer", "4", "5", "answer"),
        ("generated_solution", "boxed{4}", "boxed{5}", "box"),
        ("generated_solution", "0.5 = 4", "0.4 = 4", "equation"),
        ("generated_solution", "8 * 0.5 =", "so =", "unread equation"),
        ("generated_solution", "8 * 0.5 = 4", "2 * 4 = 8", "last equation"),
    ],
)
def test_a_broken_item_is_caught(key, old, new, fault):
    item = {
        "problem": "Of the 8 houses 50% have panels.",
        "generated_solution": r"That is 8 * 0.5 = 4. The answer is \boxed{4}.",
        "expected_answer": "4",
        "problem_source": "template:solar_roofs",
    }
    assert faults(item) == []
    assert old in item[key]
    assert fault in faults(item | {key: item[key].replace(old, new)})


def test_no_text_repeats_within_or_across_the_files(bundled):
    texts = [normalised(i["problem"]) for items in bundled.values() for i in items]
    assert len(set(texts)) == len(texts)


def test_train_and_eval_share_no_template_and_no_wording(bundled):
    for trait in (template_name, lambda item: masked(item["problem"])):
        train, held_out = ({trait(i) for i in bundled[f]} for f in (TRAIN, EVAL))
        assert not train & held_out


def test_train_and_eval_share_no_run_of_eight_words(bundled):
    def runs(items: list[Item]) -> set[tuple[str, ...]]:
        texts = [masked(item["problem"]).split() for item in items]
        return {tuple(t[i : i + 8]) for t in texts for i in range(len(t) - 7)}

    assert not runs(bundled[TRAIN]) & runs(bundled[EVAL])


def test_masking_sees_through_names_and_numbers():
    assert masked("Half of Tom's 12 eggs.") == masked("A third of Nora's 7.5 eggs")
    assert masked("Half of 12 eggs.") != masked("Half of 12 hens.")


def test_counts_schema_and_lengths(bundled):
    for family, items in bundled.items():
        assert len(items) == N_ITEMS[family]
        for item in items:
            assert list(item) == KEYS
            assert all(value and isinstance(value, str) for value in item.values())
            assert 15 <= len(item["problem"].split()) <= 50, item
            assert 15 <= len(item["generated_solution"].split()) <= 40, item


def test_templates_of_a_level_are_used_evenly(bundled):
    for items in bundled.values():
        uses = Counter(template_name(item) for item in items)
        for level in {t.level for t in TEMPLATES.values()}:
            counts = [n for name, n in uses.items() if TEMPLATES[name].level == level]
            assert max(counts) - min(counts) <= 1


def test_no_answer_is_too_common(bundled):
    golds = Counter(item["expected_answer"] for item in bundled[EVAL])
    assert max(golds.values()) <= MAX_GOLD_SHARE * N_ITEMS[EVAL]


def test_no_template_has_a_constant_answer(bundled):
    for items in bundled.values():
        golds: dict[str, set[str]] = {}
        for item in items:
            golds.setdefault(template_name(item), set()).add(item["expected_answer"])
        assert all(len(answers) > 1 for answers in golds.values()), golds


def test_every_quantity_makes_sense(fresh):
    """Plurals fit, nothing counted is broken or negative, no zero is trailing."""
    for item in fresh:
        problem, answer = item["problem"], item["expected_answer"]
        assert not re.search(r"(?<![\d.])1 [a-z]", problem), item
        assert not re.search(r"[{}]|  |\d,\d", problem), item
        assert not re.search(r"\.\d*0$", answer), item
        if "degrees" not in problem:
            assert Fraction(answer) > 0, item
        if not DIVISIBLE.search(problem):
            assert Fraction(answer).denominator == 1, item


def test_a_template_with_too_narrow_ranges_is_refused():
    always = {"a": 2, "b": 3, "answer": 6}
    narrow = replace(TEMPLATES["ferry_trips"], draw=lambda rng: always)
    with pytest.raises(ValueError, match="ferry_trips gives 1 distinct items, 2 are"):
        distinct_items(narrow, Random(0), n_items=2)


def test_a_taken_template_name_is_refused():
    taken = TEMPLATES["ferry_trips"]
    with pytest.raises(ValueError, match="ferry_trips exists"):
        template(EVAL, ONE_STEP, solution=taken.solution)(taken.draw)


def test_templates_that_repeat_a_text_are_refused(monkeypatch):
    values = {"a": 2, "b": 3, "answer": 6}
    one = replace(
        TEMPLATES["ferry_trips"],
        phrasings=("{a} trips with {b} cars",),
        draw=lambda rng: values,
    )
    twins = {name: replace(one, name=name) for name in ("one", "two")}
    monkeypatch.setattr(word_problems, "TEMPLATES", twins)
    with pytest.raises(ValueError, match="1 eval word problems repeat another"):
        build(Split(EVAL, 0, {ONE_STEP: 2}))
