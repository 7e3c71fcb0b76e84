"""The text of an answer is what its tokens say, whatever a tokenizer would tidy up."""

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.evaluation import engine
from helpers.evaluation.prompts import Prompt, TokenizedPrompt
from helpers.inference.protocols import GeneratedAnswer
from helpers.sources.items import Item


@pytest.fixture
def tidying_tokenizer():
    """Takes out spaces before punctuation, as BERT's tokenizers are set to."""
    core = Tokenizer(models.WordPiece(vocab={"?": 0, "three": 1, ",": 2}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(cleanup=False)
    options = {"unk_token": "?", "clean_up_tokenization_spaces": True}
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


def test_no_space_is_taken_out(tidying_tokenizer, monkeypatch):
    assert tidying_tokenizer.decode([1, 2, 1]) == "three, three"
    answer = GeneratedAnswer([1, 2, 1], "stop")
    monkeypatch.setattr(engine, "_generate", lambda *_: [(0, answer)])
    monkeypatch.setattr(engine, "_check_context_length", lambda *_: None)
    prompt = TokenizedPrompt(
        Prompt(Item("1", "q", ("x",)), "q"), SimpleNamespace(context=[1], cuts=()), "digest"
    )
    ask = SimpleNamespace(max_new_tokens=9, answer="text", stop="turn")
    evaluation_set = SimpleNamespace(ask=ask, adapter="squad_v2")
    arguments = None, tidying_tokenizer, evaluation_set, [prompt], None
    [row] = engine._generate_answers(*arguments, golds={})
    assert row["output"] == "three , three"
