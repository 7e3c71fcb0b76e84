"""Option scoring: against lm-evaluation-harness on the very same prompts and continuations."""

from functools import partial

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from benchmarks import agreement
from benchmarks.material import Material
from benchmarks.turns import Comparison, take_turns
from helpers.evaluation.prompts import prompt
from helpers.evaluation.scoring import score_options

SETS = ("arc", "boolq")
HARNESS_BATCH = 16
PEER = f"lm-evaluation-harness (HF backend, float32, batch {HARNESS_BATCH})"


def compare(material: Material) -> list[Comparison]:
    """Ours in float32, INT8 and bfloat16, each against the harness in float32."""
    models = {
        "float32": material.float_model(),
        "INT8": material.int8_model(),
        "bfloat16": material.float_model("bfloat16"),
    }
    harness = HFLM(
        pretrained=str(material.folder), dtype="float32", batch_size=HARNESS_BATCH, device="cpu"
    )
    ways = {PEER: partial(harness_answers, harness, material)}
    for name, model in models.items():
        ways[name] = partial(material.ask, model, SETS)
    turns = take_turns(ways, rounds=material.rounds)
    items = sum(map(len, turns.answers[PEER]))
    return [
        Comparison(
            what=f"scoring the options of {items} items ({', '.join(SETS)})",
            ours=name,
            peer=PEER,
            ours_spent=turns.seconds[name],
            peer_spent=turns.seconds[PEER],
            goal=goal,
            agreement=agreement.choices(
                turns.answers[name], turns.answers[PEER], exact=name == "float32"
            ),
        )
        for name, goal in (("float32", 3.0), ("INT8", 5.0), ("bfloat16", None))
    ]


def harness_answers(harness: HFLM, material: Material, turn: int) -> list[dict]:
    """Predictions of the round's share by the harness's log-likelihoods."""
    asked = [
        (wanted, prompt(item, wanted, material.tokenizer))
        for wanted, items in material.sets(SETS, turn)
        for item in items
    ]
    pairs = [(p.text, continuation) for _, p in asked for continuation in p.continuations]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    values = iter(harness.loglikelihood(requests, disable_tqdm=True))
    found = []
    for wanted, p in asked:
        logprobs = [next(values)[0] for _ in p.continuations]
        found.append(
            score_options(p.item, logprobs, p.continuations, normalize=wanted.ask.normalize)
        )
    return found
