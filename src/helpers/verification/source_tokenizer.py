"""Token ids of a text by the source's own tokenizer, loaded anew: the second opinion on tokens.

transformers alone says what a text begins with; nothing of `chat_conversations` or `prompts` is
used.
"""

from transformers import AutoTokenizer

from helpers.sources.models import model_folder
from helpers.study.study_run import Job


def source_tokenizer(job: Job):
    """The tokenizer of the job's model as transformers loads it."""
    folder = model_folder(job.study, job.model, job.paths)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def source_token_ids(tokenizer, text: str, plain: bool) -> tuple[list[int], int]:
    """(token ids of a text without closing special tokens, number of leading special tokens).

    Args:
        plain: the text is not rendered by a chat template, which adds its own special tokens.
    """
    encoding = tokenizer(text, add_special_tokens=plain, return_special_tokens_mask=True)
    ids, added = list(encoding.input_ids), list(encoding.special_tokens_mask) if plain else []
    first = next((i for i, special in enumerate(added) if not special), 0)
    last = next((i for i, special in enumerate(reversed(added)) if not special), 0)
    return ids[: len(ids) - last], first
