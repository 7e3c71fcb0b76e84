"""Data for the gates on an evaluation, gathered from disk, the study and the model.

The float model on the shared text is read twice: as its states were kept, which tells whether a
variant was held against the baseline, and off by rounding, which tells how far rounding alone
takes a float model from itself. A float model rounds each weight once and the result of each
operation once, by half an eps at most. Here every weight is moved up or down by a whole eps, and
by what √K of float32's roundings do to a sum of K products. The root mean square of that is more
than three times that of the roundings it stands for, so that its KL is an upper limit.
"""

import json
from collections.abc import Mapping
from functools import partial
from hashlib import sha256

import torch

from helpers.core.processes import Bar, set_activity
from helpers.core.records import Gate, gates_record, read_json
from helpers.evaluation.checks.integrity import EvaluationData, RenderedItem, evaluation_gates
from helpers.evaluation.checks.item_gates import (
    RenderedPrompt,
    answer_opening,
    order_gate,
    set_digests,
)
from helpers.evaluation.checks.numeric_gates import gold_sample_ids, is_batch_invariant, sampled_ids
from helpers.evaluation.checks.recomputed_answers import ExpectedGolds, render_golds
from helpers.evaluation.checks.second_opinion import (
    COMPARED_TEXTS,
    TEXT,
    NoOpinion,
    Recomputed,
    SecondOpinion,
    loss_gate,
    open_second_opinion,
    steps_gate,
    weights_gate,
)
from helpers.evaluation.engine import evaluate, read_golds
from helpers.evaluation.predictions import prediction_digests, read_passage_rows, read_predictions
from helpers.evaluation.prompts import (
    Prompt,
    gold_answers,
    model_inputs,
    render_prompt,
    tokenize_prompts,
)
from helpers.inference.perplexity import (
    HiddenStates,
    first_scored_token,
    load_states,
    passage_rows,
    passage_tokens,
    read_passages,
    states_path,
)
from helpers.sources.chat import EXAMPLES, PLAIN_EXAMPLES
from helpers.sources.items import Item, gold_number, load_rows
from helpers.sources.models import fine_tuning_settings, load_model, model_folder
from helpers.sources.sampling import (
    calibration_items,
    evaluation_items,
    set_items,
    shared_passages,
    training_items,
)
from helpers.study.loading import Job
from helpers.study.schema import EvaluationSet, FineTunedModel, RotatedModel, Study, TaskSet
from helpers.verification.checkpoint_files import (
    RotatedFiles,
    source_token_ids,
    source_tokenizer,
)
from helpers.verification.checkpoint_gates import (
    orthogonal_gate,
    rotated_gate,
    rotated_tokenizer_gate,
    study_texts,
    untied_gate,
)
from helpers.verification.runtime_gates import same_function_gate

ROTATED_TOKENS = 128  # of each passage that a rotated model and its start read
PASSAGES = 4  # a mean over some hundred tokens; more would cost as much as the evaluation


def read_reference_passages(job: Job, model, tokenizer) -> list[dict]:
    """Rows of the first passages, from the saved float states that the variant is compared with.

    Args:
        job: names the variant; the baseline gets no rows.
        model: that variant, for its device.

    Raises:
        StudyError: the baseline has not been evaluated yet.
    """
    if job.variant == job.study.baseline:
        return []
    passages, tokens = _first_passages(job, tokenizer)
    states, first = _saved_states(job, model, tokens), first_scored_token(tokenizer)
    return passage_rows(passages, tokens, states, None, first=first)


def read_perturbed_passages(job: Job, tokenizer) -> list[dict]:
    """The same rows for the float model with every weight perturbed by one rounding.

    The reference is the same model before the perturbation, read again here: a baseline that
    was evaluated wrongly would widen the limit. Only for float variants that change the model
    or its float type.
    """
    if job.recipe.is_unmodified or job.recipe.is_lossy:
        return []
    set_activity("the float model, off by rounding")
    passages, tokens = _first_passages(job, tokenizer)
    runtime = job.study.runtime
    types = {job.recipe.dtype, runtime.dtype}
    coarsest = torch.bfloat16 if "bfloat16" in types else torch.float32
    model = load_model(model_folder(job.study, job.model, job.paths), runtime)
    batch = {"batch_tokens": job.study.evaluation.batch.tokens}
    hidden = read_passages(model, tokens, **batch).hidden
    head = _saved_states(
        job, model, tokens
    ).head  # from the files, since the model's own head is perturbed too
    perturb_by_rounding_(model, dtype=coarsest)
    perturbed, first = read_passages(model, tokens, **batch), first_scored_token(tokenizer)
    return passage_rows(passages, tokens, perturbed, HiddenStates(hidden, head), first=first)


def _first_passages(job: Job, tokenizer) -> tuple[list[str], list[list[int]]]:
    passages = shared_passages(job.study)[:PASSAGES]
    limit = job.study.evaluation.shared_text.max_tokens
    return passages, passage_tokens(tokenizer, passages, max_tokens=limit)


def _saved_states(job: Job, model, tokens: list[list[int]]) -> HiddenStates:
    """The baseline's saved states at the tokens of these passages, which come first."""
    source = model_folder(job.study, job.model, job.paths)
    states = load_states(states_path(job), source, model)
    return HiddenStates(states.hidden[: sum(len(t) - 1 for t in tokens)], states.head)


@torch.no_grad()
def perturb_by_rounding_(model, *, dtype: torch.dtype) -> None:
    """Move every weight by one rounding of `dtype`, up or down at random with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        signs = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8) * 2 - 1
        size = torch.finfo(dtype).eps + weight.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps
        weight.mul_((1 + size * signs).to(weight))


NO_OPINION = NoOpinion()


def check_evaluation(
    job: Job, model, tokenizer, *, loaded: list[Gate], recomputed: Recomputed
) -> dict:
    """The content of `gates.json`: every gate, and the digests of the files it checked.

    Args:
        model: the variant, as it was evaluated.
        loaded: gates on the model from when it was loaded.
        recomputed: independently recomputed figures of the shared text.

    Raises:
        StudyError: the baseline has not been evaluated yet.
    """
    study, folder = job.study, job.paths.evaluation(job.model, job.variant)
    data = gather_evaluation_data(job, model, tokenizer, loaded=loaded, recomputed=recomputed)
    set_activity("checks on the answers")
    record = gates_record(evaluation_gates(data))
    digests = prediction_digests(folder, study.evaluation.datasets)
    return {"model": job.model, "variant": job.variant, **record, "predictions": digests}


def gather_evaluation_data(
    job: Job, model, tokenizer, *, loaded: list[Gate], recomputed: Recomputed
) -> EvaluationData:
    """All data that the gates on the job's evaluation compare.

    The items are drawn here once, apart from the draw of the evaluation itself.
    """
    study, folder = job.study, job.paths.evaluation(job.model, job.variant)
    baseline = job.paths.evaluation(job.model, study.baseline)
    sets, items = study.evaluation.datasets, draw_sets(study)
    opinion = open_second_opinion(job, model, tokenizer)
    alone = ask_alone(model, tokenizer, study, opinion, items)
    predictions, passages = read_predictions(folder, study), read_passage_rows(folder)
    return EvaluationData(
        study=study,
        model=job.model,
        variant=job.variant,
        predictions=predictions,
        passages=passages,
        metrics=read_json(folder / "metrics.json", made_by="03_evaluation"),
        baseline=read_predictions(baseline, study),
        baseline_passages=read_passage_rows(baseline),
        rendered=render_items_again(study, tokenizer, source_tokenizer(job), items),
        used=used_items(job.whole_study, job.model, job.variant, draw=job.draw),
        alone=alone,
        repeated=ask_alone_again(model, tokenizer, study, job.variant, alone, items),
        golds_alone=read_golds_alone(model, tokenizer, study, job.variant, items),
        reference=read_reference_passages(job, model, tokenizer),
        perturbed=read_perturbed_passages(job, tokenizer),
        loaded=tuple(loaded),
        recomputed=recomputed,
        training=training_results(job),
        made=trained_gates(job, tokenizer) or rotated_gates(job, tokenizer),
        raw={name: set_digests(evaluation_set) for name, evaluation_set in sets.items()},
        texts={r["context"] for r in load_rows(study.evaluation.shared_text.dataset)},
        pools={name: item_pool(evaluation_set) for name, evaluation_set in sets.items()},
        opinions=opinion_gates(job, model, tokenizer, opinion, predictions, passages),
        golds=render_golds_again(study, tokenizer, source_tokenizer(job), predictions, items),
    )


def draw_sets(study: Study) -> dict[str, list[Item]]:
    """The items of every evaluation set, by its name."""
    return {name: evaluation_items(study, name) for name in study.evaluation.datasets}


def item_pool(evaluation_set: EvaluationSet) -> list[Item]:
    """The items that a set is drawn from, by its settings."""
    items, _ = set_items(evaluation_set)
    numeric_only = evaluation_set.keep == "numeric_answers"
    return [item for item in items if not numeric_only or gold_number(item.golds[0]) is not None]


def training_results(job: Job) -> dict | None:
    """Results in the record of the model's fine-tuning; None if the study did not train it."""
    if not isinstance(job.study.models[job.model], FineTunedModel):
        return None
    record = job.paths.made_model(job.model) / "record.json"
    return read_json(record, made_by="00_finetuning")["results"]


def trained_gates(job: Job, tokenizer) -> tuple[Gate, ...]:
    """Gates on the fine-tuning of the job's model; they run once, with the baseline."""
    results = training_results(job)
    if results is None or job.variant != job.study.baseline:
        return ()
    settings, (training, heldout) = (
        f(job.study, job.model) for f in (fine_tuning_settings, training_items)
    )
    folder, dtype = job.paths.made_model(job.model), job.study.runtime.dtype
    start = model_folder(job.study, settings.start, job.paths)
    return (
        order_gate("training items in seed order", training, seed=job.study.seed),
        steps_gate(settings, results),
        weights_gate(start, folder, settings, results, dtype=dtype),
        loss_gate(folder, tokenizer, heldout, results, dtype=dtype),
    )


def rotated_gates(job: Job, tokenizer) -> tuple[Gate, ...]:
    """Gates on the rotation of the job's model; they run once, with the baseline."""
    source = job.study.models[job.model]
    if not isinstance(source, RotatedModel) or job.variant != job.study.baseline:
        return ()
    start = model_folder(job.study, source.start, job.paths)
    evidence = RotatedFiles(
        start,
        job.paths.made_model(job.model),
        source.rotate.rotations,
        runtime=job.study.runtime,
        tokens=[ids[:ROTATED_TOKENS] for ids in _first_passages(job, tokenizer)[1]],
        texts=list(study_texts(job.study)),
    )
    set_activity("checks on the rotation")
    gates = (
        orthogonal_gate,
        rotated_gate,
        untied_gate,
        rotated_tokenizer_gate,
        same_function_gate,
    )
    return tuple(check(evidence) for check in gates)


def opinion_gates(
    job: Job,
    model,
    tokenizer,
    opinion: SecondOpinion | NoOpinion,
    predictions: dict[str, list[dict]],
    passages: list[dict],
) -> tuple[tuple[str, Gate], ...]:
    """Compare answers and a few passages with transformers' own forward pass.

    Args:
        opinion: has traced the items that were asked alone.
        predictions, passages: rows that the evaluation stored.
    """
    few_passages, evaluation = (
        shared_passages(job.study)[: COMPARED_TEXTS[TEXT]],
        job.study.evaluation,
    )
    tokens = passage_tokens(tokenizer, few_passages, max_tokens=evaluation.shared_text.max_tokens)
    read = partial(read_passages, model, batch_tokens=evaluation.batch.tokens)
    opinion.compare_passages(tokens, passages[: len(tokens)], read)
    return tuple(opinion.gates(predictions))


def render_items_again(
    study: Study, tokenizer, own, items: Mapping[str, list[Item]] | None = None
) -> dict[str, list[RenderedItem]]:
    """The items of every set with their prompts, rendered again.

    Args:
        tokenizer: renders the prompts.
        own: the source's tokenizer as transformers loads it, for the token ids.
        items: of every set; drawn here if None.
    """
    opening = answer_opening(tokenizer)

    def render_again(item: Item, evaluation_set: EvaluationSet) -> RenderedItem:
        prompt = render_prompt(item, evaluation_set, tokenizer)
        shown = RenderedPrompt(
            item,
            prompt.text,
            tuple(prompt.continuations),
            opening,
            tokens=len(model_inputs(tokenizer, prompt).context),
            whole=len(own(prompt.text, add_special_tokens=False).input_ids),
        )
        return rendered_item(own, prompt, shown)

    return {
        name: [render_again(item, study.evaluation.datasets[name]) for item in of_set]
        for name, of_set in (items or draw_sets(study)).items()
    }


def render_golds_again(
    study: Study,
    tokenizer,
    own,
    predictions: dict[str, list[dict]],
    items: Mapping[str, list[Item]] | None = None,
) -> dict[str, dict[str, ExpectedGolds]]:
    """The golds and the foil of every prompt with a generated answer, by set and item id.

    Args:
        tokenizer, own: as in `render_items_again`.
        predictions: name the foils.
        items: of every set; drawn here if None.
    """
    golds: dict[str, dict[str, ExpectedGolds]] = {}
    for name, of_set in (items or draw_sets(study)).items():
        evaluation_set = study.evaluation.datasets[name]
        if evaluation_set.ask.protocol != "generate":
            continue
        foils = {row["id"]: row.get("foil") for row in predictions.get(name, [])}
        golds[name] = {}
        for item in of_set:
            text = render_prompt(item, evaluation_set, tokenizer).text
            foil = foils.get(item.id)
            golds[name][item.id] = render_golds(tokenizer, own, item, evaluation_set, text, foil)
    return golds


def rendered_item(tokenizer, prompt: Prompt, shown: RenderedPrompt) -> RenderedItem:
    """A prompt with its token count, and the digest that its prediction must have stored.

    The digest is computed by separate code, so that a digest of the words alone is noticed.
    """
    texts = [prompt.text, *(prompt.text + c for c in prompt.continuations)]
    context, *full_texts = (
        source_token_ids(tokenizer, text, plain=prompt.plain)[0] for text in texts
    )
    options = [full_text[len(context) :] for full_text in full_texts]
    if not prompt.text and prompt.continuations:
        first = tokenizer.bos_token_id
        context = [tokenizer.eos_token_id if first is None else first]
        options = [
            source_token_ids(tokenizer, text, plain=prompt.whole)[0]
            for text in prompt.continuations
        ]
    content = [prompt.text, list(prompt.continuations), context, options]
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return RenderedItem(prompt.item, sha256(text.encode()).hexdigest()[:16], len(context), shown)


def used_items(study: Study, model: str, variant: str, *, draw: int = 1) -> dict[str, list[Item]]:
    """Items used for the variant, by use: prompt examples, calibration, training."""
    items_by_use = {"worked-example": worked_examples(study)}
    if study.variants[variant].needs_checkpoint:
        name = study.calibration_of(variant)
        items_by_use["calibration"] = calibration_items(study, name, draw=draw)
    if isinstance(study.models[model], FineTunedModel):
        items_by_use["training"] = [item for part in training_items(study, model) for item in part]
    return items_by_use


def worked_examples(study: Study) -> list[Item]:
    """The worked examples in the prompts of the study's sets."""
    sets = study.evaluation.datasets.values()
    asks = [(s.adapter, s.ask) for s in sets if not isinstance(s, TaskSet)]
    tables = {"generate": EXAMPLES, "loglikelihood": PLAIN_EXAMPLES}
    shown = [tables[ask.protocol].get(adapter, ())[: ask.shots] for adapter, ask in asks]
    return [item for examples in shown for item, _ in examples]


def ask_alone_again(
    model,
    tokenizer,
    study: Study,
    variant: str,
    alone: dict[str, list[dict]],
    items: Mapping[str, list[Item]] | None = None,
) -> dict[str, list[dict]]:
    """Predictions of one item of every generated set, asked alone a second time.

    Empty if the runtime is batch-invariant: there, asking alone is the second time.

    Args:
        alone: what `ask_alone` returned.
        items: of every set; drawn here if None.
    """
    if is_batch_invariant(study, variant):
        return {}
    predictions, limits = {}, study.evaluation.batch
    for name, of_set in (items or draw_sets(study)).items():
        evaluation_set = study.evaluation.datasets[name]
        if evaluation_set.ask.protocol == "generate":
            first = [item for item in of_set if item.id == alone[name][0]["id"]]
            options = {"limits": limits, "golds": gold_answers(of_set, evaluation_set)}
            rows = evaluate(model, tokenizer, first, evaluation_set, **options)
            predictions[name] = list(rows)
    return predictions


def read_golds_alone(
    model, tokenizer, study: Study, variant: str, items: Mapping[str, list[Item]] | None = None
) -> dict[str, list[dict]]:
    """Golds and foils of further items of every generated set, each item read by itself.

    Empty if the runtime is batch-invariant: there, one item's golds have to be equal.
    """
    if is_batch_invariant(study, variant):
        return {}
    rows: dict[str, list[dict]] = {}
    for name, of_set in (items or draw_sets(study)).items():
        evaluation_set = study.evaluation.datasets[name]
        if evaluation_set.ask.protocol != "generate":
            continue
        ids = gold_sample_ids([i.id for i in of_set], seed=study.seed)
        sampled = [item for item in of_set if item.id in ids]
        prompts = tokenize_prompts(sampled, evaluation_set, tokenizer)
        options = {"limits": study.evaluation.batch, "golds": gold_answers(of_set, evaluation_set)}
        rows[name] = [
            row
            for prompt in Bar(prompts, desc=f"{name}, golds alone", unit="item")
            for row in read_golds(model, tokenizer, [prompt], evaluation_set, **options)
        ]
    return rows


def ask_alone(
    model,
    tokenizer,
    study: Study,
    opinion: SecondOpinion | NoOpinion = NO_OPINION,
    items: Mapping[str, list[Item]] | None = None,
) -> dict[str, list[dict]]:
    """Predictions of a few items of every set, each asked in a batch of its own.

    Args:
        opinion: traces the model meanwhile.
        items: of every set; drawn here if None.
    """
    predictions, limits = {}, study.evaluation.batch
    for name, of_set in (items or draw_sets(study)).items():
        evaluation_set = study.evaluation.datasets[name]
        ids = sampled_ids([i.id for i in of_set], evaluation_set.ask.protocol, seed=study.seed)
        sampled = [item for item in of_set if item.id in ids]
        options = {"limits": limits, "golds": gold_answers(of_set, evaluation_set)}
        predictions[name] = []
        for item in Bar(sampled, desc=f"{name}, asked alone", unit="item"):
            with opinion.trace_item(name, item) as rows:
                rows += evaluate(model, tokenizer, [item], evaluation_set, **options)
            predictions[name] += rows
    return predictions
