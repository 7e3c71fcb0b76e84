"""GGUF files: words are cut as SentencePiece cuts them, and a model of nonsense is refused."""

import random
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerFast

from helpers.core.errors import StudyError
from helpers.sources import model_files, models
from helpers.sources.model_files import (
    TensorFiles,
    check_language,
    check_round_trips,
    sentencepiece_tokenizer,
)

LETTERS = "abcdeé▁\n."
PIECES = ("ab", "bc", "abc", "bcd", "cd", "ea", "eab", "é.", "éé", "de", "cde", "abcde")
SPACED = ("▁a", "▁ab", "▁▁", "▁b")


def vocabulary(seed: int = 0) -> tuple[list[str], list[float], list[int]]:
    """Texts, scores and types of a small SentencePiece vocabulary with random scores."""
    rng = random.Random(seed)
    special = [("<unk>", 0.0, TokenType.UNKNOWN), ("<s>", 0.0, TokenType.CONTROL)]
    special += [("</s>", 0.0, TokenType.CONTROL), ("[own]", 0.0, TokenType.USER_DEFINED)]
    own_bytes = [(f"<0x{i:02X}>", 0.0, TokenType.BYTE) for i in range(256)]
    pieces = [*PIECES, *SPACED, *LETTERS]
    ranks = rng.sample(range(len(pieces)), len(pieces))
    normal = [(p, -float(rank), TokenType.NORMAL) for p, rank in zip(pieces, ranks, strict=True)]
    texts, scores, kinds = zip(*special, *own_bytes, *normal, strict=True)
    return list(texts), list(scores), [int(kind) for kind in kinds]


def fields(seed: int = 0, **others) -> dict:
    """The fields of a file as the reader gives them."""
    texts, scores, kinds = vocabulary(seed)
    values = {"tokens": texts, "scores": scores, "token_type": kinds, "unknown_token_id": 0}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "add_space_prefix": False, **others}
    return {
        f"tokenizer.ggml.{name}": SimpleNamespace(contents=lambda value=value: value)
        for name, value in values.items()
    }


def cut(text: str, seed: int) -> list[str]:
    """SentencePiece's rule written out: the pair whose union scores highest, the first if equal."""
    texts, scores, kinds = vocabulary(seed)
    score = {t: s for t, s, k in zip(texts, scores, kinds, strict=True) if k == TokenType.NORMAL}
    parts = list(text.replace(" ", "▁"))
    while True:
        unions = [(score[a + b], -i) for i, (a, b) in enumerate(pairwise(parts))
                  if a + b in score]  # fmt: skip
        if not unions:
            break
        place = -max(unions)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    pieces = [[p] if p in score else [f"<0x{b:02X}>" for b in p.encode()] for p in parts]
    return [piece for own in pieces for piece in own]


@pytest.mark.parametrize("seed", range(20))
def test_words_are_cut_by_scores(seed):
    tokenizer, rng = sentencepiece_tokenizer(fields(seed)), random.Random(seed)
    for _ in range(50):
        text = "".join(rng.choices("abcdeé \n.ü東", weights=[6] * 9 + [1, 1], k=30))
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.convert_ids_to_tokens(tokens) == cut(text, seed)
        assert tokenizer.decode(tokens) == text


def test_a_text_begins_as_the_file_says():
    assert sentencepiece_tokenizer(fields())("ab").input_ids[0] == 1
    without = sentencepiece_tokenizer(fields(add_bos_token=False))
    assert without("ab").input_ids == without("ab", add_special_tokens=False).input_ids
    led = sentencepiece_tokenizer(fields(add_space_prefix=True))
    assert led.convert_ids_to_tokens(led("ab", add_special_tokens=False).input_ids)[0] == "▁ab"
    assert led.decode(led("ab c", add_special_tokens=False).input_ids) == "ab c"


def test_own_tokens_of_a_vocabulary_are_found_in_text():
    tokenizer = sentencepiece_tokenizer(fields())
    tokens = tokenizer("ab[own]c</s>", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(tokens) == ["ab", "[own]", "c", "</s>"]


def test_a_tokenizer_that_loses_text_is_refused():
    lossy = sentencepiece_tokenizer(fields())
    lossy.backend_tokenizer.normalizer = None  # its spaces become bytes that come back as spaces
    check_round_trips(lossy, place="x.gguf")
    from tokenizers import normalizers

    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(StudyError, match=r"x\.gguf: its tokenizer gives 'two  spaces"):
        check_round_trips(lossy, place="x.gguf")


def write_gguf(path) -> None:
    """A tiny Llama of random weights with the vocabulary above."""
    rng, width, inner = np.random.default_rng(0), 32, 64
    texts, scores, kinds = vocabulary()
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(width // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(texts))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (width, width))
    shapes |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    shapes |= dict.fromkeys(("attn_norm", "ffn_norm"), (width,))
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": (len(texts), width), "output.weight": (len(texts), width)}
    for name, shape in (tensors | {"output_norm.weight": (width,)}).items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_that_models_no_language_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(StudyError, match=r"tiny\.gguf: at plain English its surprise is"):
        model_files.gguf_model_folder(tmp_path / "tiny.gguf")
    assert not model_files.is_gguf_model_converted(tmp_path / "tiny.gguf")


def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(StudyError, match=r"cut\.gguf: cannot be converted") as caught:
        model_files.gguf_model_folder(tmp_path / "cut.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_the_bundled_file_gives_the_bundled_model(tmp_path):
    """Both ways into a GGUF file give the same weights, and the check on language holds there."""
    folder = model_files.gguf_model_folder(models.bundled_gguf())
    one, other = (TensorFiles(f, dtype=None) for f in (folder, models.bundled_model_folder()))
    assert set(one) == set(other)
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.long
def test_wrong_cuts_are_seen_by_the_surprise():
    """A tokenizer with the right vocabulary and other merges gives texts back, and is refused."""
    import json

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models.bundled_model_folder()
    model, tokenizer = (c.from_pretrained(folder) for c in (AutoModelForCausalLM, AutoTokenizer))
    check_language(model, tokenizer, place="sound")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["merges"] = content["model"]["merges"][:400]
    other = tokenizer.backend_tokenizer.from_str(json.dumps(content))
    wrong = PreTrainedTokenizerFast(tokenizer_object=other, eos_token=tokenizer.eos_token)
    check_round_trips(wrong, place="wrong")
    with pytest.raises(StudyError, match="wrong: at plain English its surprise is"):
        check_language(model, wrong, place="wrong")
