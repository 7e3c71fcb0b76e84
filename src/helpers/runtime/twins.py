"""Tiny twins of causal language models: the same configuration class with small widths.

A twin keeps what decides how a family's modules are connected: the number and the kinds of its
layers, shared or grouped heads, biases, activations, tied tensors. Widths, vocabulary and the
number of experts become small, so that a forward pass in float64 takes milliseconds. What holds
for the connections of the twin holds for those of the model; what depends on weights does not,
and is left to the gates that read the model's own.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers.core.architectures import Norm
from helpers.core.errors import StudyError, one_line
from helpers.runtime.devices import as_plain_linears, every_expert_reads, experts_as_linears

VOCABULARY = 259  # token ids of bytes and three special tokens
MOST_PARAMETERS = 20_000_000  # a larger twin has a width that is not known here
MOST_POSITIONS = 4096
TOKENS = 24  # of the text that a twin reads
SAME = 1e-4  # largest relative change of logits by a fold; some modules compute in float32
WIDTHS = tuple(
    (re.compile(pattern), size)
    for pattern, size in (
        (r"(.*_)?vocab_size(_per_layer_input)?", VOCABULARY),
        (r"(input_|output_)?(hidden|embedding)_size|attention_hidden_size|lru_width", 64),
        (r"n_embd|d_model|word_embed_proj_dim|dim_model|emb_dim|embedding_dim", 64),
        (r"(swa_)?num_attention_heads|((en|de)coder_)?attention_heads|n(um)?_heads?", 4),
        (r"num_(en|de)coder_attention_heads|linear_num_(key_|value_)?heads", 4),
        (r"mamba_(n|num)_heads|n_mamba_heads", 8),
        (r"mamba_d_ssm", 128),
        (r"(.*_)?(head_dim|head_size|headdim|d_head)|kv_channels|dim_head", 16),
        (r"qk_(rope|nope)_head_dim|rotary_dim|hidden_size_per_layer_input", 8),
        (r"(.*_)?intermediate_size(_mlp)?|n_inner|(.*_)?ffn_dim|(.*_)?ffn_hidden_size", 96),
        (r"d_ff|dim_ff|dff|d_inner", 96),
        (r"(.*_)?rank", 32),
        (r"(moe_)?num_(local_)?experts|n_(routed_)?experts|zero_expert_num", 4),
        (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", 2),
        (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_?groups", 1),
        (r"((mamba_d|ssm)_)?state(_size)?", 16),
        (r"(mamba_)?chunk_size", 16),
    )
)
EPS = ("variance_epsilon", "eps", "epsilon")  # names that transformers' norms give it
HEADS = re.compile(r"num_attention_heads|n_heads?|num_heads")
KEY_HEADS = re.compile(r"(.*_)?num_key_value_heads|num_kv_heads|(.*_)?num_query_groups")
LAYERS = re.compile(r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_blocks")
EXPERTS = re.compile(r"(moe_)?num_(local_)?experts|n_(routed_)?experts")
PLAIN_ROPE = (
    "rope_theta",
    "partial_rotary_factor",
    "mrope_section",
    "llama_4_scaling_beta",
    "original_max_position_embeddings",
)
SAVED_BY = ("transformers_version", "architectures", "quantization_config", "dtype")


def twin_config(config, *, layers: int | None = None):
    """The configuration with small widths.

    Args:
        config: of a causal language model.
        layers: the most layers of the twin; None for as many as the configuration has.

    Raises:
        StudyError: the configuration has no small form.
    """
    settings = config.to_dict()
    if isinstance(settings.get("text_config"), dict):
        raise StudyError("it is made of several models; give its language model alone")
    heads = next((settings[k] for k in settings if HEADS.fullmatch(k)), None)
    count = next((v for k, v in settings.items() if LAYERS.fullmatch(k) and type(v) is int), None)
    small = {}
    for name, value in settings.items():
        if name in SAVED_BY:
            continue
        if type(value) is int and value > 0:
            value = _small_number(name, value, settings, heads, layers)
        elif isinstance(value, list) and (size := _width(name)):  # one for each layer
            value = [min(v, size) if type(v) is int else v for v in value[: layers or None]]
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            value = _plain_rope(value)
        elif isinstance(value, list) and layers and len(value) == count:
            value = value[:layers]
        elif name == "eos_token_id" and isinstance(value, list):
            value = 2
        small[name] = value
    try:
        return type(config).from_dict(small)
    except Exception as error:  # of many kinds; each is a width that is not known here
        raise StudyError(f"no tiny twin of it can be described ({reason(error)})") from None


def _small_number(name: str, value: int, settings: dict, heads, layers: int | None) -> int:
    if KEY_HEADS.fullmatch(name):
        own_heads = settings.get(name.replace("key_value", "attention"), heads)
        return 4 if value == own_heads else min(value, 2)
    if LAYERS.fullmatch(name):
        return min(value, layers or value)
    if name in ("max_position_embeddings", "n_positions", "n_ctx"):
        return min(value, MOST_POSITIONS)
    if name == "head_dim" and value == settings.get("qk_rope_head_dim"):
        name = "qk_rope_head_dim"  # multi-head latent attention names it twice
    if name == "num_heads" and "expand" in settings:
        return min(value, 8)  # hidden_size · expand / head_dim
    if name == "mamba_d_ssm" and {"mamba_n_heads", "mamba_d_head"} <= settings.keys():
        return min(settings["mamba_n_heads"], 8) * min(settings["mamba_d_head"], 16)
    if name in ("attention_hidden_size", "attention_head_dim") and heads:
        width = settings.get("attention_hidden_size", 0)  # of Zamba: twice the hidden size
        if width > settings["hidden_size"] and width % settings["hidden_size"] == 0:
            width = 64 * (width // settings["hidden_size"])
            return width if name == "attention_hidden_size" else width // min(heads, 4)
    if name.endswith(("_token_id", "_token_index")):
        return value if value < VOCABULARY else 3
    return min(value, _width(name) or value)


def _width(name: str) -> int | None:
    """The small width of a setting; None if it is no width that is known here."""
    sizes = [size for pattern, size in WIDTHS if pattern.fullmatch(name)]
    return sizes[-1] if sizes else None


def _plain_rope(parameters: dict) -> dict:
    """Unscaled rotary positions; they have no part in how modules are connected."""
    if any(isinstance(value, dict) for value in parameters.values()):
        return {k: _plain_rope(v) if isinstance(v, dict) else v for k, v in parameters.items()}
    kept = {k: v for k, v in parameters.items() if k in PLAIN_ROPE}
    return {"rope_type": "default", "rope_theta": 10_000.0, **kept}


def reason(error: Exception) -> str:
    """The last line of an error of another library, cut."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(lines[-1])[:160]


def expert_count(config) -> int:
    """The number of experts of a block; 0 if the configuration names none."""
    names = sorted(k for k in config.to_dict() if EXPERTS.fullmatch(k))
    return next((int(n) for k in names if (n := getattr(config, k))), 0)


@contextmanager
def _on_cpu(seed: int) -> Iterator[None]:
    """Inside, tensors are made on the CPU with a seed, whatever surrounds the caller."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.device("cpu"):
        torch.manual_seed(seed)
        yield


def build_twin(config, *, seed: int = 0):
    """The twin of a twin's configuration in float64, in evaluation mode.

    Norms and biases are uneven, as training leaves them; matrices keep the size of a signal.

    Raises:
        StudyError: the configuration cannot be built small.
    """
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"  # grouped products know no float64
    options = {"attn_implementation": "eager"}
    try:
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        if (size := sum(p.numel() for p in outline.parameters())) > MOST_PARAMETERS:
            raise ValueError(f"it still has {size:,} parameters")
        with _on_cpu(seed):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
            model = model.double().eval().requires_grad_(False)
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                _make_uneven_(parameter, generator)
    except Exception as error:  # of many kinds; each is a setting that has no small form here
        raise StudyError(f"no tiny twin of it can be built ({reason(error)})") from None
    return model


@torch.no_grad()
def _make_uneven_(parameter: torch.Tensor, generator: torch.Generator) -> None:
    if parameter.ndim == 1:
        parameter.add_(torch.rand(parameter.shape, generator=generator) * 0.5 - 0.25)
    elif parameter.ndim > 1:
        size = parameter.shape[-1] ** 0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / size)


@dataclass
class Flow:
    """What one forward pass shows: who reads whose output.

    Attributes:
        linears: names of the replaceable Linears that are called, in the order of their calls.
        readers: by norm, the names of the Linears that read its output, in order of calls.
        routers: by norm, other modules with a matrix that read its output.
        norms: input and output of every module with a one-dimensional weight.
    """

    linears: list[str] = field(default_factory=list)
    readers: dict[str, list[str]] = field(default_factory=dict)
    routers: dict[str, list[str]] = field(default_factory=dict)
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Twin:
    """A twin, its experts (if any) as Linears, with the logits that folding has to keep.

    Raises:
        StudyError: no twin can be built or read, or its experts are no gated Linears.
    """

    def __init__(self, config):
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, VOCABULARY, (1, TOKENS), generator=generator)
        self.model, self.experts = build_twin(config), ""
        if plain := _plain_classes(self.model):
            with as_plain_linears(plain):
                self.model = build_twin(config)
        self.plain = plain
        self.stacked = None  # transformers' own model, if its experts are stacked
        self.logits = self.read()
        if classes := {type(m) for n, m in self.model.named_modules() if _is_stack(n, m)}:
            self._unstack(config, classes)
        self.linears = self._replaceable_linears()

    def _unstack(self, config, classes: set[type]) -> None:
        stacked, stacked_class = self.model, classes.pop()
        self.stacked = stacked
        self.experts = f"{stacked_class.__module__}.{stacked_class.__qualname__}"
        try:
            with (
                as_plain_linears(self.plain),
                experts_as_linears(config.model_type, self.experts),
            ):
                self.model = build_twin(config)
            _copy_unstacked_(self.model, stacked)
            moved = self.moved()
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            moved = float("inf")
        if classes or not moved < SAME:
            raise StudyError("its stacked experts are not gated MLPs of three Linears each")

    @torch.no_grad()
    def read(self, ids: Tensor | None = None) -> Tensor:
        """(tokens, vocabulary) float64 logits of the twin as it is now."""
        try:
            output = self.model(input_ids=self.ids if ids is None else ids, use_cache=False)
        except Exception as error:  # of many kinds; each is a setting that has no small form
            raise StudyError(f"its tiny twin cannot be read ({reason(error)})") from None
        return output.logits[0]

    def _replaceable_linears(self) -> set[str]:
        """Names of the plain Linears but the head whose weight no other module reads.

        Only these can be replaced by Linears in int8, which have no float weight.
        """
        head = self.model.get_output_embeddings()
        linears = {n: m for n, m in self.model.named_modules() if type(m) is nn.Linear}
        linears = {name: module for name, module in linears.items() if module is not head}
        if self._reads_without_weights(linears.values()):
            return set(linears)
        return {n for n, module in linears.items() if self._reads_without_weights([module])}

    def _reads_without_weights(self, linears: Iterable[nn.Linear]) -> bool:
        """Whether the twin reads if these Linears have products but no weight."""
        with ExitStack() as restored:
            for linear in linears:
                weight, bias = linear.weight, linear.bias
                linear.forward = partial(_product, weight=weight, bias=bias)
                linear._parameters["weight"] = None
                restored.callback(linear._parameters.update, weight=weight)
                restored.callback(delattr, linear, "forward")
            try:
                self.read()
            except StudyError:
                return False
        return True

    def flow(self) -> Flow:
        """Who reads whose output in one pass; in a mixture every expert reads every token."""
        flow, norms = Flow(), {}  # norms by the memory of their outputs
        alive: list[Tensor] = []  # no other tensor gets their memory

        def keep_norm(name: str):
            def hook(_module, args: tuple, output) -> None:
                if isinstance(output, Tensor):
                    alive.append(output)
                    if len(args) == 1:
                        flow.norms[name] = args[0].clone(), output.clone()
                    norms[output.untyped_storage().data_ptr()] = name

            return hook

        def keep_reader(name: str, readers: dict[str, list[str]]):
            def hook(_module, args: tuple, kwargs: dict) -> None:
                x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
                if x is None:
                    return
                alive.append(x)
                if readers is flow.readers:
                    flow.linears.append(name)
                norm = norms.get(x.untyped_storage().data_ptr())
                if norm and x.shape[-1] == len(self.model.get_submodule(norm).weight):
                    readers.setdefault(norm, []).append(name)

            return hook

        with ExitStack() as hooks:
            for name, module in self.model.named_modules():
                weight = module._parameters.get("weight")
                if weight is None:
                    continue
                if weight.ndim == 1:
                    hooks.callback(module.register_forward_hook(keep_norm(name)).remove)
                elif weight.ndim == 2 and not isinstance(module, nn.Embedding):
                    readers = flow.readers if name in self.linears else flow.routers
                    reader = keep_reader(name, readers)
                    handle = module.register_forward_pre_hook(reader, with_kwargs=True)
                    hooks.callback(handle.remove)
            with every_expert_reads(self.model):
                self.read()
        flow.linears = list(dict.fromkeys(flow.linears))
        return flow

    def norms(self, flow: Flow) -> Iterator[Norm]:
        """The formula of every norm that has one of those known here."""
        for name, (x, y) in flow.norms.items():
            module = self.model.get_submodule(name)
            eps = next((e for n in EPS if isinstance(e := getattr(module, n, None), float)), 0.0)
            for centred, offset in product((False, True), (0.0, 1.0)):
                norm = Norm(name, centred, eps, offset)
                if not (x.shape == y.shape and x.shape[-1:] == module.weight.shape):
                    continue
                expected = normalized(norm, x, module.weight, getattr(module, "bias", None))
                if change(y, expected) < SAME:
                    yield norm
                    break

    def moved(self) -> float:
        """The largest change of the logits since the beginning, relative to their size."""
        return change(self.read(), self.logits)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(x, weight, bias)


def normalized(norm: Norm, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The norm's output by its formula, in x's type."""
    x = x - x.mean(-1, keepdim=True) if norm.centred else x
    y = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * (weight + norm.offset)
    return y if bias is None else y + bias


def change(values: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest expected value; infinite for NaN."""
    size = expected.abs().max().clamp(min=1e-30)
    return float(((values - expected).abs().max() / size).nan_to_num(torch.inf))


def _plain_classes(model) -> list[str]:
    """Full names of the classes of Linears that only compute what `nn.Linear` computes."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    kinds = {type(m): m for m in linears if type(m) is not nn.Linear}
    return sorted(f"{k.__module__}.{k.__qualname__}" for k, m in kinds.items() if _is_plain(m))


@torch.no_grad()
def _is_plain(linear: nn.Linear) -> bool:
    generator = torch.Generator().manual_seed(3)
    x = 3 * torch.randn(1, TOKENS, linear.in_features, generator=generator)
    x = x.to(linear.weight.dtype)
    try:
        output = linear(x)
    except Exception:  # of any kind: it takes more than x
        return False
    expected = _product(x, linear.weight, linear.bias)
    same_shape = isinstance(output, Tensor) and output.shape == expected.shape
    return same_shape and change(output, expected) < SAME


def _is_stack(name: str, module: nn.Module) -> bool:
    """Whether a module holds a matrix for each of several experts in one parameter."""
    return "expert" in name and any(
        p.ndim == 3 for p in module._parameters.values() if p is not None
    )


@torch.no_grad()
def _copy_unstacked_(model, stacked) -> None:
    """Give a model with experts as Linears the weights of one with stacked experts."""
    state = stacked.state_dict()
    for name, tensor in model.state_dict().items():
        if name in state:
            tensor.copy_(state[name])
            continue
        block, expert, part = name.removesuffix(".weight").rsplit(".", 2)
        if part == "down_proj":
            tensor.copy_(state[f"{block}.down_proj"][int(expert)])
        else:
            halves = state[f"{block}.gate_up_proj"][int(expert)].chunk(2)
            tensor.copy_(halves[part == "up_proj"])
