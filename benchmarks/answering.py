"""Written answers: against transformers' `generate` and vLLM, on the study's own prompts.

All are greedy, with the study's caps and at most as many answers at once. What a peer
writes after a complete box is cut off before answers are compared; two of the peers know
the stop themselves.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain

import torch
from transformers import StoppingCriteria

from benchmarks import agreement
from benchmarks.agreement import Agreement
from benchmarks.material import Material
from benchmarks.turns import Comparison, take_turns
from benchmarks.vllm_client import Vllm, why_not
from helpers.evaluation.engine import ask_all, box_closes, stop_tokens
from helpers.evaluation.generation import Answer, Ends
from helpers.evaluation.prompts import prompt
from helpers.sources.batching import pad
from helpers.sources.conversations import tokenize
from helpers.sources.datasets import evaluation_items
from helpers.study.plain_text import whole_characters
from helpers.study.schema import Study

SETS = ("openmath", "squad_v2")
ROWS = 32
PLAIN = f"transformers `generate` (float32, batch {ROWS})"
STOPPING = f"transformers `generate` (float32, batch {ROWS}), told the stop"
VLLM = {"float32": "vLLM (float32)", "INT8": "vLLM (the same INT8 checkpoint)"}


class BoxCloses(StoppingCriteria):
    """Ends a row of `generate` at its first complete box."""

    def __init__(self, complete: Callable[[list[int]], bool], start: int):
        self.complete, self.start = complete, start

    def __call__(self, input_ids, scores, **_options) -> torch.Tensor:
        """(rows,) bool."""
        written = input_ids[:, self.start :].tolist()
        return torch.tensor([self.complete(row) for row in written], device=input_ids.device)


def compare(material: Material, *, rounds: int) -> list[Comparison]:
    """Ours in float32 and INT8 against `generate`, with and without the stop, and vLLM."""
    study = material.asking(*SETS, rows=ROWS)
    model, int8 = material.float_model(), material.int8_model()
    ways = {
        "float32": partial(our_answers, model, material, study),
        "INT8": partial(our_answers, int8, material, study),
        PLAIN: partial(peer_answers, material, study, model, partial(generated, model, None)),
    }
    closes = box_closes(material.tokenizer)
    told = partial(generated, model, closes)
    ways[STOPPING] = partial(peer_answers, material, study, model, told)
    missing, servers = why_not(), {}
    if not missing:
        folders = {"float32": material.folder, "INT8": material.checkpoint}
        servers = {k: Vllm(f, threads=material.threads, rows=ROWS) for k, f in folders.items()}
        for name, server in servers.items():
            ways[VLLM[name]] = partial(peer_answers, material, study, model, server.answers)
    turns = take_turns(ways, rounds=rounds)
    for server in servers.values():
        server.close()
    wanted = [("float32", PLAIN, 2.5), ("float32", STOPPING, None), ("INT8", PLAIN, None)]
    wanted += [("float32", VLLM["float32"], 1 / 1.3), ("INT8", VLLM["INT8"], None)]
    return [_row(turns, ours, peer, goal, missing) for ours, peer, goal in wanted]


def _row(turns, ours: str, peer: str, goal: float | None, missing: str | None) -> Comparison:
    there = peer in turns.answers
    found = Agreement(f"not run: {missing}")
    if there:
        exact = ours == "float32"
        found = agreement.texts(turns.answers[ours], turns.answers[peer], exact=exact)
    return Comparison(
        what=f"writing {len(turns.answers[ours][0])} answers ({', '.join(SETS)})",
        ours=ours,
        peer=peer,
        ours_spent=turns.seconds[ours],
        peer_spent=turns.seconds[peer] if there else [],
        goal=goal,
        agreement=found,
    )


def our_answers(model, material: Material, study: Study) -> list[str]:
    """What every item of all sets was answered."""
    found = ask_all(model, material.tokenizer, study)
    return [prediction["output"] for prediction in chain(*found.values())]


def peer_answers(material: Material, study: Study, model, write) -> list[str]:
    """The same by a peer, cut where the study's answers end.

    Args:
        model: the float model, for its list of tokens that end a turn.
        write: (prompts, max_new_tokens, stop_tokens) → the new tokens of each prompt.
    """
    tokenizer, answers = material.tokenizer, []
    stops, closes = stop_tokens(model, tokenizer), box_closes(tokenizer)
    for name, wanted in study.evaluation.datasets.items():
        asked = [prompt(item, wanted, tokenizer) for item in evaluation_items(study, name)]
        tokens = [tokenize(tokenizer, p.text) for p in asked]
        ends = Ends(wanted.ask.max_new_tokens, frozenset(stops), closes)
        for row in write(tokens, wanted.ask.max_new_tokens, stops):
            kept = tokenizer.decode(up_to_the_end(row, ends), skip_special_tokens=True)
            answers.append(whole_characters(kept))
    return answers


def up_to_the_end(tokens: list[int], ends: Ends) -> list[int]:
    """The tokens up to where an answer of the study ends."""
    answer = Answer(0)
    for token in tokens:
        if answer.take(token, True, ends):
            break
    return answer.tokens


def generated(
    model, complete, prompts: list[list[int]], max_new_tokens: int, stops: set[int]
) -> list[list[int]]:
    """Greedy answers by `generate`, in batches of like lengths padded on the left.

    Args:
        complete: whether an answer is complete; None lets every row run to its cap.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), ROWS):
        batch = order[start : start + ROWS]
        rows = [prompts[i] for i in batch]
        width = max(map(len, rows))
        out = model.generate(
            input_ids=pad(rows, value=0, side="left", device="cpu"),
            attention_mask=pad([[1] * len(r) for r in rows], value=0, side="left", device="cpu"),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(stops),
            stopping_criteria=[BoxCloses(complete, width)] if complete else None,
        )
        for i, row in zip(batch, out[:, width:].tolist(), strict=True):
            answers[i] = row
    return answers
