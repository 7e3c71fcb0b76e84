"""The stage that evaluates one variant of one model, from its opening to its record.

Everything that it computes is recorded and checked on the way: calls of Linears while the model is
asked, passes of its decoder, answers as they are made.

The operations of evaluation and of measuring cost are counted here, before anything runs:

    python -m helpers.evaluation.stage demo

prints them for every such job of a study, as JSON. A beginning that texts share is counted once,
as the engine reads it; checks on answers are counted with the answers. `helpers.cost.operations`
says what counts.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from helpers.core.errors import StudyError
from helpers.core.files import StudyPaths
from helpers.core.records import Gate, sha256_file
from helpers.cost.measurement import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    PROMPTS,
    ROUNDS,
    ROW_TOKENS,
    WARM_TOKENS,
)
from helpers.cost.operations import (
    Size,
    folder_to_count,
    reading_operations,
    size_of,
    weight_passes,
    without_weight_passes,
    writing_operations,
)
from helpers.evaluation import engine
from helpers.evaluation.checks import evaluation_data, recorded_calls, second_opinion
from helpers.evaluation.checks.evaluation_data import PASSAGES
from helpers.evaluation.checks.numeric_gates import GOLD_SAMPLE, SAMPLE, is_batch_invariant
from helpers.evaluation.checks.recorded_calls import PACKED, SHARED_TEXT
from helpers.evaluation.predictions import Progress, write_predictions
from helpers.evaluation.prompts import (
    TokenizedPrompt,
    answer_tokens,
    gold_answers,
    record_prompts,
    study_prompts,
)
from helpers.evaluation.scoring import all_metrics, shared_text_metrics
from helpers.inference import perplexity, protocols, vllm_client
from helpers.inference.packed_attention import SplitText, split_at
from helpers.inference.perplexity import passage_tokens
from helpers.quantization import variants
from helpers.runtime.devices import FEWEST_ROWS, modules_by_device, prepare
from helpers.sources.models import Stage, begin_record, load_tokenizer
from helpers.sources.sampling import shared_passages
from helpers.study import stages
from helpers.study.loading import Job, load_study, open_job, study_file
from helpers.study.schema import EvaluationSet, FineTunedModel, Study, variant_per_scheme
from helpers.study.tasks import record_definitions
from helpers.verification.runtime_gates import loaded_gates

LOADED = 6  # passes over the weights in an evaluation: load, hash, compare


@dataclass(frozen=True)
class SetTokens:
    """Token counts of one evaluation set.

    Attributes:
        items: how many items.
        alone: tokens of all prompts, each read from its beginning.
        together: the same if shared prefixes are read once.
        options: tokens read of the options; for generated answers, of golds and foils.
        predicted: tokens at which the head runs before any token is generated.
        cap: the most new tokens of an answer; 0 for scored options.
    """

    items: int
    alone: int
    together: int
    options: int
    predicted: int
    cap: int


def count_set_tokens(
    prompts: Sequence[TokenizedPrompt], evaluation_set: EvaluationSet, tokenizer
) -> SetTokens:
    """The tokens of one evaluation set, from its prompts."""
    tokens = [p.tokens for p in prompts]
    texts = [split_at(t.context, t.cuts) for t in tokens]
    if evaluation_set.ask.protocol != "generate":
        options = sum(len(option) - 1 for t in tokens for option in t.options)
        return _set_tokens(texts, options, options + len(texts), 0)
    ask = evaluation_set.ask
    golds = gold_answers([p.item for p in prompts], evaluation_set)
    answers = [answer_tokens(tokenizer, p, golds[p.item.id].texts, ask) for p in prompts]
    options = sum(len(answer) - 1 for own in answers for answer in own.answers)
    return _set_tokens(texts, options, options + 2 * len(texts), ask.max_new_tokens)


def _set_tokens(texts: Sequence[SplitText], options: int, predicted: int, cap: int) -> SetTokens:
    prefixes = {t.shared[:end] for t in texts for end in range(1, len(t.shared) + 1)}
    together = sum(len(prefix[-1]) for prefix in prefixes) + sum(len(t.rest) for t in texts)
    return SetTokens(len(texts), sum(map(len, texts)), together, options, predicted, cap)


def shared_text_lengths(study: Study, tokenizer) -> list[int]:
    """Predicted tokens of each passage of the shared text."""
    limit = study.evaluation.shared_text.max_tokens
    passages = passage_tokens(tokenizer, shared_passages(study), max_tokens=limit)
    return [len(tokens) - 1 for tokens in passages]


def count_evaluation(
    study: Study, variant: str, size: Size, set_tokens: dict[str, SetTokens], passages: list[int]
) -> Counter:
    """Counts of one evaluation: all sets, the shared text, and the checks that ask again.

    Args:
        set_tokens: of every evaluation set, by its name.
        passages: predicted tokens of each passage of the shared text.
    """
    recipe, floats = study.variants[variant], _float_type(study, variant)
    read, write = _operations_of(study, variant, size)
    shares_prefixes = not recipe.quantized or recipe.scheme[1] != "tensor_dynamic"
    counts = weight_passes(size, LOADED)
    for one in set_tokens.values():
        prompt_tokens = one.together if shares_prefixes else one.alone
        counts += read(prompt_tokens + one.options, head=one.predicted)
        counts += write(one.items * max(0, one.cap - 1))
        counts += _count_asked_alone(study, variant, one, size)
    text_tokens, checked_tokens = sum(passages), sum(passages[:PASSAGES])
    counts += read(text_tokens, head=text_tokens)
    if variant != study.baseline:  # the head runs again on the baseline's states
        counts += reading_operations(size, floats, 0, head=text_tokens + 2 * checked_tokens)
    if not (recipe.is_unmodified or recipe.is_lossy):
        counts += reading_operations(size, floats, checked_tokens, head=2 * checked_tokens)
        counts += weight_passes(size, 8)
    return counts


def _operations_of(study: Study, variant: str, size: Size) -> tuple[Callable, Callable]:
    """(reading operations, writing operations) of a variant, as functions of token counts."""
    arithmetic, floats = linear_arithmetic(study, variant), _float_type(study, variant)
    return (
        partial(reading_operations, size, arithmetic, floats=floats),
        partial(writing_operations, size, arithmetic, floats=floats),
    )


def _count_asked_alone(study: Study, variant: str, tokens: SetTokens, size: Size) -> Counter:
    """Counts of the items asked alone, and of those asked twice if answers depend on the batch."""
    read, write = _operations_of(study, variant, size)
    asked_twice = bool(tokens.cap) and not is_batch_invariant(study, variant)
    protocol = "generate" if tokens.cap else "loglikelihood"
    items = min(tokens.items, SAMPLE[protocol] + asked_twice)
    prompt_tokens = items * (tokens.alone + tokens.options) // tokens.items
    rows = items * min(FEWEST_ROWS, study.evaluation.batch.rows)
    if asked_twice:
        further = min(GOLD_SAMPLE, tokens.items)
        prompt_tokens += further * (tokens.alone + tokens.options) // tokens.items
    return read(prompt_tokens, head=FEWEST_ROWS * items) + write(rows * max(0, tokens.cap - 1))


def count_cost(study: Study, size: Size) -> Counter:
    """Counts of all measured configurations: per round, one row read and one batch answered."""
    quantized = [v for v in variant_per_scheme(study.variants).values() if not _served(study, v)]
    types = [("float32", "float32"), ("bfloat16", "bfloat16")]
    types += [(linear_arithmetic(study, v), _float_type(study, v)) for v in quantized]
    row_tokens = min(ROW_TOKENS, study.evaluation.batch.tokens)
    tokens = ROUNDS * (row_tokens + WARM_TOKENS + PROMPTS * PROMPT_TOKENS)
    new_tokens, prompts = ROUNDS * PROMPTS * (NEW_TOKENS - 1), ROUNDS * PROMPTS
    counts: Counter = Counter()
    for arithmetic, floats in types:
        counts += reading_operations(size, arithmetic, tokens, head=prompts, floats=floats)
        counts += writing_operations(size, arithmetic, new_tokens, floats=floats)
        counts += weight_passes(size, 4 * ROUNDS)
    return counts


def linear_arithmetic(study: Study, variant: str) -> str:
    """The type that the Linears of a variant multiply in."""
    on_int8_kernels = study.variants[variant].quantized and study.runtime.quantized != "reference"
    return "int8" if on_int8_kernels else _float_type(study, variant)


def _float_type(study: Study, variant: str) -> str:
    dtype = study.variants[variant].dtype or study.runtime.dtype
    return "float32" if dtype == "auto" else dtype


def _served(study: Study, variant: str) -> bool:
    """Whether the variant runs on vLLM, whose speed is not measured here."""
    return study.variants[variant].quantized and study.runtime.quantized == "vllm"


def count_model(study: Study, model: str, size: Size, tokenizer) -> dict[str, Counter]:
    """Counts by job: every evaluation of a model but vLLM's, and its cost if it is measured."""
    set_tokens = _study_tokens(study, tokenizer, study_prompts(study, tokenizer))
    passages = shared_text_lengths(study, tokenizer)
    counts = {}
    for variant in study.variants:
        if _served(study, variant):
            continue
        run = stages.Run("evaluation", model, variant)
        counts[run.name] = count_evaluation(study, variant, size, set_tokens, passages)
        option_sets = {n: set_tokens[n] for n in study.with_option_sets_only.evaluation.datasets}
        for draw in range(2, study.variants[variant].repeats + 1):
            counts[replace(run, draw=draw).name] = count_evaluation(
                study, variant, size, option_sets, passages
            )
    if not isinstance(study.models[model], FineTunedModel):
        counts[stages.Run("cost", model).name] = count_cost(study, size)
    return counts


def _study_tokens(study: Study, tokenizer, prompts: Mapping[str, list[TokenizedPrompt]]) -> dict:
    sets = study.evaluation.datasets
    return {name: count_set_tokens(prompts[name], sets[name], tokenizer) for name in sets}


def evaluation_stage_operations(
    job: Job, tokenizer, prompts: Mapping[str, list[TokenizedPrompt]]
) -> dict[str, int]:
    """Operations of an evaluation job by arithmetic, for its record.

    Args:
        prompts: of every evaluation set, by its name.
    """
    study, size = job.study, size_of(folder_to_count(job.study, job.model, job.paths))
    set_tokens, passages = (
        _study_tokens(study, tokenizer, prompts),
        shared_text_lengths(study, tokenizer),
    )
    counts = count_evaluation(study, job.variant, size, set_tokens, passages)
    return without_weight_passes(counts)


def cost_stage_operations(job: Job) -> dict[str, int]:
    """Operations of a cost measurement by arithmetic, for its record."""
    size = size_of(folder_to_count(job.study, job.model, job.paths))
    return without_weight_passes(count_cost(job.study, size))


def main(study_name: str) -> None:
    """Print the counts of a study's jobs, and the reasons for missing counts."""
    study, paths = load_study(study_name), StudyPaths(study_file(study_name).stem)
    jobs, uncounted = {}, {}
    for model in study.models:
        try:
            folder = folder_to_count(study, model, paths)
            size = size_of(folder)
            tokenizer = load_tokenizer(folder, enable_thinking=study.enable_thinking)
            jobs |= count_model(study, model, size, tokenizer)
        except StudyError as error:
            uncounted[model] = str(error)
    for variant in study.variants:
        if _served(study, variant):
            uncounted[variant] = "vLLM answers, and its speed is not measured here"
    print(json.dumps({"jobs": jobs, "uncounted": uncounted}))


if __name__ == "__main__":
    main(sys.argv[1])


@dataclass(frozen=True, kw_only=True)
class EvaluationStage(Stage):
    """One variant of one model that is asked its evaluation sets.

    Attributes:
        network: the variant, loaded.
        prompts: of every item, by evaluation set, drawn and rendered once.
        loaded: gates on the variant as it was loaded.
        progress: answers kept as they are made.
        calls: of every Linear, while the model is asked.
    """

    network: Any
    prompts: dict[str, list[TokenizedPrompt]]
    loaded: tuple[Gate, ...]
    progress: Progress
    calls: recorded_calls.CallRecorder | recorded_calls.NoCalls

    def answer(self) -> dict[str, list[dict]]:
        """The predictions of every evaluation set, by its name; one an item, in the items' order.

        Raises:
            StudyError: a prompt does not fit the model's context, or half a batch the card.
        """
        arguments = self.network, self.tokenizer, self.study, self.progress, self.prompts
        return self.calls.record(PACKED, engine.ask_all, *arguments)

    def read_shared_text(self) -> tuple[list[dict], second_opinion.Recomputed]:
        """(one row a passage of the text every variant reads, the figures computed again).

        Raises:
            StudyError: the baseline has not been evaluated yet, or a file of it is damaged.
        """
        passes = second_opinion.Passes(self.network)
        given = self.job, self.network, self.tokenizer
        rows = self.calls.record(SHARED_TEXT, perplexity.read_shared_text, *given)
        recomputed = second_opinion.recompute(self.job, self.network, passes)
        self.record.add_input("float_states", sha256_file(perplexity.states_path(self.job)))
        return rows, recomputed

    def save(self, predictions: dict[str, list[dict]], rows: list[dict]) -> None:
        """Write the predictions, the rows of the shared text, and the metrics of both."""
        job = self.job
        write_predictions(self.folder, predictions, rows, model=job.model, variant=job.variant)
        metrics = all_metrics(self.study, predictions)
        shared = shared_text_metrics(rows)
        self.write_json("metrics.json", {"datasets": metrics, "shared_text": shared})

    def check(
        self,
        predictions: dict[str, list[dict]],
        rows: list[dict],
        recomputed: second_opinion.Recomputed,
    ) -> dict:
        """Hold what was saved to every check; the record of the gates, written to gates.json."""
        resumed = self.progress.resumed
        gates = recorded_calls.call_gates(self.job, self.calls, predictions, rows, resumed)
        checked = evaluation_data.check_evaluation(
            self.job,
            self.network,
            self.tokenizer,
            loaded=[*self.loaded, *gates],
            recomputed=recomputed,
        )
        self.write_json("gates.json", checked)
        return checked

    def finish(self, **results: Any) -> None:
        """Write the record with these results and how this machine computes."""
        machine = variants.arithmetic_record(self.job) | modules_by_device(self.network)
        machine |= protocols.reading_record(self.network)
        self.record.add_machine(machine)
        super().finish(**results)
        self.progress.discard()


def open_evaluation(
    study: str | Path, *, model: str, variant: str, draw: int | str = 1
) -> EvaluationStage:
    """Load the variant and open its stage; the baseline's stage records its prompts.

    Args:
        study: a study's name in params/, or the path of its YAML file.
        draw: of the variant's checkpoint; from the second on it answers option sets only.

    Raises:
        StudyError: the study file is wrong, the checkpoint is missing or damaged, or another
            process runs the stage.
    """
    job = prepare(open_job(study, model=model, variant=variant, draw=draw)).of_option_sets
    record = begin_record("evaluation", job)
    record.add_input("variant", variants.variant_digest(job))
    network, tokenizer = variants.load_variant(job)
    if not vllm_client.is_served(network):
        protocols.prove_engine(network)
        protocols.keep_keys_and_values(network, job.recipe.kv, at=f"variants.{variant}")
    record.add_packages(vllm_client.engine_packages(network))
    loaded = loaded_gates(job, network)
    prompts = study_prompts(job.study, tokenizer)
    record_prompts(job, prompts)
    record_definitions(job.study, job.paths)
    record.add_operations(evaluation_stage_operations(job, tokenizer, prompts))
    return EvaluationStage(
        job=job,
        record=record,
        tokenizer=tokenizer,
        network=network,
        prompts=prompts,
        loaded=tuple(loaded),
        progress=Progress(job, files=record.inputs["variant"], packages=record.packages),
        calls=recorded_calls.call_recorder(job, network),
    )
