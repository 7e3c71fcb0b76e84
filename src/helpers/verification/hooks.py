"""What a model's Linears are given, and what the model answers, on a few real texts."""

from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from helpers.core.architectures import architecture
from helpers.runtime.moe_experts import every_expert_reads


@torch.inference_mode()
def logits_of(model, items: list[list[int]]) -> list[Tensor]:
    """Float32 logits of each item read alone: (tokens, vocabulary)."""
    logits = []
    for tokens in items:
        ids = torch.tensor([tokens], device=model.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits.append(model.get_output_embeddings()(hidden).float().cpu())
    return logits


@torch.inference_mode()
def capture_inputs(model, names: Iterable[str], tokens: list[int]) -> dict[str, Tensor]:
    """Module name to its input on one text, in the original shape.

    In a mixture every expert reads every token, so that each expert has an input.
    """
    inputs: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda _module, args: inputs.__setitem__(name, args[0].detach())

    handles = [model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in names]
    with every_expert_reads(model):
        logits_of(model, [tokens])
    for handle in handles:
        handle.remove()
    return inputs


@torch.inference_mode()
def input_maxima(model, items: list[list[int]]) -> dict[str, Tensor]:
    """Linear name to (in_features,) abs-max of its inputs, each item read alone."""
    maxima: dict[str, Tensor] = {}

    def observe(name: str):
        def keep(_module, args: tuple) -> None:
            top = args[0].float().abs().flatten(0, -2).amax(0).cpu()
            maxima[name] = torch.maximum(maxima[name], top) if name in maxima else top

        return keep

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_pre_hook(observe(n)) for n, m in linears]
    try:
        with every_expert_reads(model):
            for tokens in items:
                ids = torch.tensor([tokens], device=model.device)
                model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return maxima


@contextmanager
def first_block_only(model):
    """Inside, the model has only its first decoder block."""
    parent, _, name = architecture(model.config).blocks.rpartition(".")
    holder = model.get_submodule(parent)
    blocks = getattr(holder, name)
    setattr(holder, name, blocks[:1])
    try:
        yield
    finally:
        setattr(holder, name, blocks)
