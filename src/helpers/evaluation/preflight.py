"""Checks before the first job: each problem that would stop a study later, in one line.

Rows are read and items drawn: rows that are no items and sets too small to draw from are named. Of
every model the tensors' names and shapes, the tokenizer, the chat template and the length of every
text it will be given are looked at. No weight is read. What is on a Hub and not here yet is passed
over.

usage: python -m helpers.evaluation.preflight STUDY [--dry]
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from transformers.utils import logging

from helpers.core.errors import StudyError
from helpers.core.files import StudyPaths
from helpers.core.processes import allow_interrupts
from helpers.evaluation.prompts import (
    answer_tokens,
    gold_answers,
    option_tokens,
    render_prompt,
    tokenize_prompts,
)
from helpers.inference.perplexity import passage_tokens
from helpers.quantization.calibration import smoothing_groups
from helpers.quantization.protection import bytes_saved
from helpers.quantization.variants import has_hadamard_matrix
from helpers.runtime.discovery import linear_names
from helpers.sources.chat import calibration_tokens, end_of_turn, training_tokens
from helpers.sources.fetching import cached_model
from helpers.sources.items import Item, cached_rows_info
from helpers.sources.model_files import (
    QUANTIZED_PARTS,
    TensorFiles,
    check_model_safety,
    context_length,
    is_gguf_model_converted,
    length_independent_up_to,
    load_config,
    skeleton,
)
from helpers.sources.models import (
    is_bundled_model_converted,
    load_tokenizer,
    model_folder,
    tensor_problem,
)
from helpers.sources.sampling import (
    calibration_items,
    evaluation_items,
    shared_passages,
    training_items,
)
from helpers.study.inputs import (
    checkpoint_folder,
    is_commit,
    resolve_path,
    study_sources,
    task_sources,
)
from helpers.study.loading import load_study, study_file, study_file_label, unrotatable
from helpers.study.schema import (
    ROTATED,
    BundledModel,
    EvaluationSet,
    FineTunedModel,
    GgufModel,
    HubDataset,
    HubModel,
    MadeModel,
    ModelSource,
    RotatedModel,
    Study,
    TaskSet,
    is_ignored,
)


def row_problems(study: Study) -> Iterator[str]:
    """A line for each invalid row or too small set among the rows on this machine."""
    draws: list[tuple[str, list, Callable]] = []
    for name, settings in study.evaluation.datasets.items():
        draw = lambda name=name: evaluation_items(study, name)  # noqa: E731
        sources = task_sources(settings) if isinstance(settings, TaskSet) else [settings.source]
        draws.append((f"evaluation.datasets.{name}", sources, draw))
    sets = [source for _, sources, _ in draws for source in sources]
    calibration = [study.calibration.dataset, *sets]
    text_source = study.evaluation.shared_text.dataset
    draws.append(("evaluation.shared_text", [text_source], lambda: shared_passages(study)))
    draws.append(("calibration", calibration, lambda: calibration_items(study)))
    for name, model in study.models.items():
        if isinstance(model, FineTunedModel):
            draw = lambda name=name: training_items(study, name)  # noqa: E731
            sources = [model.finetune.dataset, *calibration]
            draws.append((f"models.{name}.finetune", sources, draw))
    trained = [m for m in study.models.values() if isinstance(m, FineTunedModel)]
    for name in ("", *study.calibrations):
        last = study.calibration_draws(name)
        if last == 1 and not name:
            continue
        draw = lambda name=name, last=last: calibration_items(study, name, draw=last)  # noqa: E731
        sources = [*calibration, *(model.finetune.dataset for model in trained)]
        sources.append(study.calibration_called(name).dataset)
        draws.append((f"calibrations.{name}" if name else "calibration", sources, draw))
    reported: set[str] = set()
    for key, sources, draw in draws:
        if not _are_here(sources):
            continue
        try:
            draw()
        except StudyError as error:
            if (
                str(error) not in reported
            ):  # all draws exclude the evaluation sets, so they repeat its error
                reported.add(str(error))
                yield str(error) if str(error).startswith(key) else f"{key}: {error}"


def rows_are_here(study: Study) -> bool:
    """Whether all rows that a study names on a Hub have been fetched."""
    return _are_here([source for _, source in study_sources(study)])


def _are_here(sources: list) -> bool:
    return all(cached_rows_info(source) for source in sources if isinstance(source, HubDataset))


REMEDY_TOKENIZER = (
    "resize them with model.resize_token_embeddings and train, or take the tokenizer it had"
)
Texts = Iterable[tuple[str, list[int], int]]  # (name, token ids, tokens to generate)


def problems(study: Study, paths: StudyPaths, *, dry: bool) -> Iterator[str]:
    """A line for each problem that would stop a job of the study; it starts with the key.

    Args:
        dry: skip models and data that are not on this machine.
    """
    row_lines = list(row_problems(study))
    yield from row_lines
    check_texts = not row_lines and rows_are_here(study)
    for model, source in study.models.items():
        skipped = isinstance(source, MadeModel) or (dry and not _is_local(source))
        if not skipped:
            yield from _model_problems(study, model, paths, check_texts=check_texts)


def _is_local(source: ModelSource) -> bool:
    match source:
        case HubModel():
            return is_commit(source.revision) and bool(cached_model(source.hub, source.revision))
        case BundledModel():
            return is_bundled_model_converted()
        case GgufModel(gguf=path):
            return is_gguf_model_converted(resolve_path(path))
    return True


def _model_problems(study: Study, model: str, paths: StudyPaths, *, check_texts: bool):
    key = f"models.{model}"
    try:
        folder = model_folder(study, model, paths)
        config, files = load_config(folder), TensorFiles(folder, dtype=None)
        tokenizer = load_tokenizer(folder, enable_thinking=study.enable_thinking)
    except StudyError as error:
        yield f"{key}: {error}"
        return
    if tensor_problems := _tensor_problem(files, config):
        yield f"{key}: {folder.name}: {tensor_problems}"
        return
    yield from _smoothing_problems(study, model, config)
    yield from _protection_problems(study, model, config, tied=files.tied)
    yield from _checkpoint_problems(study, model, files, config)
    yield from _rotation_problems(study, model, config)
    if study.runtime.quantized == "vllm" and length_independent_up_to(config) is not None:
        yield (
            f"runtime.quantized = 'vllm' but the positions of {model} depend on the length of a "
            "text, which vLLM computes otherwise than transformers; use int8"
        )
    if template_problems := list(_template_problems(study, model, tokenizer)):
        yield from template_problems
    elif check_texts:
        rows = files.shape(skeleton(config).table)[0]
        yield from _text_problems(study, model, tokenizer, rows, context_length(config))


def _smoothing_problems(study: Study, model: str, config) -> Iterator[str]:
    """A line for each variant whose smoothing has no place in a model; the others can run."""
    for name, variant in study.variants.items():
        smooth = variant.smooth
        for key, targets in (
            (("targets", smooth.targets), ("optional", smooth.optional)) if smooth else ()
        ):
            try:
                smoothing_groups(config, targets)
            except StudyError as error:
                line = str(error).replace("smooth.targets", f"smooth.{key}", 1)
                yield f"variants.{name}.{line}, or the variant from a study of {model}"


def _protection_problems(study: Study, model: str, config, *, tied: bool) -> Iterator[str]:
    """A line for each variant whose share of the bytes protects no Linear of a model, or all."""
    known, size = skeleton(config), {"float32": 4, "bfloat16": 2}.get(study.runtime.dtype)
    shapes = {n: shape for n, shape in known.shapes.items() if not (tied and n == known.head)}
    for name, variant in study.variants.items():
        if variant.protect is None or size is None:
            continue
        names = [n for n in linear_names(config) if not is_ignored(n, variant.ignore)]
        costs = [bytes_saved(shapes[f"{n}.weight"], size, variant) for n in names]
        share, whole = variant.protect.bytes, size * sum(map(math.prod, shapes.values()))
        if not min(costs) <= share * whole < sum(costs):
            all_fit = share * whole >= sum(costs)
            effect = "leaves every Linear float" if all_fit else "fits no Linear"
            yield (
                f"variants.{name}.protect.bytes = {share:g} {effect} of {model}; give "
                f"{min(costs) / whole:.2g} to {sum(costs) / whole:.2g}, or leave it out"
            )


def _checkpoint_problems(study: Study, model: str, files: TensorFiles, config) -> Iterator[str]:
    """A line for each checkpoint made elsewhere whose tensors are not those of a model.

    A model that is made here has the architecture of its start, which is looked at; a rotated one
    has a head of its own besides.
    """
    shapes, known = {name: files.shape(name) for name in files}, skeleton(config)
    owners = {model: shapes}
    for name, source in study.models.items():
        if isinstance(source, MadeModel) and source.start == model:
            head = [known.head] if isinstance(source, RotatedModel) else []
            owners[name] = {n: known.shapes[n] for n in head} | shapes
    for name, variant in study.variants.items():
        for owner in owners if variant.checkpoint else ():
            key = f"variants.{name}.checkpoint.{owner}.folder"
            at = f"{key} = {variant.checkpoint[owner].folder!r}"
            folder = checkpoint_folder(variant, owner)
            try:
                check_model_safety(folder)
                if problem := _other_model(folder, owner, owners[owner], config):
                    yield f"{at} {problem}; give a checkpoint of models.{owner}"
            except StudyError as error:
                yield f"{at}: {error}"


def _other_model(folder: Path, model: str, shapes: dict, config) -> str | None:
    """Why a checkpoint is not one of a model: its architecture, a tensor, a shape."""
    own, given = load_config(folder), TensorFiles(folder, dtype=None)
    if own.model_type != config.model_type:
        return f"is a {own.model_type} model, and models.{model} a {config.model_type} model"
    parts = {n: given.shape(n) for n in given if n.rpartition(".")[2] not in QUANTIZED_PARTS}
    if parts == shapes:
        return None
    differing = sorted(n for n in shapes.keys() | parts.keys() if shapes.get(n) != parts.get(n))
    sizes = [list(s[differing[0]]) if differing[0] in s else "missing" for s in (parts, shapes)]
    return (
        f"has {differing[0]} {sizes[0]} where models.{model} has {sizes[1]} "
        f"({len(differing)} tensors differ)"
    )


def _rotation_problems(study: Study, model: str, config) -> Iterator[str]:
    """A line for each rotation of a model whose family or sizes llmcompressor cannot rotate."""
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    sizes = {"r1": ("hidden_size", config.hidden_size), "r2": ("head_dim", head_size)}
    for name, source in study.models.items():
        if not isinstance(source, RotatedModel) or source.start != model:
            continue
        key = f"models.{name}.rotate"
        if config.model_type not in ROTATED:
            yield f"{key}.start = {model!r} {unrotatable(config.model_type)}"
            continue
        for rotation in source.rotate.rotations:
            setting, size = sizes[rotation]
            if not has_hadamard_matrix(size):
                yield (
                    f"{key}.rotations: {rotation} needs a Hadamard matrix of {setting} = {size}, "
                    f"and llmcompressor has none; leave {rotation} out"
                )


def _tensor_problem(files: TensorFiles, config) -> str | None:
    """A tensor that is missing, unexpected, or of another shape than config.json implies."""
    model = skeleton(config)
    expected = set(model.shapes) - ({model.head} if files.tied else set())
    if problem := tensor_problem(expected - set(files), set(files) - expected):
        return problem
    for name in sorted(expected):
        if files.shape(name) != model.shapes[name]:
            return (
                f"{name} is {list(files.shape(name))} in its files and {list(model.shapes[name])} "
                "by config.json; correct config.json, or save the model anew"
            )
    return None


def _template_problems(study: Study, model: str, tokenizer) -> Iterator[str]:
    """A line for each setting that needs a chat template, if the model has none.

    In plain text worked examples show where an answer stands, and only its box ends it.
    """
    if tokenizer.chat_template:
        return
    remedy = "set tokenizer.chat_template and save it"
    for name, evaluation_set in study.evaluation.datasets.items():
        ask = evaluation_set.ask
        if ask.protocol != "generate" or isinstance(evaluation_set, TaskSet):
            continue
        key = f"evaluation.datasets.{name}.ask"
        if not ask.shots:
            yield (
                f"{key}.shots = 0 but models.{model} has no chat template, so that nothing shows "
                f"how to answer; take 1 or more, or {remedy}"
            )
        if ask.stop != "answer":
            yield (
                f"{key}.stop = {ask.stop!r} but models.{model} has no chat template, so that its "
                f"answers have no turns; use stop: answer, or {remedy}"
            )
    for name, other in study.models.items():
        if isinstance(other, FineTunedModel) and other.finetune.start == model:
            yield (
                f"models.{name}.finetune.start = {model!r} has no chat template to train with; "
                f"{remedy}"
            )


def _text_problems(study: Study, model: str, tokenizer, rows: int, positions: int):
    """The first text of each kind that exceeds the model's context or its vocabulary."""
    for key, texts, remedy in _model_texts(study, model, tokenizer):
        unknown_id = too_long = ""
        try:
            for name, tokens, cap in texts:
                length = len(tokens) + cap
                if length > positions and not too_long:
                    too_long = (
                        f"{key}: {name} needs {length} tokens but models.{model} reads "
                        f"{positions}; {remedy}"
                    )
                if max(tokens) >= rows and not unknown_id:
                    token = tokenizer.convert_ids_to_tokens(max(tokens))
                    unknown_id = (
                        f"models.{model}: its tokenizer gives {token!r} the id {max(tokens)}, "
                        f"beyond the {rows} rows of its embeddings ({key}: {name}); "
                        f"{REMEDY_TOKENIZER}"
                    )
        except StudyError as error:
            yield f"{key}: {error}"
            continue
        yield from filter(None, (too_long, unknown_id))
        if unknown_id:
            return  # every other text would show the same problem


def _model_texts(study: Study, model: str, tokenizer) -> Iterator[tuple[str, Texts, str]]:
    """(key, its texts, remedy if one is too long) for everything that the model reads."""
    for name, evaluation_set in study.evaluation.datasets.items():
        key = f"evaluation.datasets.{name}"
        items = evaluation_items(study, name)
        if evaluation_set.ask.protocol != "generate":
            prompts = [render_prompt(item, evaluation_set, tokenizer) for item in items]
            yield key, _scored_texts(tokenizer, prompts), "leave the item out"
        else:
            remedy = "lower max_new_tokens or shots, or leave the item out"
            yield key, _generated_texts(tokenizer, items, evaluation_set), remedy
    shared = study.evaluation.shared_text
    tokens = passage_tokens(tokenizer, shared_passages(study), max_tokens=shared.max_tokens)
    texts = ((f"passage {i}", ids, 0) for i, ids in enumerate(tokens, start=1))
    yield "evaluation.shared_text", texts, f"lower max_tokens = {shared.max_tokens}"
    for name in ("", *study.calibrations):
        settings = study.calibration_called(name)
        key = f"calibrations.{name}" if name else "calibration"
        drawn = (
            item
            for draw in range(1, study.calibration_draws(name) + 1)
            for item in calibration_items(study, name, draw=draw)
        )
        texts = (
            (f"item {i.id}", calibration_tokens(tokenizer, i, settings.adapter), 0) for i in drawn
        )
        yield key, _check_max_tokens(texts, key, settings.max_tokens), "leave the item out"
    for name, source in study.models.items():
        if isinstance(source, FineTunedModel) and source.finetune.start == model:
            key = f"models.{name}.finetune"
            items = [item for part in training_items(study, name) for item in part]
            pairs = ((item.id, *training_tokens(tokenizer, item)) for item in items)
            texts = ((f"item {item_id}", prompts + answer, 0) for item_id, prompts, answer in pairs)
            yield (
                key,
                _check_max_tokens(texts, key, source.finetune.max_tokens),
                "leave the item out",
            )


def _scored_texts(tokenizer, prompts) -> Texts:
    for prompt in prompts:
        tokens = option_tokens(tokenizer, prompt)
        longest = max(tokens.options, key=len)
        if prompt.whole:  # read in windows, however long it is
            yield f"item {prompt.item.id}", [max(longest)], 0
        else:
            yield f"item {prompt.item.id}", tokens.context + longest, 0


def _generated_texts(tokenizer, items: list[Item], evaluation_set: EvaluationSet) -> Texts:
    """Each prompt with the highest id that may follow it, and room for the longest answer."""
    end, golds = end_of_turn(tokenizer), gold_answers(items, evaluation_set)
    for prompt in tokenize_prompts(items, evaluation_set, tokenizer):
        texts = golds[prompt.item.id].texts
        answers = answer_tokens(tokenizer, prompt, texts, evaluation_set.ask).answers
        room = max([evaluation_set.ask.max_new_tokens, *map(len, answers)])
        highest = max([end, *(token for answer in answers for token in answer)])
        yield f"item {prompt.item.id}", [*prompt.tokens.context, highest], room - 1


def _check_max_tokens(texts: Texts, key: str, limit: int) -> Texts:
    """The texts; raises at the first one that exceeds the study's `max_tokens`."""
    for name, tokens, cap in texts:
        if len(tokens) > limit:
            raise StudyError(f"max_tokens = {limit} but {name} has {len(tokens)} tokens; raise it")
        yield name, tokens, cap


def main(argv: list[str] | None = None) -> int:
    """The command line: prints a line for each problem; returns 2 if there are any, else 0."""
    study, *options = sys.argv[1:] if argv is None else argv
    paths, dry = StudyPaths(study_file(study).stem), options == ["--dry"]
    logging.set_verbosity_error()  # each problem is reported once, in one line
    logging.disable_progress_bar()
    try:
        allow_interrupts()
        lines = list(problems(load_study(study), paths, dry=dry))
    except StudyError as error:
        lines = [str(error)]
    except KeyboardInterrupt:
        return 130
    place = study_file_label(study)
    for line in lines:
        print(line if line.startswith(place) else f"{place}: {line}", file=sys.stderr)
    return 2 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
