"""Files of a model: its folder's configuration, safety and tensors, and folders made of GGUF.

Weights are only numbers, and no code runs. Safetensors are read, and GGUF where a source says so.
A pickle can run anything while it is loaded, so none is ever opened; where there is nothing else
it is refused by name. Pickles that lie beside (an optimizer's state, a second copy of the weights)
are let lie.

The tensors are those that transformers gives the model, under the model's names: what it passes
over is not among them, and the head is one of them only if it is not the embeddings. Whether it
is, the tensors decide, not the configuration. Names and shapes come from transformers' own model,
built on the meta device without any weights. Tensors are read one at a time: two files of weights
need not be in memory to be compared.

A configuration also says whether rotary positions depend on the length of a text (longrope,
dynamic NTK scaling). transformers computes them for the longest text of a forward pass, so that
beyond a length a text beside a longer one is read otherwise than alone; such texts are read one at
a time.

A GGUF file is converted once into a folder in the Hub's layout. transformers dequantizes the
weights, which stay on the grid they came from, and writes float32. Of a SentencePiece vocabulary
(`llama` in the file) transformers makes a Unigram, which cuts words otherwise than the model was
trained on. Its pieces are those of a BPE whose merges are not in the file; they follow from the
scores: of all pairs of neighbours the one is merged whose union has the highest score. So the
tokenizer is built here, and checked twice: texts come back from their tokens, and on plain English
the model is a language model, not a guess. A tokenizer that cuts words wrongly, or lacks the token
that begins a text, fails the second check.
"""

import copy
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.initialization import no_init_weights

from helpers.core.architectures import HEAD
from helpers.core.errors import StudyError, one_line
from helpers.core.files import cache_root
from helpers.core.records import RECORD, cached_folder, sha256_file
from helpers.runtime.discovery import (
    ConfigKey,
    architecture,
    linear_experts,
    names_in_files,
)
from helpers.sources.chat import plain_tokens
from helpers.sources.items import load_rows
from helpers.study.inputs import (
    INDEX_FILE,
    TOKENIZERS,
    StoredTensor,
    stored_tensors,
    weights_problem,
)
from helpers.study.schema import ShippedDataset

SPACE = "▁"  # SentencePiece's
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
SPECIAL = ("bos", "eos", "pad")  # tokens that a model's configuration names
PASSAGES = 12  # of plain English that the model reads
LARGEST_SHARE = 0.4  # of a uniform guess's surprise, at which no language is modelled
ROUND_TRIPS = (
    "Two  spaces, and a tab:\t1,024.50 km².",
    "Zeile eins\nZeile zwei\n\nüber Straße, naïve, 東京, Привет",
    "x = {'a': [1, 2]}  # 🙂",
)


def load_config(folder: Path):
    """The configuration of a folder's model.

    Raises:
        StudyError: it is missing or unusable, or its family is unknown.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise loading_error(folder, "model", error) from None
        reason = str(error).strip().splitlines()[0]
        raise StudyError(f"{folder.name}: its config.json cannot be used ({reason})") from None
    architecture(config)
    return config


def loading_error(folder: Path, part: str, error: Exception) -> StudyError:
    """The error of a failed loading in one line; names custom code as the reason if it is."""
    if "trust_remote_code" in str(error):
        return StudyError(
            f"{folder.name}: the {part} comes with code of its own, which is never run here; "
            "give one that transformers itself knows"
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return StudyError(f"{folder.name}: no {part} can be loaded from it ({reason})")


def check_context_length(label: str, lengths: list[int], config) -> None:
    """Check that no text is longer than the model's context, whose positions were trained.

    Raises:
        StudyError: a text is longer.
    """
    longest, limit = max(lengths, default=0), context_length(config)
    if longest > limit:
        raise StudyError(
            f"{label}: a text has {longest} tokens but the model reads {limit}; lower max_tokens, "
            "or leave the text out"
        )


def context_length(config) -> int:
    """The most tokens of a text; a model without trained positions (ALiBi) has no limit."""
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def length_independent_up_to(config) -> int | None:
    """The length up to which positions do not depend on the length; None if they never do."""
    limits = []
    for parameters in _rope_parameters(config):
        kind = parameters.get("rope_type", "default")
        if kind == "longrope":
            limits.append(parameters["original_max_position_embeddings"])
        elif "dynamic" in kind:
            limits.append(context_length(config))
    return min(limits, default=None)


def _rope_parameters(config) -> list[dict]:
    """The rotary settings: one mapping, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def reads_alone(config, length: int) -> bool:
    """Whether a text of this length must be read alone."""
    limit = length_independent_up_to(config)
    return limit is not None and length > limit


def changes_at(config, length: int) -> bool:
    """Whether the last token of a text changes the positions of the earlier ones."""
    limit = length_independent_up_to(config)
    if limit is None or length <= limit:
        return False
    changing = any("dynamic" in p.get("rope_type", "") for p in _rope_parameters(config))
    return changing or length == limit + 1


def batch_tokens_for(config, lengths: list[int], *, batch_tokens: int) -> int:
    """The token budget of a batch of padded texts: 1, which means one text, if needed."""
    return 1 if reads_alone(config, max(lengths, default=0)) else batch_tokens


def reset_dynamic_rope_(model) -> None:
    """Reset dynamic scaling, which otherwise keeps the frequencies of a longer text."""
    for module in model.modules():
        if "dynamic" in str(getattr(module, "rope_type", "")):
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)


SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")


def check_model_safety(folder: Path) -> None:
    """Check that loading a folder runs no code from it.

    Raises:
        StudyError: it holds only pickles, or a file names a pickle, code to fetch, or another
            model to load.
    """
    for name in SETTINGS:
        _json(folder / name)
    if problem := weights_problem(path.name for path in folder.iterdir()):
        raise StudyError(f"{folder.name}: {problem}")
    _check_index(folder)
    _check_tokenizer(folder)
    _check_attention_code(folder)


def _check_index(folder: Path) -> None:
    weight_map = _json(folder / INDEX_FILE).get("weight_map", {})
    files = (
        sorted(set(map(str, weight_map.values())))
        if isinstance(weight_map, dict)
        else [str(weight_map)]
    )
    for name in files:
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise StudyError(
                f"{folder.name}: {INDEX_FILE} names {name!r}, which is no safetensors file of this "
                "folder; save the model again"
            )


def _check_tokenizer(folder: Path) -> None:
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".pkl", ".pickle")]
    if pickles and not any((folder / name).is_file() for name in TOKENIZERS):
        raise StudyError(
            f"{folder.name}: its tokenizer is {pickles[0]}, a pickle, which may run anything; "
            "save the tokenizer as tokenizer.json"
        )


def _check_attention_code(folder: Path) -> None:
    """Refuse an attention implementation named like a repository: transformers would fetch it."""
    config = _json(folder / "config.json")
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(config.get(key, "")):
            raise StudyError(
                f"{folder.name}: config.json asks for attention code to be fetched and run "
                f"({key} = {config[key]!r}); remove that line"
            )


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty if the file is not there."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{path.parent.name}: {path.name} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise StudyError(f"{path.parent.name}: {path.name} is no mapping; save the model again")
    return content


@dataclass(frozen=True)
class Skeleton:
    """Names and shapes of the tensors of one configuration's model.

    Attributes:
        shapes: of every saved tensor by name, a tied head included.
        unread: pattern of the tensor names that transformers ignores; None if there are none.
        prefix: prefix of the decoder's tensor names in the causal model.
        head: name of the head's weight.
        table: name of the token embeddings' weight.
        own_names: the model's names of tensors that files call otherwise.
    """

    shapes: dict[str, tuple[int, ...]]
    unread: re.Pattern | None
    prefix: str
    head: str
    table: str
    own_names: Mapping[str, str]

    def is_ignored(self, name: str) -> bool:
        """Whether transformers silently ignores a tensor of this name."""
        return self.unread is not None and bool(self.unread.search(name))

    def name_of(self, stored: str) -> str:
        """The model's name of a stored tensor; adds the prefix for a decoder saved without head.

        Tensors of a quantized Linear are called as its weight is.
        """
        if stored in self.shapes:
            return stored
        if stored in self.own_names:
            return self.own_names[stored]
        module, _, part = stored.rpartition(".")
        if part in QUANTIZED_PARTS and (weight := self.own_names.get(f"{module}.weight")):
            return weight.removesuffix("weight") + part
        longer = f"{self.prefix}.{stored}"
        return longer if longer in self.shapes else stored


def skeleton(config) -> Skeleton:
    """The skeleton of a configuration's model.

    Raises:
        StudyError: the family is not known.
    """
    return _skeleton(ConfigKey(config))


@lru_cache(maxsize=8)
def _skeleton(same: ConfigKey) -> Skeleton:
    config = copy.deepcopy(same.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with linear_experts(config), torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
        own_names = names_in_files(model)
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return Skeleton(
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        unread=re.compile("|".join(f"({p})" for p in sorted(patterns))) if patterns else None,
        prefix=model.base_model_prefix,
        head=f"{HEAD}.weight",
        table=f"{architecture(config).embeddings[0]}.weight",
        own_names=own_names,
    )


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Beside, or instead of, a quantized Linear's weight.
QUANTIZED_PARTS = ("weight_scale", "input_scale", "weight_packed", "weight_shape")
COMPARED_ROWS = 8192  # of two tables at a time


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a folder by name, as a model loaded from it has them.

    Args:
        folder: `model.safetensors` or its shards, and the configuration beside them.
        dtype: dtype of the returned tensors; None for that of the file.

    Attributes:
        tied: whether head and embeddings are one tensor: the configuration ties them, and
            the head is not in the files or equals the embeddings.

    Raises:
        StudyError: weights are missing or truncated.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype | None):
        self.folder, self.dtype, self.tied = Path(folder), dtype, False
        try:
            stored = stored_tensors(self.folder)
        except StudyError as error:
            raise StudyError(f"{self.folder.name}: {error}") from None
        for name, tensor in stored.items():
            if tensor.dtype not in DTYPES:
                raise StudyError(
                    f"{self.folder.name}: {name} is {tensor.dtype}, which is not read here; give "
                    f"a model in {', '.join(DTYPES)}"
                )
        self._tensors: dict[str, StoredTensor] = stored
        self._stored_names = {name: name for name in stored}
        if (self.folder / "config.json").is_file():
            config = load_config(self.folder)
            self._take_as_the_model_does(skeleton(config), says_tied=config.tie_word_embeddings)

    def _take_as_the_model_does(self, model: Skeleton, *, says_tied: bool) -> None:
        read = {n: t for n, t in self._tensors.items() if not model.is_ignored(n)}
        self._stored_names = {model.name_of(name): name for name in read}
        self._tensors = {name: read[stored] for name, stored in self._stored_names.items()}
        head, table = model.head in self._tensors, model.table in self._tensors
        if not says_tied:
            return
        if head and not table:  # the model reads either of the two
            self._stored_names[model.table] = self._stored_names[model.head]
            self._tensors[model.table] = self._tensors[model.head]
        self.tied = not (head and table) or self._equal(model.head, model.table)
        if self.tied:
            self._tensors.pop(model.head, None)

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors are equal in the returned dtype, compared part by part."""
        if self.shape(one) != self.shape(other):
            return False
        if self.stored_dtype(one) != self.stored_dtype(other) and self.dtype is None:
            return False
        for start in range(0, self.shape(one)[0], COMPARED_ROWS):
            parts = (self._rows(n, start, start + COMPARED_ROWS) for n in (one, other))
            if not torch.equal(*parts):
                return False
        return True

    def _rows(self, name: str, start: int, end: int) -> Tensor:
        with safe_open(self._tensors[name].path, framework="pt") as file:
            return self._given(file.get_slice(self._stored_names[name])[start:end])

    def _given(self, tensor: Tensor) -> Tensor:
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._tensors[name].path, framework="pt") as file:
            return self._given(file.get_tensor(self._stored_names[name]))

    def load_all(self) -> dict[str, Tensor]:
        """Every tensor by name, each file opened once."""
        tensors: dict[str, Tensor] = {}
        for path in sorted({tensor.path for tensor in self._tensors.values()}):
            with safe_open(path, framework="pt") as file:
                for name, tensor in self._tensors.items():
                    if tensor.path == path:
                        tensors[name] = self._given(file.get_tensor(self._stored_names[name]))
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # Mapping.__contains__ would read the tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self._tensors[name].shape

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype in the file, without reading the tensor."""
        return DTYPES[self._tensors[name].dtype]

    def size_bytes(self, name: str) -> int:
        """The tensor's size in the file."""
        return torch.Size(self.shape(name)).numel() * self.stored_dtype(name).itemsize


def gguf_model_folder(path: Path) -> Path:
    """The converted model of a GGUF file (float32 safetensors, tokenizer), made on first use.

    Raises:
        StudyError: the file cannot be read, its tokenizer does not give texts back, or the model
            does not model plain English.
    """

    def fill(folder: Path) -> None:
        try:
            model, tokenizer = convert(path)
        except StudyError:
            raise
        except Exception as error:  # of many kinds; each is a fault of the file
            reason = one_line(error)[:200]
            raise StudyError(f"{path.name}: cannot be converted ({reason})") from None
        check_round_trips(tokenizer, place=path.name)
        check_language(model, tokenizer, place=path.name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cached_folder(_folder(path), fill)


def is_gguf_model_converted(path: Path) -> bool:
    """Whether a GGUF file is converted already."""
    return (_folder(path) / RECORD).is_file()


def _folder(path: Path) -> Path:
    own = sha256_file(Path(__file__))[:8]
    return cache_root() / "models" / f"gguf-{path.stem}-{sha256_file(path)[:12]}-{own}"


def convert(path: Path):
    """(model in float32, tokenizer) of a GGUF file."""
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with parsed_once() as reader:
        fields = reader(str(path)).fields
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        if _content(fields, "tokenizer.ggml.model") == "llama":
            tokenizer = sentencepiece_tokenizer(fields)
        else:
            tokenizer = AutoTokenizer.from_pretrained(**source)
    forget_quantization_(model)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    for config in (model.config, model.generation_config):
        for name, value in ids.items():
            setattr(config, name, value)
    return model.eval(), tokenizer


def forget_quantization_(model) -> None:
    """Let a dequantized model be saved; transformers still takes it for a quantized one."""
    del model.config.quantization_config
    del model.hf_quantizer, model.quantization_method
    model.is_quantized = False


@contextmanager
def parsed_once() -> Iterator:
    """Inside the context, a GGUF file is parsed once and its names are mapped once.

    transformers parses it again for each part, and maps the names for each module.

    Yields:
        the reader's class, which keeps what it has read.
    """
    import gguf

    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in originals.items():
        setattr(gguf, name, cache(function))
    try:
        yield gguf.GGUFReader
    finally:
        for name, function in originals.items():
            setattr(gguf, name, function)


def _content(fields, key: str, default=None):
    return fields[key].contents() if key in fields else default


def sentencepiece_tokenizer(fields):
    """The tokenizer of a GGUF file with SentencePiece pieces and scores.

    Args:
        fields: of the file, as `gguf.GGUFReader` gives them.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    value = lambda name, default=None: _content(fields, f"tokenizer.ggml.{name}", default)  # noqa: E731
    pieces, scores, kinds = value("tokens"), value("scores"), value("token_type")
    ids = {piece: i for i, piece in enumerate(pieces)}
    normal = {p: s for p, s, kind in zip(pieces, scores, kinds, strict=True) if kind == NORMAL}
    unknown = value("unknown_token_id")
    core = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=merges_by_score(normal, ids),
            unk_token=None if unknown is None else pieces[unknown],
            fuse_unk=True,
            byte_fallback=BYTE in kinds,
        )
    )
    prefix = bool(value("add_space_prefix", True))
    own_space = [normalizers.Prepend(SPACE)] if prefix else []
    core.normalizer = normalizers.Sequence([*own_space, normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    for piece, kind in zip(pieces, kinds, strict=True):
        if kind == CONTROL:
            core.add_special_tokens([AddedToken(piece, normalized=False, special=True)])
    own = [p for p, kind in zip(pieces, kinds, strict=True) if kind == USER_DEFINED]
    core.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in own])
    names = {
        name: pieces[i]
        for name, key in zip(SPECIAL, ("bos", "eos", "padding"), strict=True)
        if (i := value(f"{key}_token_id")) is not None
    }
    if value("add_bos_token", True) and "bos" in names:
        core.post_processor = processors.TemplateProcessing(
            single=f"{names['bos']} $A", special_tokens=[(names["bos"], ids[names["bos"]])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, **{f"{name}_token": text for name, text in names.items()}
    )
    tokenizer.chat_template = value("chat_template")
    return tokenizer


def merges_by_score(normal: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a BPE, first the one whose union has the highest score.

    Args:
        normal: score of each piece that can be a union.
        ids: of all pieces.
    """
    merges = [
        (-score, ids[union], cut, (union[:cut], union[cut:]))
        for union, score in normal.items()
        for cut in range(1, len(union))
        if union[:cut] in ids and union[cut:] in ids
    ]
    return [pair for *_, pair in sorted(merges)]


def check_round_trips(tokenizer, *, place: str) -> None:
    """Check that texts come back from their tokens.

    Raises:
        StudyError: one does not.
    """
    for text in ROUND_TRIPS:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        if (back := tokenizer.decode(tokens)) != text:
            raise StudyError(
                f"{place}: its tokenizer gives {back[:60]!r} back for {text[:60]!r}; give the "
                "model as a folder with its own tokenizer.json"
            )


@torch.inference_mode()
def check_language(model, tokenizer, *, place: str) -> None:
    """Check that the model is surprised by plain English as a language model is.

    Raises:
        StudyError: its mean surprise at a token is more than LARGEST_SHARE of a uniform guess's.
    """
    surprises = []
    passages = dict.fromkeys(r["context"] for r in load_rows(ShippedDataset(shipped="squad_v2")))
    for passage in list(passages)[:PASSAGES]:
        tokens = plain_tokens(tokenizer, passage)
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1].float()
        expected = torch.tensor(tokens[1:])
        surprises += torch.nn.functional.cross_entropy(logits, expected, reduction="none").tolist()
    uniform = math.log(len(tokenizer))
    if not (mean := sum(surprises) / len(surprises)) <= LARGEST_SHARE * uniform:
        raise StudyError(
            f"{place}: at plain English its surprise is {mean:.1f} nats a token (a uniform guess "
            f"has {uniform:.1f}, a language model under {LARGEST_SHARE * uniform:.1f}); its "
            "tokenizer or its weights are not what the model was trained with"
        )
