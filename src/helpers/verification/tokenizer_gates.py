"""The gate on the tokenizer that is saved with a checkpoint: it is the source's.

The evaluation reads with the source's tokenizer; whoever serves the checkpoint reads with the
one beside it. Files may be written anew by another version, so that what they do is
compared: the vocabulary, the special tokens, the chat format, and the tokens of every text of
the study.
"""

from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from helpers.sources.items import Item
from helpers.sources.sampling import calibration_items, evaluation_items, shared_passages
from helpers.study.schema import Study
from helpers.verification.checkpoint_files import Evidence
from helpers.verification.gate_decorator import gate, named

ENDS = ("bos_token_id", "eos_token_id")
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 3 + 4?"},
]


@gate("the source's tokenizer beside the checkpoint")
def tokenizer_gate(evidence: Evidence):
    """Same vocabulary, ends and chat format, and the same tokens of every text."""
    source, saved = _load(evidence.source_folder), _load(evidence.folder)
    odd = [name for name in ENDS if getattr(source, name) != getattr(saved, name)]
    vocabularies = [tokenizer.get_vocab() for tokenizer in (source, saved)]
    moved = sorted(vocabularies[0].items() ^ vocabularies[1].items())
    odd += [f"vocabulary: {moved[0][0]!r}"] if moved else []
    written = {"tokenize": False, "add_generation_prompt": True}
    chats = [t.apply_chat_template(CONVERSATION, **written) for t in (source, saved)]
    odd += ["chat format"] if chats[0] != chats[1] else []
    texts = list(texts_of(evidence.job.study))
    read = [tokenizer(texts).input_ids for tokenizer in (source, saved)]
    other = [t for t, a, b in zip(texts, *read, strict=True) if a != b]
    return (
        not odd and not other,
        f"{len(other)} of {len(texts)} texts have other tokens; other: {len(odd)}{named(odd)}",
        "none, none",
    )


def _load(folder: Path):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def texts_of(study: Study) -> Iterator[str]:
    """Every text of the study's items, and the passages that all variants read."""
    for name in study.evaluation.datasets:
        yield from map(_text, evaluation_items(study, name))
    yield from map(_text, calibration_items(study))
    yield from shared_passages(study)


def _text(item: Item) -> str:
    return "\n".join((item.passage, item.question, *item.options, *item.golds, item.solution))
