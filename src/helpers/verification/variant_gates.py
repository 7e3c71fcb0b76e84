"""All gates on one variant: checkpoint, calibration, α and record.

What the run that made the checkpoint held in memory is not asked: a bug in smoothing or
compression would vouch for itself there. The gates on tensors and metadata are in
`checkpoint_gates`, those on what the loaded checkpoint computes in `runtime_gates`. Here are four
more kinds:

- calibration: whose texts it read, all of them, and nothing but them;
- the choice of α: what was chosen is the least of what was recorded;
- the choice of Linears left float: it is what the files hold, the best for its bytes, and made on
  the judging items by what rounding does there, which is computed again for two of them;
- the record: bytes, Linears, α in words and SQNR stand in the report and guard nothing else, so
  that nothing else would show them wrong. They are counted again from the headers of the files
  and, for one Linear, by numpy.

The result is written to verification.json, beside the checkpoint that it was held against.
"""

import json
import math
import re
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.core.architectures import HEAD
from helpers.core.processes import Bar
from helpers.core.records import (
    Gate,
    checkpoint_gates_record,
    examples,
    gate,
    read_json,
    sha256_folder,
    write_json,
)
from helpers.quantization.simulation import AUTO_ALPHAS
from helpers.runtime.discovery import head_logits
from helpers.sources.items import Item, item_key, load_rows, normalized_text
from helpers.sources.sampling import evaluation_items, load_items, training_items
from helpers.study.inputs import UNKNOWN_ORIGIN, FoundScheme
from helpers.study.loading import Job
from helpers.study.schema import FineTunedModel, Numbers, Ruler, Variant
from helpers.study.stages import Run
from helpers.verification import checkpoint_gates, rulers, runtime_gates
from helpers.verification.checkpoint_files import (
    CheckpointFiles,
    capture_inputs,
    first_block_only,
    input_maxima,
    logits_of,
)
from helpers.verification.checkpoint_gates import float_weights_gate

PRODUCTS_A_BLOCK = 4  # products between a block's input and its last Linear: q·k, ·v, o, gate·up


@gate("calibration items as declared")
def items_gate(evidence: CheckpointFiles):
    """The recorded items and token counts equal those that the study draws and tokenizes now."""
    results = evidence.calibration_record["results"]
    settings = evidence.job.calibration_settings
    ids, expected = results["items"], [item.id for item in evidence.items]
    tokens = sum(map(len, evidence.tokens))
    path = evidence.calibration_folder / "activations.safetensors"
    counted_tokens = {int(t) for k, t in load_file(path).items() if k.endswith(".tokens")}
    longest = max(map(len, evidence.tokens))
    return (
        ids == expected
        and len(ids) == settings.items
        and results["tokens"] == tokens
        and counted_tokens == {tokens}
        and longest <= settings.max_tokens,
        f"{len(ids)} items on record, {len(set(ids) ^ set(expected))} of them others; "
        f"{results['tokens']} tokens on record, "
        f"{'/'.join(map(str, sorted(counted_tokens))) or 'none'} in "
        f"the statistics; the longest item has {longest}",
        f"{settings.items} items, {tokens} tokens in both, no item of more than "
        f"{settings.max_tokens}",
    )


@gate("calibration texts complete")
def texts_gate(evidence: CheckpointFiles):
    """The decoded tokens of every item contain the texts of its raw row.

    Whitespace is ignored, since a tokenizer may change it.
    """
    settings, incomplete = evidence.job.calibration_settings, []
    raw_rows = load_rows(settings.dataset)
    rows = {_without_spaces(row.get("problem") or row.get("question")): row for row in raw_rows}
    for item, tokens in zip(evidence.items, evidence.tokens, strict=True):
        row = rows.get(_without_spaces(item.question), {})
        decoded = evidence.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        text = _without_spaces(decoded)
        question, solution = (
            _without_spaces(item.question),
            _without_spaces(row.get("generated_solution") or ""),
        )
        passage = _without_spaces(row.get("context") or row.get("passage") or "")
        if not row or question not in text or passage not in text or not text.endswith(solution):
            incomplete.append(item.id)
    return (
        not incomplete,
        f"{len(incomplete)} of {len(evidence.items)} lack a part{examples(incomplete)}",
        "none",
    )


@gate("calibration items in seed order")
def order_gate(evidence: CheckpointFiles):
    """The items lie in the order of the seed, whichever items the draw left out."""
    seed = evidence.job.study.seed
    draw_keys = [sha256(f"{seed}:{item_key(i)}".encode()).hexdigest() for i in evidence.items]
    has_titles = any(item.title for item in evidence.items)  # drawn title by title
    misplaced = 0 if has_titles else sum(a > b for a, b in pairwise(draw_keys))
    return (
        not misplaced,
        f"{misplaced} of {len(draw_keys)} lie before one that the seed draws first",
        "none",
    )


@gate("outlier figure shows the maximum")
def surface_gate(evidence: CheckpointFiles):
    """The item of the outlier figure contains its Linear's calibrated maximum."""
    [(name, surface)] = load_file(evidence.calibration_folder / "surface.safetensors").items()
    surface_max, calibrated_max = surface.max().item(), evidence.absmax[name].max().item()
    tolerance = (
        PRODUCTS_A_BLOCK * evidence.config.num_hidden_layers * evidence.rounding(evidence.widest)
    )
    return (
        math.isclose(surface_max, calibrated_max, rel_tol=tolerance),
        f"{name}: {surface_max:.6g}",
        f"{calibrated_max:.6g}",
    )


def _without_spaces(text: str) -> str:
    return "".join(text.split())


@gate("no calibration leakage")
def leakage_gate(evidence: CheckpointFiles):
    """No text on the calibration record is an evaluation or a training item.

    Nor is one of a further draw on the calibration record of an earlier one.
    """
    study, model, draw = evidence.job.study, evidence.job.model, evidence.job.draw
    settings = evidence.job.calibration_settings
    rows = load_items(settings.dataset, adapter=settings.adapter)
    items_by_id = {item.id: item for item in rows}
    calibration_items = [items_by_id[i] for i in evidence.calibration_record["results"]["items"]]
    others = {d: evaluation_items(study, d) for d in study.evaluation.datasets}
    if isinstance(study.models[model], FineTunedModel):
        others["training"] = [i for part in training_items(study, model) for i in part]
    for number in range(1, draw):
        run = Run("calibration", model, evidence.job.calibration, number)
        record = run.record(evidence.job.paths)
        ids = read_json(record, made_by="01_calibration")["results"]["items"]
        others[f"draw {number}"] = [items_by_id[i] for i in ids]
    texts = {
        normalized_item_text(item): set_name for set_name, items in others.items() for item in items
    }
    shared = [
        f"{i.id} in {texts[normalized_item_text(i)]}"
        for i in calibration_items
        if normalized_item_text(i) in texts
    ]
    return (
        bool(calibration_items) and not shared,
        f"{len(shared)} of {len(calibration_items)} items are among {len(texts)} others"
        f"{examples(shared)}",
        "none",
    )


def normalized_item_text(item: Item) -> str:
    """The normalized words of a question and its passage."""
    return normalized_text(f"{item.question}\n{item.passage}")


@gate("calibration maxima recomputed")
def statistics_gate(evidence: CheckpointFiles):
    """The abs-max of the first block's Linears, computed again item by item.

    This uses no padding and no batch. The other Linears are checked on the probes, which are
    prefixes of calibration items, so that no input may exceed its calibrated maximum. Batched
    and single passes round differently: the limit is rounding() per product in the chain,
    times the depth, relative to the layer's largest value.
    """
    model, differing, exceeded = evidence.source_model, [], []
    first_block = {n for n in evidence.linears if n.startswith(f"{evidence.blocks}.0.")}
    with first_block_only(model):
        maxima = input_maxima(model, evidence.tokens)
    for name in sorted(first_block):
        if not _within(evidence, name, (maxima[name] - evidence.absmax[name]).abs(), blocks=1):
            differing.append(name)
    maxima = input_maxima(model, evidence.probes)
    for name in sorted(set(evidence.linears) - first_block - {HEAD}):
        excess = maxima[name] - evidence.absmax[name]
        if not _within(evidence, name, excess, blocks=evidence.config.num_hidden_layers):
            exceeded.append(name)
    return (
        not (differing or exceeded),
        f"{len(differing)} of {len(first_block)} Linears of the first block differ from the "
        f"items read alone{examples(differing)}; {len(exceeded)} others exceed their maxima"
        f"{examples(exceeded)}",
        "none beyond rounding",
    )


def _within(evidence: CheckpointFiles, name: str, error: Tensor, *, blocks: int) -> bool:
    calibrated = evidence.absmax[name]
    limit = PRODUCTS_A_BLOCK * blocks * evidence.rounding(evidence.widest) * calibrated.max().item()
    return math.isfinite(limit) and bool((error <= limit).all())


@gate("alpha minimizes the loss")
def alpha_choice_gate(evidence: CheckpointFiles):
    """The chosen α has the least KL of its grid, or with `auto` the least error of its group.

    With optional targets the grid has every α without and with them.
    """
    declared = evidence.job.recipe.smooth
    folder = evidence.job.paths.quantization(evidence.job.model, evidence.job.variant)
    record = read_json(folder / "alpha.json", made_by="02_quantization")
    optional = bool(declared.optional) and record["targets"] != list(declared.targets)
    if declared.alpha == "auto":
        losses = {
            name: {
                (row["alpha"], False): row["error"]
                for row in record["errors"]
                if row["group"] == name
            }
            for name in record["alphas"]
        }
        alphas = AUTO_ALPHAS
    else:
        curve = {(row["alpha"], row.get("optional", False)): row["kl"] for row in record["curve"]}
        losses = dict.fromkeys(record["alphas"], curve)
        alphas = declared.alpha if isinstance(declared.alpha, tuple) else (declared.alpha,)
    grid = {(a, folded) for a in alphas for folded in {False, bool(declared.optional)}}
    wrong_groups = [
        n
        for n, curve_of_group in losses.items()
        if not _is_least_loss((record["alphas"][n], optional), curve_of_group, grid)
    ]
    wrong_groups += [g.consumers[0] for g in evidence.groups if g.consumers[0] not in losses]
    return (
        not wrong_groups,
        f"{len(wrong_groups)} of {len(losses)} groups have an α that is not the least of its "
        f"curve{examples(wrong_groups)}",
        "none, each curve over all the study names",
    )


Choice = tuple[float, bool]  # α, and whether optional targets are folded into


def _is_least_loss(chosen: Choice, losses: dict[Choice, float | None], grid: set[Choice]) -> bool:
    finite = {a: x for a, x in losses.items() if x is not None and math.isfinite(x)}
    return set(losses) == grid and chosen in finite and finite[chosen] == min(finite.values())


def _recorded_choice(evidence: CheckpointFiles) -> dict:
    folder = evidence.job.paths.quantization(evidence.job.model, evidence.job.variant)
    return read_json(folder / "protected.json", made_by="02_quantization")


@gate("protected Linears as chosen")
def protected_gate(evidence: CheckpointFiles):
    """The Linears that are float on disk are those ignored and the best choice for its bytes.

    Bytes are counted from the headers of the checkpoint's files. The largest sum of recorded
    sensitivities that fits them is found without a solver: of Linears with equal bytes the most
    sensitive come first, and of all such beginnings the undominated sums are kept. The choice reads
    judging items alone and is compared on none of them, with random choices that leave no room.
    """
    record, share = _recorded_choice(evidence), evidence.job.recipe.protect.bytes
    chosen, gains = record["chosen"], {n: row["kl"] for n, row in record["linears"].items()}
    candidates = [*evidence.targets, *chosen]
    costs, model_bytes = _bytes_of_floats(evidence, candidates)
    allowed = share * model_bytes
    spent = sum(costs[name] for name in chosen)
    headers = tensor_headers(evidence.folder)
    int8 = {k.removesuffix(".weight") for k, v in headers.items() if v["dtype"] == "I8"}
    wrong = sorted(int8 ^ set(evidence.targets))
    problems = [f"{len(wrong)} Linears are not stored as chosen{examples(wrong)}"] if wrong else []
    if sorted(candidates) != sorted(gains) or not all(map(_is_sensitivity, gains.values())):
        return False, "not every Linear has one sensitivity on record", "each has one"
    if spent > allowed:
        problems.append(f"{spent:,} bytes for {len(chosen)} Linears")
    best, reached = _largest_sum(gains, costs, allowed), sum(gains[name] for name in chosen)
    if reached < best - CLOSE_SUM * max(gains.values()):
        problems.append(f"another choice has {best:.4g} nats instead of {reached:.4g}")
    problems += _wrong_items(evidence, record) + _wrong_rank(record, costs, allowed)
    return (
        not problems,
        "; ".join(problems) or f"{len(chosen)} of {len(gains)} Linears for {spent:,} bytes",
        f"at most {allowed:,.0f} bytes, {share:g} of the float model's; no choice with more nats",
    )


CLOSE_SUM = 1e-5  # of the largest sensitivity, below which an integer programme need not look
FEWEST_SETS = 19  # random choices, of which one is the best once in twenty times


def _is_sensitivity(kl: object) -> bool:
    return isinstance(kl, float) and math.isfinite(kl) and kl >= 0


def _bytes_of_floats(evidence: CheckpointFiles, names: list[str]) -> tuple[dict[str, int], int]:
    """(by Linear the bytes of a float weight less those in int8, bytes of the float model)."""
    headers, size = tensor_headers(evidence.folder), torch.finfo(evidence.dtype).bits // 8
    suffixes = (".weight_scale", ".input_scale")
    elements = {k: math.prod(v["shape"]) for k, v in headers.items() if not k.endswith(suffixes)}
    weights, activations = evidence.claim.scheme
    costs = {}
    for name in names:
        scales = headers[f"{name}.weight"]["shape"][0] if weights == "channel" else 1
        scales += activations == "tensor_static"
        costs[name] = elements[f"{name}.weight"] * (size - 1) - scales * size
    return costs, size * sum(elements.values())


def _largest_sum(gains: dict[str, float], costs: dict[str, int], allowed: float) -> float:
    """The largest sum of gains of Linears whose costs fit."""
    by_cost: dict[int, list[float]] = {}
    for name, gain in sorted(gains.items(), key=lambda pair: -pair[1]):
        by_cost.setdefault(costs[name], []).append(gain)
    spent, sums = np.zeros(1), np.zeros(1)
    for cost, of_cost in by_cost.items():
        most = min(len(of_cost), int(allowed // cost))
        beginnings = np.concatenate([[0.0], np.cumsum(of_cost[:most])])
        spent = (spent[:, None] + cost * np.arange(most + 1)).ravel()
        sums = (sums[:, None] + beginnings).ravel()
        order = np.lexsort((-sums, spent))
        order = order[spent[order] <= allowed]
        before = np.maximum.accumulate(np.concatenate([[-1.0], sums[order][:-1]]))
        order = order[sums[order] > before]  # no cheaper choice has as much
        spent, sums = spent[order], sums[order]
    return float(sums.max())


def _wrong_items(evidence: CheckpointFiles, record: dict) -> list[str]:
    """Items of the choice that judge no calibration, or of the comparison that do."""
    items = len(evidence.items)
    judging = set(range(items)[-max(1, items // 10) :])
    chosen_on, compared_on = set(record["judging_items"]), set(record["other_items"])
    problems = []
    if not chosen_on or chosen_on - judging:
        problems.append("chosen on items that are not the judging ones")
    if not compared_on or compared_on - (set(range(items)) - judging):
        problems.append("compared on items that judge, or are no calibration items")
    return problems


def _wrong_rank(record: dict, costs: dict[str, int], allowed: float) -> list[str]:
    """A rank that the recorded KLs do not give, and random choices of other bytes."""
    infinite = lambda kl: math.inf if kl is None else kl  # noqa: E731
    sets, own = record["random"], infinite(record["kl_chosen"])
    rank = 1 + sum(infinite(row["kl"]) <= own for row in sets)
    problems = [] if rank == record["rank"] else [f"rank {record['rank']} instead of {rank}"]
    for row in sets:
        names = set(row["chosen"])
        left = allowed - sum(costs[name] for name in names)
        smallest = min((costs[name] for name in costs if name not in names), default=math.inf)
        if not 0 <= left < smallest or len(names) < len(row["chosen"]):
            problems.append("a random choice of other bytes")
    if len(sets) < FEWEST_SETS:
        problems.append(f"{len(sets)} random choices instead of {FEWEST_SETS}")
    return list(dict.fromkeys(problems))


CLOSE_KL = 0.05  # of √KL, which grows as the error of the logits does, for one Linear
CLOSE_KL_OF_MANY = 0.1  # values between two steps turn either way, from Linear to Linear


@gate("recorded sensitivity recomputed")
def sensitivity_gate(evidence: CheckpointFiles):
    """The KL of two Linears alone in int8, and of the choice, are those of the source's texts.

    The two are the most sensitive of those left float and of the others. Each item is read alone by
    transformers' own forward pass, and the Linear's product is written out again. The limit adds
    what the float model's logits differ by if the items are padded into one batch.
    """
    record, differing = _recorded_choice(evidence), []
    gains, left = {n: row["kl"] for n, row in record["linears"].items()}, set(record["chosen"])
    ranked = sorted(gains, key=lambda name: -gains[name])
    most = [next(n for n in ranked if (n in left) == kept) for kept in (True, False)]
    judging, others = record["judging_items"], record["other_items"]
    cases = [(name, [name], judging, gains[name]) for name in most]
    cases.append(("the choice", [n for n in gains if n not in left], others, record["kl_chosen"]))
    for label, int8, items, recorded in cases:
        texts = [evidence.tokens[i] for i in items]
        again, noise = _simulated_kl(evidence, int8, texts)
        close = CLOSE_KL_OF_MANY if len(int8) > 1 else CLOSE_KL
        allowed = close * again**0.5 + noise**0.5 + SMALLEST_KL**0.5
        if recorded is None or not abs(recorded**0.5 - again**0.5) <= allowed:
            differing.append(f"{label}: {recorded} nats on record, {again:.4g} again")
    return (
        not differing,
        "; ".join(differing) or f"{len(cases)} KLs agree, that of the choice is {recorded:.4g}",
        f"√KL within {CLOSE_KL:.0%}, of the choice {CLOSE_KL_OF_MANY:.0%}, but for rounding",
    )


SMALLEST_KL = 1e-7  # nats, below which logarithms in float32 are no longer exact


@torch.inference_mode()
def _simulated_kl(
    evidence: CheckpointFiles, names: list[str], texts: list[list[int]]
) -> tuple[float, float]:
    """KL in nats a token of the source with some Linears in int8, and in one padded batch."""
    model, longest = evidence.source_model, max(map(len, texts))
    expected = logits_of(model, texts)
    tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    inputs = {"input_ids": tokens.to(model.device), "attention_mask": mask.to(model.device)}
    states = model.base_model(**inputs, use_cache=False).last_hidden_state
    padded = [
        head_logits(model, row[: len(text)]).float().cpu()
        for row, text in zip(states, texts, strict=True)
    ]
    hooks = [
        model.get_submodule(name).register_forward_hook(partial(_in_int8, evidence, name))
        for name in names
    ]
    try:
        rounded = logits_of(model, texts)
    finally:
        for hook in hooks:
            hook.remove()
    return _divergence(expected, rounded), _divergence(expected, padded)


def _divergence(expected: list[Tensor], actual: list[Tensor]) -> float:
    total = 0.0
    for first, second in zip(expected, actual, strict=True):
        p, q = first.double().log_softmax(-1), second.double().log_softmax(-1)
        total += (p.exp() * (p - q)).sum().item()
    return max(0.0, total / sum(map(len, expected)))


def _in_int8(evidence: CheckpointFiles, name: str, linear, args: tuple, y: Tensor) -> Tensor:
    """The output of a Linear as the variant declares it, weights rounded to nearest."""
    weights, activations = evidence.claim.scheme
    columns, rows = evidence.folded[name]
    weight, x = evidence.source[f"{name}.weight"].float(), args[0].float().cpu()
    absmax = evidence.absmax[name].float()
    if columns is not None:
        columns = columns.float()
        weight, x, absmax = weight * columns, x / columns, absmax / columns
    rows = rows if rows is None else rows.float()
    weight = weight if rows is None else weight / rows[:, None]
    step = weight.abs().amax(1, keepdim=True) if weights == "channel" else weight.abs().max()
    step = step / 127.5
    limits = {"token_dynamic": x.abs().amax(-1, keepdim=True), "tensor_dynamic": x.abs().max()}
    scale = (limits.get(activations, absmax.max()) / 127.5).clamp(min=1e-30)
    q = (x / scale).round().clamp(-128, 127) * scale
    product = q @ ((weight / step.clamp(min=1e-30)).round().clamp(-128, 127) * step).T
    product = product if rows is None else product * rows
    if linear.bias is not None:
        product = product + evidence.source[f"{name}.bias"].float()
    return product.to(y)


SQNR_TEXTS = 4  # texts of the recorded SQNR
CLOSE_DB = 0.1


def tensor_headers(folder: Path) -> dict[str, dict]:
    """Header entry of each tensor in a folder's safetensors files, by its name."""
    headers = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            headers |= {k: v for k, v in json.loads(stream.read(size)).items() if k[:2] != "__"}
    return headers


@gate("recorded bytes and Linears match the files")
def bytes_gate(evidence: CheckpointFiles):
    """The recorded bytes and int8 Linears equal those in the headers of the files."""
    recorded, differences = evidence.record, []
    folders = {"bytes_after": evidence.folder, "bytes_before": evidence.source_folder}
    for parts, folder in folders.items():
        expected = sum(
            b - a for a, b in (v["data_offsets"] for v in tensor_headers(folder).values())
        )
        recorded_bytes = sum(recorded[parts].values())
        # A source may store a tied head twice, or tensors that transformers ignores.
        if recorded_bytes > expected or (recorded_bytes < expected and parts == "bytes_after"):
            differences.append(f"{parts} {recorded_bytes:,}, in the files {expected:,}")
    int8 = [k for k, v in tensor_headers(evidence.folder).items() if v["dtype"] == "I8"]
    expected = len(int8) if evidence.claim.quantized else recorded["quantized_linears"]
    expected = len(evidence.targets) if evidence.claim.ruler else expected
    if recorded["quantized_linears"] != expected:
        differences.append(f"{recorded['quantized_linears']} quantized Linears, not {expected}")
    return (
        not differences,
        "; ".join(differences) or f"{sum(recorded['bytes_after'].values()):,} bytes",
        "equal",
    )


@gate("recorded recipe as declared")
def scheme_gate(evidence: CheckpointFiles):
    """The recorded recipe text states the variant's α, places and granularities."""
    recorded = evidence.record["scheme"]
    alphas = sorted(set(evidence.alphas.values())) if evidence.claim.smooth else []
    expected = [f"{alphas[i]:g}" for i in {0, len(alphas) - 1} if alphas]
    numbers = re.findall(r"\d+(?:\.\d+)?", recorded.partition("α")[2])
    missing = [a for a in expected if a not in numbers]
    if evidence.claim.smooth:
        places = [target.replace("_", " ") for target in evidence.claim.smooth.targets]
        named = re.split(r";| \(", recorded.rpartition(" at ")[2])[0].split(", ")
        missing += sorted(set(places) ^ set(named))
    if evidence.claim.quantized:
        weights, activations = evidence.claim.scheme
        parts = [f"weights per {weights}", f"activations per {activations.replace('_', ', ')}"]
        parts += {"gptq": ["GPTQ"], "mse": ["clipped"]}.get(evidence.claim.rounding, [])
        if evidence.claim.protect:
            kept = len(_recorded_choice(evidence)["chosen"])
            parts.append(f"{kept} of {kept + len(evidence.targets)} Linears chosen")
        parts += [UNKNOWN_ORIGIN] if evidence.claim.made_elsewhere else []
        missing += [part for part in parts if part not in recorded]
    if evidence.claim.ruler:
        weights, activations = evidence.claim.ruler
        parts = [_numbers_words(weights, "weights"), _numbers_words(activations, "activations")]
        missing += [part for part in [*parts, "simulated"] if part not in recorded]
    return not missing, f"“{recorded}”{examples(missing)}", "α and granularities as declared"


def _numbers_words(numbers: Numbers | None, part: str) -> str:
    if numbers is None:
        return f"float {part}"
    kind = {"int": "int", "float": "fp"}[numbers.kind]
    return f"{kind}{numbers.bits} {part} per {numbers.granularity}"


@gate("recorded SQNR recomputed")
def sqnr_gate(evidence: CheckpointFiles):
    """The recorded SQNR of the first quantized Linear equals one computed by numpy."""
    name = evidence.targets[0]
    recorded = list(evidence.record["sqnr_db"].values())[-1][name]
    model, texts = evidence.source_model, evidence.tokens[:SQNR_TEXTS]
    with first_block_only(model):
        inputs = [capture_inputs(model, [name], tokens)[name] for tokens in texts]
    to_numpy = lambda t: t.detach().to(torch.float64).cpu().numpy()  # noqa: E731
    files = evidence.at_study_dtype
    columns, rows = (None if s is None else to_numpy(s) for s in files.folded[name])
    weight, ruler = to_numpy(files.source[f"{name}.weight"]), evidence.claim.ruler
    if name in evidence.rounded_targets:
        if ruler:
            stored = to_numpy(rulers.weight_of(evidence, name).values)
        else:
            step = to_numpy(evidence.saved[f"{name}.weight_scale"]).reshape(-1, 1)
            stored = to_numpy(evidence.saved[f"{name}.weight"]) * step
    else:
        stored = to_numpy(evidence.saved[f"{name}.weight"])
    signal = noise = 0.0
    for x in inputs:
        x = to_numpy(x).reshape(-1, weight.shape[1])
        exact = x @ weight.T
        exact = exact if rows is None else exact / rows
        # float32 decides on which side of ±127.5 steps a token's largest value falls
        smooth = x.astype(np.float32)
        smooth = smooth if columns is None else smooth / columns.astype(np.float32)
        if ruler:
            rounded = _ruler_rounded(smooth.astype(np.float64), ruler)
            signal += float((exact**2).sum())
            noise += float(((exact - rounded @ stored.T) ** 2).sum())
            continue
        absmax = np.abs(smooth).max(1, keepdims=True)
        if evidence.claim.scheme[1] == "tensor_dynamic":
            absmax = absmax.max()
        scale = np.maximum(absmax / np.float32(127.5), np.float32(1e-30))
        if evidence.claim.scheme[1] == "tensor_static":
            scale = to_numpy(evidence.saved[f"{name}.input_scale"]).astype(np.float32)
        rounded = np.clip(np.rint(smooth / scale), -128, 127).astype(np.float64) * scale
        signal += float((exact**2).sum())
        noise += float(((exact - rounded @ stored.T) ** 2).sum())
    recomputed = 10 * math.log10(signal / noise) if noise else 200.0
    return (
        abs(recorded - recomputed) <= CLOSE_DB,
        f"{name}: {recorded:.2f} dB on record, {recomputed:.2f} dB again",
        f"within {CLOSE_DB} dB",
    )


def _ruler_rounded(rows: np.ndarray, ruler: Ruler) -> np.ndarray:
    """(rows, features) activations as a ruler rounds them."""
    if ruler.activations is None:
        return rows
    numbers, x = ruler.activations, torch.from_numpy(rows)
    step = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / rulers.range_of(numbers)
    return (rulers.nearest(x / step, numbers) * step).numpy()


def record_gates_of(claim) -> tuple:
    """The gates on the record that apply to a variant."""
    if not claim.compressed:
        return bytes_gate, scheme_gate
    return bytes_gate, scheme_gate, sqnr_gate


# Order: gates without a model, gates that run the source, gates that run the checkpoint. The
# model slot holds one model, and in this order each model is loaded once or twice.
FILE_CHECKS = (
    checkpoint_gates.smoothing_gate,
    checkpoint_gates.unchanged_gate,
    checkpoint_gates.source_gate,
    items_gate,
    leakage_gate,
    checkpoint_gates.tokenizer_gate,
)
RECORD_CHECKS = (  # these gates need the calibration's own files
    texts_gate,
    order_gate,
    surface_gate,
)
INT8_FILE_CHECKS = (
    checkpoint_gates.grid_gate,
    checkpoint_gates.census_gate,
    checkpoint_gates.metadata_gate,
)
SOURCE_MODEL_CHECKS = (statistics_gate, runtime_gates.function_gate)
CHECKPOINT_MODEL_CHECKS = (runtime_gates.reload_gate,)
INT8_LAYER_CHECKS = (runtime_gates.activations_gate, runtime_gates.kernel_gate)


# What made a checkpoint elsewhere, and from which items, is not asked: no file tells.
ELSEWHERE_CHECKS = (
    checkpoint_gates.found_scales_gate,
    checkpoint_gates.origin_gate,
    checkpoint_gates.config_gate,
    checkpoint_gates.unchanged_gate,
    checkpoint_gates.source_gate,
    checkpoint_gates.tokenizer_gate,
    checkpoint_gates.census_gate,
    checkpoint_gates.metadata_gate,
    runtime_gates.function_gate,
)


def checks_of(claim: Variant) -> tuple:
    """The gates that apply to a variant's declared scheme."""
    if claim.made_elsewhere:
        return (*ELSEWHERE_CHECKS, *CHECKPOINT_MODEL_CHECKS, *INT8_LAYER_CHECKS)
    model_checks = (*SOURCE_MODEL_CHECKS, *CHECKPOINT_MODEL_CHECKS)
    alpha_is_chosen = claim.smooth is not None and claim.smooth.is_chosen
    if alpha_is_chosen:
        model_checks = (alpha_choice_gate, *model_checks)
    if claim.ruler:
        rounding = rulers.weights_gate if claim.ruler.weights else float_weights_gate
        of_files = (rulers.layers_gate, rulers.metadata_gate, rounding)
        return (*FILE_CHECKS, *of_files, *model_checks, rulers.arithmetic_gate)
    if claim.protect is not None:
        model_checks = (protected_gate, sensitivity_gate, *model_checks)
    if not claim.quantized:
        return (*FILE_CHECKS, float_weights_gate, *model_checks)
    static = (checkpoint_gates.static_gate,) if claim.scheme[1] == "tensor_static" else ()
    if claim.rounding == "gptq":
        model_checks = (runtime_gates.gptq_gate, *model_checks)
    return (*FILE_CHECKS, *INT8_FILE_CHECKS, *static, *model_checks, *INT8_LAYER_CHECKS)


def verify_checkpoint(job: Job, *, source_hash: str, record: dict | None = None) -> list[Gate]:
    """Run all gates on the job's saved checkpoint.

    Args:
        job: names the model and variant whose checkpoint, source and calibration are read.
        source_hash: content hash of the source's folder before the run.
        record: results that the quantization will record; None skips the gates on them.
    """
    evidence = CheckpointFiles(job, source_hash=source_hash, record=record)
    evidence.release()  # frees the memory that quantization left in use
    checks = checks_of(job.recipe.claim)
    if record:  # the gates on the record run the source, so they come first
        of_calibration = () if job.recipe.made_elsewhere else RECORD_CHECKS
        checks = (*of_calibration, *record_gates_of(job.recipe.claim), *checks)
    gates = Bar(checks, desc="checks on the checkpoint", unit="check")
    return [check(evidence) for check in gates]


def write_verification(job: Job, *, source_hash: str, quantization: dict) -> dict:
    """Verify the job's checkpoint as it is saved; returns what verification.json holds.

    Args:
        source_hash: content hash of the source's folder before the run.
        quantization: what the record of the quantization will say.
    """
    checkpoint = sha256_folder(job.paths.checkpoint(job.model, job.variant))
    verified = {"model": job.model, "variant": job.variant, "checkpoint": checkpoint}
    if job.recipe.made_elsewhere:  # results are read where its folder may be missing
        verified["found"] = job.recipe.model_dump(
            mode="json", include=set(FoundScheme.model_fields)
        )
    verified |= checkpoint_gates_record(
        verify_checkpoint(job, source_hash=source_hash, record=quantization)
    )
    write_json(job.paths.variant(job.model, job.variant) / "verification.json", verified)
    return verified
