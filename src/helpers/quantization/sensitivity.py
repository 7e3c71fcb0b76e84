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

HEAD_ROWS = 64  # tokens whose whole vocabulary is looked at at once
BATCH_TOKENS = 2048  # read at once, padding counted
JUDGES = 3  # judging items that a probe reads, since it reads them once for every kind of Linear


class Probe:
    """The float model's log-probabilities on a few texts.

    Args:
        model: the float model.
        texts: token ids.
        variant: what will be looked at; one dynamic scale a tensor sees a text at a time.
    """

    def __init__(self, model, texts: list[list[int]], variant: Variant):
        together = not variant.scheme or variant.scheme[1] != "tensor_dynamic"
        budget = batch_tokens_for(model.config, list(map(len, texts)), batch_tokens=BATCH_TOKENS)
        self.texts, self.batch_tokens = texts, budget if together else 1
        self.expected = list(self._logprobs(model))

    def divergence(self, model) -> dict[str, float | None]:
        """KL(float ‖ model) in nats a token, and the share of tokens with the same top-1.

        The KL is None where it is not finite; what such a model is worth is the gates' to say.
        """
        kl, same, tokens = 0.0, 0, 0
        for expected, found in zip(self.expected, self._logprobs(model), strict=True):
            kl += (expected.exp() * (expected - found)).sum(dtype=torch.float64).item()
            same += int((expected.max(-1).indices == found.max(-1).indices).sum())
            tokens += len(found)
        mean = kl / tokens if math.isfinite(kl) else None
        return {"kl": mean, "top1_agreement": same / tokens}

    @torch.inference_mode()
    def _logprobs(self, model) -> Iterator[Tensor]:
        """(some tokens, vocabulary) log-probabilities of all texts, a few tokens at a time.

        Texts are read side by side where they may be, since a simulated Linear rounds its
        weights at every call.
        """
        head, device = model.get_output_embeddings(), model.device
        lengths = list(map(len, self.texts))
        for batch in token_budget_batches(lengths, batch_tokens=self.batch_tokens):
            tokens = pad([self.texts[i] for i in batch], value=0, side="right", device=device)
            mask = pad([[1] * lengths[i] for i in batch], value=0, side="right", device=device)
            read = model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
            for rows in read.last_hidden_state[mask.bool()].split(HEAD_ROWS):
                yield head(rows).float().log_softmax(-1).cpu()


def left_float(model, targets: list[str], absmax: dict[str, Tensor], probe: Probe) -> list[dict]:
    """The divergence as quantized, and with some Linears left float.

    One kind of Linear after the other, and the two whose input one channel rules most.

    Args:
        model: quantized by `compression.quantize_`, not saved yet; left as it was.
        targets: names of its quantized Linears.
        absmax: Linear name to (in_features,) calibrated maxima of its input.
    """
    choices = [("nothing", [])]
    for kind in dict.fromkeys(name.rpartition(".")[2] for name in targets):
        choices.append((f"every {kind}", [n for n in targets if n.endswith(f".{kind}")]))
    ruled = sorted(targets, key=lambda n: -_ruled(absmax[n]))[:2]
    choices.append((" and ".join(ruled), ruled))
    rows = []
    for label, names in Bar(choices, desc="leaving Linears float", unit="probe"):
        with _unquantized(model, names), simulated_by_onednn(model):
            rows.append({"float": label, "linears": len(names), **probe.divergence(model)})
    return rows


def _ruled(absmax: Tensor) -> float:
    """How far the largest channel stands above the median one."""
    return (absmax.max() / absmax.median().clamp(min=1e-12)).item()


@contextmanager
def _unquantized(model, names: list[str]) -> Iterator[None]:
    modules = [model.get_submodule(name) for name in names]
    for module in modules:
        module.quantization_enabled = False
    try:
        yield
    finally:
        for module in modules:
            module.quantization_enabled = True
