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

from helpers.verification.checkpoint_files import Evidence
from helpers.verification.gate_decorator import gate, named
from helpers.verification.hooks import first_block_only, inputs_of

TEXTS = 4  # that the SQNR on record is over
CLOSE_DB = 0.1


def header(folder: Path) -> dict[str, dict]:
    """What the headers of a folder's safetensors files say of each tensor."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            found |= {k: v for k, v in json.loads(stream.read(size)).items() if k[:2] != "__"}
    return found


@gate("bytes and Linears of the record as the files have them")
def bytes_gate(evidence: Evidence):
    """Every byte of the tensors in one of the parts, every int8 matrix counted."""
    made, told = evidence.made, []
    folders = {"bytes_after": evidence.folder, "bytes_before": evidence.source_folder}
    for parts, folder in folders.items():
        due = sum(b - a for a, b in (v["data_offsets"] for v in header(folder).values()))
        found = sum(made[parts].values())
        # A source may hold its head twice, or what transformers ignores.
        if found > due or (found < due and parts == "bytes_after"):
            told.append(f"{parts} {found:,}, in the files {due:,}")
    int8 = [k for k, v in header(evidence.folder).items() if v["dtype"] == "I8"]
    due = len(int8) if evidence.claim.quantized else made["quantized_linears"]
    if made["quantized_linears"] != due:
        told.append(f"{made['quantized_linears']} Linears in int8, in the files {due}")
    return not told, "; ".join(told) or f"{sum(made['bytes_after'].values()):,} bytes", "equal"


@gate("the recipe in words as declared")
def words_gate(evidence: Evidence):
    """The α and the granularities of the recipe's line are those of the variant."""
    told = evidence.made["scheme"]
    alphas = sorted(set(evidence.alphas.values())) if evidence.groups else []
    due = [f"{alphas[i]:g}" for i in {0, len(alphas) - 1} if alphas]
    said = re.findall(r"\d+(?:\.\d+)?", told.partition("α")[2])
    lacking = [a for a in due if a not in said]
    if evidence.claim.quantized:
        weights, activations = evidence.claim.scheme
        parts = [f"weights per {weights}", f"activations per {activations.replace('_', ', ')}"]
        lacking += [part for part in parts if part not in told]
    return not lacking, f"“{told}”{named(lacking)}", "α and granularities as declared"


@gate("output SQNR on record")
def sqnr_gate(evidence: Evidence):
    """The SQNR of the first quantized Linear, by numpy from both files."""
    name = evidence.targets[0]
    found = list(evidence.made["sqnr_db"].values())[-1][name]
    model, texts = evidence.source_model, evidence.tokens[:TEXTS]
    with first_block_only(model):
        inputs = [inputs_of(model, [name], tokens)[name] for tokens in texts]
    read = lambda t: t.detach().to(torch.float64).cpu().numpy()  # noqa: E731
    columns, rows = (None if s is None else read(s) for s in evidence.folded[name])
    weight = read(evidence.source[f"{name}.weight"])
    step = read(evidence.saved[f"{name}.weight_scale"]).reshape(-1, 1)
    stored = read(evidence.saved[f"{name}.weight"]) * step
    signal = noise = 0.0
    for x in inputs:
        x = read(x).reshape(-1, weight.shape[1])
        smooth = x if columns is None else x / columns
        exact = x @ weight.T
        exact = exact if rows is None else exact / rows
        each = np.abs(smooth).max(1, keepdims=True)
        if evidence.claim.scheme[1] == "tensor_dynamic":
            each = each.max()
        scale = np.maximum(each / 127.5, 1e-30)
        if evidence.claim.scheme[1] == "tensor_static":
            scale = read(evidence.saved[f"{name}.input_scale"])
        rounded = np.clip(np.rint(smooth / scale), -128, 127) * scale
        signal += float((exact**2).sum())
        noise += float(((exact - rounded @ stored.T) ** 2).sum())
    again = 10 * math.log10(signal / noise) if noise else 200.0
    return (
        abs(found - again) <= CLOSE_DB,
        f"{name}: {found:.2f} dB on record, {again:.2f} dB again",
        f"within {CLOSE_DB} dB",
    )


def on_record(claim) -> tuple:
    """The gates that apply to what a variant claims to be."""
    if not claim.quantized:
        return bytes_gate, words_gate
    return bytes_gate, words_gate, sqnr_gate
