"""How far a model's next-token distributions are from the float model's, on a few texts.

A quick look for choices and explanations inside the quantization; what counts is
measured in the evaluation, on other texts. Also answers what the loss would be if some
Linears were left float.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

HEAD_ROWS = 64  # tokens whose whole vocabulary is looked at at once


class Probe:
    """The float model's log-probabilities on a few texts.

    Args:
        model: the float model.
        texts: token ids; each is read alone.
    """

    def __init__(self, model, texts: list[list[int]]):
        self.texts = texts
        self.expected = list(_logprobs(model, texts))

    def divergence(self, model) -> dict[str, float]:
        """KL(float ‖ model) in nats a token, and the share of tokens with the same top-1."""
        kl, same, tokens = 0.0, 0, 0
        for expected, found in zip(self.expected, _logprobs(model, self.texts), strict=True):
            kl += (expected.exp() * (expected - found)).sum(dtype=torch.float64).item()
            same += int((expected.argmax(-1) == found.argmax(-1)).sum())
            tokens += len(found)
        return {"kl": kl / tokens, "top1_agreement": same / tokens}


@torch.inference_mode()
def _logprobs(model, texts: list[list[int]]) -> Iterator[Tensor]:
    """(some tokens, vocabulary) log-probabilities, text after text, a few tokens at a time."""
    head = model.get_output_embeddings()
    for tokens in texts:
        ids = torch.tensor([tokens], device=model.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        for rows in hidden.split(HEAD_ROWS):
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
    for label, names in choices:
        with _unquantized(model, names):
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
