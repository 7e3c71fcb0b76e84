"""Part 8: out of memory, the batch is halved once and one line says what to set."""

import warnings

import torch

from benchmarks.gpu import full_size
from benchmarks.gpu.part import Part
from helpers.core.errors import StudyError
from helpers.evaluation.engine import evaluate
from helpers.sources.models import load_tokenizer, random_model, random_model_folder
from helpers.sources.sampling import load_items
from helpers.study.loading import load_study
from helpers.study.schema import Batch

# The items are 20,094 tokens: the whole batch has to be full, else half of it has no half of them.
LIMITS = Batch(tokens=20480, rows=64)
DRY_LIMITS = Batch(tokens=2048, rows=64)
WIDE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32}
WIDE |= {"num_key_value_heads": 8, "head_dim": 64}
# Of what a whole batch takes over the model: what a half fits in, and what it does not.
ENOUGH, TOO_LITTLE = 0.75, 0.25


def run(part: Part) -> None:
    """Evaluate the same items with memory for a whole batch, for half a batch, and for less."""
    full_size.scratch()
    study = load_study("smoke")
    wanted = study.evaluation.datasets["arc"]
    tokenizer = load_tokenizer(
        random_model_folder("qwen3", size="tiny", seed=1), enable_thinking=None
    )
    items = load_items(wanted.source, adapter=wanted.adapter)[: 24 if part.dry else 200]
    model = random_model("qwen3", seed=1, **({} if part.dry else WIDE)).to(part.device)
    limits = DRY_LIMITS if part.dry else LIMITS
    room = Room(part, model)
    asked = lambda: list(evaluate(model, tokenizer, items, wanted, limits=limits))  # noqa: E731
    whole = room.whole(asked)
    part.note("share of the batch's tokens in its longest pass", room.longest / limits.tokens)
    for name, share in (("room for half a batch", ENOUGH), ("too little room", TOO_LITTLE)):
        with warnings.catch_warnings(record=True) as told, room.only(share):
            warnings.simplefilter("always")
            try:
                found = asked()
                outcome = f"{len(found)} of {len(whole)} items answered"
            except StudyError as error:
                outcome = str(error)
        said = [str(w.message) for w in told if "out of memory" in str(w.message)]
        part.note(name, {"said": said, "outcome": outcome})


class Room:
    """The memory limit of a batch: bytes of the card, or tokens of a pass in a dry run."""

    def __init__(self, part: Part, model):
        self.part, self.model, self.most = part, model, None
        self.longest = 0
        model.base_model.register_forward_pre_hook(self._watch, with_kwargs=True)

    def _watch(self, _module, _args, kwargs) -> None:
        tokens = kwargs["input_ids"].numel()
        self.longest = max(self.longest, tokens)
        if self.part.dry and self.most is not None and tokens > self.most:
            raise torch.OutOfMemoryError("dry run")

    def whole(self, ask):
        """The answers without a limit; the memory they took is stored."""
        self.part.forget_peak()
        before = 0 if self.part.dry else torch.cuda.memory_allocated()
        answers = ask()
        self.before = before
        self.took = self.longest if self.part.dry else torch.cuda.max_memory_allocated() - before
        return answers

    def only(self, share: float):
        """Inside, a batch may use this share of the memory of a whole one."""
        return _Limited(self, share)


class _Limited:
    def __init__(self, room: Room, share: float):
        self.room, self.share = room, share

    def __enter__(self):
        room = self.room
        if room.part.dry:
            room.most = room.took * self.share
            return
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        allowed = room.before + self.share * room.took
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))

    def __exit__(self, *_error):
        self.room.most = None
        if not self.room.part.dry:
            torch.cuda.set_per_process_memory_fraction(1.0)
