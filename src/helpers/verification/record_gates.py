"""Gates on what the record of a quantization will say: bytes, Linears, α in words, SQNR.

These numbers stand in the report and guard nothing else, so that nothing else would show them
wrong. They are counted again from the headers of the files and, for one Linear, by numpy.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch

from helpers.verification.checkpoint_files import CheckpointFiles
from helpers.verification.gate_decorator import examples, gate
from helpers.verification.hooks import capture_inputs, first_block_only

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
    if recorded["quantized_linears"] != expected:
        differences.append(
            f"{recorded['quantized_linears']} Linears in int8, in the files {expected}"
        )
    return (
        not differences,
        "; ".join(differences) or f"{sum(recorded['bytes_after'].values()):,} bytes",
        "equal",
    )


@gate("recorded recipe as declared")
def scheme_gate(evidence: CheckpointFiles):
    """The recorded recipe text states the variant's α and granularities."""
    recorded = evidence.record["scheme"]
    alphas = sorted(set(evidence.alphas.values())) if evidence.groups else []
    expected = [f"{alphas[i]:g}" for i in {0, len(alphas) - 1} if alphas]
    numbers = re.findall(r"\d+(?:\.\d+)?", recorded.partition("α")[2])
    missing = [a for a in expected if a not in numbers]
    if evidence.claim.quantized:
        weights, activations = evidence.claim.scheme
        parts = [f"weights per {weights}", f"activations per {activations.replace('_', ', ')}"]
        missing += [part for part in parts if part not in recorded]
    return not missing, f"“{recorded}”{examples(missing)}", "α and granularities as declared"


@gate("recorded SQNR recomputed")
def sqnr_gate(evidence: CheckpointFiles):
    """The recorded SQNR of the first quantized Linear equals one computed by numpy."""
    name = evidence.targets[0]
    recorded = list(evidence.record["sqnr_db"].values())[-1][name]
    model, texts = evidence.source_model, evidence.tokens[:SQNR_TEXTS]
    with first_block_only(model):
        inputs = [capture_inputs(model, [name], tokens)[name] for tokens in texts]
    to_numpy = lambda t: t.detach().to(torch.float64).cpu().numpy()  # noqa: E731
    columns, rows = (None if s is None else to_numpy(s) for s in evidence.folded[name])
    weight = to_numpy(evidence.source[f"{name}.weight"])
    step = to_numpy(evidence.saved[f"{name}.weight_scale"]).reshape(-1, 1)
    stored = to_numpy(evidence.saved[f"{name}.weight"]) * step
    signal = noise = 0.0
    for x in inputs:
        x = to_numpy(x).reshape(-1, weight.shape[1])
        smooth = x if columns is None else x / columns
        exact = x @ weight.T
        exact = exact if rows is None else exact / rows
        absmax = np.abs(smooth).max(1, keepdims=True)
        if evidence.claim.scheme[1] == "tensor_dynamic":
            absmax = absmax.max()
        scale = np.maximum(absmax / 127.5, 1e-30)
        if evidence.claim.scheme[1] == "tensor_static":
            scale = to_numpy(evidence.saved[f"{name}.input_scale"])
        rounded = np.clip(np.rint(smooth / scale), -128, 127) * scale
        signal += float((exact**2).sum())
        noise += float(((exact - rounded @ stored.T) ** 2).sum())
    recomputed = 10 * math.log10(signal / noise) if noise else 200.0
    return (
        abs(recorded - recomputed) <= CLOSE_DB,
        f"{name}: {recorded:.2f} dB on record, {recomputed:.2f} dB again",
        f"within {CLOSE_DB} dB",
    )


def record_gates_of(claim) -> tuple:
    """The gates on the record that apply to a variant."""
    if not claim.quantized:
        return bytes_gate, scheme_gate
    return bytes_gate, scheme_gate, sqnr_gate
