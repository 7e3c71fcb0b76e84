"""Discovery: the smoothing groups of a configuration, found and proved on a tiny twin.

Hooks see which norm's output is the input of which Linears: the two share their memory. Whether
scales can be folded there is then tried: the norm is divided by random scales, all that read it are
multiplied, and the logits in float64 must not move. A norm of (1 + w) shows itself by the form that
keeps them. A Linear that feeds another (values to the output, up to down) is found the same way,
among the Linears of the same part of the block. Nothing is known of a family in advance.

A module that lets one token change another's output is attention; the rest of a block is its MLP.
Later gates check the groups on the real weights (`smoothing preserves the logits`).
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from helpers.core.architectures import EXPERT, HEAD, Architecture, Logits, Norm, Place
from helpers.core.errors import StudyError
from helpers.core.files import cache_root, write_atomically
from helpers.core.records import canonical_json, sha256_file, sha256_text
from helpers.runtime import twins
from helpers.runtime.devices import as_plain_linears, experts_as_linears
from helpers.runtime.twins import SAME, Flow, Twin, change

DIFFERENT = 1e-3  # least change of logits if only the producer is divided
OFFSETS = (0.0, 1.0)  # of a norm's weight
MIXED = 1e-8  # least relative change of a token's output that another token's input makes
BLOCK = re.compile(r"^(.*?)\.(\d+)\.")
ONE_EXPERT = re.compile(r"(\.experts)\.\d+\.")
HEAD_COUNTS = ("num_attention_heads", "num_key_value_heads")
ONE_VALUE_A_HEAD = (
    "as many key/value heads as heads, since a shared value channel feeds several heads; here "
    "are {config.num_key_value_heads} and {config.num_attention_heads}"
)
ACTIVATIONS = ("hidden_act", "activation_function", "hidden_activation", "activation")


def architecture(config) -> Architecture:
    """The architecture of a model's configuration, discovered once and kept.

    Raises:
        StudyError: it is no causal language model that can be studied; the message says why.
    """
    result = _architecture(ConfigKey(config))
    if isinstance(result, str):
        raise StudyError(f"architecture {config.model_type!r} cannot be studied: {result}")
    return result


def places(config) -> list[Place]:
    """Every place of every block, experts expanded, in block order."""
    experts = twins.expert_count(config)
    return [one for place in architecture(config).places for one in _expanded(place, experts)]


def linear_names(config) -> list[str]:
    """Names of every Linear the architecture has, block by block, and the head last."""
    return [name for place in places(config) for name in place.consumers] + [HEAD]


def float_matrices(config) -> list[str]:
    """Names of the modules whose matrices are not Linears: lookup tables, routers, others."""
    known = architecture(config)
    return [*known.embeddings, *known.matrices]


def block_names(config) -> list[str]:
    """Names of the decoder's blocks, in order."""
    blocks = architecture(config).blocks
    matches = [match for match in map(BLOCK.match, linear_names(config)) if match]
    return list(dict.fromkeys(match[0][:-1] for match in matches if match[1] == blocks))


_LOGITS: WeakKeyDictionary[nn.Module, Logits] = WeakKeyDictionary()


def head_logits(model, hidden: Tensor) -> Tensor:
    """(rows, vocabulary) logits of (rows, hidden) last states, in the head's type."""
    if model not in _LOGITS:
        _LOGITS[model] = architecture(model.config).logits
    return _formed(model.get_output_embeddings()(hidden), _LOGITS[model])


def _formed(products: Tensor, logits: Logits) -> Tensor:
    if logits.scale != 1.0:
        products = products * logits.scale
    return products if logits.cap is None else torch.tanh(products / logits.cap) * logits.cap


@contextmanager
def linear_experts(config) -> Iterator[None]:
    """Inside the context, models of this configuration are built with plain Linears.

    That is, with `LinearExperts`, and without classes that only compute what a Linear computes.
    """
    known = architecture(config)
    with as_plain_linears(known.plain), experts_as_linears(config.model_type, known.experts):
        yield


def _expanded(place: Place, experts: int) -> list[Place]:
    """A place for each expert if its producer is one's; else all experts read one producer."""

    def names(patterns: Iterable[str], indices: Iterable[int]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p.replace(EXPERT, str(e)) for e in indices for p in patterns))

    if EXPERT not in "".join((place.producer, *place.consumers)):
        return [place]
    separate = all(EXPERT in name for name in (place.producer or EXPERT, *place.consumers))
    return [
        replace(
            place,
            producer=place.producer.replace(EXPERT, str(indices[0])),
            consumers=names(place.consumers, indices),
        )
        for indices in ([(e,) for e in range(experts)] if separate else [range(experts)])
    ]


class ConfigKey:
    """A configuration as a cache key: equal if all its settings are equal."""

    def __init__(self, config):
        self.config, self.text = config, config.to_json_string(use_diff=False)

    def __eq__(self, other) -> bool:
        return self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Hash of what a discovery depends on beside the configuration: code, torch, transformers."""
    own = [sha256_file(Path(module)) for module in (__file__, twins.__file__)]
    return sha256_text(" ".join((*own, torch.__version__, version("transformers"))))


@lru_cache(maxsize=64)
def _architecture(same: ConfigKey) -> Architecture | str:
    """The architecture of a configuration, or why there is none; kept on disk by its twin."""
    try:
        config = twins.twin_config(same.config)
    except StudyError as error:
        return str(error)
    key = source_hash() + ConfigKey(config).text
    path = cache_root() / "architectures" / f"{sha256_text(key)[:20]}.json"
    if (stored := _stored(path)) is not None:
        return stored
    try:
        result = discover(config)
    except StudyError as error:
        result = str(error)
    content = {"refusal": result} if isinstance(result, str) else asdict(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda p: p.write_text(canonical_json(content), "utf-8"))
    return result


def _stored(path: Path) -> Architecture | str | None:
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if "refusal" in content:
        return content["refusal"]
    classes = {"places": Place, "norms": Norm}
    for name, value in content.items():
        if name == "logits":
            value = Logits(**value)
        elif name in classes:
            value = [classes[name](**_with_tuples(row)) for row in value]
        content[name] = tuple(value) if isinstance(value, list) else value
    return Architecture(**content)


def _with_tuples(row: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


def discover(config) -> Architecture:
    """The architecture of a twin's configuration.

    Raises:
        StudyError: no twin can be built, or the model is none that can be studied.
    """
    twin = Twin(config)
    model = twin.model
    logits = _check_form(twin)
    flow = twin.flow()
    _check_linears(twin, flow)
    _check_names(config, twin)
    blocks = _blocks(flow.linears)
    every_place = Search(twin, flow).places
    linears = {*flow.linears, HEAD}
    matrices = {
        name.removesuffix(".weight")
        for name, tensor in model.state_dict().items()
        if tensor.ndim > 1 and name.removesuffix(".weight") not in linears
    }
    table = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    embeddings = [n for n in sorted(matrices) if _is_embedding(model, n) and n != table]
    return Architecture(
        name=config.model_type,
        blocks=blocks,
        embeddings=(table, *embeddings),
        matrices=tuple(sorted(matrices - {table, *embeddings})),
        experts=twin.experts,
        plain=tuple(twin.plain),
        logits=logits,
        norms=tuple(twin.norms(flow)),
        places=tuple(every_place),
    )


def _is_embedding(model, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name), nn.Embedding)
    except AttributeError:
        return False


def _check_form(twin: Twin) -> Logits:
    """Check what this project takes for granted of every model.

    Returns:
        what becomes of the head's products.

    Raises:
        StudyError: the head has another name, logits do not follow from its products, or a token's
            logits depend on later tokens.
    """
    model, head = twin.model, twin.model.get_output_embeddings()
    name = next((n for n, m in model.named_modules() if m is head), None)
    if name != HEAD:
        raise StudyError(f"its head is {name!r}, and only {HEAD!r} is known here")
    with torch.no_grad():
        output = model.base_model(input_ids=twin.ids, use_cache=False)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise StudyError("its decoder returns no last hidden state")
    with torch.no_grad():
        products = head(hidden)[0]
    logits = min(_forms(model.config), key=lambda f: change(_formed(products, f), twin.logits))
    if change(products, twin.logits) <= SAME:
        logits = Logits()
    elif change(_formed(products, logits), twin.logits) > SAME:
        raise StudyError("its logits are not the product of head and last hidden state")
    if not torch.isfinite(twin.logits).all():
        raise StudyError("its tiny twin gives no finite logits")
    changed = twin.ids.clone()
    changed[0, -1] = 3 if changed[0, -1] != 3 else 4
    if change(twin.read(changed)[:-1], twin.logits[:-1]) > SAME:
        raise StudyError("a token's logits depend on later tokens: it is no causal model")
    return logits


def _forms(config) -> Iterator[Logits]:
    """The products scaled or capped by a number of the configuration."""
    yield Logits()
    settings = config.to_dict().values()
    numbers = dict.fromkeys(float(x) for x in settings if type(x) in (int, float) and x > 0)
    for number in numbers:
        yield from (Logits(scale=1 / number), Logits(scale=number), Logits(cap=number))


def _check_linears(twin: Twin, flow: Flow) -> None:
    """Check that there are Linears that can be replaced by ones in int8.

    A Linear of a class of its own stays float, and so does one that the model never calls or whose
    weight another module reads.

    Raises:
        StudyError: there is none but the head.
    """
    if flow.linears:
        return
    others = {type(m).__name__ for m in twin.model.modules() if isinstance(m, nn.Linear)}
    if others := sorted(others - {nn.Linear.__name__}):
        raise StudyError(f"its Linears are {others[0]}s; only plain Linears are saved as int8")
    raise StudyError("it has no Linear but its head (transformers' Conv1D is none)")


def _check_names(config, twin: Twin) -> None:
    """Check that each tensor of a saved model is one of its modules', whatever its name there.

    A model whose experts transformers stacks is saved by transformers too, and must give the same
    tensors under the same names.

    Raises:
        StudyError: transformers converts some tensors on loading.
    """
    with experts_as_linears(config.model_type, twin.experts):
        names = names_in_files(twin.model)
    if twin.stacked is None:
        return
    own = twin.model.state_dict()
    saved = revert_weight_conversion(twin.stacked, twin.stacked.state_dict())
    if others := [*sorted(saved.keys() - names.keys()), *sorted(names.keys() - saved.keys())]:
        raise StudyError(
            f"its files hold {others[0]}, which is no tensor of one Linear ({len(others)} in all)"
        )
    if others := sorted(n for n, tensor in saved.items() if not tensor.equal(own[names[n]])):
        raise StudyError(f"{others[0]} of its files is not the tensor that is read as such")


def names_in_files(model) -> dict[str, str]:
    """By each tensor's name in saved files, its name in the model, a tied head included.

    Args:
        model: built in `linear_experts`, and still inside.

    Raises:
        StudyError: transformers converts some tensors on loading.
    """
    state = model.state_dict()  # a tensor object for each name, tied or not
    own = {id(tensor): name for name, tensor in state.items()}
    stored = revert_weight_conversion(model, dict(state))
    if others := sorted(name for name, tensor in stored.items() if id(tensor) not in own):
        raise StudyError(
            f"its files hold {others[0]}, which transformers converts on loading ({len(others)} "
            "tensors in all), and tensors are compared with the files one by one"
        )
    return {name: own[id(tensor)] for name, tensor in stored.items()}


def _blocks(linears: list[str]) -> str:
    """Name of the list that holds the most Linears."""
    lists = [match[1] for match in map(BLOCK.match, linears) if match]
    if not lists:
        raise StudyError("its Linears lie in no list of blocks")
    return max(dict.fromkeys(lists), key=lists.count)


class Search:
    """The places of a twin: candidates from its flow, proofs by folding.

    Args:
        twin: as it was after every trial.
        flow: of the twin.
    """

    def __init__(self, twin: Twin, flow: Flow):
        self.twin, self.flow = twin, flow
        self._calls = {name: i for i, name in enumerate(flow.linears)}
        self._makes: dict[str, str] = {}
        self._mixing: dict[str, bool] = {}
        self._proofs: dict[tuple, tuple[float | None, str]] = {}
        self._producers: dict[str, str] = {}
        behind_norms = {name for names in flow.readers.values() for name in names}
        others = [name for name in flow.linears if name not in behind_norms]
        every_place = [*self._norm_places(), *map(self._linear_place, others)]
        every_place.sort(key=lambda place: self._calls[place.consumers[0]])
        self._prove_together(every_place)
        self.places = _for_all_experts(every_place)

    def _norm_places(self) -> Iterator[Place]:
        """A place for each norm that Linears read; two targets if it feeds both parts."""
        for norm, consumers in self.flow.readers.items():
            consumers = tuple(dict.fromkeys(consumers))
            routers = tuple(dict.fromkeys(self.flow.routers.get(norm, ())))
            targets = sorted({self._norm_target(norm, name) for name in consumers})
            place = Place(targets[0], norm, consumers, routers, also="".join(targets[1:2]))
            if HEAD in routers:
                yield _refused(place, f"a norm that feeds Linears only; here {norm} feeds the head")
            else:
                yield self._proved(place, OFFSETS)

    def _norm_target(self, norm: str, consumer: str) -> str:
        """The target of a norm's consumer; behind a norm inside a part, its last Linear is out."""
        part, mixes = self._part(consumer), self._mixes(consumer)
        own_linears = [name for name in self.flow.linears if name.startswith(f"{part}.")]
        if norm.startswith(f"{part}.") and own_linears[-1:] == [consumer]:
            return "attention_output" if mixes else "mlp_down"
        return "attention_input" if mixes else "mlp_input"

    def _linear_place(self, consumer: str) -> Place:
        """The place of a Linear that no norm feeds: the first candidate with a proof."""
        target = "attention_output" if self._mixes(consumer) else "mlp_down"
        candidates, kind = self._candidates(consumer), self._kind(consumer)
        if kind not in self._producers:
            proved = (self._proved(Place(target, n, (consumer,)), OFFSETS[:1]) for n in candidates)
            self._producers[kind] = next((self._kind(p.producer) for p in proved if p.producer), "")
        producers = [n for n in candidates if self._kind(n) == self._producers[kind]]
        if producers:
            return Place(target, producers[-1], (consumer,))
        return _refused(Place(target, "", (consumer,)), self._condition(target, candidates))

    def _candidates(self, consumer: str) -> list[str]:
        """Earlier Linears of the same expert, or of the same half of the block, wide enough."""
        expert, width = ONE_EXPERT.search(consumer), self._module(consumer).in_features
        scope = consumer[: expert.end()] if expert else self._block(consumer)
        earlier = self.flow.linears[: self._calls[consumer]] if scope else []
        return [
            name
            for name in earlier
            if name.startswith(scope) and self._mixes(name) == self._mixes(consumer)
            if self._module(name).out_features >= width
        ]

    def _condition(self, target: str, candidates: list[str]) -> str:
        """What a Linear without a producer would need, as far as the configuration tells."""
        config = self.twin.model.config
        heads, key_heads = (getattr(config, name, None) for name in HEAD_COUNTS)
        if target == "attention_output" and key_heads and key_heads != heads:
            return ONE_VALUE_A_HEAD
        activation = next((n for n in ACTIVATIONS if getattr(config, n, None)), None)
        if target == "mlp_down" and candidates and activation:
            return f"an activation that commutes with scales; here is {{config.{activation}}}"
        return "a Linear before it whose channels reach it one by one; here is none"

    def _module(self, name: str) -> nn.Module:
        return self.twin.model.get_submodule(name)

    def _block(self, name: str) -> str:
        """`model.layers.3.` of a name in a block; empty outside."""
        match = BLOCK.match(name)
        return match[0] if match else ""

    def _kind(self, name: str) -> str:
        """The name without its block's and its expert's number, and the make of the block."""
        block = self._block(name)
        if block not in self._makes:
            modules = self._module(block[:-1]).named_modules() if block else ()
            make = "".join(f"{n}:{type(m).__name__} " for n, m in modules)
            self._makes[block] = sha256_text(make)
        return self._makes[block] + ONE_EXPERT.sub(rf"\1.{EXPERT}.", name.removeprefix(block))

    def _part(self, name: str) -> str:
        """The child of the block that holds a module, by its full name."""
        block = self._block(name)
        return block + name.removeprefix(block).split(".")[0]

    def _mixes(self, name: str) -> bool:
        """Whether the part of a module lets one token change another's output."""
        part = self._part(name)
        kind = self._kind(part)
        if kind not in self._mixing:
            self._mixing[kind] = bool(self._block(name)) and self._does_mix(self._module(part))
        return self._mixing[kind]

    def _does_mix(self, part: nn.Module) -> bool:
        """Whether the part's output at the last token follows its input at the one before."""
        if isinstance(part, nn.Linear):
            return False
        outputs: list[Tensor] = []

        def alter(_module, args: tuple, kwargs: dict):
            new_args, new_kwargs = list(args), dict(kwargs)
            places = [
                *((new_args, i) for i in range(len(args))),
                *((new_kwargs, k) for k in kwargs),
            ]
            holder, key = next((h, k) for h, k in places if isinstance(h[k], Tensor))
            holder[key] = holder[key].clone()
            holder[key][..., -2:-1, :] += 1.0
            return tuple(new_args), new_kwargs

        def keep(_module, _args, output) -> None:
            states = output[0] if isinstance(output, tuple) else output
            outputs.append(states.reshape(-1, states.shape[-1])[-1])

        with ExitStack() as hooks:
            hooks.callback(part.register_forward_hook(keep).remove)
            self.twin.read()
            hooks.callback(part.register_forward_pre_hook(alter, with_kwargs=True).remove)
            self.twin.read()
        return bool(outputs) and change(outputs[-1], outputs[0]) > MIXED

    def _proved(self, place: Place, offsets: tuple[float, ...]) -> Place:
        """The place with the offset that keeps the logits; without producer if none does.

        Equal places of equal blocks are tried once.
        """
        key = (self._kind(place.producer), *map(self._kind, place.consumers))
        if key not in self._proofs:
            self._proofs[key] = self._proof(place, offsets)
        offset, condition = self._proofs[key]
        return _refused(place, condition) if offset is None else replace(place, norm_offset=offset)

    def _proof(self, place: Place, offsets: tuple[float, ...]) -> tuple[float | None, str]:
        """(the offset that keeps the logits, empty) or (None, the condition that does not hold)."""
        changes, norm = [], place.producer
        for offset in offsets:
            with self._folded([replace(place, norm_offset=offset)]):
                changes.append(self.twin.moved())
            if changes[-1] < SAME:
                with self._folded([replace(place, norm_offset=offset, consumers=(), readers=())]):
                    depends = self.twin.moved() > DIFFERENT
                return (offset, "") if depends else (None, f"a part in the logits; {norm} has none")
        moved = f"{min(changes):.1g} of their size"
        return None, f"a norm that only its Linears read; scales in {norm} move logits by {moved}"

    def _prove_together(self, every_place: list[Place]) -> None:
        """Check that scales at all places at once keep the logits.

        Raises:
            StudyError: they do not.
        """
        with self._folded([place for place in every_place if place.producer]):
            if not self.twin.moved() < SAME:
                raise StudyError("scales folded at all its places at once change its logits")

    @contextmanager
    def _folded(self, chosen: list[Place]) -> Iterator[None]:
        """Inside, random scales are folded at the places."""
        names = dict.fromkeys(n for p in chosen for n in (p.producer, *p.consumers, *p.readers))
        state = {n: [p.clone() for p in self._module(n)._parameters.values() if p is not None]
                 for n in names}  # fmt: skip
        generator = torch.Generator().manual_seed(2)
        try:
            for place in chosen:
                reading = [self._module(name) for name in (*place.consumers, *place.readers)]
                _fold_(self._module(place.producer), reading, place.norm_offset, generator)
            yield
        finally:
            for name, values in state.items():
                own = [p for p in self._module(name)._parameters.values() if p is not None]
                for parameter, value in zip(own, values, strict=True):
                    parameter.copy_(value)


@torch.no_grad()
def _fold_(producer, reading: list[nn.Module], offset: float, generator: torch.Generator) -> None:
    """Divide a producer's last channels by random scales and multiply what reads them.

    Written out apart from `helpers.quantization.smoothing`, which is what it prepares.
    """
    weight = producer.weight
    width = reading[0].weight.shape[-1] if reading else len(weight)
    scales = torch.rand(width, generator=generator, dtype=torch.float64) * 1.5 + 0.5
    rows = weight[-width:]
    divisors = scales if rows.ndim == 1 else scales[:, None]
    rows.copy_((rows + offset) / divisors - offset)
    if getattr(producer, "bias", None) is not None:
        producer.bias[-width:] /= scales
    for module in reading:
        module.weight *= scales


def _refused(place: Place, condition: str) -> Place:
    return replace(place, producer="", readers=(), refusal=condition)


def _for_all_experts(every_place: list[Place]) -> list[Place]:
    """The places with one expert's names standing for all."""
    merged: dict[Place, None] = {}
    for place in every_place:
        names = ONE_EXPERT.sub(rf"\1.{EXPERT}.", " ".join((place.producer, *place.consumers)))
        producer, *consumers = names.split(" ")
        merged[replace(place, producer=producer, consumers=tuple(dict.fromkeys(consumers)))] = None
    return list(merged)
