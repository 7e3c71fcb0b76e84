"""The templates of the bundled word problems: wording, numbers and arithmetic.

Two families, TRAIN and EVAL, practice the same skills in different situations and
words; no template is in both. A template is a function that draws the numbers from
a `random.Random`, under a decorator that holds the text. Every phrasing of a template
names its numbers in the same order, so that a test can solve the problem from its
text alone.

Draws are built on `Random.random()`: it is the one method whose sequence for a seed
the standard library promises to keep; `randrange`, `choice` and `shuffle` are free to
change between Python versions.

Building items and writing files is left to `word_problems`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import gcd
from random import Random
from typing import TypeVar

TRAIN, EVAL = "train", "eval"
ONE_STEP, TWO_STEP, HARDER = "one_step", "two_step", "harder"

T = TypeVar("T")
Values = dict[str, object]


@dataclass(frozen=True)
class Template:
    """One kind of problem: the texts are format strings over what `draw` returns."""

    name: str
    family: str
    level: str
    phrasings: tuple[str, ...]
    solution: str
    draw: Callable[[Random], Values]


TEMPLATES: dict[str, Template] = {}


def template(
    family: str, level: str, *phrasings: str, solution: str
) -> Callable[[Callable[[Random], Values]], Callable[[Random], Values]]:
    """Decorator that files a draw function in TEMPLATES under its own name.

    The function returns the values of the format strings, with the result under
    "answer" (int, Decimal or Fraction).

    Raises:
        ValueError: the name is taken.
    """

    def register(draw: Callable[[Random], Values]) -> Callable[[Random], Values]:
        name = draw.__name__
        if name in TEMPLATES:
            raise ValueError(f"word problem template {name} exists; rename one")
        TEMPLATES[name] = Template(name, family, level, phrasings, solution, draw)
        return draw

    return register


def whole(rng: Random, low: int, high: int, step: int = 1) -> int:
    """A uniform draw from low, low + step, ... up to and including high."""
    return low + step * int(rng.random() * ((high - low) // step + 1))


def pick(rng: Random, options: Sequence[T]) -> T:
    """A uniform draw from the options."""
    return options[whole(rng, 0, len(options) - 1)]


def tenths(number: int) -> Decimal:
    """25 -> 2.5, 30 -> 3: exact and without trailing zeros."""
    return Decimal(number) / 10


def hundredths(number: int) -> Decimal:
    """125 -> 1.25, 150 -> 1.5: exact and without trailing zeros."""
    return Decimal(number) / 100


def bill_over(cost: int) -> int:
    """The smallest common bill that leaves some change, in dollars."""
    return next(bill for bill in (10, 20, 50, 100) if bill > cost)


def quarter_hours(minutes: int) -> list[int]:
    """Extra minutes that make the sum quarter hours but not full hours."""
    extras = range(20, 60, 5)
    return [x for x in extras if (minutes + x) % 15 == 0 and (minutes + x) % 60]


PEOPLE = {
    TRAIN: (
        *((name, "she", "her") for name in ("Anna", "Mia", "Sofia", "Leila", "Grace")),
        *((name, "he", "his") for name in ("Tom", "Ben", "Omar", "Lucas", "Ivan")),
    ),
    EVAL: (
        *((name, "she", "her") for name in ("Nora", "Priya", "Clara", "Hana", "Ruth")),
        *((name, "he", "his") for name in ("Felix", "Diego", "Samir", "Noah", "Kofi")),
    ),
}


def people(rng: Random, family: str) -> Values:
    """Format values for a person (with pronouns) and the name of somebody else."""
    name, he, his = person = pick(rng, PEOPLE[family])
    other, *_ = pick(rng, [p for p in PEOPLE[family] if p is not person])
    words = {"name": name, "he": he, "his": his, "other": other}
    return words | {"He": he.capitalize(), "His": his.capitalize()}


SHARES = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}
MULTIPLES = {2: "twice", 3: "three times", 4: "four times"}
PERCENTS = (10, 20, 25, 50)


# ---- train, one step ---------------------------------------------------------------


@template(
    TRAIN,
    ONE_STEP,
    "{name} has {a} {things} and gets {b} more from {other}. "
    "How many {things} does {name} have now?",
    "{name} keeps {a} {things} in a box, and {other} adds {b} more. "
    "How many {things} are in the box now?",
    "On Monday {name} owned {a} {things}. On Friday {he} got {b} new ones. "
    "How many {things} did {he} own then?",
    solution="Adding the {b} new {things} to the first {a} gives {a} + {b} = {answer}.",
)
def marble_gift(rng: Random) -> Values:
    a, b = whole(rng, 3, 19), whole(rng, 2, 19)
    things = pick(rng, ("marbles", "stickers", "postcards", "buttons"))
    return {"a": a, "b": b, "things": things, "answer": a + b}


@template(
    TRAIN,
    ONE_STEP,
    "A bus has {a} passengers. At the market stop, {b} of them get off. "
    "How many passengers are still on the bus?",
    "There were {a} people on a bus, and {b} of them left at the next stop. "
    "How many people stayed on the bus?",
    solution="Of the {a} people, {b} leave the bus, so {a} - {b} = {answer} stay on.",
)
def bus_stop(rng: Random) -> Values:
    b, answer = whole(rng, 2, 12), whole(rng, 2, 14)
    return {"a": b + answer, "b": b, "answer": answer}


@template(
    TRAIN,
    ONE_STEP,
    "A farmer packs {a} boxes of eggs with {b} eggs in each box. "
    "How many eggs does the farmer pack in all?",
    "On a shelf there are {a} boxes, and each of them holds {b} eggs. "
    "How many eggs are on the shelf?",
    solution="Each of the {a} boxes holds {b} eggs, so {a} * {b} = {answer} eggs.",
)
def egg_boxes(rng: Random) -> Values:
    a, b = whole(rng, 3, 20), pick(rng, (4, 6, 10, 12))
    return {"a": a, "b": b, "answer": a * b}


@template(
    TRAIN,
    ONE_STEP,
    "{name} shares {total} candies equally among {n} friends. "
    "How many candies does each friend get?",
    "At {name}'s party, {total} candies are divided equally among {n} children. "
    "How many candies does each child get?",
    solution="The {total} candies make {n} equal shares, "
    "so each share is {total} / {n} = {answer}.",
)
def candy_shares(rng: Random) -> Values:
    n, answer = whole(rng, 2, 10), whole(rng, 2, 12)
    return {"total": n * answer, "n": n, "answer": answer}


@template(
    TRAIN,
    ONE_STEP,
    "{name} has a red ribbon that is {a} centimeters long and a blue one that is {b} "
    "centimeters long. How many centimeters longer is the red ribbon?",
    "A red ribbon measures {a} centimeters and a blue ribbon measures {b} centimeters. "
    "By how many centimeters is the red one longer?",
    solution="The difference between the two ribbons is {a} - {b} = {answer} centimeters.",
)
def ribbon_lengths(rng: Random) -> Values:
    b, answer = whole(rng, 20, 60, 5), whole(rng, 5, 40, 5)
    return {"a": b + answer, "b": b, "answer": answer}


@template(
    TRAIN,
    ONE_STEP,
    "A piano lesson starts {a} minutes after ten and ends {b} minutes after ten. "
    "How many minutes does it last?",
    "{name}'s piano lesson begins {a} minutes past four and is over {b} minutes past "
    "four. How many minutes long is the lesson?",
    solution="From minute {a} to minute {b} of the hour there are {b} - {a} = {answer} minutes.",
)
def lesson_minutes(rng: Random) -> Values:
    a, answer = whole(rng, 2, 20), whole(rng, 15, 35)
    return {"a": a, "b": a + answer, "answer": answer}


@template(
    TRAIN,
    ONE_STEP,
    "At noon the temperature in {city} is {a} degrees. By midnight it has fallen by "
    "{b} degrees. What is the temperature at midnight, in degrees?",
    "It is {a} degrees in {city} in the afternoon, and during the night it gets {b} "
    "degrees colder. How many degrees is it then?",
    solution="The temperature falls by {b} degrees from {a}, so {a} - {b} = {answer}.",
)
def night_temperature(rng: Random) -> Values:
    a, b = whole(rng, 2, 12), whole(rng, 2, 20)
    city = pick(rng, ("Oslo", "Moscow", "Toronto", "Helsinki"))
    return {"a": a, "b": b, "city": city, "answer": a - b}


@template(
    TRAIN,
    ONE_STEP,
    "A shop sells notebooks at ${p} each. How many dollars does {name} pay for {n} notebooks?",
    "One notebook costs ${p}, and {name} needs {n} notebooks for school. "
    "How many dollars do they cost together?",
    solution="At ${p} each, {n} notebooks cost {n} * {p} = {answer} dollars.",
)
def notebook_price(rng: Random) -> Values:
    # An odd count of prices ending in 5 cents never ends in a zero.
    cents, n = whole(rng, 105, 295, 10), pick(rng, (3, 5, 7))
    return {"p": hundredths(cents), "n": n, "answer": hundredths(n * cents)}


@template(
    TRAIN,
    ONE_STEP,
    "{name}'s lunch costs ${x}. {He} pays with a ${bill} bill. "
    "How many dollars does {he} get back?",
    "{name} buys a lunch for ${x} and gives the waiter a ${bill} bill. "
    "How many dollars of change does {he} get?",
    solution="The change is the bill minus the price, {bill} - {x} = {answer} dollars.",
)
def lunch_change(rng: Random) -> Values:
    bill = pick(rng, (5, 10, 20))
    cents = 10 * whole(rng, 3 * bill, 10 * bill - 4) + 5
    return {"x": hundredths(cents), "bill": bill, "answer": bill - hundredths(cents)}


@template(
    TRAIN,
    ONE_STEP,
    "A rectangular garden is {a} meters long and {b} meters wide. "
    "What is its area in square meters?",
    "{name} digs a rectangular garden that measures {a} meters by {b} meters. "
    "How many square meters does the garden cover?",
    solution="The area is the length times the width, {a} * {b} = {answer} square meters.",
)
def garden_area(rng: Random) -> Values:
    b = whole(rng, 2, 12)
    a = b + whole(rng, 1, 8)
    return {"a": a, "b": b, "answer": a * b}


@template(
    TRAIN,
    ONE_STEP,
    "A youth club has {n} members, and {share} of them walk to the meeting. "
    "How many members walk there?",
    "There are {n} people at a meeting, and {share} of them came on foot. "
    "How many people came on foot?",
    solution="To find {share} of {n}, divide by {d}, so {n} / {d} = {answer} people.",
)
def club_walkers(rng: Random) -> Values:
    d, answer = pick(rng, tuple(SHARES)), whole(rng, 3, 16)
    return {"n": d * answer, "share": SHARES[d], "d": d, "answer": answer}


@template(
    TRAIN,
    ONE_STEP,
    "{name} cycles at {v} kilometers per hour for {t} hours without a break. "
    "How many kilometers does {he} ride?",
    "Riding {v} kilometers every hour, {name} is on the bicycle for {t} hours. "
    "How many kilometers does {he} cover?",
    solution="The distance is the speed times the hours, {v} * {t} = {answer} kilometers.",
)
def bicycle_ride(rng: Random) -> Values:
    v, t = whole(rng, 8, 20), whole(rng, 2, 6)
    return {"v": v, "t": t, "answer": v * t}


@template(
    TRAIN,
    ONE_STEP,
    "A theater has {n} seats, and {p}% of them are taken. How many seats are taken?",
    "In a theater with {n} seats, {p}% of the seats are sold for tonight. How many seats are sold?",
    solution="We need {p}% of the {n} seats, which is {n} * {part} = {answer}.",
)
def theater_seats(rng: Random) -> Values:
    n, p = whole(rng, 20, 300, 20), pick(rng, PERCENTS)
    return {"n": n, "p": p, "part": hundredths(p), "answer": n * p // 100}


@template(
    TRAIN,
    ONE_STEP,
    "{name} is {a} years old. {His} {sibling} is {b} years older. How old is {name}'s {sibling}?",
    "{name} has just turned {a}, and {his} {sibling} is {b} years older. How old is the {sibling}?",
    solution="The {sibling} is {b} years older than {name}, so {a} + {b} = {answer}.",
)
def sibling_age(rng: Random) -> Values:
    a, b = whole(rng, 3, 15), whole(rng, 2, 9)
    sibling = pick(rng, ("brother", "sister", "cousin"))
    return {"a": a, "b": b, "sibling": sibling, "answer": a + b}


# ---- train, two steps --------------------------------------------------------------


@template(
    TRAIN,
    TWO_STEP,
    "{name} buys {n} {things} at ${p} each and pays with a ${bill} bill. "
    "How many dollars of change does {he} get?",
    "In a toy shop {name} takes {n} {things} that cost ${p} each and hands over a "
    "${bill} bill. How many dollars does {he} get back?",
    solution="The {things} cost {n} * {p} = {cost} dollars, "
    "so the change is {bill} - {cost} = {answer}.",
)
def toy_change(rng: Random) -> Values:
    n, p = whole(rng, 2, 8), whole(rng, 2, 12)
    things = pick(rng, ("kites", "puzzles", "balls", "dolls"))
    cost, bill = n * p, bill_over(n * p)
    values = {"n": n, "p": p, "bill": bill, "things": things}
    return values | {"cost": cost, "answer": bill - cost}


@template(
    TRAIN,
    TWO_STEP,
    "A baker makes {a} trays of {b} rolls and sells {c} rolls before noon. "
    "How many rolls are left?",
    "From the oven come {a} trays with {b} rolls each. By noon {c} rolls are sold. "
    "How many rolls remain?",
    solution="The trays hold {a} * {b} = {made} rolls, and {made} - {c} = {answer} of "
    "them are left.",
)
def roll_trays(rng: Random) -> Values:
    a, b = whole(rng, 2, 8), whole(rng, 5, 12)
    c = whole(rng, 3, a * b - 3)
    return {"a": a, "b": b, "c": c, "made": a * b, "answer": a * b - c}


@template(
    TRAIN,
    TWO_STEP,
    "At a museum an adult ticket costs ${a} and a child ticket costs ${b}. "
    "How many dollars do one adult and {n} children pay together?",
    "A museum charges ${a} for an adult and ${b} for a child. "
    "How many dollars does {name}'s mother pay for herself and {n} children?",
    solution="The children pay {n} * {b} = {kids} dollars, "
    "and with the adult it is {a} + {kids} = {answer}.",
)
def museum_tickets(rng: Random) -> Values:
    a, b, n = whole(rng, 8, 20), whole(rng, 3, 7), whole(rng, 2, 6)
    return {"a": a, "b": b, "n": n, "kids": n * b, "answer": a + n * b}


@template(
    TRAIN,
    TWO_STEP,
    "{name} watches a film that lasts {h} hours and {m} minutes. "
    "How many minutes long is the film?",
    "A film runs for {h} hours and {m} minutes without a break. What is its length in minutes?",
    solution="The hours make {h} * 60 = {full} minutes, "
    "and adding the rest gives {full} + {m} = {answer}.",
)
def film_length(rng: Random) -> Values:
    h, m = whole(rng, 2, 4), whole(rng, 5, 55)
    return {"h": h, "m": m, "full": 60 * h, "answer": 60 * h + m}


@template(
    TRAIN,
    TWO_STEP,
    "{name} scores {a} points in the first game and {b} points in the second game. "
    "What is {his} average score per game?",
    "In two games, {name} wins {a} points and then {b} points. "
    "How many points does {he} win per game on average?",
    solution="The sum is {a} + {b} = {total} points in two games, "
    "so the average is {total} / 2 = {answer}.",
)
def two_games(rng: Random) -> Values:
    answer, gap = whole(rng, 8, 30), whole(rng, 1, 6)
    a, b = pick(rng, ((answer - gap, answer + gap), (answer + gap, answer - gap)))
    return {"a": a, "b": b, "total": a + b, "answer": answer}


@template(
    TRAIN,
    TWO_STEP,
    "A rectangular field is {a} meters long and {b} meters wide. "
    "How many meters of fence go all the way around it?",
    "{name} walks once around a rectangular field that is {a} meters long and {b} "
    "meters wide. How many meters does {he} walk?",
    solution="One long and one short side are {a} + {b} = {half} meters, "
    "so all the way around is 2 * {half} = {answer}.",
)
def field_border(rng: Random) -> Values:
    b = whole(rng, 5, 40, 5)
    a = b + whole(rng, 5, 40, 5)
    return {"a": a, "b": b, "half": a + b, "answer": 2 * (a + b)}


@template(
    TRAIN,
    TWO_STEP,
    "{name} has ${a} and saves ${b} every week. How many dollars does {he} have after {n} weeks?",
    "{name}'s piggy bank holds ${a}, and {he} adds ${b} each week. "
    "How many dollars are in it after {n} weeks?",
    solution="In {n} weeks {name} saves {n} * {b} = {saved} dollars, "
    "which makes {a} + {saved} = {answer}.",
)
def weekly_savings(rng: Random) -> Values:
    a, b, n = whole(rng, 5, 50, 5), whole(rng, 2, 12), whole(rng, 3, 10)
    return {"a": a, "b": b, "n": n, "saved": n * b, "answer": a + n * b}


@template(
    TRAIN,
    TWO_STEP,
    "A coat costs ${p}. In the winter sale its price is cut by {q}%. "
    "What is the sale price in dollars?",
    "{name} finds a coat with a price of ${p} and a discount of {q}%. "
    "How many dollars does {he} pay for it?",
    solution="The discount is {p} * {part} = {cut} dollars, "
    "so the coat costs {p} - {cut} = {answer} dollars.",
)
def coat_sale(rng: Random) -> Values:
    p, q = whole(rng, 40, 240, 20), pick(rng, PERCENTS)
    cut = p * q // 100
    return {"p": p, "q": q, "part": hundredths(q), "cut": cut, "answer": p - cut}


@template(
    TRAIN,
    TWO_STEP,
    "{name} has {n} pencils and fills as many boxes of {b} as possible. "
    "How many pencils are left over?",
    "There are {n} pencils for boxes that hold {b} each. After {name} has filled every "
    "box {he} can, how many pencils remain?",
    solution="The {q} full boxes use {q} * {b} = {used} pencils, "
    "which leaves {n} - {used} = {answer}.",
)
def pencil_boxes(rng: Random) -> Values:
    b, q = whole(rng, 4, 12), whole(rng, 2, 8)
    answer = whole(rng, 1, b - 1)
    n = b * q + answer
    return {"n": n, "b": b, "q": q, "used": b * q, "answer": answer}


@template(
    TRAIN,
    TWO_STEP,
    "{name} has {a} stamps, gives {b} of them to {other} and spreads the rest evenly "
    "over {n} pages. How many stamps are on each page?",
    "Out of {a} stamps, {name} sells {b}. The other stamps go on {n} album pages, the "
    "same number on each. How many stamps are on one page?",
    solution="There are {a} - {b} = {rest} stamps for the pages, "
    "so each page gets {rest} / {n} = {answer}.",
)
def stamp_pages(rng: Random) -> Values:
    n, answer, b = whole(rng, 2, 8), whole(rng, 3, 12), whole(rng, 3, 20)
    rest = n * answer
    return {"a": rest + b, "b": b, "n": n, "rest": rest, "answer": answer}


@template(
    TRAIN,
    TWO_STEP,
    "A machine fills {a} bottles in {m} minutes. "
    "At the same rate, how many bottles does it fill in {k} minutes?",
    "In a dairy, {a} bottles are filled in {m} minutes. "
    "How many bottles are filled in {k} minutes at this speed?",
    solution="In one minute it is {a} / {m} = {rate} bottles, "
    "so in {k} minutes it is {rate} * {k} = {answer}.",
)
def bottle_machine(rng: Random) -> Values:
    rate, m = whole(rng, 3, 12), whole(rng, 2, 6)
    k = m + whole(rng, 1, 6)
    return {"a": rate * m, "m": m, "k": k, "rate": rate, "answer": rate * k}


@template(
    TRAIN,
    TWO_STEP,
    "{name} buys {n} bags of flour that weigh {w} kilograms each. "
    "After {he} uses {u} kilograms, how many kilograms are left?",
    "In the pantry there are {n} bags with {w} kilograms of flour each. {name} takes "
    "out {u} kilograms. How many kilograms of flour remain?",
    solution="The bags weigh {n} * {w} = {total} kilograms, "
    "and {total} - {u} = {answer} kilograms of flour are left.",
)
def flour_bags(rng: Random) -> Values:
    n, w = whole(rng, 2, 6), pick(rng, (12, 15, 18, 22, 25))
    u = whole(rng, 11, n * w - 5)
    u += (n * w - u) % 10 == 0  # what is left is not a whole number
    values = {"n": n, "w": tenths(w), "u": tenths(u)}
    return values | {"total": tenths(n * w), "answer": tenths(n * w - u)}


@template(
    TRAIN,
    TWO_STEP,
    "A factory makes {a} chairs a day. After {d} days it ships {s} chairs. "
    "How many chairs are still in the factory?",
    "A workshop sends {a} chairs to its store room every day. After {d} days, {s} of "
    "the chairs are sold. How many chairs stay in the store room?",
    solution="In {d} days there are {d} * {a} = {made} chairs, "
    "and {made} - {s} = {answer} chairs are left.",
)
def factory_chairs(rng: Random) -> Values:
    a, d = whole(rng, 150, 400, 50), pick(rng, (10, 12, 20))
    s = whole(rng, 100, 400, 100)
    return {"a": a, "d": d, "s": s, "made": d * a, "answer": d * a - s}


@template(
    TRAIN,
    TWO_STEP,
    "{name} finds {a} shells on the beach, and {other} finds {times} as many. "
    "How many shells do they have together?",
    "On the beach {name} picks up {a} shells. {other} picks up {times} as many. "
    "How many shells do the two of them bring home?",
    solution="{other} has {k} * {a} = {more} shells, so together they have "
    "{a} + {more} = {answer}.",
)
def shell_walk(rng: Random) -> Values:
    a, k = whole(rng, 3, 20), pick(rng, tuple(MULTIPLES))
    values = {"a": a, "times": MULTIPLES[k], "k": k}
    return values | {"more": k * a, "answer": a + k * a}


# ---- train, harder -----------------------------------------------------------------


@template(
    TRAIN,
    HARDER,
    "A bag holds {n} marbles, and {k} of them are red. "
    "What fraction of the marbles is red, in lowest terms?",
    "There are {n} marbles in {name}'s bag, and {k} of these are red. "
    "Which fraction of all the marbles is red? Simplify it.",
    solution="The red marbles are {k} out of {n}. "
    "Dividing both numbers by {g} gives {k} / {n} = {answer}.",
)
def red_marbles(rng: Random) -> Values:
    g, bottom = whole(rng, 2, 6), whole(rng, 3, 9)
    top = pick(rng, [i for i in range(1, bottom) if gcd(i, bottom) == 1])
    answer = Fraction(top, bottom)
    return {"n": g * bottom, "k": g * top, "g": g, "answer": answer}


@template(
    TRAIN,
    HARDER,
    "{name} gets {a}, {b} and {c} points in three tests. "
    "What is {his} average number of points per test?",
    "In three tests, {name} scores {a} points, {b} points and {c} points. "
    "How many points is that per test on average?",
    solution="The sum is {a} + {b} + {c} = {total} points, "
    "so the average of three tests is {total} / 3 = {answer}.",
)
def three_tests(rng: Random) -> Values:
    answer, gap, shift = whole(rng, 8, 25), whole(rng, 1, 4), whole(rng, 0, 2)
    a, b, c = answer - gap, answer + gap + shift, answer - shift
    return {"a": a, "b": b, "c": c, "total": a + b + c, "answer": answer}


@template(
    TRAIN,
    HARDER,
    "{name} buys {n} pens at ${p} each and {m} books at ${q} each. {He} pays with a "
    "${bill} bill. How many dollars of change does {he} get?",
    "At the counter {name} has {n} pens for ${p} each, {m} books for ${q} each and a "
    "${bill} bill. How many dollars are left after paying?",
    solution="The pens cost {n} * {p} = {pens}, the books {m} * {q} = {books}, "
    "together {pens} + {books} = {cost}, so the change is {bill} - {cost} = {answer}.",
)
def pens_and_books(rng: Random) -> Values:
    n, p, m, q = whole(rng, 2, 6), whole(rng, 2, 4), whole(rng, 2, 5), whole(rng, 5, 12)
    cost, bill = n * p + m * q, bill_over(n * p + m * q)
    values = {"n": n, "p": p, "m": m, "q": q, "bill": bill}
    return values | {"pens": n * p, "books": m * q, "cost": cost, "answer": bill - cost}


@template(
    TRAIN,
    HARDER,
    "{name} plans a trip of {d} kilometers. {He} drives {t} hours at {v} kilometers "
    "per hour and divides the rest evenly over {n} days. How many kilometers does {he} "
    "drive on each of those days?",
    "A trip is {d} kilometers long. After {t} hours at {v} kilometers per hour, {name} "
    "splits the remaining distance into {n} equal stages. How many kilometers is each?",
    solution="The drive covers {t} * {v} = {done}, which leaves {d} - {done} = {rest}, "
    "so each part has {rest} / {n} = {answer} kilometers.",
)
def road_trip(rng: Random) -> Values:
    t, v = whole(rng, 2, 5), whole(rng, 40, 90, 10)
    n, answer = whole(rng, 2, 5), whole(rng, 20, 90, 10)
    done, rest = t * v, n * answer
    values = {"d": done + rest, "t": t, "v": v, "n": n}
    return values | {"done": done, "rest": rest, "answer": answer}


@template(
    TRAIN,
    HARDER,
    "A choir has {n} singers, of whom {p}% are children and the rest are adults. "
    "If {k} adults leave, how many adults remain?",
    "Of the {n} singers in a choir, {p}% are children, and all the others are adults. "
    "Then {k} adults stop singing. How many adults are still there?",
    solution="There are {n} * {part} = {kids} children and {n} - {kids} = {adults} "
    "adults, and then {adults} - {k} = {answer} remain.",
)
def choir_adults(rng: Random) -> Values:
    n, p = whole(rng, 20, 120, 20), pick(rng, PERCENTS)
    kids = n * p // 100
    k = whole(rng, 2, 8)
    values = {"n": n, "p": p, "k": k, "part": hundredths(p)}
    return values | {"kids": kids, "adults": n - kids, "answer": n - kids - k}


@template(
    TRAIN,
    HARDER,
    "A rectangular yard is {a} meters long and {b} meters wide. A fence around it "
    "costs ${p} per meter. How many dollars does the whole fence cost?",
    "{name} fences in a yard of {a} meters by {b} meters and pays ${p} for each meter "
    "of fence. How many dollars does {he} pay in all?",
    solution="Half of the fence is {a} + {b} = {half} meters, all of it 2 * {half} = "
    "{fence} meters, and it costs {fence} * {p} = {answer} dollars.",
)
def yard_fence(rng: Random) -> Values:
    b, p = whole(rng, 4, 12), pick(rng, (2, 3, 5, 10))
    a = b + whole(rng, 1, 8)
    values = {"a": a, "b": b, "p": p, "half": a + b}
    return values | {"fence": 2 * (a + b), "answer": 2 * (a + b) * p}


@template(
    TRAIN,
    HARDER,
    "{name} picks {n} apples, gives {share} of them to {other} and packs the rest into "
    "bags of {b}. How many bags does {he} fill?",
    "From a harvest of {n} apples, {name} keeps {share} for {his} family. The others "
    "go into bags of {b} apples. How many bags are there?",
    solution="That takes {n} / {d} = {gone} apples away, {n} - {gone} = {rest} are "
    "left, and they fill {rest} / {b} = {answer} bags.",
)
def apple_bags(rng: Random) -> Values:
    d, b, k = pick(rng, tuple(SHARES)), whole(rng, 3, 6), whole(rng, 2, 5)
    gone = b * k
    n = d * gone
    values = {"n": n, "share": SHARES[d], "d": d, "b": b}
    return values | {"gone": gone, "rest": n - gone, "answer": (n - gone) // b}


@template(
    TRAIN,
    HARDER,
    "{name} practices the violin for {m} minutes on each of {d} days and for {k} "
    "minutes on Sunday. How many hours does {he} practice in all?",
    "On {name}'s plan there are {m} minutes of violin on each of {d} school days and "
    "{k} minutes on Sunday. How many hours are on the plan?",
    solution="The days have {d} * {m} = {most} minutes, with Sunday {most} + {k} = "
    "{total} minutes, and that is {total} / 60 = {answer} hours.",
)
def violin_hours(rng: Random) -> Values:
    m, d = whole(rng, 20, 50, 5), whole(rng, 3, 5)
    k = pick(rng, quarter_hours(m * d))
    total = m * d + k
    values = {"m": m, "d": d, "k": k, "most": m * d}
    return values | {"total": total, "answer": hundredths(total * 100 // 60)}


@template(
    TRAIN,
    HARDER,
    "A kitchen floor is {a} meters long and {b} meters wide. One box of tiles covers "
    "{c} square meters and costs ${p}. How many dollars do the tiles cost?",
    "{name} tiles a floor of {a} meters by {b} meters. Each box of tiles is enough for "
    "{c} square meters and costs ${p}. How many dollars does {he} need?",
    solution="The floor has {a} * {b} = {area} square meters, which takes {area} / {c} "
    "= {boxes} boxes, and they cost {boxes} * {p} = {answer} dollars.",
)
def floor_tiles(rng: Random) -> Values:
    c, k = pick(rng, (2, 3, 4)), whole(rng, 2, 3)
    a, p = c * k, whole(rng, 10, 40, 10)
    b = whole(rng, 2, min(a - 1, 6))
    values = {"a": a, "b": b, "c": c, "p": p, "area": a * b}
    return values | {"boxes": k * b, "answer": k * b * p}


# ---- eval, one step ----------------------------------------------------------------


@template(
    EVAL,
    ONE_STEP,
    "An orchard had {a} pear trees, and {b} more were planted in spring. "
    "How many pear trees grow there today?",
    "After a storm, {a} pear trees were standing in an orchard. The owner planted {b} "
    "young ones. What is the number of pear trees now?",
    solution="The old trees and the new ones together are {a} + {b} = {answer} trees.",
)
def orchard_trees(rng: Random) -> Values:
    a, b = whole(rng, 4, 18), whole(rng, 3, 18)
    return {"a": a, "b": b, "answer": a + b}


@template(
    EVAL,
    ONE_STEP,
    "A village library owns {a} atlases, and {b} of them are out on loan. "
    "How many atlases are on the shelf?",
    "Of the {a} atlases in a library, readers have borrowed {b}. "
    "How many atlases can still be borrowed today?",
    solution="Taking the {b} borrowed atlases from all {a} gives {a} - {b} = {answer}.",
)
def library_atlases(rng: Random) -> Values:
    b, answer = whole(rng, 2, 10), whole(rng, 3, 12)
    return {"a": b + answer, "b": b, "answer": answer}


@template(
    EVAL,
    ONE_STEP,
    "A ferry crosses the bay {a} times a day and carries {b} cars on every crossing. "
    "How many cars does it carry in a day?",
    "Each day a ferry makes {a} crossings, always with {b} cars on board. "
    "How many cars cross the bay daily?",
    solution="On {a} crossings with {b} cars each the ferry carries {a} * {b} = {answer} cars.",
)
def ferry_trips(rng: Random) -> Values:
    a, b = whole(rng, 3, 12), pick(rng, (5, 8, 9, 10, 20, 30))
    return {"a": a, "b": b, "answer": a * b}


@template(
    EVAL,
    ONE_STEP,
    "{name} cuts a rope of {total} meters into {n} pieces of the same length. "
    "How many meters long is each piece?",
    "A rope that measures {total} meters is cut into {n} equal parts. "
    "What is the length of one part in meters?",
    solution="Cutting {total} meters into {n} equal parts gives {total} / {n} = "
    "{answer} meters each.",
)
def rope_pieces(rng: Random) -> Values:
    n, answer = whole(rng, 2, 9), whole(rng, 2, 11)
    return {"total": n * answer, "n": n, "answer": answer}


@template(
    EVAL,
    ONE_STEP,
    "A freezer is at {a} degrees when {name} plugs it in. Its temperature then sinks "
    "by {b} degrees. What does its thermometer read now?",
    "The thermometer of a freezer reads {a} degrees. The freezer is plugged in, and "
    "the reading drops by {b} degrees. What is the new reading?",
    solution="Going down {b} degrees from a reading of {a} leads to {a} - {b} = {answer}.",
)
def freezer_reading(rng: Random) -> Values:
    a, b = whole(rng, 3, 10), whole(rng, 4, 20)
    return {"a": a, "b": b, "answer": a - b}


@template(
    EVAL,
    ONE_STEP,
    "{name} mails one parcel of {x} kilograms and another of {y} kilograms. "
    "How many kilograms do the two parcels weigh together?",
    "Two parcels lie on a scale. One weighs {x} kilograms and the other {y} kilograms. "
    "How many kilograms does the scale show?",
    solution="The weights of both parcels are added, which makes {x} + {y} = {answer} kilograms.",
)
def parcel_weights(rng: Random) -> Values:
    x = 10 * whole(rng, 1, 5) + whole(rng, 1, 9)
    y = 10 * whole(rng, 1, 4) + whole(rng, 1, 9)
    y += (x + y) % 10 == 0  # the sum is not a whole number
    return {"x": tenths(x), "y": tenths(y), "answer": tenths(x + y)}


@template(
    EVAL,
    ONE_STEP,
    "The surface of a swimming pool measures {a} by {b} meters. "
    "A plastic sheet of how many square meters covers it exactly?",
    "{name} orders a plastic sheet for a pool with sides of {a} and {b} meters. "
    "How many square meters must the sheet have?",
    solution="The surface of the pool is side times side, {a} * {b} = {answer} square meters.",
)
def pool_cover(rng: Random) -> Values:
    b = whole(rng, 3, 10)
    a = b + whole(rng, 2, 10)
    return {"a": a, "b": b, "answer": a * b}


@template(
    EVAL,
    ONE_STEP,
    "A pastry cook has {n} eggs and uses {share} of them for a wedding cake. "
    "How many eggs go into the cake?",
    "There are {n} eggs in the kitchen, and {share} of them are needed for a cake. "
    "How many eggs does the cook take?",
    solution="The cake needs {share} of the {n} eggs, and {n} / {d} = {answer}.",
)
def cake_eggs(rng: Random) -> Values:
    d, answer = pick(rng, tuple(SHARES)), whole(rng, 2, 10)
    return {"n": d * answer, "share": SHARES[d], "d": d, "answer": answer}


@template(
    EVAL,
    ONE_STEP,
    "A printer produces {a} pages every minute. "
    "How many pages does it produce in {b} minutes of non-stop work?",
    "Every minute {a} pages come out of a printer. "
    "How many pages lie in its tray after {b} minutes?",
    solution="The printer makes {a} pages a minute, so {a} * {b} = {answer} pages.",
)
def printer_pages(rng: Random) -> Values:
    a, b = pick(rng, (6, 8, 12, 15, 20, 30)), whole(rng, 3, 9)
    return {"a": a, "b": b, "answer": a * b}


@template(
    EVAL,
    ONE_STEP,
    "Of the {n} houses on an island, {p}% have solar panels. "
    "How many houses on the island have solar panels?",
    "An island has {n} houses. Solar panels were put on {p}% of these houses. "
    "How many houses got panels?",
    solution="Taking {p}% of {n} houses means {n} * {part} = {answer} houses with panels.",
)
def solar_roofs(rng: Random) -> Values:
    n, p = whole(rng, 20, 200, 20), pick(rng, PERCENTS)
    return {"n": n, "p": p, "part": hundredths(p), "answer": n * p // 100}


@template(
    EVAL,
    ONE_STEP,
    "A loaf must bake for {a} minutes, and it has been in the oven for {b} minutes. "
    "How many more minutes does it need?",
    "{name} sets a kitchen timer to {a} minutes for a loaf. "
    "After {b} minutes, how many minutes does the timer still show?",
    solution="Of the {a} minutes, {b} have passed already, so {a} - {b} = {answer} remain.",
)
def bread_timer(rng: Random) -> Values:
    b, answer = whole(rng, 5, 30, 5), whole(rng, 5, 30, 5)
    return {"a": b + answer, "b": b, "answer": answer}


@template(
    EVAL,
    ONE_STEP,
    "{name} spends ${t} on {n} zoo tickets that all have the same price. "
    "How many dollars does one ticket cost?",
    "A group pays ${t} for {n} zoo tickets of the same price. "
    "What is the price of a single ticket in dollars?",
    solution="One of the {n} tickets costs {t} / {n} = {answer} dollars.",
)
def zoo_tickets(rng: Random) -> Values:
    n, answer = whole(rng, 2, 9), whole(rng, 3, 15)
    return {"t": n * answer, "n": n, "answer": answer}


# ---- eval, two steps ---------------------------------------------------------------


@template(
    EVAL,
    TWO_STEP,
    "A beekeeper fills {a} jars of honey a day for {b} days and then gives {c} jars to "
    "neighbors. How many jars does the beekeeper keep?",
    "{name} fills {a} jars of honey on each of {b} days and takes {c} jars to a fair. "
    "How many jars stay at home?",
    solution="In {b} days there are {b} * {a} = {made} jars, "
    "and {made} - {c} = {answer} of them stay.",
)
def honey_jars(rng: Random) -> Values:
    a, b = whole(rng, 4, 12), whole(rng, 3, 6)
    c = whole(rng, 2, a * b - 4)
    return {"a": a, "b": b, "c": c, "made": a * b, "answer": a * b - c}


@template(
    EVAL,
    TWO_STEP,
    "{name} spends ${a} to enter a fair and takes {n} rides at ${p} each. "
    "How many dollars does the visit to the fair cost?",
    "The entrance to a fair is ${a}. Inside, {name} goes on {n} rides for ${p} each. "
    "What does {he} spend altogether, in dollars?",
    solution="The rides cost {n} * {p} = {rides} dollars, "
    "and with the entrance it is {rides} + {a} = {answer}.",
)
def fair_rides(rng: Random) -> Values:
    a, n, p = whole(rng, 5, 15), whole(rng, 2, 8), whole(rng, 2, 6)
    return {"a": a, "n": n, "p": p, "rides": n * p, "answer": n * p + a}


@template(
    EVAL,
    TWO_STEP,
    "{name} hikes for {h} hours and then rests for {m} minutes. "
    "How many minutes pass from the start of the hike to the end of the rest?",
    "A hike takes {name} {h} hours, and the picnic afterwards takes {m} minutes. "
    "How many minutes do both take together?",
    solution="The hike lasts {h} * 60 = {full} minutes, "
    "and {full} + {m} = {answer} minutes pass in all.",
)
def hike_minutes(rng: Random) -> Values:
    h, m = whole(rng, 2, 5), whole(rng, 10, 55, 5)
    return {"h": h, "m": m, "full": 60 * h, "answer": 60 * h + m}


@template(
    EVAL,
    TWO_STEP,
    "A snail crawls {a} centimeters on Monday and {b} centimeters on Tuesday. "
    "What is its average daily distance in centimeters?",
    "On two mornings a snail moves {a} and {b} centimeters. "
    "How many centimeters is the average of these two distances?",
    solution="Together the snail moves {a} + {b} = {total} centimeters, "
    "and {total} / 2 = {answer} is the average.",
)
def snail_average(rng: Random) -> Values:
    answer, gap = whole(rng, 10, 40), whole(rng, 1, 8)
    a, b = answer + gap, answer - gap
    return {"a": a, "b": b, "total": a + b, "answer": answer}


@template(
    EVAL,
    TWO_STEP,
    "{name} glues gold tape along all the edges of a picture that is {a} centimeters "
    "wide and {b} centimeters tall. How many centimeters of tape does {he} need?",
    "A picture has a width of {a} centimeters and a height of {b} centimeters. "
    "What is its perimeter in centimeters?",
    solution="Width and height add up to {a} + {b} = {half}, "
    "and the perimeter is twice that, {half} * 2 = {answer}.",
)
def picture_edges(rng: Random) -> Values:
    a, b = whole(rng, 10, 50, 5), whole(rng, 20, 60, 10)
    return {"a": a, "b": b, "half": a + b, "answer": 2 * (a + b)}


@template(
    EVAL,
    TWO_STEP,
    "A concert hall has {a} rows of {b} seats and a balcony with {c} more seats. "
    "How many people can sit in the hall?",
    "Downstairs in a concert hall there are {a} rows with {b} seats each, and upstairs "
    "there are {c} seats. How many seats does the hall have?",
    solution="The rows have {a} * {b} = {rows} seats, "
    "and with the balcony it is {rows} + {c} = {answer} seats.",
)
def concert_hall(rng: Random) -> Values:
    a, b, c = whole(rng, 30, 50, 10), whole(rng, 30, 50, 10), whole(rng, 110, 300, 10)
    return {"a": a, "b": b, "c": c, "rows": a * b, "answer": a * b + c}


@template(
    EVAL,
    TWO_STEP,
    "A young tree was {h} centimeters tall last year and has grown by {p}% since then. "
    "How many centimeters tall is it now?",
    "{name} planted a tree of {h} centimeters. In a year it became {p}% taller. "
    "What is its height now, in centimeters?",
    solution="The tree has grown by {h} * {part} = {more} centimeters "
    "to a height of {h} + {more} = {answer}.",
)
def tree_growth(rng: Random) -> Values:
    h, p = whole(rng, 60, 200, 20), pick(rng, PERCENTS)
    more = h * p // 100
    return {"h": h, "p": p, "part": hundredths(p), "more": more, "answer": h + more}


@template(
    EVAL,
    TWO_STEP,
    "A florist with {n} roses ties bunches of {b} until no full bunch can be made. "
    "How many roses stay untied?",
    "From {n} roses, {name} makes bunches of exactly {b} until too few are left for "
    "another bunch. How many roses are in no bunch?",
    solution="There are {q} bunches with {q} * {b} = {used} roses, "
    "so {n} - {used} = {answer} remain.",
)
def rose_bunches(rng: Random) -> Values:
    b, q = whole(rng, 5, 12), whole(rng, 2, 6)
    answer = whole(rng, 1, b - 1)
    n = b * q + answer
    return {"n": n, "b": b, "q": q, "used": b * q, "answer": answer}


@template(
    EVAL,
    TWO_STEP,
    "At a summer camp, {a} girls and {b} boys are split into {n} equal teams. "
    "How many children are in each team?",
    "A camp with {a} girls and {b} boys forms {n} teams of the same size for a race. "
    "How many children race in one team?",
    solution="The camp has {a} + {b} = {total} children, "
    "so a team has {total} / {n} = {answer} of them.",
)
def camp_teams(rng: Random) -> Values:
    n, answer = whole(rng, 2, 6), whole(rng, 4, 10)
    total = n * answer
    a = whole(rng, 3, total - 3)
    return {"a": a, "b": total - a, "n": n, "total": total, "answer": answer}


@template(
    EVAL,
    TWO_STEP,
    "A kettle holds {x} liters of soup. A cook serves {n} bowls of {y} liters each. "
    "How many liters of soup are left in the kettle?",
    "From a pot with {x} liters of soup, {name} ladles out {n} portions of {y} liters. "
    "How many liters of soup does the pot still hold?",
    solution="The servings take {n} * {y} = {out} liters out, "
    "so {x} - {out} = {answer} liters of soup are left.",
)
def soup_kettle(rng: Random) -> Values:
    n, y = whole(rng, 2, 9), pick(rng, (2, 3, 4, 5))
    x = 10 * whole(rng, 5, 9)
    x += 5 * ((x - n * y) % 10 == 0)  # what stays is not a whole number
    values = {"x": tenths(x), "n": n, "y": tenths(y)}
    return values | {"out": tenths(n * y), "answer": tenths(x - n * y)}


@template(
    EVAL,
    TWO_STEP,
    "A tap gives {a} liters of water in {m} minutes. "
    "How many liters does it give in {k} minutes if the flow stays the same?",
    "From a tap come {a} liters of water in {m} minutes. "
    "How much water, in liters, comes out of it in {k} minutes?",
    solution="Each minute gives {a} / {m} = {rate} liters, "
    "so {k} minutes give {k} * {rate} = {answer} liters of water.",
)
def tap_flow(rng: Random) -> Values:
    rate, m = whole(rng, 4, 12), whole(rng, 2, 5)
    k = m + whole(rng, 2, 8)
    return {"a": rate * m, "m": m, "k": k, "rate": rate, "answer": rate * k}


# ---- eval, harder ------------------------------------------------------------------


@template(
    EVAL,
    HARDER,
    "A drawer holds {a} white socks and {b} black socks. "
    "What fraction of the socks in the drawer is white, as a reduced fraction?",
    "In {name}'s drawer are {a} white and {b} black socks. "
    "White socks are what part of the whole? Give a reduced fraction.",
    solution="The drawer has {a} + {b} = {n} socks, and the white part is {a} / {n} = {answer}.",
)
def sock_drawer(rng: Random) -> Values:
    g, bottom = whole(rng, 2, 4), whole(rng, 3, 8)
    top = pick(rng, [i for i in range(1, bottom) if gcd(i, bottom) == 1])
    a, n = g * top, g * bottom
    return {"a": a, "b": n - a, "n": n, "answer": Fraction(top, bottom)}


@template(
    EVAL,
    HARDER,
    "A village had {a} mm of rain on Friday, {b} mm on Saturday and {c} mm on Sunday. "
    "What was the average daily rainfall in mm?",
    "The rain gauge shows {a} mm, {b} mm and {c} mm on three days. Find the mean daily rain in mm.",
    solution="All the rain is {a} + {b} + {c} = {total} mm, "
    "and over three days {total} / 3 = {answer} mm is the mean.",
)
def rain_gauge(rng: Random) -> Values:
    answer, gap, shift = whole(rng, 9, 20), whole(rng, 1, 4), whole(rng, 0, 3)
    a, b, c = answer + gap + shift, answer - gap, answer - shift
    return {"a": a, "b": b, "c": c, "total": a + b + c, "answer": answer}


@template(
    EVAL,
    HARDER,
    "{name} paints a wall that is {a} meters wide and {b} meters high. The paint comes "
    "in cans for {c} square meters at ${p} a can. "
    "How many dollars does the paint cost?",
    "A wall with a width of {a} meters and a height of {b} meters gets new paint. Each "
    "can lasts for {c} square meters, and the price of a can is ${p}. What does all "
    "the paint cost, in dollars?",
    solution="The wall has {a} * {b} = {area} square meters, so {area} / {c} = {cans} "
    "cans are needed for {cans} * {p} = {answer} dollars.",
)
def wall_paint(rng: Random) -> Values:
    b, width, cans = whole(rng, 2, 4), whole(rng, 2, 3), whole(rng, 2, 6)
    a, c, p = width * cans, width * b, pick(rng, (10, 12, 20))
    values = {"a": a, "b": b, "c": c, "p": p, "area": a * b}
    return values | {"cans": cans, "answer": cans * p}


@template(
    EVAL,
    HARDER,
    "A market stall sells {n} cakes at ${p} each and {m} pies at ${q} each. The "
    "ingredients cost ${c}. How many dollars of profit does the stall make?",
    "{name} sells {n} cakes for ${p} each and {m} pies for ${q} each, and had spent "
    "${c} on the ingredients. What is {his} profit in dollars?",
    solution="The cakes bring {n} * {p} = {cakes}, the pies {m} * {q} = {pies}, "
    "together {cakes} + {pies} = {sales}, so the profit is {sales} - {c} = {answer}.",
)
def market_stall(rng: Random) -> Values:
    n, p, m, q = whole(rng, 2, 6), whole(rng, 5, 12), whole(rng, 3, 8), whole(rng, 2, 4)
    sales = n * p + m * q
    c = whole(rng, 5, sales - 6)
    values = {"n": n, "p": p, "m": m, "q": q, "c": c}
    return values | {"cakes": n * p, "pies": m * q, "sales": sales, "answer": sales - c}


@template(
    EVAL,
    HARDER,
    "A canoe tour is {d} kilometers long. {name} paddles for {t} hours with a speed of "
    "{v} kilometers an hour and finishes in {h} more hours. What is the speed in this "
    "second part, in kilometers an hour?",
    "On a tour of {d} kilometers, a canoe goes {t} hours at a speed of {v} kilometers "
    "an hour. The remaining part takes {h} hours. How many kilometers an hour does the "
    "canoe make in that part?",
    solution="The first part is {t} * {v} = {done} and the second {d} - {done} = "
    "{rest} kilometers, so the speed is {rest} / {h} = {answer}.",
)
def canoe_tour(rng: Random) -> Values:
    t, v, h, answer = (
        whole(rng, 2, 4),
        whole(rng, 3, 8),
        whole(rng, 2, 5),
        whole(rng, 2, 9),
    )
    done, rest = t * v, h * answer
    values = {"d": done + rest, "t": t, "v": v, "h": h}
    return values | {"done": done, "rest": rest, "answer": answer}


@template(
    EVAL,
    HARDER,
    "A trader has {n} melons and sells {p}% of them. The others go into {k} crates "
    "with equal numbers. How many melons does each crate hold?",
    "Of {n} melons, a trader sells {p}%. The unsold ones are divided evenly among {k} "
    "crates. How many melons are in one crate?",
    solution="The trader sells {n} * {part} = {sold} melons and keeps {n} - {sold} = "
    "{rest}, so each crate holds {rest} / {k} = {answer}.",
)
def melon_crates(rng: Random) -> Values:
    n, p = whole(rng, 40, 200, 20), pick(rng, PERCENTS)
    sold = n * p // 100
    rest = n - sold
    k = pick(rng, [i for i in range(2, 11) if rest % i == 0])
    values = {"n": n, "p": p, "k": k, "part": hundredths(p)}
    return values | {"sold": sold, "rest": rest, "answer": rest // k}


@template(
    EVAL,
    HARDER,
    "A pottery kiln fires {n} batches for {m} minutes each and needs {k} minutes to "
    "warm up first. For how many hours is it on?",
    "In a pottery, {n} batches of cups need {m} minutes each in the kiln, which is "
    "heated up for {k} minutes first. How many hours does the kiln run?",
    solution="The batches take {n} * {m} = {most} minutes, with the heating "
    "{most} + {k} = {total}, and {total} / 60 = {answer} hours.",
)
def kiln_hours(rng: Random) -> Values:
    n, m = whole(rng, 2, 4), whole(rng, 25, 55, 5)
    k = pick(rng, quarter_hours(n * m))
    total = n * m + k
    values = {"n": n, "m": m, "k": k, "most": n * m}
    return values | {"total": total, "answer": hundredths(total * 100 // 60)}
