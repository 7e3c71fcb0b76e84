"""Gates on the shared text: its figures and token counts against those computed a second time.

What they are held to is made in `full_logits`. Imports no torch.
"""

import math

from helpers.core.gates import Gate, none_of

ROOM = 10.0  # times the rounding measured on one passage, a single sample
EPS = 2.0**-22  # two roundings of float32
LARGEST_LOGPROB = 32.0  # nats; bounds the absolute rounding error of a float32 log-probability


def recomputed_gates(
    rows: list[dict], means: dict, recomputation, *, is_baseline: bool
) -> list[Gate]:
    """The gates on the rows of the shared text.

    Args:
        rows: as the evaluation stored them.
        means: `perplexity`, `kl`, `top1_agreement`, as the evaluation stored them.
        recomputation: rows and token counts from `full_logits`; None if they were not computed.
    """
    recomputed = recomputation.rows if recomputation else []
    counts = recomputation.token_counts if recomputation else {}
    gates = [
        logits_gate(rows, recomputed),
        token_counts_gate(rows, counts),
        tokens_gate(rows, recomputation.unread if recomputation else ["any of them"]),
        means_gate(rows, means),
    ]
    return [*gates, itself_gate(rows)] if is_baseline else gates


def logits_gate(rows: list[dict], recomputed: list[dict]) -> Gate:
    """Loss, KL and top-1 agreement of a few passages follow from two full logit matrices."""
    stored = {row["id"]: row for row in rows}
    differences, example = [], ""
    for row in recomputed:
        if row["id"] not in stored:
            differences.append(f"{row['id']} was not read")
            continue
        differences += _differences(stored[row["id"]], row)
        example = example or f"nll {row['nll']:.6g}, KL {row['kl']:.3g} computed again"
    expected_count = min(2, len(rows))
    if len(recomputed) != expected_count:
        differences.append(
            f"{len(recomputed)} of {expected_count} passages could be computed again"
        )
    return Gate(
        "shared-text figures recomputed",
        bool(recomputed) and not differences,
        "; ".join(differences) or f"{len(recomputed)} passages agree ({example})",
        "the stored figures, but for rounding measured on the baseline",
    )


def _differences(stored: dict, recomputed: dict) -> list[str]:
    """Messages about the figures that differ by more than rounding."""
    differences, resolution = [], recomputed["tokens"] * LARGEST_LOGPROB * EPS
    for name in ("nll", "kl"):
        limit = ROOM * recomputed[f"{name}_blur"] + resolution
        value = stored[name]
        if value is None or not abs(value - recomputed[name]) <= limit:
            shown = "none" if value is None else f"{value:.6g}"
            differences.append(
                f"{name} {shown} of {stored['id']}, again {recomputed[name]:.6g} ± {limit:.2g}"
            )
    if abs(stored["top1_agreements"] - recomputed["top1_agreements"]) > recomputed["ties"]:
        differences.append(
            f"{stored['top1_agreements']} top-1 agreements of {stored['id']}, "
            f"again {recomputed['top1_agreements']} ± {recomputed['ties']}"
        )
    return differences


def token_counts_gate(rows: list[dict], counts: dict[str, int]) -> Gate:
    """The stored number of predicted tokens of every passage is the tokenizer's own count."""
    differing = [
        f"{row['tokens']} of {row['id']}, {counts.get(row['id'], 'none')} by the tokenizer"
        for row in rows
        if counts.get(row["id"]) != row["tokens"]
    ]
    differing += sorted(counts.keys() - {row["id"] for row in rows})
    differing += [] if counts else ["no passage was tokenized again"]
    return none_of("passage token counts", differing, len(rows), "passages have other counts")


def tokens_gate(rows: list[dict], unread: list[str]) -> Gate:
    """Every passage was read as the token ids of the source's own tokenizer."""
    return none_of("passages tokenized by the source", unread, len(rows), "were read otherwise")


def means_gate(rows: list[dict], means: dict) -> Gate:
    """Perplexity, KL and top-1 agreement of the whole text follow from its passages."""
    tokens = sum(row["tokens"] for row in rows)
    complete = tokens > 0 and all(row[key] is not None for row in rows for key in ("nll", "kl"))
    if not complete:
        return Gate("shared-text means recomputed", False, "a passage has no figures", "each has")
    loss, kl = (sum(row[key] for row in rows) / tokens for key in ("nll", "kl"))
    expected = {"perplexity": math.exp(min(loss, 700.0)), "kl": kl}
    expected["top1_agreement"] = sum(row["top1_agreements"] for row in rows) / tokens
    differing = [
        f"{name} {means.get(name)}, {value:.9g} by the passages"
        for name, value in expected.items()
        if means.get(name) is None
        or not math.isclose(means[name], value, rel_tol=1e-9, abs_tol=1e-12)
    ]
    return none_of("shared-text means recomputed", differing, len(expected), "are others")


def itself_gate(rows: list[dict]) -> Gate:
    """The baseline agrees with itself: KL 0 and every top-1 token equal."""
    differing = [
        f"{row['id']}: KL {row['kl']}, {row['top1_agreements']} of {row['tokens']}"
        for row in rows
        if row["kl"] != 0 or row["top1_agreements"] != row["tokens"]
    ]
    return none_of("baseline agrees with itself", differing, len(rows), "passages differ from it")
