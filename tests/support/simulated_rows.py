"""Rows of option sets, written answers and a shared text with known losses, for the tests."""

import numpy as np

LABELS = ["A", "B", "C", "D"]


def option_rows(rng: np.random.Generator, n: int = 60, *, know: float = 1.5) -> list[dict]:
    """A model's rows of items with four options, in passages of two."""
    rows = []
    for i in range(n):
        right = int(rng.integers(4))
        sizes = [int(s) for s in rng.integers(4, 40, 4)]
        per_byte = -rng.gamma(4, 0.15, 4)
        per_byte[right] += know / np.mean(sizes)
        rows.append(
            {
                "id": f"item-{i:03}",
                "cluster": f"passage-{i // 2:03}",
                "golds": [LABELS[right]],
                "labels": LABELS,
                "option_bytes": sizes,
                "logprobs": [float(x * s) for x, s in zip(per_byte, sizes, strict=True)],
            }
        )
    return rows


def written_rows(rng: np.random.Generator, n: int = 60, *, lead: float = 0.8) -> list[dict]:
    """A model's rows of written answers, one to three golds each; every seventh has no foil."""
    rows = []
    for i in range(n):
        tokens = [int(t) for t in rng.integers(1, 9, int(rng.integers(1, 4)))]
        level = -rng.gamma(2, 0.5)
        golds = [float(t * (level - rng.gamma(1, 0.2))) for t in tokens]
        foil = float(5 * (level - lead + 0.3 * rng.normal()))
        has_foil = i % 7 != 3
        rows.append(
            {
                "id": f"item-{i:03}",
                "cluster": "",
                "golds": [f"answer {k}" for k in range(len(tokens))],
                "gold_loglikelihoods": golds,
                "gold_tokens": tokens,
                "foil_loglikelihood": foil if has_foil else None,
                "foil_tokens": 5 if has_foil else None,
            }
        )
    return rows


def quantized(
    rows: list[dict], rng: np.random.Generator, *, noise: float, loss: float = 0.0
) -> list[dict]:
    """The rows with log-probabilities moved by noise, and the right answer's lowered by `loss`."""
    found = []
    for row in rows:
        new = dict(row)
        if "logprobs" in row:
            moved = np.array(row["logprobs"]) + noise * rng.normal(size=len(row["logprobs"]))
            moved[[label in row["golds"] for label in row["labels"]]] -= loss
            new["logprobs"] = [float(x) for x in moved]
        else:
            new["gold_loglikelihoods"] = [
                float(x + t * (noise * rng.normal() - loss))
                for x, t in zip(row["gold_loglikelihoods"], row["gold_tokens"], strict=True)
            ]
        found.append(new)
    rng.shuffle(found)
    return found


def passages(rng: np.random.Generator, n: int = 32, *, kl: float = 0.03) -> list[dict]:
    """Rows of the shared text, 20 to 250 tokens each, with their sums of KL."""
    rows = []
    for i in range(n):
        tokens = int(rng.integers(20, 250))
        rows.append({"id": f"p{i:02}", "tokens": tokens, "kl": tokens * kl * rng.lognormal(0, 0.5)})
    return rows
