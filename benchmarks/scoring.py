"""Option scoring: against lm-evaluation-harness on the very same prompts and continuations."""

from functools import partial
from itertools import chain

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from benchmarks import agreement
from benchmarks.material import Material
from benchmarks.turns import Comparison, Turns, take_turns
from helpers.evaluation.prompts import render_prompt
from helpers.evaluation.scoring import score_options

SETS = ("arc", "boolq")
HARNESS_BATCH = 16
PEER = f"lm-evaluation-harness (HF backend, float32, batch {HARNESS_BATCH})"


def compare(material: Material) -> list[Comparison]:
    """Ours in float32, INT8 and bfloat16, each against the harness in float32; by set as well."""
    models = {
        "float32": material.float_model(),
        "INT8": material.int8_model(),
        "bfloat16": material.float_model("bfloat16"),
    }
    harness = HFLM(
        pretrained=str(material.folder), dtype="float32", batch_size=HARNESS_BATCH, device="cpu"
    )
    by_set = {}
    for name in SETS:
        ways = {PEER: partial(harness_answers, harness, material, name)}
        ways |= {kind: partial(material.ask, model, [name]) for kind, model in models.items()}
        by_set[name] = take_turns(ways, rounds=material.rounds)
    goals = {"float32": 3.0, "INT8": 5.0, "bfloat16": None}
    rows = [_row(together(list(by_set.values())), ", ".join(SETS), *goal) for goal in goals.items()]
    return rows + [_row(by_set[name], name, kind, None) for name in SETS for kind in models]


def together(parts: list[Turns]) -> Turns:
    """All sets as one: seconds added and answers joined, round by round."""
    seconds, answers = {}, {}
    for way in parts[0].seconds:
        seconds[way] = list(map(sum, zip(*(part.seconds[way] for part in parts), strict=True)))
        rounds = zip(*(part.answers[way] for part in parts), strict=True)
        answers[way] = [list(chain.from_iterable(each)) for each in rounds]
    return Turns(seconds, answers)


def _row(turns: Turns, sets: str, kind: str, goal: float | None) -> Comparison:
    items = sum(map(len, turns.answers[PEER]))
    return Comparison(
        what=f"scoring the options of {items} items ({sets})",
        ours=kind,
        peer=PEER,
        ours_spent=turns.seconds[kind],
        peer_spent=turns.seconds[PEER],
        goal=goal,
        agreement=agreement.choices(
            turns.answers[kind], turns.answers[PEER], exact=kind == "float32"
        ),
    )


def harness_answers(harness: HFLM, material: Material, name: str, turn: int) -> list[dict]:
    """Predictions of the round's share of one set by the harness's log-likelihoods."""
    prompts = [
        (evaluation_set, render_prompt(item, evaluation_set, material.tokenizer))
        for evaluation_set, items in material.sets([name], turn)
        for item in items
    ]
    pairs = [(p.text, continuation) for _, p in prompts for continuation in p.continuations]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    values = iter(harness.loglikelihood(requests, disable_tqdm=True))
    predictions = []
    for evaluation_set, p in prompts:
        logprobs = [next(values)[0] for _ in p.continuations]
        predictions.append(
            score_options(p.item, logprobs, p.continuations, normalize=evaluation_set.ask.normalize)
        )
    return predictions
