"""What the gates of an evaluation look at, gathered from the disk, the study and the model."""

import json
from functools import partial
from hashlib import sha256

from helpers.core.activity import Bar, doing
from helpers.core.gates import Gate, as_record
from helpers.core.records import read_json
from helpers.evaluation.checks.batch_invariance import exact, sample
from helpers.evaluation.checks.float_reference import read_reference, read_shaken
from helpers.evaluation.checks.full_logits import Recomputed
from helpers.evaluation.checks.gold_gates import DueGolds, due_golds
from helpers.evaluation.checks.integrity import Asked, Evidence, evaluation_gates
from helpers.evaluation.checks.prompt_gates import Shown, answer_opening, order_gate
from helpers.evaluation.checks.second_opinion import (
    LOOKED_AT,
    TEXT,
    NoOpinion,
    SecondOpinion,
    second_opinion,
)
from helpers.evaluation.checks.training_gates import loss_gate, steps_gate, weights_gate
from helpers.evaluation.engine import evaluate
from helpers.evaluation.gold_answers import gold_answers
from helpers.evaluation.predictions import prediction_digests, read_passage_rows, read_predictions
from helpers.evaluation.prompts import Prompt, asked_tokens, prompt
from helpers.inference.perplexity import passage_tokens, read_passages
from helpers.sources.chat_conversations import EXAMPLES
from helpers.sources.exact_numbers import gold_number
from helpers.sources.finetuning import settings_of
from helpers.sources.items import Item
from helpers.sources.models import model_folder
from helpers.sources.raw_rows import raw_digests
from helpers.sources.rows import load_rows
from helpers.sources.sampling import (
    calibration_items,
    evaluation_items,
    load_items,
    shared_passages,
    training_items,
)
from helpers.study.schema import EvaluationSet, Study
from helpers.study.schema_sources import FineTunedModel
from helpers.study.study_run import Job
from helpers.verification.source_tokenizer import own_tokenizer, own_tokens

NOBODY = NoOpinion()


def check(job: Job, model, tokenizer, *, loaded: list[Gate], recomputed: Recomputed) -> dict:
    """The record `gates.json`: every gate, and which files it was held against.

    Args:
        model: the variant, as it was asked.
        loaded: gates on the model, made when it was loaded.
        recomputed: figures of the shared text computed a second time.

    Raises:
        StudyError: the baseline has not been evaluated yet.
    """
    study, folder = job.study, job.paths.evaluation(job.model, job.variant)
    evidence = gather(job, model, tokenizer, loaded=loaded, recomputed=recomputed)
    doing("checks on the answers")
    record = as_record(evaluation_gates(evidence))
    made_of = prediction_digests(folder, study.evaluation.datasets)
    return {"model": job.model, "variant": job.variant, **record, "predictions": made_of}


def gather(job: Job, model, tokenizer, *, loaded: list[Gate], recomputed: Recomputed) -> Evidence:
    """The evidence on the evaluation of the job's model and variant, as it lies on disk."""
    study, folder = job.study, job.paths.evaluation(job.model, job.variant)
    baseline = job.paths.evaluation(job.model, study.baseline)
    opinion = second_opinion(job, model, tokenizer)
    alone = ask_alone(model, tokenizer, study, opinion)
    predictions, passages = read_predictions(folder, study), read_passage_rows(folder)
    return Evidence(
        study=study,
        model=job.model,
        variant=job.variant,
        predictions=predictions,
        passages=passages,
        metrics=read_json(folder / "metrics.json", made_by="03_evaluation"),
        baseline=read_predictions(baseline, study),
        baseline_passages=read_passage_rows(baseline),
        asked=asked_now(study, tokenizer, own_tokenizer(job)),
        seen=seen_items(study, job.model, job.variant),
        alone=alone,
        again=ask_again(model, tokenizer, study, job.variant, alone),
        reference=read_reference(job, model, tokenizer),
        shaken=read_shaken(job, tokenizer),
        loaded=tuple(loaded),
        recomputed=recomputed,
        training=training_results(job),
        trained=trained_gates(job, tokenizer),
        raw={
            name: raw_digests(wanted.source, adapter=wanted.adapter)
            for name, wanted in study.evaluation.datasets.items()
        },
        texts={r["context"] for r in load_rows(study.evaluation.shared_text.dataset)},
        pools={name: pool_of(wanted) for name, wanted in study.evaluation.datasets.items()},
        opinions=opinions(job, model, tokenizer, opinion, predictions, passages),
        golds=golds_now(study, tokenizer, own_tokenizer(job), predictions),
    )


def pool_of(wanted: EvaluationSet) -> list[Item]:
    """The items that a set may be drawn from, as its settings say."""
    items = load_items(wanted.source, adapter=wanted.adapter)
    numeric = wanted.keep == "numeric_answers"
    return [item for item in items if not numeric or gold_number(item.golds[0]) is not None]


def training_results(job: Job) -> dict | None:
    """Results of the record of the model's fine-tuning; None where the study trained none."""
    if not isinstance(job.study.models[job.model], FineTunedModel):
        return None
    record = job.paths.finetuned_model(job.model) / "record.json"
    return read_json(record, made_by="00_finetuning")["results"]


def trained_gates(job: Job, tokenizer) -> tuple[Gate, ...]:
    """Gates on the fine-tuning of the job's model; asked once, with the baseline."""
    results = training_results(job)
    if results is None or job.variant != job.study.baseline:
        return ()
    settings, (drawn, heldout) = (f(job.study, job.model) for f in (settings_of, training_items))
    folder, dtype = job.paths.finetuned_model(job.model), job.study.runtime.dtype
    start = model_folder(job.study, settings.start, job.paths)
    return (
        order_gate("training items as the seed draws them", drawn, seed=job.study.seed),
        steps_gate(settings, results),
        weights_gate(start, folder, settings, results, dtype=dtype),
        loss_gate(folder, tokenizer, heldout, results, dtype=dtype),
    )


def opinions(
    job: Job,
    model,
    tokenizer,
    opinion: SecondOpinion | NoOpinion,
    predictions: dict[str, list[dict]],
    passages: list[dict],
) -> tuple[tuple[str, Gate], ...]:
    """What transformers' own forward pass says of the items asked alone and of a few passages.

    Args:
        opinion: has looked on while the items were asked.
        predictions, passages: what the evaluation stored.
    """
    few, wanted = shared_passages(job.study)[: LOOKED_AT[TEXT]], job.study.evaluation
    tokens = passage_tokens(tokenizer, few, max_tokens=wanted.shared_text.max_tokens)
    read = partial(read_passages, model, batch_tokens=wanted.batch.tokens)
    opinion.passages(tokens, passages[: len(tokens)], read)
    return tuple(opinion.gates(predictions))


def asked_now(study: Study, tokenizer, own) -> dict[str, list[Asked]]:
    """The items of every set, drawn again, with the prompts the study gives them now.

    Args:
        tokenizer: renders them.
        own: the source's tokenizer as transformers loads it, which makes tokens of them.
    """
    opening = answer_opening(tokenizer)

    def told(asked: Prompt) -> Asked:
        handed = len(asked_tokens(tokenizer, asked).context)
        whole = len(own(asked.text, add_special_tokens=False).input_ids)
        texts = asked.text, tuple(asked.continuations)
        return asked_of(own, asked, Shown(asked.item, *texts, opening, handed, whole))

    return {
        name: [told(prompt(item, wanted, tokenizer)) for item in evaluation_items(study, name)]
        for name, wanted in study.evaluation.datasets.items()
    }


def golds_now(
    study: Study, tokenizer, own, predictions: dict[str, list[dict]]
) -> dict[str, dict[str, DueGolds]]:
    """What has to be read after every prompt that is answered in writing, by set and item id.

    Args:
        tokenizer, own: as in `asked_now`.
        predictions: name the foils.
    """
    found: dict[str, dict[str, DueGolds]] = {}
    for name, wanted in study.evaluation.datasets.items():
        if wanted.ask.protocol != "generate":
            continue
        foils = {row["id"]: row.get("foil") for row in predictions.get(name, [])}
        for item in evaluation_items(study, name):
            args = tokenizer, own, item, wanted, prompt(item, wanted, tokenizer).text
            found.setdefault(name, {})[item.id] = due_golds(*args, foils.get(item.id))
    return found


def asked_of(tokenizer, asked: Prompt, shown: Shown) -> Asked:
    """A prompt with its tokens, and the digest of both that a prediction has to have stored.

    The digest is written out again, so that one of the words alone is seen.
    """
    texts = [asked.text, *(asked.text + c for c in asked.continuations)]
    context, *wholes = (own_tokens(tokenizer, text, plain=asked.plain)[0] for text in texts)
    options = [whole[len(context) :] for whole in wholes]
    told = [asked.text, list(asked.continuations), context, options]
    text = json.dumps(told, ensure_ascii=False, separators=(",", ":"))
    return Asked(asked.item, sha256(text.encode()).hexdigest()[:16], len(context), shown)


def seen_items(study: Study, model: str, variant: str) -> dict[str, list[Item]]:
    """The items the variant knows: examples in its prompts, calibration, and training items."""
    found = {"worked-example": worked_examples(study)}
    if study.variants[variant].changes_model:
        found["calibration"] = calibration_items(study)
    if isinstance(study.models[model], FineTunedModel):
        found["training"] = [item for part in training_items(study, model) for item in part]
    return found


def worked_examples(study: Study) -> list[Item]:
    """The examples that stand in the prompts of the study's sets."""
    asked = [(w.adapter, w.ask) for w in study.evaluation.datasets.values()]
    shots = [(adapter, ask.shots) for adapter, ask in asked if ask.protocol == "generate"]
    return [item for adapter, n in shots for item, _ in EXAMPLES[adapter][:n]]


def ask_again(model, tokenizer, study: Study, variant: str, alone: dict[str, list[dict]]) -> dict:
    """Predictions of one item of every generated set, asked once more in a batch of its own.

    None where an answer is the same in any company: there it was asked twice already.
    """
    if exact(study, variant):
        return {}
    found, limits = {}, study.evaluation.batch
    for name, wanted in study.evaluation.datasets.items():
        if wanted.ask.protocol == "generate":
            items = evaluation_items(study, name)
            first = [item for item in items if item.id == alone[name][0]["id"]]
            read = {"limits": limits, "golds": gold_answers(items, wanted)}
            found[name] = list(evaluate(model, tokenizer, first, wanted, **read))
    return found


def ask_alone(
    model, tokenizer, study: Study, opinion: SecondOpinion | NoOpinion = NOBODY
) -> dict[str, list[dict]]:
    """Predictions of a few items of every set, each asked in a batch of its own.

    Args:
        opinion: looks on.
    """
    found = {}
    for name, wanted in study.evaluation.datasets.items():
        items = evaluation_items(study, name)
        chosen = sample([item.id for item in items], wanted.ask.protocol, seed=study.seed)
        few = [item for item in items if item.id in chosen]
        read = {"limits": study.evaluation.batch, "golds": gold_answers(items, wanted)}
        found[name] = []
        for item in Bar(few, desc=f"{name}, asked alone", unit="item"):
            with opinion.of(name, item) as rows:
                rows += evaluate(model, tokenizer, [item], wanted, **read)
            found[name] += rows
    return found
