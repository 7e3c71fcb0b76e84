"""Gates with limits of their own, where one measured on the baseline would move with it.

A baseline that is broken is broken for every variant, and nothing that is held against it
shows that. Imports no torch.
"""

import bz2
import lzma
import math
import zlib

from helpers.core.gates import Gate
from helpers.study.schema import Study
from helpers.study.schema_sources import FineTunedModel, RandomModel

LEAST_CHANGE = 1e-4  # relative change of a held-out loss; float32 rounds a mean over tokens to 1e-6
RAW = [{"id": lzma.FILTER_LZMA2, "preset": 9}]


def is_random(study: Study, model: str) -> bool:
    """Whether the study declares that a model's weights are random, or were before training."""
    source = study.models[model]
    if isinstance(source, FineTunedModel):
        return is_random(study, source.finetune.start)
    return isinstance(source, RandomModel)


def plain_text_gate(study: Study, model: str, rows: list[dict], texts: dict[str, str]) -> Gate:
    """The baseline predicts plain text better than a general-purpose compressor.

    Measured in bits per byte, which no tokenizer changes. Compressed passage by passage, text
    takes 3 to 5 bits per byte; a usable language model needs 1 to 2.

    Args:
        rows: the baseline's rows of the shared text.
        texts: the scored part of each passage, by its id.
    """
    name = "plain text beats compression"
    scored_rows = [row for row in rows if row["id"] in texts and row["nll"] is not None]
    text_bytes = sum(len(texts[row["id"]].encode()) for row in scored_rows)
    if not text_bytes or len(scored_rows) != len(rows):
        measured = f"{len(scored_rows)} of {len(rows)} passages have a loss and a text"
        return Gate(name, False, measured, "all")
    bits = sum(row["nll"] for row in scored_rows) / math.log(2) / text_bytes
    limit = 8 * sum(compressed_bytes(texts[row["id"]]) for row in scored_rows) / text_bytes
    bits_measured = f"{bits:.2f} bits a byte"
    if is_random(study, model):
        return Gate(
            name, True, f"{bits_measured}; its weights are random", "none for random weights"
        )
    return Gate(
        name, bits < limit, bits_measured, f"less than {limit:.2f}, what a compressor needs"
    )


def compressed_bytes(text: str) -> int:
    """Bytes of a text by the best of three compressors, without their headers."""
    data = text.encode()
    deflate = zlib.compressobj(9, wbits=-15)
    return min(
        len(deflate.compress(data) + deflate.flush()),
        len(bz2.compress(data)),
        len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=RAW)),
    )


def training_gate(results: dict) -> Gate:
    """Training changed the loss on held-out items by more than rounding.

    Args:
        results: from the record of the fine-tuning.
    """
    before, after = results["heldout_loss_before"], results["heldout_loss_after"]
    change = abs(after - before) / abs(before) if before else math.inf
    return Gate(
        "training changed the held-out loss",
        math.isfinite(change) and change > LEAST_CHANGE,
        f"from {before:.6g} to {after:.6g} nats a token",
        f"by more than {LEAST_CHANGE:g} of it",
    )


def trained_on_gate(results: dict, drawn: list[str]) -> Gate:
    """The recorded training items equal those that the study draws.

    Args:
        results: from the record of the fine-tuning.
        drawn: ids of the training items, then of the held-out ones.
    """
    items = results.get("items", {})
    recorded = [*items.get("training", []), *items.get("heldout", [])]
    differing = len(set(recorded) ^ set(drawn))
    return Gate(
        "training items on record",
        bool(drawn) and recorded == drawn,
        f"{len(recorded)} items on record, {differing} of them others",
        f"the {len(drawn)} drawn, in their order",
    )
