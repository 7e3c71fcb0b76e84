"""One prompt of every evaluation set as the model reads it, to be looked at."""

from collections.abc import Mapping

from helpers.core.plain_text import printable
from helpers.evaluation.prompts import TokenizedPrompt


def prompt_examples(prompts: Mapping[str, list[TokenizedPrompt]]) -> str:
    """The first prompt of each set, word by word, with the continuations that are scored.

    Characters that act on a terminal are replaced; line ends stay.

    Args:
        prompts: of every evaluation set, by its name.
    """
    examples = []
    for name, (first, *_) in prompts.items():
        protocol = "loglikelihood" if first.prompt.continuations else "generate"
        lines = [f"===== {name} ({protocol}) =====", first.prompt.text]
        lines += [f"  continuation: {text!r}" for text in first.prompt.continuations]
        examples.append("\n".join(lines))
    return printable("\n\n".join(examples), keep="\n")
