"""The experts of a mixture, each with three Linears of its own, as the files have them.

transformers stacks the experts of a block into two three-dimensional tensors, which no
quantizer of Linears sees and into which int8 weights cannot be loaded back. On disk,
before and after, every expert has its own gate, up and down; here it has them in memory
too. The function is that of the stacked experts (tests/test_experts.py).
"""

from contextlib import contextmanager
from importlib import import_module

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from helpers.core.architectures import architecture
from helpers.runtime.batching import FEWEST_ROWS, current_sequence_ids, use_sequence_ids


class Expert(nn.Module):
    """One gated MLP: down(act(gate(x)) · up(x))."""

    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LinearExperts(nn.ModuleList):
    """All experts of a block, each applied to the tokens that the router assigns to it.

    With `every_token` each expert reads all tokens, so that statistics of the inputs of its
    Linears do not depend on the router; the output stays the same.

    llm-compressor replaces experts by Linears too, but does not keep an output bit-equal for
    any number of tokens, which batch invariance needs.
    """

    def __init__(self, config):
        super().__init__([Expert(config) for _ in range(config.num_experts)])
        self.every_token = False

    def forward(self, x: Tensor, expert_indices: Tensor, weights: Tensor) -> Tensor:
        """Σ weight · expert(x) over the selected experts of each token.

        Args:
            x: (tokens, hidden).
            expert_indices: (tokens, k) the experts of each token.
            weights: (tokens, k) their weights.
        """
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self):
            tokens, slot = torch.where(expert_indices == index)
            if self.every_token:
                outputs = expert(x)[tokens]
            elif len(tokens):
                outputs = _expert_outputs(expert, x, tokens)
            else:
                continue
            weighted = outputs * weights[tokens, slot, None]
            mixed.index_add_(0, tokens, weighted.to(mixed.dtype))
        return mixed


class _LinearExpertsFactory:
    """Stands in for transformers' class and makes `LinearExperts`.

    Nothing is an instance of it, so transformers does not initialize our experts as its own.
    """

    def __new__(cls, config):
        return LinearExperts(config)


def _expert_outputs(expert: Expert, x: Tensor, tokens: Tensor) -> Tensor:
    """The expert's outputs for some tokens, independent of their number.

    Fewer than FEWEST_ROWS tokens are padded, since products of few rows sum in another order.
    The sequence ids go along, since a dynamic scale per tensor is one per text.
    """
    count = len(tokens)
    if count < FEWEST_ROWS:
        tokens = torch.cat([tokens, tokens[-1:].expand(FEWEST_ROWS - count)])
    sequence_ids = current_sequence_ids(tokens.device)
    with use_sequence_ids(None if sequence_ids is None else sequence_ids[tokens]):
        return expert(x[tokens])[:count]


@contextmanager
def linear_experts(config):
    """Inside the context, models of this configuration are built with `LinearExperts`.

    A family without experts is unchanged. Tensor names in the files then equal those of the
    modules, so nothing is stacked on loading or unstacked on saving.
    """
    entry = architecture(config)
    if not entry.experts:
        yield
        return
    module, _, stacked_class = entry.experts.rpartition(".")
    modeling = import_module(module)
    stacked_experts, conversion = (
        getattr(modeling, stacked_class),
        get_checkpoint_conversion_mapping(entry.name),
    )
    setattr(modeling, stacked_class, _LinearExpertsFactory)
    register_checkpoint_conversion_mapping(entry.name, [], overwrite=True)
    try:
        yield
    finally:
        setattr(modeling, stacked_class, stacked_experts)
        register_checkpoint_conversion_mapping(entry.name, conversion, overwrite=True)


@contextmanager
def every_expert_reads(model):
    """Inside the context, every expert of the model reads every token."""
    mixtures = [m for m in model.modules() if isinstance(m, LinearExperts)]
    for mixture in mixtures:
        mixture.every_token = True
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.every_token = False
