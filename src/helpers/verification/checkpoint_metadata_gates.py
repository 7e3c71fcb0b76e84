"""Gates on what the checkpoint says of itself: its layers, bits and granularities."""

import json

from helpers.core.architectures import float_matrices
from helpers.verification.checkpoint_files import CheckpointFiles
from helpers.verification.gate_decorator import examples, gate


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
    layers = set(evidence.linears) - set(config["quantization_config"]["ignore"])
    if layers != evidence.stored_int8:
        return f"ignores other Linears than the {len(evidence.stored_int8)} stored as int8"
    kind = f"{inputs['strategy']}_{timing}"
    return _description(weights["num_bits"], weights["strategy"], inputs["num_bits"], kind, layers)
