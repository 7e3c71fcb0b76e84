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
from helpers.verification.checkpoint_files import CheckpointFiles
from helpers.verification.gate_decorator import examples, gate

ENDS = ("bos_token_id", "eos_token_id")
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 3 + 4?"},
]


@gate("tokenizer matches the source")
def tokenizer_gate(evidence: CheckpointFiles):
    """Both tokenizers agree in vocabulary, special tokens, chat format and tokens of every text."""
    source, saved = _load(evidence.source_folder), _load(evidence.folder)
    differences = [name for name in ENDS if getattr(source, name) != getattr(saved, name)]
    vocabularies = [tokenizer.get_vocab() for tokenizer in (source, saved)]
    vocabulary_changes = sorted(vocabularies[0].items() ^ vocabularies[1].items())
    differences += [f"vocabulary: {vocabulary_changes[0][0]!r}"] if vocabulary_changes else []
    options = {"tokenize": False, "add_generation_prompt": True}
    chats = [t.apply_chat_template(CONVERSATION, **options) for t in (source, saved)]
    differences += ["chat format"] if chats[0] != chats[1] else []
    texts = list(study_texts(evidence.job.study))
    token_ids = [tokenizer(texts).input_ids for tokenizer in (source, saved)]
    differing_texts = [t for t, a, b in zip(texts, *token_ids, strict=True) if a != b]
    return (
        not differences and not differing_texts,
        f"{len(differing_texts)} of {len(texts)} texts have other tokens; other: "
        f"{len(differences)}{examples(differences)}",
        "none, none",
    )


def _load(folder: Path):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def study_texts(study: Study) -> Iterator[str]:
    """Every text of the study's items, and the passages of the shared text."""
    for name in study.evaluation.datasets:
        yield from map(_item_text, evaluation_items(study, name))
    yield from map(_item_text, calibration_items(study))
    yield from shared_passages(study)


def _item_text(item: Item) -> str:
    return "\n".join((item.passage, item.question, *item.options, *item.golds, item.solution))
