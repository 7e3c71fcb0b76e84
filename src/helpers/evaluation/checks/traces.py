"""What a model computes for one text asked alone: states of some layers, token by token.

Hooks copy what goes into a few decoder layers and into and out of each of their Linears. The
rows of a text are then looked for by its token ids, wherever the engine computed them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from helpers.core.architectures import HEAD, architecture, linear_names

FINAL = "final norm"  # the head's input
INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class Layers:
    """Module names of a decoder.

    Attributes:
        blocks: names of the decoder layers, in order.
        played: by layer, the modules whose outputs can be played back: its Linears or, in a
            mixture, the experts as a whole.
    """

    blocks: list[str]
    played: list[list[str]]

    @classmethod
    def from_config(cls, config) -> "Layers":
        known = architecture(config)
        blocks = [f"{known.blocks}.{i}" for i in range(config.num_hidden_layers)]
        names = [n.split(".experts.")[0] + ".experts" if ".experts." in n else n
                 for n in linear_names(config) if n != HEAD]  # fmt: skip
        names = list(dict.fromkeys(names))
        return cls(blocks, [[n for n in names if n.startswith(f"{b}.")] for b in blocks])


@dataclass
class Trace:
    """The rows of all passes of one text, one per token, in the order of computation.

    Attributes:
        layers: indices of the traced decoder layers.
        ids: token id of each row.
        decoding: whether a row was computed alone, after earlier passes.
        states: (module, INPUT or OUTPUT) → (rows, features).
        errors: reasons why rows could not be stored.
    """

    layers: list[int]
    ids: list[int] = field(default_factory=list)
    decoding: list[bool] = field(default_factory=list)
    parts: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @cached_property
    def states(self) -> dict[tuple[str, str], Tensor]:
        return {key: torch.cat(parts) for key, parts in self.parts.items()}

    def written(self) -> list[int]:
        """Indices of the rows that were decoded one token at a time, in order."""
        return [row for row, decoding in enumerate(self.decoding) if decoding]

    def rows_of(self, tokens: Sequence[int], *, last: bool = False) -> list[int] | None:
        """Row indices of a text that was read in one piece; None if it was not.

        Args:
            last: the rows of its last reading; else of its first.
        """
        size, tokens = len(tokens), list(tokens)
        starts = range(len(self.ids) - size + 1)
        for start in reversed(starts) if last else starts:
            if self.ids[start : start + size] == tokens and not any(
                self.decoding[start : start + size]
            ):
                return list(range(start, start + size))
        return None

    def rows_of_option(
        self, context: Sequence[int], options: Sequence[Sequence[int]], k: int
    ) -> list[int] | None:
        """Row indices of a context and its k-th option, without the option's last token.

        All options may follow one context in a single pass, one after the other.
        """
        tails = [list(option[:-1]) for option in options]
        whole = self.rows_of([*context, *(token for tail in tails for token in tail)])
        if whole is None:
            return self.rows_of([*context, *tails[k]])
        begin = len(context) + sum(map(len, tails[:k]))
        return whole[: len(context)] + whole[begin : begin + len(tails[k])]


@contextmanager
def traced(model: nn.Module, layers: Layers, chosen: Sequence[int]) -> Iterator[Trace]:
    """Inside, the caller asks one text, and the chosen layers' inputs and outputs are stored."""
    trace = Trace(list(chosen))
    one_row = [False]

    def guarded(step) -> Callable:
        def hook(*args) -> None:
            try:
                step(*args)
            except Exception as error:  # tracing must not stop the evaluation
                trace.errors.append(f"{type(error).__name__}: {error}")

        return hook

    def begin(_module, args, kwargs) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None).reshape(-1)
        slots = "packed" in kwargs and not hasattr(kwargs["packed"], "spans")
        one_row[0] = slots or len(ids) == 1
        kept_ids = ids[:1] if one_row[0] else ids
        trace.ids += kept_ids.tolist()
        trace.decoding += [one_row[0]] * len(kept_ids)

    def keep(key, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        rows = rows[:1] if one_row[0] else rows
        trace.parts.setdefault(key, []).append(rows.to("cpu", copy=True))

    def keep_input(name: str, _module, args, kwargs) -> None:
        keep((name, INPUT), args[0] if args else kwargs["hidden_states"])

    def keep_output(name: str, _module, _args, output) -> None:
        keep((name, OUTPUT), output[0] if isinstance(output, tuple) else output)

    def keep_final(_module, _args, output) -> None:
        keep((FINAL, OUTPUT), output.last_hidden_state)

    hooks = [
        model.base_model.register_forward_pre_hook(guarded(begin), with_kwargs=True),
        model.base_model.register_forward_hook(guarded(keep_final)),
    ]
    modules = [n for i in chosen for n in (layers.blocks[i], *layers.played[i])]
    for name in modules:
        module = model.get_submodule(name)
        hook = guarded(partial(keep_input, name))
        hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    for name in dict.fromkeys([*modules, layers.blocks[-1]]):
        hooks.append(
            model.get_submodule(name).register_forward_hook(guarded(partial(keep_output, name)))
        )
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()
