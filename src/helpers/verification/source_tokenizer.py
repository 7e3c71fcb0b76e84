"""Token ids of a text by the source's own tokenizer, loaded anew: the second opinion on tokens.

transformers alone says what a text begins with; nothing of `chat_conversations` or `prompts` is
used.
"""

from transformers import AutoTokenizer

from helpers.sources.models import model_folder
from helpers.study.study_run import Job


def own_tokenizer(job: Job):
    """The tokenizer of the job's model as transformers loads it."""
    folder = model_folder(job.study, job.model, job.paths)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def own_tokens(tokenizer, text: str, plain: bool) -> tuple[list[int], int]:
    """(token ids of a text that goes on, how many of them the tokenizer puts before it).

    Args:
        plain: not rendered by a chat template, which has written what belongs before the text.
    """
    found = tokenizer(text, add_special_tokens=plain, return_special_tokens_mask=True)
    ids, added = list(found.input_ids), list(found.special_tokens_mask) if plain else []
    first = next((i for i, special in enumerate(added) if not special), 0)
    last = next((i for i, special in enumerate(reversed(added)) if not special), 0)
    return ids[: len(ids) - last], first
