"""Option scoring: against lm-evaluation-harness on the very same prompts and continuations."""

from functools import partial
from itertools import chain

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from benchmarks import agreement
from benchmarks.material import Material
from benchmarks.turns import Comparison, take_turns
from helpers.evaluation.engine import ask_all
from helpers.evaluation.prompts import prompt
from helpers.evaluation.scoring import score_options
from helpers.sources.datasets import evaluation_items
from helpers.study.schema import Study

SETS = ("arc", "boolq")
HARNESS_BATCH = 16
PEER = f"lm-evaluation-harness (HF backend, float32, batch {HARNESS_BATCH})"


def compare(material: Material, *, rounds: int) -> list[Comparison]:
    """Ours in float32, INT8 and bfloat16, each against the harness in float32."""
    study = material.asking(*SETS)
    models = {
        "float32": material.float_model(),
        "INT8": material.int8_model(),
        "bfloat16": material.float_model("bfloat16"),
    }
    harness = HFLM(
        pretrained=str(material.folder), dtype="float32", batch_size=HARNESS_BATCH, device="cpu"
    )
    ways = {PEER: partial(harness_answers, harness, material, study)}
    for name, model in models.items():
        ways[name] = partial(our_answers, model, material, study)
    turns = take_turns(ways, rounds=rounds)
    items = len(turns.answers[PEER][0])
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


def our_answers(model, material: Material, study: Study) -> list[dict]:
    """The predictions of all sets, one after the other."""
    return list(chain(*ask_all(model, material.tokenizer, study).values()))


def harness_answers(harness: HFLM, material: Material, study: Study) -> list[dict]:
    """The same, by the harness's log-likelihoods."""
    asked = [
        (wanted, prompt(item, wanted, material.tokenizer))
        for name, wanted in study.evaluation.datasets.items()
        for item in evaluation_items(study, name)
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
