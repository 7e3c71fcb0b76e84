"""How far a model's next-token distributions are from the float model's, on a few texts.

A quick look for choices and explanations inside the quantization; what counts is
measured in the evaluation, on other texts. Also answers what the loss would be if some
Linears were left float.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from helpers.core.activity import Bar
from helpers.runtime.batching import pad, token_budget_batches
from helpers.runtime.linears import simulated_by_onednn
from helpers.runtime.rotary_positions import batch_tokens_for
from helpers.study.schema_variants import Variant

HEAD_ROWS = 64  # tokens whose logits are in memory at once
BATCH_TOKENS = 2048  # of one pass, including padding
JUDGES = 3  # judging items that a probe reads, since it reads them once for every kind of Linear


class DivergenceProbe:
    """The float model's log-probabilities on a few texts.

    Args:
        model: the float model.
        texts: token ids.
        variant: the variant to compare; with `tensor_dynamic`, texts are read one at a time.
    """

    def __init__(self, model, texts: list[list[int]], variant: Variant):
        batched = not variant.scheme or variant.scheme[1] != "tensor_dynamic"
        budget = batch_tokens_for(model.config, list(map(len, texts)), batch_tokens=BATCH_TOKENS)
        self.texts, self.batch_tokens = texts, budget if batched else 1
        self.expected = list(self._logprobs(model))

    def divergence(self, model) -> dict[str, float | None]:
        """KL(float ‖ model) in nats per token, and the share of tokens with the same top-1.

        The KL is None if it is not finite; the gates judge such a model.
        """
        kl, agreements, tokens = 0.0, 0, 0
        for expected, logprobs in zip(self.expected, self._logprobs(model), strict=True):
            kl += (expected.exp() * (expected - logprobs)).sum(dtype=torch.float64).item()
            agreements += int((expected.max(-1).indices == logprobs.max(-1).indices).sum())
            tokens += len(logprobs)
        mean_kl = kl / tokens if math.isfinite(kl) else None
        return {"kl": mean_kl, "top1_agreement": agreements / tokens}

    @torch.inference_mode()
    def _logprobs(self, model) -> Iterator[Tensor]:
        """Yield (some tokens, vocabulary) log-probabilities of all texts, a few tokens at a time.

        Texts are batched if possible, since a simulated Linear rounds its weights at each call.
        """
        head, device = model.get_output_embeddings(), model.device
        lengths = list(map(len, self.texts))
        for batch in token_budget_batches(lengths, batch_tokens=self.batch_tokens):
            tokens = pad([self.texts[i] for i in batch], value=0, side="right", device=device)
            mask = pad([[1] * lengths[i] for i in batch], value=0, side="right", device=device)
            output = model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
            for rows in output.last_hidden_state[mask.bool()].split(HEAD_ROWS):
                yield head(rows).float().log_softmax(-1).cpu()


def sensitivity_rows(
    model, targets: list[str], absmax: dict[str, Tensor], probe: DivergenceProbe
) -> list[dict]:
    """The divergence of the quantized model, and with some of its Linears left float.

    The Linears left float are each kind in turn, and the two with the strongest input outlier.

    Args:
        model: quantized by `compression.quantize_`, not saved yet; unchanged afterwards.
        targets: names of its quantized Linears.
        absmax: Linear name to (in_features,) calibrated maxima of its input.
    """
    groups = [("nothing", [])]
    for kind in dict.fromkeys(name.rpartition(".")[2] for name in targets):
        groups.append((f"every {kind}", [n for n in targets if n.endswith(f".{kind}")]))
    outlier_linears = sorted(targets, key=lambda n: -_channel_ratio(absmax[n]))[:2]
    groups.append((" and ".join(outlier_linears), outlier_linears))
    rows = []
    for label, names in Bar(groups, desc="leaving Linears float", unit="probe"):
        with _left_float(model, names), simulated_by_onednn(model):
            rows.append({"float": label, "linears": len(names), **probe.divergence(model)})
    return rows


def _channel_ratio(absmax: Tensor) -> float:
    """Ratio of the largest to the median channel."""
    return (absmax.max() / absmax.median().clamp(min=1e-12)).item()


@contextmanager
def _left_float(model, names: list[str]) -> Iterator[None]:
    modules = [model.get_submodule(name) for name in names]
    for module in modules:
        module.quantization_enabled = False
    try:
        yield
    finally:
        for module in modules:
            module.quantization_enabled = True
