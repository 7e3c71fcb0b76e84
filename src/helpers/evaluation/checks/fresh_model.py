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

SHAKEN_ROWS = 8192  # of a weight at a time


@dataclass(frozen=True)
class Reading:
    """A text to be read, and what the engine said of it.

    Attributes:
        compared: where differences go.
        where: what it is, in words.
        text: token ids.
        places: after which of them a next token is asked for.
        targets: these next tokens; None where the likeliest were written.
        engine: the summed log-probability of the targets, or the row of what was written.
        option: which of its item's options it is, if it is one.
    """

    compared: Comparison
    where: str
    text: list[int]
    places: list[int]
    targets: list[int] | None
    engine: float | dict
    option: int | None = None


class FreshModel:
    """A float variant as transformers loads it, with the attention it spells out in full."""

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
        """(places, vocabulary) float32 logits of what follows some tokens of one sequence."""
        ids = torch.tensor([list(text)], device=self.model.device)
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
            for rows in weight.split(SHAKEN_ROWS):
                coin = torch.randint(0, 2, rows.shape, generator=generator, dtype=torch.int8)
                rows.mul_((1 + eps * (2 * coin - 1).float()).to(rows))


def read_whole(
    readings: list[Reading], files: LinearFiles, device
) -> tuple[list[Tensor], float, float]:
    """Every text read by transformers' own model, and how far rounding goes in it.

    Returns:
        logits of each reading; the root mean square, and the most, of what one rounding of
        every weight changes a logit by, in a scored text of every kind.
    """
    fresh = FreshModel(files, device)
    logits = [fresh.logits(r.text, r.places) for r in readings]
    fresh.shake_()
    mean = most = 0.0
    for index in _one_of_each(readings):
        change = fresh.logits(readings[index].text, readings[index].places) - logits[index]
        mean = largest((mean, rms(change)))
        most = largest((most, float(change.abs().max())))
    return logits, mean, most


def _one_of_each(readings: list[Reading]) -> list[int]:
    """The first scored text of every kind; the first of all where none is scored."""
    first: dict[int, int] = {}
    for index, reading in enumerate(readings):
        if reading.targets is not None:
            first.setdefault(id(reading.compared), index)
    return list(first.values()) or [0]
