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

IGNORED = -100  # transformers' mark of what is not scored
CLOSE = {"float32": 1e-3}  # relative, of a mean over all tokens
LONGEST_STEP = 3.2  # learning rates
COARSE = 0.02  # where the trained weights were rounded to be saved


def steps_gate(settings: FineTuning, results: dict) -> Gate:
    """As many steps as the epochs have batches; held-out items are none of those trained on."""
    items = results.get("items", {})
    trained, heldout = items.get("training", []), items.get("heldout", [])
    due = settings.epochs * math.ceil(settings.items / settings.batch_items)
    both = set(trained) & set(heldout)
    sizes = len(set(trained)), len(set(heldout))
    return Gate(
        "every batch trained on, held-out items apart",
        results["steps"] == due == len(results["losses"])
        and sizes == (settings.items, settings.heldout_items)
        and not both,
        f"{results['steps']} steps; {sizes[0]} items, {sizes[1]} held out, {len(both)} in both",
        f"{due} steps; {settings.items} items, {settings.heldout_items} held out, none in both",
    )


def weights_gate(start, folder, settings: FineTuning, results: dict, *, dtype: str) -> Gate:
    """Every tensor moved, and none further than AdamW goes at the declared learning rate.

    A step of Adam is at most (1 - β₁) / √(1 - β₂) rates long (Kingma and Ba, arXiv:1412.6980).
    """
    before, after = (TensorFiles(path, dtype=torch.float32) for path in (start, folder))
    moved = {n: float((after[n] - before[n]).abs().max()) for n in after if n in before}
    still, furthest = [n for n, change in moved.items() if not change], largest(moved.values())
    limit = LONGEST_STEP * settings.learning_rate * results["steps"]
    if dtype != "float32":  # a step may be less than half the spacing of saved weights
        still, limit = [], limit + max(float(before[n].abs().max()) for n in moved) * 2**-8
    return Gate(
        "weights moved as far as the learning rate takes them",
        not still and 0 < furthest <= limit,
        f"{len(still)} of {len(moved)} tensors did not move{f' ({still[0]})' if still else ''}; "
        f"the furthest by {furthest:.3g}",
        f"all of them, by at most {limit:.3g}",
    )


def loss_gate(folder, tokenizer, heldout: list[Item], results: dict, *, dtype: str) -> Gate:
    """The trained model's loss on the held-out answers is the one on record.

    Args:
        folder: the trained model's files.
        heldout: the held-out items.
        results: of the record of the fine-tuning.
    """
    name, told = "held-out loss as transformers computes it", results["heldout_loss_after"]
    set_activity("the held-out loss a second time")
    try:
        again = heldout_loss(folder, tokenizer, heldout)
    except Exception as error:  # a folder that cannot be read, a template without the solution
        return Gate(name, False, f"{type(error).__name__}: {error}", "can be computed")
    close = CLOSE.get(dtype, COARSE)
    return Gate(
        name,
        math.isclose(told, again, rel_tol=close),
        f"{told:.6g} nats a token on record, {again:.6g} again",
        f"but for {close:g} of it",
    )


@torch.inference_mode()
def heldout_loss(folder, tokenizer, items: list[Item]) -> float:
    """Mean loss of the tokens of the worked solutions and the ends of their turns, in nats."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    total = count = 0.0
    for item in items:
        ids, answer = example(tokenizer, item)
        labels = [IGNORED] * (len(ids) - answer) + ids[-answer:]
        made = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
        total, count = total + made.loss.item() * answer, count + answer
    return total / count


def example(tokenizer, item: Item) -> tuple[list[int], int]:
    """(token ids of a question as asked, its solution and the end of its turn; those answered)."""
    turns = [("system", SYSTEM["openmath"]), ("user", item.question), ("assistant", item.solution)]
    messages = [{"role": role, "content": content} for role, content in turns]
    asked = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    whole, solution = tokenizer.apply_chat_template(messages, tokenize=False), item.solution.strip()
    read = lambda part: tokenizer(part, add_special_tokens=False).input_ids  # noqa: E731
    added = tokenizer.added_tokens_decoder.items()
    special = {i for i, token in added if token.special} | set(tokenizer.all_special_ids)
    after = [i for i in read(whole[whole.rindex(solution) + len(solution) :]) if i in special]
    answer = [*read(item.solution), *(after or [tokenizer.eos_token_id])[:1]]
    return read(asked) + answer, len(answer)
