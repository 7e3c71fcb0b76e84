"""transformers' own model of a folder, one sequence at a time, with nothing of this engine.

Used for float variants: whole models in int8 cannot be compared (`playback`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.core.gates import largest
from helpers.evaluation.checks.float64_linears import LinearFiles
from helpers.evaluation.checks.rounding_bounds import Comparison, rms

PERTURBED_ROWS = 8192  # rows of a weight in one step


@dataclass(frozen=True)
class Reading:
    """A text to read again, and the engine's result for it.

    Attributes:
        compared: collects the differences.
        where: a name of the text for messages.
        text: token ids.
        places: indices whose next token is predicted.
        targets: these next tokens; None for generated text, which takes the likeliest.
        engine: the summed log-probability of the targets, or the prediction's row.
        option: index among its item's options, if the text ends with one.
    """

    compared: Comparison
    where: str
    text: list[int]
    places: list[int]
    targets: list[int] | None
    engine: float | dict
    option: int | None = None


class FreshModel:
    """A float variant as transformers loads it, with its eager attention."""

    def __init__(self, files: LinearFiles, device):
        model = AutoModelForCausalLM.from_pretrained(
            files.folder,
            dtype=files.dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
        )
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def logits(self, text: Sequence[int], places: Sequence[int]) -> Tensor:
        """(places, vocabulary) float32 next-token logits at some places of one sequence."""
        ids = torch.tensor([list(text)], device=self.model.device)
        keep = torch.tensor(list(places), device=self.model.device)
        output = self.model(input_ids=ids, use_cache=False, logits_to_keep=keep)
        return output.logits[0].float().cpu()

    @torch.no_grad()
    def shake_(self) -> None:
        """Move every weight by one rounding of its type, up or down at random with a fixed seed.

        Two correct programs may differ by as much as that changes a log-probability.
        """
        generator = torch.Generator().manual_seed(1)
        for weight in self.model.parameters():
            eps = torch.finfo(weight.dtype).eps
            for rows in weight.split(PERTURBED_ROWS):
                signs = torch.randint(0, 2, rows.shape, generator=generator, dtype=torch.int8)
                rows.mul_((1 + eps * (2 * signs - 1).float()).to(rows))


def read_whole(
    readings: list[Reading], files: LinearFiles, device
) -> tuple[list[Tensor], float, float]:
    """Read every text with transformers' own model, and measure the effect of rounding.

    Returns:
        logits of each reading; the root mean square and the maximum of the logit changes that
        one rounding of every weight causes, over one scored text of every kind.
    """
    fresh = FreshModel(files, device)
    logits = [fresh.logits(r.text, r.places) for r in readings]
    fresh.shake_()
    rms_change = largest_change = 0.0
    for index in _one_of_each_kind(readings):
        difference = fresh.logits(readings[index].text, readings[index].places) - logits[index]
        rms_change = largest((rms_change, rms(difference)))
        largest_change = largest((largest_change, float(difference.abs().max())))
    return logits, rms_change, largest_change


def _one_of_each_kind(readings: list[Reading]) -> list[int]:
    """Index of the first scored text of every kind; 0 if none is scored."""
    first: dict[int, int] = {}
    for index, reading in enumerate(readings):
        if reading.targets is not None:
            first.setdefault(id(reading.compared), index)
    return list(first.values()) or [0]
