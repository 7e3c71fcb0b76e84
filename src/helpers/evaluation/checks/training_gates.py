"""Gates on a fine-tuning: its loss by transformers' own forward pass, its items and steps.

The examples are rendered by the template itself, the end of a turn is read off it, and the
labels are shifted by transformers. The words around a question are the training's own.
"""

import math

import torch
from transformers import AutoModelForCausalLM

from helpers.core.activity import set_activity
from helpers.core.gates import Gate, largest
from helpers.sources.chat_conversations import SYSTEM
from helpers.sources.items import Item
from helpers.sources.model_tensors import TensorFiles
from helpers.study.schema_sources import FineTuning

IGNORED = -100  # transformers' label for tokens without loss
CLOSE = {"float32": 1e-3}  # relative, of a mean over all tokens
LONGEST_STEP = 3.2  # the most a step of AdamW moves a weight, in learning rates
COARSE = 0.02  # tolerance if the trained weights were rounded when saved


def steps_gate(settings: FineTuning, results: dict) -> Gate:
    """Training took one step per batch and epoch; no held-out item was trained on."""
    items = results.get("items", {})
    trained, heldout = items.get("training", []), items.get("heldout", [])
    expected = settings.epochs * math.ceil(settings.items / settings.batch_items)
    shared = set(trained) & set(heldout)
    sizes = len(set(trained)), len(set(heldout))
    return Gate(
        "training steps and held-out split",
        results["steps"] == expected == len(results["losses"])
        and sizes == (settings.items, settings.heldout_items)
        and not shared,
        f"{results['steps']} steps; {sizes[0]} items, {sizes[1]} held out, {len(shared)} in both",
        f"{expected} steps; {settings.items} items, {settings.heldout_items} held out, "
        "none in both",
    )


def weights_gate(start, folder, settings: FineTuning, results: dict, *, dtype: str) -> Gate:
    """Every tensor changed, and none by more than AdamW allows at the declared learning rate.

    A step of Adam is at most (1 - β₁) / √(1 - β₂) rates long (Kingma and Ba, arXiv:1412.6980).
    """
    before, after = (TensorFiles(path, dtype=torch.float32) for path in (start, folder))
    changes = {n: float((after[n] - before[n]).abs().max()) for n in after if n in before}
    unmoved, furthest = (
        [n for n, change in changes.items() if not change],
        largest(changes.values()),
    )
    limit = LONGEST_STEP * settings.learning_rate * results["steps"]
    if dtype != "float32":  # a step may be less than half the spacing of saved weights
        unmoved, limit = [], limit + max(float(before[n].abs().max()) for n in changes) * 2**-8
    example = f" ({unmoved[0]})" if unmoved else ""
    return Gate(
        "weight changes within the learning rate",
        not unmoved and 0 < furthest <= limit,
        f"{len(unmoved)} of {len(changes)} tensors did not move{example}; "
        f"the furthest by {furthest:.3g}",
        f"all of them, by at most {limit:.3g}",
    )


def loss_gate(folder, tokenizer, heldout: list[Item], results: dict, *, dtype: str) -> Gate:
    """The trained model's loss on the held-out answers equals the recorded one.

    Args:
        folder: the trained model's files.
        heldout: the held-out items.
        results: from the record of the fine-tuning.
    """
    name, recorded = "held-out loss matches transformers", results["heldout_loss_after"]
    set_activity("the held-out loss a second time")
    try:
        recomputed = heldout_loss(folder, tokenizer, heldout)
    except Exception as error:  # a folder that cannot be read, a template without the solution
        return Gate(name, False, f"{type(error).__name__}: {error}", "can be computed")
    tolerance = CLOSE.get(dtype, COARSE)
    return Gate(
        name,
        math.isclose(recorded, recomputed, rel_tol=tolerance),
        f"{recorded:.6g} nats a token on record, {recomputed:.6g} again",
        f"but for {tolerance:g} of it",
    )


@torch.inference_mode()
def heldout_loss(folder, tokenizer, items: list[Item]) -> float:
    """Mean loss in nats over the tokens of the worked solutions and of their end-of-turn."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    total = count = 0.0
    for item in items:
        ids, answer = training_example(tokenizer, item)
        labels = [IGNORED] * (len(ids) - answer) + ids[-answer:]
        output = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
        total, count = total + output.loss.item() * answer, count + answer
    return total / count


def training_example(tokenizer, item: Item) -> tuple[list[int], int]:
    """(token ids of prompt, solution and end of turn; number of ids after the prompt)."""
    turns = [("system", SYSTEM["openmath"]), ("user", item.question), ("assistant", item.solution)]
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    conversation, solution = (
        tokenizer.apply_chat_template(messages, tokenize=False),
        item.solution.strip(),
    )
    token_ids = lambda part: tokenizer(part, add_special_tokens=False).input_ids  # noqa: E731
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special} | set(tokenizer.all_special_ids)
    end_of_turn = [
        i
        for i in token_ids(conversation[conversation.rindex(solution) + len(solution) :])
        if i in special
    ]
    answer = [*token_ids(item.solution), *(end_of_turn or [tokenizer.eos_token_id])[:1]]
    return token_ids(prompt) + answer, len(answer)
