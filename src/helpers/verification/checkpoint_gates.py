"""Gates on a checkpoint's files: tensors, metadata, tokenizer.

Tensors are held against the source's and the calibration's files; layers, bits and granularities
in the metadata against the tensors and the study.

The evaluation reads with the source's tokenizer; whoever serves the checkpoint reads with the one
beside it. Files may be written anew by another version, so what they do is compared: the
vocabulary, the special tokens, the chat format, and the tokens of every text of the study.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from helpers.core.architectures import HEAD
from helpers.core.records import examples, gate, largest, sha256_folder
from helpers.quantization.int8_linear import HALF_RANGE
from helpers.runtime.discovery import float_matrices
from helpers.sources.items import Item
from helpers.sources.model_files import load_config
from helpers.sources.sampling import calibration_items, evaluation_items, shared_passages
from helpers.study.inputs import UNKNOWN_ORIGIN
from helpers.study.schema import Study, is_ignored
from helpers.verification import rulers
from helpers.verification.checkpoint_files import GPTQ_RMS, CheckpointFiles, RotatedFiles

EPS32 = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).tiny  # so that zeros may be compared
LEVELS = 127  # a row with a maximum of 127.5 steps reaches at least ±127 after rounding
LOGARITHM = 32  # x^α = exp(α·ln x): |ln x| < 16 for x in [1e-5, 1e6], two such factors
SUFFIXES = ("weight_scale", "input_scale")


@gate("smoothing scales as declared")
def smoothing_gate(evidence: CheckpointFiles):
    """Every group was folded with the paper's scales at the declared alpha.

    A recovered scale is a quotient of two norms of the dtype, one of them a rounded quotient:
    2 eps. The scales were computed in float32, where x^α loses up to |ln x| eps. Other readers
    of the norm (a router) and the producer's bias must have the same scales.
    """
    folded, largest_error, wrong_groups, wrong_companions = 0, 0.0, [], []
    for group in evidence.groups:
        recovered, allowed = evidence.recovered_scales(group), _norm_rounding(evidence, group)
        if allowed is None:
            recovered, allowed = _row_scales(evidence, group)
        declared = evidence.declared_scales(group)
        error = ((recovered - declared).abs() / declared / allowed).max().item()
        folded += not bool((recovered == 1).all())
        if not error <= 1:  # NaN as well
            wrong_groups.append(group.producer)
        largest_error = largest((largest_error, error))
        wrong_companions += _wrong_companions(evidence, group)
    expected = len(evidence.groups)
    return (
        not (wrong_groups or wrong_companions) and folded == expected,
        f"{folded} of {expected} groups folded, {len(wrong_groups)} with other scales than "
        f"equation 4 gives{examples(wrong_groups)}; largest deviation {largest_error:.2g} of what "
        f"rounding allows; "
        f"{len(wrong_companions)} biases or routers off{examples(wrong_companions)}",
        f"{expected} groups folded, each by the scales of equation 4 at "
        + (_alpha_text(evidence.alphas) if evidence.groups else "no place"),
    )


def _alpha_text(alphas: dict[str, float]) -> str:
    low, high = min(alphas.values()), max(alphas.values())
    return f"α = {low:g}" if low == high else f"its own α ({low:g} to {high:g})"


def _norm_rounding(evidence: CheckpointFiles, group) -> Tensor | None:
    """(features,) relative rounding error of a norm's quotient; None for a Linear.

    A norm of (1 + w) stores w; close to -1, rounding w is coarse relative to 1 + w.
    """
    factors = evidence.norm_factors(group)
    if factors is None:
        return None
    _, after = factors
    coarser = ((after - group.norm_offset) / after).abs().clamp(min=1)
    coarser = torch.where(torch.isfinite(coarser), coarser, 1.0)
    return 2 * torch.finfo(evidence.dtype).eps * coarser + LOGARITHM * EPS32


def _wrong_companions(evidence: CheckpointFiles, group) -> list[str]:
    """Biases and routers of a group whose stored tensors lack the group's scales.

    Each is rounded twice: the scale to the dtype, then the product or quotient.
    """
    limit, wrong = 4 * torch.finfo(evidence.dtype).eps + LOGARITHM * EPS32, []
    scales, bias = evidence.recovered_scales(group), f"{group.producer}.bias"
    expected = {f"{n}.weight": evidence.source[f"{n}.weight"] * scales for n in group.readers}
    if bias in evidence.source:
        divided = evidence.source[bias].double()
        divided[-len(scales) :] /= scales
        expected[bias] = divided
    for key, tensor in expected.items():
        error = (evidence.saved[key].double() - tensor).abs()
        if not bool((error <= limit * tensor.abs()).all()):
            wrong.append(key)
    return wrong


def _row_scales(evidence: CheckpointFiles, group) -> tuple[Tensor, Tensor]:
    """(scales that a Linear producer's rows were divided by, their relative uncertainty).

    A row w of the source (its columns smoothed) became v: s = ⟨w, w⟩ / ⟨w, v⟩. Rounding to
    the grid moved every v_j by at most half a step, so ⟨w, v⟩ by at most ‖w‖₁ / 2 steps; GPTQ
    moved it by at most ‖w‖ √n times its root mean square. Clipped weights (MSE) lie up to 0.19 of
    the largest away. A fused producer is divided in its last rows.
    """
    name, size = group.producer, len(evidence.declared_scales(group))
    columns, _ = evidence.folded[name]
    w = evidence.source[f"{name}.weight"].double() * (1 if columns is None else columns)
    step, rounded_by_ruler = None, evidence.claim.ruler and name in evidence.rounded_targets
    if rounded_by_ruler:
        saved = rulers.weight_of(evidence, name).values
    else:
        saved, step = evidence.saved[f"{name}.weight"].double(), _step(evidence, name)
    projection = (w * saved * (1 if step is None else step)).sum(1)
    scales = w.square().sum(1) / projection
    eps = torch.finfo(evidence.dtype).eps
    uncertainty = 4 * eps + LOGARITHM * EPS32 + torch.zeros_like(scales)
    if rounded_by_ruler:
        low, high = rulers.bounds_of(evidence, name, 0.0)
        uncertainty = uncertainty + (w.abs() * (high - low) / 2).sum(1) / projection.abs()
    elif step is not None:
        moved = w.abs().sum(1) * (step.flatten() / 2)
        if evidence.claim.rounding == "gptq":
            moved = w.norm(dim=1) * w.shape[1] ** 0.5 * GPTQ_RMS * step.flatten()
        elif evidence.claim.rounding == "mse":
            beyond = (w.abs() - MOST_CLIPPED * w.abs().amax(1, keepdim=True)).clamp(min=0)
            moved = moved + (w.abs() * beyond).sum(1) / scales
        uncertainty = uncertainty + moved / projection.abs()
    return scales[-size:], uncertainty[-size:]


def _step(evidence: CheckpointFiles, name: str) -> Tensor | None:
    """(out_features or 1, 1) float64 step of a Linear stored as int8, else None."""
    scale = evidence.saved.get(f"{name}.weight_scale")
    return None if scale is None else scale.double().reshape(-1, 1)


@gate("weights on the declared grid")
def grid_gate(evidence: CheckpointFiles):
    """int8 weights are source × scales, rounded as declared on the declared grid.

    The grid: a row's step (the tensor's, per tensor) is its largest weight / 127.5, so that all
    steps are used; a clipped grid has at least 0.81 of that step, the smallest that the observer
    tries, and errs no more than the whole one. The rounding: a stored weight is within half a step
    of source × scales, or at the end of its grid if that lies beyond. GPTQ gives up nearness for
    the Linear's output: the root mean square of a row's errors is at most what its damping allows
    (`GPTQ_RMS`), far below that of weights in another order or of another row; `gptq_gate` holds
    the rounding itself against the calibration's inputs.

    The quotient of at most 128 steps carries four roundings of the dtype (s, the product, the
    step, the quotient): 2 eps. A row whose maximum is below 127 has fewer than 8 bits, or the
    scale of another row; under GPTQ a maximum may shrink, and the step alone tells.
    """
    granularity, rounding = evidence.claim.scheme[0], evidence.claim.rounding
    relative = 2 * torch.finfo(evidence.dtype).eps + LOGARITHM * EPS32
    limit = (GPTQ_RMS if rounding == "gptq" else 0.5) + 128 * relative
    off_weights, unused_grid, malformed, largest_error = [], [], [], 0.0
    for name in evidence.targets:
        q, step = evidence.saved[f"{name}.weight"], _step(evidence, name)
        if q.dtype != torch.int8 or step is None or len(step) != _steps(q, granularity):
            malformed.append(name)
            continue
        if not (torch.isfinite(step).all() and (step > 0).all()):
            malformed.append(name)
            continue
        weight = evidence.smoothed_weight(name)
        if rounding == "gptq":
            error = evidence.errors_of_rows(name, weight, step).max().item()
        else:
            steps = weight / step
            steps = steps.clamp(-128, 127) if rounding == "mse" else steps
            error = (q.double() - steps).abs().max().item()
        largest_error = largest((largest_error, error))
        if not error <= limit:
            off_weights.append(name)
        if not _uses_whole_grid(q, weight, step, granularity, rounding, relative):
            unused_grid.append(name)
    unit = "steps, the largest root mean square of a row" if rounding == "gptq" else "steps"
    return (
        not (off_weights or unused_grid or malformed),
        f"of {len(evidence.targets)} Linears {len(malformed)} are not int8 with positive steps per "
        f"{granularity}{examples(malformed)}, {len(off_weights)} are off their float weights"
        f"{examples(off_weights)}, {len(unused_grid)} do not use the whole grid"
        f"{examples(unused_grid)}; largest error {largest_error:.4g} {unit}",
        f"none, none, none; at most {limit:.4g} steps",
    )


MOST_OF_RECIPE = 100_000  # characters
FOUND = {"nearest": "to nearest", "mse": "to nearest on clipped grids", "gptq": "further (as GPTQ)"}


@gate("weights follow from the source")
def origin_gate(evidence: CheckpointFiles):
    """int8 weights of a checkpoint made elsewhere are source × scales, rounded in a known way.

    `CheckpointFiles.found_rounding` says which. Its scales are those found in its norms and
    rows; what else keeps the function (a rotation) is not recognized, and fails. Which items it
    was calibrated on is in no file: `recipe.yaml`, if it has one, names llmcompressor's modifiers.
    """
    malformed = [name for name in evidence.targets if not _is_well_formed(evidence, name)]
    counts = Counter(evidence.found_roundings.values()) if not malformed else Counter()
    of_kinds = [f"{counts[kind]} rounded {words}" for kind, words in FOUND.items() if counts[kind]]
    wrong = (
        [n for n, kind in evidence.found_roundings.items() if kind not in FOUND] if counts else []
    )
    kinds = sorted({evidence.found_roundings[name] for name in wrong})
    return (
        not (malformed or wrong) and bool(counts),
        f"of {len(evidence.targets)} Linears {len(malformed)} are not int8 with positive steps"
        f"{examples(malformed)}; {', '.join(of_kinds) or 'none of a known rounding'}, {len(wrong)} "
        f"are no rounding of source × scales{examples(wrong)}"
        f"{' (' + ', '.join(kinds) + ')' if kinds else ''}{_claimed_recipe(evidence.folder)}; "
        f"{UNKNOWN_ORIGIN}",
        "none, none",
    )


def _claimed_recipe(folder: Path) -> str:
    """The modifiers that llmcompressor's file beside a checkpoint names."""
    path = folder / "recipe.yaml"
    text = path.read_text("utf-8", errors="replace")[:MOST_OF_RECIPE] if path.is_file() else ""
    modifiers = dict.fromkeys(re.findall(r"\b[A-Za-z]{1,40}Modifier\b", text))
    return f"; its recipe.yaml names {', '.join(modifiers)}, unchecked" if modifiers else ""


def _is_well_formed(evidence: CheckpointFiles, name: str) -> bool:
    """Whether a Linear has int8 weights and the positive, finite steps of its scheme."""
    weights, activations = evidence.claim.scheme
    q, step = evidence.saved.get(f"{name}.weight"), _step(evidence, name)
    if q is None or q.dtype != torch.int8 or step is None or len(step) != _steps(q, weights):
        return False
    static = evidence.saved.get(f"{name}.input_scale")
    if (static is not None and static.numel() == 1) != (activations == "tensor_static"):
        return False
    steps = step.flatten() if static is None else torch.cat([step.flatten(), static.reshape(-1)])
    return bool((torch.isfinite(steps) & (steps > 0)).all())


@gate("smoothing scales found in the files")
def found_scales_gate(evidence: CheckpointFiles):
    """Norms that are not the source's, and rows of other steps, were divided by positive scales.

    What else they feed (biases, routers) has the same scales.
    """
    improper, wrong_companions, largest_scale = [], [], 1.0
    for group in evidence.groups:
        scales = evidence.recovered_scales(group)
        if not bool((torch.isfinite(scales) & (scales > 0)).all()):
            improper.append(group.producer)
            continue
        largest_scale = max(largest_scale, scales.max().item(), (1 / scales).max().item())
        wrong_companions += _wrong_companions(evidence, group)
    norms = sum(evidence.norm_factors(group) is not None for group in evidence.groups)
    return (
        not (improper or wrong_companions),
        f"{norms} norms and the rows of {len(evidence.groups) - norms} Linears are divided by "
        f"scales of at most {largest_scale:.3g} (or 1 over it); {len(improper)} have scales that "
        f"are not positive{examples(improper)}, {len(wrong_companions)} biases or routers are off"
        f"{examples(wrong_companions)}; made elsewhere: α and the items behind it unknown",
        "none, none",
    )


# Of a configuration, what says nothing of the function that the model computes.
NOT_THE_FUNCTION = {"_name_or_path", "architectures", "dtype", "quantization_config"}
NOT_THE_FUNCTION |= {"tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache"}
ENDS_OF_TEXT = ("bos_token_id", "eos_token_id", "pad_token_id")


@gate("configuration matches the source")
def config_gate(evidence: CheckpointFiles):
    """config.json describes the source's function, and answers end at the source's tokens."""
    source, saved = (load_config(f).to_dict() for f in (evidence.source_folder, evidence.folder))
    keys = (source.keys() | saved.keys()) - NOT_THE_FUNCTION
    differing = sorted(key for key in keys if source.get(key) != saved.get(key))
    ends = [_ends(folder) for folder in (evidence.source_folder, evidence.folder)]
    differing += [f"generation {name}" for name in ENDS_OF_TEXT if ends[0][name] != ends[1][name]]
    return (
        not differing,
        f"{len(differing)} of {len(keys)} settings differ{examples(differing)}",
        "none",
    )


def _ends(folder: Path) -> dict[str, list[int]]:
    """The end-of-text and padding tokens of a folder's generation settings."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    given = {name: settings.get(name) for name in ENDS_OF_TEXT}
    return {n: v if isinstance(v, list) else [] if v is None else [v] for n, v in given.items()}


def _steps(q: Tensor, granularity: str) -> int:
    return q.shape[0] if granularity == "channel" else 1


MOST_CLIPPED = 0.81  # the smallest share of the range that llmcompressor's MSE observer tries
ERROR_POWER = 2.4  # of the error that it makes least


def _uses_whole_grid(
    q: Tensor, weight: Tensor, step: Tensor, granularity: str, rounding: str, relative: float
) -> bool:
    """Whether every row (the tensor, per tensor) has the step that its rounding declares.

    Args:
        q, weight: (out_features, in_features) stored integers, and what was rounded.
        step: (out_features or 1, 1).
        relative: rounding error of a step.
    """
    parts = weight if granularity == "channel" else weight.reshape(1, -1)
    top = parts.abs().amax(1, keepdim=True)
    share, smallest = step / (top / HALF_RANGE), MOST_CLIPPED if rounding == "mse" else 1.0
    right = (share >= smallest * (1 - relative)) & (share <= 1 + relative)
    if rounding != "gptq":
        right &= q.reshape(parts.shape).int().abs().amax(1, keepdim=True) >= LEVELS
    if rounding == "mse":
        whole = _grid_errors(parts, top / HALF_RANGE)
        right &= _grid_errors(parts, step) <= whole * (1 + ERROR_POWER * 128 * relative)
    return bool((right | (top == 0)).all())


def _grid_errors(parts: Tensor, step: Tensor) -> Tensor:
    """(rows, 1) summed power of the errors of rounding to nearest with a step."""
    rounded = (parts / step).round().clamp(-128, 127) * step
    return (rounded - parts).abs().pow(ERROR_POWER).sum(1, keepdim=True)


@gate("smoothed float weights")
def float_weights_gate(evidence: CheckpointFiles):
    """In a variant that rounds no weight, every weight equals the source's times the scales.

    Two roundings of the dtype each for columns and rows, two for the scales themselves.
    """
    limit = 4 * torch.finfo(evidence.dtype).eps + LOGARITHM * EPS32
    smoothed = [n for n, scales in evidence.folded.items() if scales != (None, None)]
    wrong = []
    for name in smoothed:
        expected = evidence.smoothed_weight(name)
        error = (evidence.saved[f"{name}.weight"].double() - expected).abs()
        if not bool((error <= limit * expected.abs()).all()):
            wrong.append(name)
    return (
        not wrong,
        f"{len(wrong)} of {len(smoothed)} smoothed Linears are off{examples(wrong)}",
        f"none by more than {limit:.1e} of each weight",
    )


@gate("static scales from the calibration")
def static_gate(evidence: CheckpointFiles):
    """A static input scale is the layer's own calibrated maximum after smoothing, over 127.5.

    Three roundings of the dtype (s, the smoothed maximum, the scale) and those inside s.
    """
    limit = 3 * torch.finfo(evidence.dtype).eps + LOGARITHM * EPS32
    wrong = []
    for name in evidence.targets:
        columns, _ = evidence.folded[name]
        absmax = evidence.absmax[name].double()
        expected = (absmax if columns is None else absmax / columns).max() / HALF_RANGE
        stored = evidence.saved.get(f"{name}.input_scale", torch.tensor(float("nan"))).double()
        if stored.numel() != 1 or not abs(stored.item() / expected.item() - 1) <= limit:
            wrong.append(name)
    return (
        not wrong,
        f"{len(wrong)} of {len(evidence.targets)} input scales are not their layer's"
        f"{examples(wrong)}",
        f"none by more than {limit:.1e}",
    )


@gate("all other tensors unchanged")
def unchanged_gate(evidence: CheckpointFiles):
    """Head, embeddings, other norms, biases and ignored layers equal the source's bit for bit.

    Other gates check the tensors that smoothing changes (its norms, scaled float Linears).
    """
    rounded = {f"{n}.weight" for n in evidence.rounded_targets}
    changed_by_design = set(rounded)
    changed_by_design |= {f"{g.producer}.weight" for g in evidence.groups}
    changed_by_design |= {f"{g.producer}.bias" for g in evidence.groups}
    changed_by_design |= {f"{n}.weight" for n, s in evidence.folded.items() if s != (None, None)}
    unchanged_keys = [k for k in evidence.source if k not in changed_by_design]
    suffixes = rulers.PARTS if evidence.claim.ruler else SUFFIXES
    added = {f"{n}.{suffix}" for n in evidence.rounded_targets for suffix in suffixes}
    packed = rounded if evidence.claim.ruler else set()  # their gate looks for them
    unexpected = (set(evidence.source) - packed) ^ (set(evidence.saved) - added - packed)
    differing = [
        k for k in unchanged_keys if k in evidence.saved and not _is_unchanged(evidence, k)
    ]
    return (
        not (unexpected or differing),
        f"{len(differing)} of {len(unchanged_keys)} kept tensors differ{examples(differing)}, "
        f"{len(unexpected)} are "
        f"missing or new{examples(sorted(unexpected))}",
        "none differ, none are missing or new",
    )


def _is_unchanged(evidence: CheckpointFiles, key: str) -> bool:
    saved, expected = evidence.saved[key], evidence.source[key]
    return saved.dtype == expected.dtype and torch.equal(saved, expected)


@gate("source model unchanged")
def source_gate(evidence: CheckpointFiles):
    """The source's files are unchanged since calibration and since the start of the run."""
    now = sha256_folder(evidence.source_folder)
    calibrated = evidence.calibration_record["inputs"].get("model", "unknown")
    return (
        now == evidence.source_hash == calibrated,
        f"files {now[:12]} after the run",
        f"files {evidence.source_hash[:12]} before it, {calibrated[:12]} at calibration",
    )


@gate("quantized layers as declared")
def census_gate(evidence: CheckpointFiles):
    """The Linears stored as int8 are all of the architecture's, except those ignored by name.

    Every matrix of the source must be a known Linear, embedding or router.
    """
    stored, expected = evidence.stored_int8, set(evidence.targets)
    missing, extra = sorted(expected - stored), sorted(stored - expected)
    unknown = sorted(_matrices(evidence) - {*evidence.linears, *float_matrices(evidence.config)})
    return (
        stored == expected and not unknown,
        f"{len(stored)} of {len(evidence.linears)} Linears are int8 on disk; "
        f"{len(missing)} missing{examples(missing)}, {len(extra)} too many{examples(extra)}; "
        f"{len(unknown)} matrices of the source are no known part{examples(unknown)}",
        f"{len(expected)}, by name; none unknown",
    )


def _matrices(evidence: CheckpointFiles) -> set[str]:
    source = evidence.source
    return {k.removesuffix(".weight") for k in source if len(source.shape(k)) > 1}


@gate("metadata match the tensors")
def metadata_gate(evidence: CheckpointFiles):
    """Bits, granularities and layers agree between tensors, config and study file."""
    weights, activations = evidence.claim.scheme
    study = _description(8, weights, 8, activations, set(evidence.targets))
    descriptions = {"tensors": _from_tensors(evidence), "config": _from_config(evidence)}
    differing = [f"{source}: {words}" for source, words in descriptions.items() if words != study]
    return (
        not differing,
        "; ".join(differing) or f"tensors and config: {study}",
        f"study file: {study}",
    )


def _description(weight_bits, weights, activation_bits, activations, layers: set[str]) -> str:
    head_note = "" if "lm_head" in layers else ", head kept"
    return (
        f"{weight_bits}-bit weights per {weights}, {activation_bits}-bit activations "
        f"{activations.replace('_', ' ')}, {len(layers)} Linears{head_note}"
    )


def _from_tensors(evidence: CheckpointFiles) -> str:
    names = sorted(evidence.stored_int8)
    if not names:
        return "no Linear is int8"
    tops = {int(evidence.saved[f"{n}.weight"].int().abs().max()) for n in names}
    bits = max(2, (min(tops) or 1).bit_length() + 1) if min(tops) < 128 else 8
    shapes = {evidence.saved[f"{n}.weight_scale"].numel() for n in names}
    weights = "tensor" if shapes == {1} else "channel"
    static = sum(f"{n}.input_scale" in evidence.saved for n in names)
    activations = evidence.claim.scheme[1]
    if static != (len(names) if activations == "tensor_static" else 0):
        activations = f"with {static} static scales"
    return _description(bits, weights, 8, activations, set(names))


def _from_config(evidence: CheckpointFiles) -> str:
    config = json.loads((evidence.folder / "config.json").read_text("utf-8"))
    groups = config.get("quantization_config", {}).get("config_groups", {})
    if len(groups) != 1:
        return f"{len(groups)} quantization groups"
    (group,) = groups.values()
    weights, inputs = group["weights"], group["input_activations"]
    if not all(g["symmetric"] and g["type"] == "int" for g in (weights, inputs)):
        return "not symmetric integers"
    timing = "dynamic" if inputs["dynamic"] else "static"
    listed = config["quantization_config"]["ignore"]
    if evidence.claim.made_elsewhere:  # it may list patterns
        listed = [name for name in evidence.linears if is_ignored(name, listed)]
    layers = set(evidence.linears) - set(listed)
    if layers != evidence.stored_int8:
        return f"ignores other Linears than the {len(evidence.stored_int8)} stored as int8"
    kind = f"{inputs['strategy']}_{timing}"
    return _description(weights["num_bits"], weights["strategy"], inputs["num_bits"], kind, layers)


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
    texts = list(study_texts(evidence.job.study, evidence.job.calibration))
    return _compared_tokenizers(evidence.source_folder, evidence.folder, texts)


def _compared_tokenizers(source_folder: Path, folder: Path, texts: list[str]):
    source, saved = _load(source_folder), _load(folder)
    differences = [name for name in ENDS if getattr(source, name) != getattr(saved, name)]
    vocabularies = [tokenizer.get_vocab() for tokenizer in (source, saved)]
    vocabulary_changes = sorted(vocabularies[0].items() ^ vocabularies[1].items())
    differences += [f"vocabulary: {vocabulary_changes[0][0]!r}"] if vocabulary_changes else []
    differences += ["chat format"] if _chat(source) != _chat(saved) else []
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


def _chat(tokenizer) -> str | None:
    """A conversation in the tokenizer's format; None without a chat template."""
    if not tokenizer.chat_template:
        return None
    return tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)


def study_texts(study: Study, calibration: str = "") -> Iterator[str]:
    """Every text of the study's items, of one calibration, and of the shared text."""
    for name in study.evaluation.datasets:
        yield from map(_item_text, evaluation_items(study, name))
    yield from map(_item_text, calibration_items(study, calibration))
    yield from shared_passages(study)


def _item_text(item: Item) -> str:
    return "\n".join((item.passage, item.question, *item.options, *item.golds, item.solution))


MOST_OFF = 0.1  # of an entry of a Hadamard matrix times √n, which is 1 or -1
REWRITTEN = {"_name_or_path", "dtype", "tie_word_embeddings", "transformers_version"}


@gate("rotations are orthogonal")
def orthogonal_gate(evidence: RotatedFiles):
    """R1 and every block's R2 are Hadamard matrices: the integer matrix S of signs has SSᵀ = nI."""
    places = {"R1": ""} if "r1" in evidence.rotations else {}
    if "r2" in evidence.rotations:
        places |= {f"R2 of {block}": block for block in evidence.blocks}
    wrong, furthest = [], 0.0
    for label, block in places.items():
        matrix = evidence.rotation(block)
        size = len(matrix)
        signs, off = matrix.sign(), (matrix.abs() * size**0.5 - 1).abs().max().item()
        if not (off <= MOST_OFF and torch.equal(signs @ signs.T, size * torch.eye(size).to(signs))):
            wrong.append(label)
        furthest = largest((furthest, off))
    return (
        bool(places) and not wrong,
        f"{len(wrong)} of {len(places)} matrices are no Hadamard matrices{examples(wrong)}; "
        f"an entry is up to {furthest:.2g} of its size off",
        f"none; at most {MOST_OFF:g}",
    )


@gate("rotated tensors as declared")
def rotated_gate(evidence: RotatedFiles):
    """Every tensor is the start's, with its norm folded in and rotated on the declared sides.

    A norm is all ones, and what no rotation reaches is unchanged. A weight was rounded to float32
    after each step, which mixes rows or columns: four eps of the larger one's length, and one of
    the saved dtype for the value itself.
    """
    head = f"{HEAD}.weight"
    before, after = {*evidence.before, head}, set(evidence.after)
    wrong, furthest = sorted(before ^ after), 0.0
    for name in sorted(before & after):
        expected, saved = evidence.expected(name), evidence.after[name].double()
        if saved.shape != expected.shape:
            wrong.append(name)
            continue
        off = ((saved - expected).abs() / _rotation_rounding(expected, evidence.dtype)).max().item()
        if not off <= 1:  # NaN as well
            wrong.append(name)
        furthest = largest((furthest, off))
    return (
        not wrong,
        f"{len(wrong)} of {len(before | after)} tensors differ{examples(wrong)}; the largest "
        f"difference is {furthest:.2g} of what rounding allows",
        "none; at most 1",
    )


def _rotation_rounding(expected: Tensor, dtype: torch.dtype) -> Tensor:
    lengths = expected.norm(dim=-1, keepdim=True)
    if expected.ndim == 2:
        lengths = torch.maximum(lengths, expected.norm(dim=0, keepdim=True))
    return torch.finfo(dtype).eps * expected.abs() + 4 * EPS32 * lengths + TINY


@gate("rotated model has a head of its own")
def untied_gate(evidence: RotatedFiles):
    """Its configuration is the start's, but does not tie head and embeddings."""
    start, saved = (load_config(folder) for folder in (evidence.start, evidence.folder))
    settings = [config.to_dict() for config in (start, saved)]
    names = sorted((settings[0].keys() | settings[1].keys()) - REWRITTEN)
    changed = [name for name in names if settings[0].get(name) != settings[1].get(name)]
    tied = saved.tie_word_embeddings or f"{HEAD}.weight" not in evidence.after
    return (
        not (tied or changed),
        f"{'tied' if tied else 'not tied'}; "
        f"{len(changed)} other settings differ{examples(changed)}",
        "not tied; none",
    )


@gate("rotated model's tokenizer matches its start's")
def rotated_tokenizer_gate(evidence: RotatedFiles):
    """The two agree as a checkpoint's tokenizer agrees with its source's."""
    return _compared_tokenizers(evidence.start, evidence.folder, evidence.texts)
