"""What was asked, word by word: one line an item, kept by every model's baseline.

All variants of a model are asked the same (a gate holds them to the baseline's hashes),
so one copy is enough. With it a report shows its questions, and results can be handed on
in another format, where neither the items nor the model are at hand. Reading it needs no
torch; a line proves itself, since its hash is in every prediction.
"""

from collections.abc import Sequence
from pathlib import Path

from helpers.core.errors import StudyError
from helpers.core.hashing import sha256_data
from helpers.core.records import read_jsonl

FOLDER = "prompts"


def prompt_digest(
    text: str,
    continuations: Sequence[str],
    tokens: Sequence[int] | None = None,
    options: Sequence[Sequence[int]] = (),
) -> str:
    """Digest of a prompt, equal for two variants if and only if their prompts are equal.

    Args:
        text, continuations: the words.
        tokens, options: their token ids, as the model receives them; without them the digest
            covers the words alone, as in older records.
    """
    words = [text, list(continuations)]
    if tokens is None:
        return sha256_data(words)[:16]
    return sha256_data([*words, list(tokens), [list(option) for option in options]])[:16]


def read_prompts(folder: Path, dataset: str) -> dict[str, dict]:
    """The recorded prompts by item id; empty if the evaluation has no record of them.

    Args:
        folder: the baseline's evaluation.

    Raises:
        StudyError: a line is damaged or does not match its digest.
    """
    path = folder / FOLDER / f"{dataset}.jsonl"
    if not path.is_file():
        return {}
    rows = {}
    for number, row in enumerate(read_jsonl(path, made_by="03_evaluation"), start=1):
        try:
            ids = row.get("tokens"), row.get("continuation_tokens", ())
            digest = prompt_digest(row["prompt"], row["continuations"], *ids)
            is_valid = digest == row["prompt_hash"]
            rows[row["id"]] = row
        except (KeyError, TypeError, ValueError):
            is_valid = False
        if not is_valid or not isinstance(row.get("question"), str):
            raise StudyError(
                f"{'/'.join(path.parts[-5:])}: line {number} is damaged (its hash differs); "
                "run 03_evaluation again"
            )
    return rows
