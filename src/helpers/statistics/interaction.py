"""Does fine-tuning raise the cost of quantization? A difference of differences, with a verdict.

Both models answer the same items, so each item gives one number: what the fine-tuned model
lost to quantization minus what the base model lost. Its mean is tested as any other paired
difference is. Two costs whose intervals overlap may still differ, and two verdicts that read
differently ("worse" and "inconclusive") need not.

Nothing is said where either model has no ability on the set.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from helpers.core.errors import StudyError
from helpers.statistics.clustered import MeanEstimate, clustered_mean
from helpers.statistics.graded import Scored, paired_differences


def cost_difference(base: tuple[Scored, Scored], finetuned: tuple[Scored, Scored]) -> MeanEstimate:
    """(finetuned variant - finetuned baseline) - (base variant - base baseline), by item.

    Negative: quantization costs the fine-tuned model more.

    Args:
        base, finetuned: the baseline's and the variant's scores of one set.

    Raises:
        StudyError: the four answered different items.
    """
    if base[0].ids != finetuned[0].ids:
        raise StudyError("the two models answered different items; run 03_evaluation again")
    changes = paired_differences(*finetuned) - paired_differences(*base)
    return clustered_mean(changes, base[0].clusters)


def kl_difference(
    base: Sequence[Mapping], finetuned: Sequence[Mapping], *, key: str = "kl"
) -> MeanEstimate:
    """KL a token of the fine-tuned variant minus that of the base variant, by passage.

    Each is held against its own float model. Positive: quantization costs the fine-tuned
    model more.

    Args:
        base, finetuned: rows of the shared text: `id`, `tokens`, and the sum over the
            passage under `key`, in nats.

    Raises:
        StudyError: the two read different passages or tokens, or a sum is not finite.
    """
    before, after = ({row["id"]: row for row in rows} for rows in (base, finetuned))
    tokens = {name: row["tokens"] for name, row in before.items()}
    if tokens != {name: row["tokens"] for name, row in after.items()}:
        raise StudyError("the two models read other tokens of the shared text; nothing to compare")
    names = sorted(tokens)
    sums = [[side[name][key] for name in names] for side in (before, after)]
    if any(value is None for side in sums for value in side):
        raise StudyError(f"a passage has no finite {key}; the variant is invalid")
    counts = np.array([tokens[name] for name in names], dtype=float)
    changes = (np.array(sums[1]) - np.array(sums[0])) / counts  # (passages,) nats a token
    return clustered_mean(changes, names, counts)
