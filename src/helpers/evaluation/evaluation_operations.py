"""Operations of evaluation and of measuring cost, counted before anything runs.

    python -m helpers.evaluation.evaluation_operations demo

prints them for every such job of a study, as JSON. What texts share is counted once, as the
engine reads it; checks on answers are counted with the answers. See
`helpers.cost.operations` for what counts.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from helpers.core.errors import StudyError
from helpers.core.paths import StudyPaths
from helpers.cost.operations import (
    Size,
    folder_to_count,
    operations,
    read,
    size_of,
    touched,
    written,
)
from helpers.cost.throughput import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    PROMPTS,
    ROUNDS,
    ROW_TOKENS,
    WARM_TOKENS,
)
from helpers.evaluation.checks.batch_invariance import SAMPLE, exact
from helpers.evaluation.checks.float_reference import PASSAGES
from helpers.evaluation.gold_answers import answer_tokens, gold_answers
from helpers.evaluation.prompts import asked_tokens, option_tokens, prompt
from helpers.inference.packed_rows import Text, cut
from helpers.inference.perplexity import passage_tokens
from helpers.runtime.batching import FEWEST_ROWS
from helpers.sources.models import load_tokenizer
from helpers.sources.sampling import evaluation_items, shared_passages
from helpers.study import stages
from helpers.study.loading import load_study, study_file
from helpers.study.schema import Study
from helpers.study.schema_sources import FineTunedModel
from helpers.study.schema_variants import one_a_scheme
from helpers.study.study_run import Job

LOADED = 6  # times an evaluation's weights are loaded, hashed and compared


@dataclass(frozen=True)
class Asked:
    """The tokens of one evaluation set.

    Attributes:
        items: how many.
        alone: tokens of all prompts, each read from its beginning.
        together: the same with shared beginnings read once.
        options: tokens read of the options, or of golds and foils where answers are written.
        predicted: how many tokens' predictions are looked at before any is written.
        cap: the most new tokens of an answer; 0 where none is written.
    """

    items: int
    alone: int
    together: int
    options: int
    predicted: int
    cap: int


def asked(study: Study, name: str, tokenizer) -> Asked:
    """The tokens of one evaluation set of the study."""
    wanted = study.evaluation.datasets[name]
    prompts = [prompt(item, wanted, tokenizer) for item in evaluation_items(study, name)]
    if wanted.ask.protocol == "loglikelihood":
        tokens = [option_tokens(tokenizer, p) for p in prompts]
        texts = [cut(t.context, t.cuts) for t in tokens]
        options = sum(len(option) - 1 for t in tokens for option in t.options)
        return _asked(texts, options, options + len(texts), 0)
    tokens = [asked_tokens(tokenizer, p) for p in prompts]
    golds = gold_answers([p.item for p in prompts], wanted)
    read = [
        answer_tokens(tokenizer, p, t, golds[p.item.id].texts, wanted.ask)
        for p, t in zip(prompts, tokens, strict=True)
    ]
    texts = [cut(t.context, t.cuts) for t in tokens]
    options = sum(len(option) - 1 for r in read for option in r.options)
    return _asked(texts, options, options + 2 * len(texts), wanted.ask.max_new_tokens)


def _asked(texts: Sequence[Text], options: int, predicted: int, cap: int) -> Asked:
    beginnings = {t.shared[:end] for t in texts for end in range(1, len(t.shared) + 1)}
    together = sum(len(b[-1]) for b in beginnings) + sum(len(t.rest) for t in texts)
    return Asked(len(texts), sum(map(len, texts)), together, options, predicted, cap)


def shared_text(study: Study, tokenizer) -> list[int]:
    """Tokens that are predicted in each passage of the shared text."""
    limit = study.evaluation.shared_text.max_tokens
    found = passage_tokens(tokenizer, shared_passages(study), max_tokens=limit)
    return [len(tokens) - 1 for tokens in found]


def evaluation(
    study: Study, variant: str, size: Size, sets: dict[str, Asked], passages: list[int]
) -> Counter:
    """All sets, the shared text, and what the checks ask again.

    Args:
        sets: every evaluation set by name.
        passages: predicted tokens of each passage of the shared text.
    """
    recipe, floats = study.variants[variant], _floats(study, variant)
    how = arithmetic(study, variant)
    sharing = not recipe.quantized or recipe.scheme[1] != "tensor_dynamic"
    counted = touched(size, LOADED)
    for wanted in sets.values():
        tokens = (wanted.together if sharing else wanted.alone) + wanted.options
        counted += read(size, how, tokens, head=wanted.predicted, floats=floats)
        counted += written(size, how, wanted.items * max(0, wanted.cap - 1), floats=floats)
        counted += _alone(study, variant, wanted, size)
    own, few = sum(passages), sum(passages[:PASSAGES])
    counted += read(size, how, own, head=own, floats=floats)
    if variant != study.baseline:  # the baseline's states, once more through the head
        counted += read(size, floats, 0, head=own + 2 * few)
    if not (recipe.as_loaded or recipe.claim.quantized):
        counted += read(size, floats, few, head=2 * few) + touched(size, 8)
    return counted


def _alone(study: Study, variant: str, wanted: Asked, size: Size) -> Counter:
    """What is asked in a batch of its own, and once more where answers depend on company."""
    how, floats = arithmetic(study, variant), _floats(study, variant)
    again = bool(wanted.cap) and not exact(study, variant)
    few = min(wanted.items, SAMPLE["generate" if wanted.cap else "loglikelihood"] + again)
    tokens = few * (wanted.alone + wanted.options) // wanted.items
    rows = few * min(FEWEST_ROWS, study.evaluation.batch.rows)
    return read(size, how, tokens, head=FEWEST_ROWS * few, floats=floats) + written(
        size, how, rows * max(0, wanted.cap - 1), floats=floats
    )


def cost(study: Study, size: Size) -> Counter:
    """Every way of running a model, each round: one row read, one batch of answers written."""
    quantized = one_a_scheme(study.variants).values()
    ways = [("float32", "float32"), ("bfloat16", "bfloat16")]
    ways += [(arithmetic(study, v), _floats(study, v)) for v in quantized if not _served(study, v)]
    row = min(ROW_TOKENS, study.evaluation.batch.tokens)
    counted: Counter = Counter()
    for how, floats in ways:
        tokens = ROUNDS * (row + WARM_TOKENS + PROMPTS * PROMPT_TOKENS)
        counted += read(size, how, tokens, head=ROUNDS * PROMPTS, floats=floats)
        counted += written(size, how, ROUNDS * PROMPTS * (NEW_TOKENS - 1), floats=floats)
        counted += touched(size, 4 * ROUNDS)
    return counted


def arithmetic(study: Study, variant: str) -> str:
    """What the Linears of a variant multiply in."""
    real = study.variants[variant].quantized and study.runtime.quantized != "reference"
    return "int8" if real else _floats(study, variant)


def _floats(study: Study, variant: str) -> str:
    dtype = study.variants[variant].dtype or study.runtime.dtype
    return "float32" if dtype == "auto" else dtype


def _served(study: Study, variant: str) -> bool:
    """Whether vLLM answers, whose speed is not known from here."""
    return study.variants[variant].quantized and study.runtime.quantized == "vllm"


def of_model(study: Study, model: str, size: Size, tokenizer) -> dict[str, Counter]:
    """By job: every evaluation of a model but vLLM's, and its cost if that is measured."""
    sets = {name: asked(study, name, tokenizer) for name in study.evaluation.datasets}
    passages = shared_text(study, tokenizer)
    found = {}
    for variant in study.variants:
        if _served(study, variant):
            continue
        run = stages.Run("evaluation", model, variant)
        found[run.name] = evaluation(study, variant, size, sets, passages)
    if not isinstance(study.models[model], FineTunedModel):
        found[stages.Run("cost", model).name] = cost(study, size)
    return found


def for_record(job: Job, tokenizer, *, stage: str) -> dict[str, int]:
    """Operations of an evaluation, or of measuring cost, by arithmetic."""
    study, size = job.study, size_of(folder_to_count(job.study, job.model, job.paths))
    if stage == "cost":
        return operations(cost(study, size))
    sets = {name: asked(study, name, tokenizer) for name in study.evaluation.datasets}
    passages = shared_text(study, tokenizer)
    return operations(evaluation(study, job.variant, size, sets, passages))


def main(study_name: str) -> None:
    """Print the counts of a study's jobs, and why others have none."""
    study, paths = load_study(study_name), StudyPaths(study_file(study_name).stem)
    jobs, uncounted = {}, {}
    for model in study.models:
        try:
            folder = folder_to_count(study, model, paths)
            size = size_of(folder)
            tokenizer = load_tokenizer(folder, enable_thinking=study.enable_thinking)
            jobs |= of_model(study, model, size, tokenizer)
        except StudyError as error:
            uncounted[model] = str(error)
    for variant in study.variants:
        if _served(study, variant):
            uncounted[variant] = "vLLM answers, and its speed is not measured here"
    print(json.dumps({"jobs": jobs, "uncounted": uncounted}))


if __name__ == "__main__":
    main(sys.argv[1])
