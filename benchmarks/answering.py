"""Written answers: against transformers' `generate` and vLLM, on the study's own prompts.

All are greedy, with the study's caps and at most as many answers at once, and all are
told that a complete box ends an answer. Every round asks all items: with fewer, slots that
nobody is left to refill would weigh more.
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers import StoppingCriteria

from benchmarks import agreement
from benchmarks.agreement import Agreement
from benchmarks.material import Material
from benchmarks.turns import Comparison, take_turns
from benchmarks.vllm_client import Vllm, why_not
from helpers.core.errors import valid_unicode
from helpers.evaluation.engine import box_closes, stop_tokens
from helpers.evaluation.prompts import render_prompt
from helpers.inference.protocols import AnswerInProgress, StopRules
from helpers.runtime.devices import pad
from helpers.sources.chat import tokenize

SETS = ("openmath", "squad_v2")
ROWS = 32
GENERATE = f"transformers `generate` (float32, batch {ROWS})"
VLLM = {"float32": "vLLM (float32)", "INT8": "vLLM (the same INT8 checkpoint)"}


class BoxCloses(StoppingCriteria):
    """Ends a row of `generate` at its first complete box."""

    def __init__(self, complete: Callable[[list[int]], bool], start: int):
        self.complete, self.start = complete, start

    def __call__(self, input_ids, scores, **_options) -> torch.Tensor:
        """(rows,) bool."""
        written = input_ids[:, self.start :].tolist()
        return torch.tensor([self.complete(row) for row in written], device=input_ids.device)


def compare(material: Material) -> list[Comparison]:
    """Ours in float32 and INT8 against `generate` and vLLM."""
    model, int8 = material.float_model(), material.int8_model()
    ways = {
        "float32": partial(our_answers, model, material),
        "INT8": partial(our_answers, int8, material),
    }
    generate_answers = partial(generated, material.peers_model(), box_closes(material.tokenizer))
    ways[GENERATE] = partial(peer_answers, material, model, generate_answers)
    missing, servers = why_not(), {}
    if not missing:
        folders = {"float32": material.folder, "INT8": material.checkpoint}
        servers = {k: Vllm(f, threads=material.threads, rows=ROWS) for k, f in folders.items()}
        for name, server in servers.items():
            ways[VLLM[name]] = partial(peer_answers, material, model, server.answers)
    turns = take_turns(ways, rounds=material.rounds)
    for server in servers.values():
        server.close()
    comparisons = [("float32", GENERATE, 2.5), ("INT8", GENERATE, None)]
    comparisons += [("float32", VLLM["float32"], 1 / 1.3), ("INT8", VLLM["INT8"], None)]
    return [_row(turns, ours, peer, goal, missing) for ours, peer, goal in comparisons]


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


def our_answers(model, material: Material, _turn: int) -> list[str]:
    """The answer to every item."""
    return [prediction["output"] for prediction in material.ask(model, SETS, None, rows=ROWS)]


def peer_answers(material: Material, model, write, _turn: int) -> list[str]:
    """The same by another library, cut where the study's stop rules end an answer.

    Args:
        model: the float model, for its list of tokens that end a turn.
        write: (prompts, max_new_tokens, stop_tokens) → the new tokens of each prompt.
    """
    tokenizer, answers = material.tokenizer, []
    stops, closes = stop_tokens(model, tokenizer), box_closes(tokenizer)
    for evaluation_set, items in material.sets(SETS, None):
        prompts = [render_prompt(item, evaluation_set, tokenizer) for item in items]
        tokens = [tokenize(tokenizer, p.text) for p in prompts]
        ends = StopRules(evaluation_set.ask.max_new_tokens, frozenset(stops), closes)
        for row in write(tokens, evaluation_set.ask.max_new_tokens, stops):
            text = tokenizer.decode(up_to_the_end(row, ends), skip_special_tokens=True)
            answers.append(valid_unicode(text))
    return answers


def up_to_the_end(tokens: list[int], ends: StopRules) -> list[int]:
    """The tokens before the study's stop rules end the answer."""
    answer = AnswerInProgress(0)
    for token in tokens:
        if answer.append_token(token, True, ends):
            break
    return answer.tokens


def generated(
    model, complete, prompts: list[list[int]], max_new_tokens: int, stops: set[int]
) -> list[list[int]]:
    """Greedy answers by `generate`, in batches of like lengths padded on the left.

    Args:
        complete: whether an answer is complete; its row then ends.
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
            stopping_criteria=[BoxCloses(complete, width)],
        )
        for i, row in zip(batch, out[:, width:].tolist(), strict=True):
            answers[i] = row
    return answers
