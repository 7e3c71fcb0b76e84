"""Models that come as GGUF files: converted once into a folder in the Hub's layout.

transformers dequantizes the weights, which stay on the grid they came from, and writes float32.

Of a SentencePiece vocabulary (`llama` in the file) transformers makes a Unigram, which cuts words
otherwise than the model was trained on. Its pieces are those of a BPE whose merges are not in the
file; they follow from the scores: of all pairs of neighbours the one is merged whose union has the
highest score. So the tokenizer is built here, and checked twice: texts come back from their tokens,
and on plain English the model is a language model, not a guess. A tokenizer that cuts words
wrongly, or lacks the token that begins a text, fails the second check.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.core.errors import StudyError, one_line
from helpers.core.files import cache_root
from helpers.core.records import RECORD, cached_folder, sha256_file
from helpers.sources.chat import plain_tokens
from helpers.sources.items import load_rows
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
