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
    """All experts of a block, asked for the tokens that the router sends them.

    `every_token` lets each expert read all tokens, so that a look at the inputs of its
    Linears does not depend on whom the router chose; the answer stays the same.
    """

    def __init__(self, config):
        super().__init__([Expert(config) for _ in range(config.num_experts)])
        self.every_token = False

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Σ share · expert(x) over the chosen experts of each token.

        Args:
            x: (tokens, hidden).
            chosen: (tokens, k) indices of experts.
            shares: (tokens, k) their weights.
        """
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self):
            tokens, place = torch.where(chosen == index)
            if self.every_token:
                answers = expert(x)[tokens]
            elif len(tokens):
                answers = _expert_outputs(expert, x, tokens)
            else:
                continue
            weighted = answers * shares[tokens, place, None]
            mixed.index_add_(0, tokens, weighted.to(mixed.dtype))
        return mixed


class _LinearExpertsFactory:
    """Takes the name of transformers' class and makes ours; nothing is an instance of it,
    so that transformers does not initialize our experts as if they were its own."""

    def __new__(cls, config):
        return LinearExperts(config)


def _expert_outputs(expert: Expert, x: Tensor, tokens: Tensor) -> Tensor:
    """The expert's answers to some tokens, the same however many they are.

    Few are made more, since products of few rows sum otherwise; and whose they are is
    told, since one dynamic scale a tensor is one a text.
    """
    count = len(tokens)
    if count < FEWEST_ROWS:
        tokens = torch.cat([tokens, tokens[-1:].expand(FEWEST_ROWS - count)])
    owners = current_sequence_ids(tokens.device)
    with use_sequence_ids(None if owners is None else owners[tokens]):
        return expert(x[tokens])[:count]


@contextmanager
def linear_experts(config):
    """Models of this configuration made or loaded inside have `LinearExperts`.

    Without experts nothing changes. The names in the files are then those of the
    modules, and nothing has to be stacked on the way in or unstacked on the way out.
    """
    known = architecture(config)
    if not known.experts:
        yield
        return
    module, _, stacked_class = known.experts.rpartition(".")
    modeling = import_module(module)
    stacked, stacking = (
        getattr(modeling, stacked_class),
        get_checkpoint_conversion_mapping(known.name),
    )
    setattr(modeling, stacked_class, _LinearExpertsFactory)
    register_checkpoint_conversion_mapping(known.name, [], overwrite=True)
    try:
        yield
    finally:
        setattr(modeling, stacked_class, stacked)
        register_checkpoint_conversion_mapping(known.name, stacking, overwrite=True)


@contextmanager
def every_expert_reads(model):
    """Inside, every expert of the model reads every token."""
    mixtures = [m for m in model.modules() if isinstance(m, LinearExperts)]
    for mixture in mixtures:
        mixture.every_token = True
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.every_token = False
