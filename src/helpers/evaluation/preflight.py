"""What would stop a study inside a job, found before the first one: a line for each problem.

Rows are read and items drawn; of every model the tensors' names and shapes, the tokenizer,
the chat template and the length of every text it will be given are looked at. No weight is
read. What is on a Hub and not here yet is passed over.

usage: python -m helpers.evaluation.preflight STUDY [--dry]
"""

import sys
from collections.abc import Iterable, Iterator

from transformers.utils import logging

from helpers.core.errors import StudyError
from helpers.core.paths import StudyPaths
from helpers.evaluation.gold_answers import answer_tokens, gold_answers
from helpers.evaluation.prompts import asked_tokens, option_tokens, prompt
from helpers.inference.perplexity import passage_tokens
from helpers.runtime.rotary_positions import fixed_up_to
from helpers.sources.bundled_model import bundled_model_is_here
from helpers.sources.chat_conversations import calibration_tokens, training_tokens
from helpers.sources.chat_template import end_of_turn
from helpers.sources.hub import cached_model
from helpers.sources.model_config import load_config
from helpers.sources.model_skeleton import skeleton
from helpers.sources.model_tensors import TensorFiles
from helpers.sources.models import load_tokenizer, model_folder, tensor_problem
from helpers.sources.row_problems import row_problems, rows_are_here
from helpers.sources.sampling import (
    calibration_items,
    evaluation_items,
    shared_passages,
    training_items,
)
from helpers.study.loading import load_study, place_of, study_file
from helpers.study.pins import is_commit
from helpers.study.schema import EvaluationSet, Study
from helpers.study.schema_sources import BundledModel, FineTunedModel, HubModel, ModelSource

ANEW = "resize them with model.resize_token_embeddings and train, or take the tokenizer it had"
Texts = Iterable[tuple[str, list[int], int]]  # (what it is, token ids, tokens to be written)


def problems(study: Study, paths: StudyPaths, *, dry: bool) -> Iterator[str]:
    """A line for each thing that a job of the study would fail on, beginning with its key.

    Args:
        dry: what is not on this machine is passed over.
    """
    wrong = list(row_problems(study))
    yield from wrong
    with_texts = not wrong and rows_are_here(study)
    for model, source in study.models.items():
        passed_over = isinstance(source, FineTunedModel) or (dry and not _is_here(source))
        if not passed_over:
            yield from _model_problems(study, model, paths, with_texts=with_texts)


def _is_here(source: ModelSource) -> bool:
    match source:
        case HubModel():
            return is_commit(source.revision) and bool(cached_model(source.hub, source.revision))
        case BundledModel():
            return bundled_model_is_here()
    return True


def _model_problems(study: Study, model: str, paths: StudyPaths, *, with_texts: bool):
    key = f"models.{model}"
    try:
        folder = model_folder(study, model, paths)
        config, files = load_config(folder), TensorFiles(folder, dtype=None)
        tokenizer = load_tokenizer(folder, enable_thinking=study.enable_thinking)
    except StudyError as error:
        yield f"{key}: {error}"
        return
    if wrong := _tensors(files, config):
        yield f"{key}: {folder.name}: {wrong}"
        return
    if study.runtime.quantized == "vllm" and fixed_up_to(config) is not None:
        yield (
            f"runtime.quantized = 'vllm' but the positions of {model} depend on the length of a "
            "text, which vLLM computes otherwise than transformers; use int8"
        )
    if refusals := list(_without_template(study, model, tokenizer)):
        yield from refusals
    elif with_texts:
        rows = files.shape(skeleton(config).table)[0]
        yield from _text_problems(study, model, tokenizer, rows, config.max_position_embeddings)


def _tensors(files: TensorFiles, config) -> str | None:
    """What is missing, has no place, or has another shape than config.json says."""
    model = skeleton(config)
    due = set(model.shapes) - ({model.head} if files.tied else set())
    if problem := tensor_problem(due - set(files), set(files) - due):
        return problem
    for name in sorted(due):
        if files.shape(name) != model.shapes[name]:
            return (
                f"{name} is {list(files.shape(name))} in its files and {list(model.shapes[name])} "
                "by config.json; correct config.json, or save the model anew"
            )
    return None


def _without_template(study: Study, model: str, tokenizer) -> Iterator[str]:
    """What of the study needs a chat template that the model does not have."""
    if tokenizer.chat_template:
        return
    remedy = "set tokenizer.chat_template and save it"
    for name, wanted in study.evaluation.datasets.items():
        if wanted.ask.protocol == "generate":
            yield (
                f"evaluation.datasets.{name}.ask.protocol = 'generate' but models.{model} has no "
                f"chat template; use loglikelihood, or {remedy}"
            )
    for name, other in study.models.items():
        if isinstance(other, FineTunedModel) and other.finetune.start == model:
            yield (
                f"models.{name}.finetune.start = {model!r} has no chat template to train with; "
                f"{remedy}"
            )


def _text_problems(study: Study, model: str, tokenizer, rows: int, positions: int):
    """The first text of each kind that is too long for the model, or has ids it does not know."""
    for key, texts, remedy in _texts(study, model, tokenizer):
        beyond = long = ""
        try:
            for what, tokens, cap in texts:
                length = len(tokens) + cap
                if length > positions and not long:
                    long = (
                        f"{key}: {what} needs {length} tokens but models.{model} reads "
                        f"{positions}; {remedy}"
                    )
                if max(tokens) >= rows and not beyond:
                    token = tokenizer.convert_ids_to_tokens(max(tokens))
                    beyond = (
                        f"models.{model}: its tokenizer gives {token!r} the id {max(tokens)}, "
                        f"beyond the {rows} rows of its embeddings ({key}: {what}); {ANEW}"
                    )
        except StudyError as error:
            yield f"{key}: {error}"
            continue
        yield from filter(None, (long, beyond))
        if beyond:
            return  # the same of every text


def _texts(study: Study, model: str, tokenizer) -> Iterator[tuple[str, Texts, str]]:
    """(key, its texts, what to do if one is too long) of all that the model is given."""
    for name, wanted in study.evaluation.datasets.items():
        key = f"evaluation.datasets.{name}"
        asked = [prompt(item, wanted, tokenizer) for item in evaluation_items(study, name)]
        if wanted.ask.protocol == "loglikelihood":
            yield key, _scored(tokenizer, asked), "leave the item out"
        else:
            remedy = "lower max_new_tokens or shots, or leave the item out"
            yield key, _answered(tokenizer, asked, wanted), remedy
    shared = study.evaluation.shared_text
    tokens = passage_tokens(tokenizer, shared_passages(study), max_tokens=shared.max_tokens)
    texts = ((f"passage {i}", ids, 0) for i, ids in enumerate(tokens, start=1))
    yield "evaluation.shared_text", texts, f"lower max_tokens = {shared.max_tokens}"
    adapter = study.calibration.adapter
    texts = (
        (f"item {item.id}", calibration_tokens(tokenizer, item, adapter), 0)
        for item in calibration_items(study)
    )
    limit = study.calibration.max_tokens
    yield "calibration", _within(texts, "calibration", limit), "leave the item out"
    for name, other in study.models.items():
        if isinstance(other, FineTunedModel) and other.finetune.start == model:
            key = f"models.{name}.finetune"
            items = [item for part in training_items(study, name) for item in part]
            pairs = ((item.id, *training_tokens(tokenizer, item)) for item in items)
            texts = ((f"item {ident}", asked + said, 0) for ident, asked, said in pairs)
            yield key, _within(texts, key, other.finetune.max_tokens), "leave the item out"


def _scored(tokenizer, asked) -> Texts:
    for each in asked:
        found = option_tokens(tokenizer, each)
        longest = max(found.options, key=len)
        yield f"item {each.item.id}", found.context + longest, 0


def _answered(tokenizer, asked, wanted: EvaluationSet) -> Texts:
    """Each prompt with the highest id that may follow it, and room for the longest answer."""
    end, golds = end_of_turn(tokenizer), gold_answers([each.item for each in asked], wanted)
    for each in asked:
        texts, tokens = golds[each.item.id].texts, asked_tokens(tokenizer, each)
        read = answer_tokens(tokenizer, each, tokens, texts, wanted.ask).options
        room = max([wanted.ask.max_new_tokens, *map(len, read)])
        highest = max([end, *(token for option in read for token in option)])
        yield f"item {each.item.id}", [*tokens.context, highest], room - 1


def _within(texts: Texts, key: str, limit: int) -> Texts:
    """The texts, as long as none is longer than the study says."""
    for what, tokens, cap in texts:
        if len(tokens) > limit:
            raise StudyError(f"max_tokens = {limit} but {what} has {len(tokens)} tokens; raise it")
        yield what, tokens, cap


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 if nothing is wrong, 2 after a line for each thing that is."""
    study, *options = sys.argv[1:] if argv is None else argv
    paths, dry = StudyPaths(study_file(study).stem), options == ["--dry"]
    logging.set_verbosity_error()  # each problem is told in one line, and only here
    try:
        found = list(problems(load_study(study), paths, dry=dry))
    except StudyError as error:
        found = [str(error)]
    place = place_of(study)
    for line in found:
        print(line if line.startswith(place) else f"{place}: {line}", file=sys.stderr)
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
