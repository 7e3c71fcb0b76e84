"""transformers' own model of a folder, one sequence at a time, with nothing of this engine.

Used for float variants: whole models in int8 cannot be compared (`playback`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.evaluation.linear_files import LinearFiles


class FreshModel:
    """A float variant as transformers loads it, with the attention it spells out in full."""

    def __init__(self, files: LinearFiles, device):
        self.model = AutoModelForCausalLM.from_pretrained(
            files.folder,
            dtype=files.dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
        )
        self.model = self.model.to(device).eval()

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
        """(places, vocabulary) float32 logits of what follows some tokens of one sequence."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        keep = torch.tensor(list(places), device=self.model.device)
        output = self.model(input_ids=ids, use_cache=False, logits_to_keep=keep)
        return output.logits[0].float().cpu()

    @torch.no_grad()
    def shake_(self) -> None:
        """Put every weight off by one rounding of its type, up or down by a seeded coin.

        What that does to a log-probability is as much as two correct programs may differ by.
        """
        generator = torch.Generator().manual_seed(1)
        for weight in self.model.parameters():
            eps = torch.finfo(weight.dtype).eps
            for rows in weight.split(8192):
                coin = torch.randint(0, 2, rows.shape, generator=generator, dtype=torch.int8)
                rows.mul_((1 + eps * (2 * coin - 1).float()).to(rows))
