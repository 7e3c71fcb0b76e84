"""One prompt of every evaluation set as the model reads it, to be looked at."""

from helpers.core.plain_text import visible
from helpers.evaluation.prompts import prompt
from helpers.sources.sampling import evaluation_items
from helpers.study.schema import Study


def prompt_examples(study: Study, tokenizer) -> str:
    """The first item of each set, word by word, with the continuations that are scored.

    Characters that act on a terminal are replaced; line ends stay.
    """
    examples = []
    for name, wanted in study.evaluation.datasets.items():
        asked = prompt(evaluation_items(study, name)[0], wanted, tokenizer)
        lines = [f"===== {name} ({wanted.ask.protocol}) =====", asked.text]
        lines += [f"  continuation: {text!r}" for text in asked.continuations]
        examples.append("\n".join(lines))
    return visible("\n\n".join(examples), keep="\n")
