"""transformers' own forward pass, one sequence at a time, sees what the engine gets wrong.

Each lapse is put into the running engine, which asks in earnest and asks alone with it.
"""

from dataclasses import replace

import pytest
import torch
import yaml

from conftest import STUDY
from evaluated_run import looked_at
from helpers.evaluation import engine
from helpers.evaluation.checks.evaluation_data import ask_alone
from helpers.evaluation.checks.numeric_gates import invariance_gate
from helpers.evaluation.checks.second_opinion import GOLDS, LAYERS, LOGPROBS, TEXT, TOKENS
from helpers.evaluation.engine import ask_all
from helpers.inference import packed_attention, perplexity, protocols
from helpers.quantization.variants import load_variant
from quantized_run import VARIANTS, QuantizedRun
from test_plain_beginning import tokenizer_with
from test_positions import LONGROPE

BOOLQ = {
    "adapter": "boolq",
    "source": {"shipped": "boolq"},
    "items": 3,
    "ask": {"protocol": "loglikelihood", "normalize": "none"},
}
FLOATS = ("noquant", "smooth_only")
FLOAT_AND_INT8 = ["noquant", pytest.param("rtn_w8a8", marks=pytest.mark.long)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """make(family, variant, dtype, runtime): a sound run whose items share beginnings."""
    kept = {}

    def make(family: str, variant: str, dtype: str = "float32", quantized: str = "int8"):
        key = (family, variant, dtype, quantized)
        if key not in kept:
            torch.set_num_threads(1)
            settings = yaml.safe_load(STUDY)
            settings["runtime"] |= {"dtype": dtype, "quantized": quantized}
            settings["evaluation"]["datasets"]["boolq"] = BOOLQ
            for asking in settings["evaluation"]["datasets"].values():
                asking["items"] = 3
            run = QuantizedRun(tmp_path_factory.mktemp("run"), settings, variant)
            run.save_source(family, **({} if family == "gemma3_text" else {"num_hidden_layers": 3}))
            if VARIANTS[variant]:
                run.calibrate()
                run.quantize()
            kept[key] = run
        return kept[key]

    return make


def failed(gates) -> set[str]:
    return {gate.name for _, gate in gates if not gate.passed}


SOUND = [("llama", "noquant"), ("llama", "o2"), ("qwen3", "rtn_w8a8")]
MORE = [("llama", "smooth_only"), ("qwen3", "noquant"), ("qwen3", "o3")]
SOUND += [pytest.param(*more, marks=pytest.mark.long) for more in MORE]


@pytest.mark.parametrize(("family", "variant"), SOUND)
def test_a_sound_engine_agrees(runs, family, variant):
    gates = looked_at(runs(family, variant))
    assert [gate for _, gate in gates if not gate.passed] == []
    assert {gate.name for _, gate in gates} == {LAYERS, LOGPROBS, TOKENS, GOLDS, TEXT}
    assert {what for what, _ in gates} == {"whole variant", "arc", "squad_v2", "boolq"}


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llama", "o2"),
        pytest.param("llama", "noquant", marks=pytest.mark.long),
        pytest.param("qwen3", "rtn_w8a8", marks=pytest.mark.long),
    ],
)
def test_a_sound_engine_agrees_in_bfloat16(runs, family, variant):
    assert failed(looked_at(runs(family, variant, "bfloat16"))) == set()


@pytest.mark.parametrize(
    "family",
    [
        "gemma3_text",
        "qwen3_moe",
        *(pytest.param(f, marks=pytest.mark.long) for f in ("opt", "phi3")),
    ],
)
def test_other_families_agree(runs, family):
    assert [g for _, g in looked_at(runs(family, "rtn_w8a8")) if not g.passed] == []


@pytest.mark.parametrize("variant", ["rtn_w8a8", pytest.param("o2", marks=pytest.mark.long)])
def test_the_simulated_runtime_agrees(runs, variant):
    assert [
        g for _, g in looked_at(runs("llama", variant, "float32", "reference")) if not g.passed
    ] == []


@pytest.mark.parametrize("variant", FLOAT_AND_INT8)
def test_a_text_that_begins_with_two_tokens_agrees(tmp_path, variant):
    """The second one is as little predicted as the first."""
    run = QuantizedRun(tmp_path, yaml.safe_load(STUDY), variant)
    run.save_source("llama")
    tokenizer_with("two first tokens").save_pretrained(tmp_path / "source")
    if VARIANTS[variant]:
        run.calibrate()
        run.quantize()
    assert failed(looked_at(run)) == set()


def positions_off_by_one_after_a_shared_beginning(patch):
    """After a beginning that others share."""
    whole = packed_attention.Segment.__post_init__

    def late(self):
        whole(self)
        if self.before:
            self.positions = [p + 1 for p in self.positions]

    patch.setattr(packed_attention.Segment, "__post_init__", late)


def options_that_see_the_next_token(patch):
    def mask(self, window):
        size = len(self.tokens)
        branch = torch.tensor(self.branches or [packed_attention.TRUNK] * size)
        own = torch.ones(size, size, dtype=torch.bool).tril() | (branch[:, None] == branch) & (
            branch > packed_attention.TRUNK
        )
        own &= (branch[:, None] == branch) | (branch == packed_attention.TRUNK)
        return torch.cat([torch.ones(size, self.start, dtype=torch.bool), own], dim=1)

    patch.setattr(packed_attention.Segment, "_mask", mask)


def options_that_see_each_other(patch):
    def mask(self, window):
        size = len(self.tokens)
        own = torch.ones(size, size, dtype=torch.bool).tril()
        return torch.cat([torch.ones(size, self.start, dtype=torch.bool), own], dim=1)

    patch.setattr(packed_attention.Segment, "_mask", mask)


def a_key_too_many_in_a_slot(patch):
    beyond = packed_attention.KVCache._masks

    def one_more(self, window):
        common, own = beyond(self, window)
        places = torch.arange(self._width)
        return common, own & (places > self._at[:, None] + 1)[:, None, None]

    patch.setattr(packed_attention.KVCache, "_masks", one_more)


def attention_in_bfloat16(patch):
    whole = packed_attention.scaled_dot_product_attention

    def coarse(*parts, **how):
        return whole(*(x.bfloat16() for x in parts), **how).to(parts[0].dtype)

    patch.setattr(packed_attention, "scaled_dot_product_attention", coarse)


def decoding_in_bfloat16(patch):
    attend = packed_attention.KVCache.attend

    def coarse(self, layer, query, key, value, **how):
        return attend(self, layer, query, key, value, **how).bfloat16().to(query.dtype)

    patch.setattr(packed_attention.KVCache, "attend", coarse)


def scores_scaled_otherwise(patch):
    attend = packed_attention.PackedBatch.attend

    def warm(self, layer, query, key, value, **how):
        return attend(self, layer, query * 0.97, key, value, **how)

    patch.setattr(packed_attention.PackedBatch, "attend", warm)


def positions_of_decoding_off_by_one(patch):
    step = packed_attention.KVCache.step
    patch.setattr(packed_attention.KVCache, "step", lambda self, *args: step(self, *args) + 1)


@pytest.mark.bank("reading", "{lapse}", LAYERS)
@pytest.mark.parametrize("variant", FLOAT_AND_INT8)
@pytest.mark.parametrize(
    ("lapse", "names"),
    [
        (positions_off_by_one_after_a_shared_beginning, {LAYERS}),
        (options_that_see_the_next_token, {LAYERS}),
        (options_that_see_each_other, {LAYERS}),
        (a_key_too_many_in_a_slot, {LAYERS}),
        (attention_in_bfloat16, {LAYERS}),
        (decoding_in_bfloat16, {LAYERS}),
        (scores_scaled_otherwise, {LAYERS}),
        (positions_of_decoding_off_by_one, {LAYERS}),
    ],
)
def test_how_a_text_is_read(runs, monkeypatch, lapse, names, variant):
    lapse(monkeypatch)
    assert names <= failed(looked_at(runs("llama", variant)))


def the_cache_left_in_floats(patch):
    patch.setattr(packed_attention, "int8_rounded", lambda states: states)


def one_scale_for_all_heads(patch):
    def rounded(states):
        step = states.abs().amax((1, 3), keepdim=True) / 127
        return (states / step).round() * step

    patch.setattr(packed_attention, "int8_rounded", rounded)


def one_scale_for_a_text(patch):
    def rounded(states):
        step = states.abs().amax((2, 3), keepdim=True) / 127
        return (states / step).round() * step

    patch.setattr(packed_attention, "int8_rounded", rounded)


def a_cache_of_seven_bits(patch):
    patch.setattr(packed_attention, "KV_STEPS", 63)


def values_left_in_floats(patch):
    attend, whole = packed_attention.packed_attention, packed_attention.int8_rounded
    calls = []

    def keys_only(states):
        calls.append(None)
        return whole(states) if len(calls) % 2 else states

    assert attend
    patch.setattr(packed_attention, "int8_rounded", keys_only)


KV = {"kv8": {"kv": "int8"}, "w8a8_kv8": {"preset": "w8a8", "kv": "int8"}}


@pytest.fixture
def with_kv(monkeypatch):
    for name, recipe in KV.items():
        monkeypatch.setitem(VARIANTS, name, recipe)


def kv_run(runs, family, variant, dtype="float32"):
    """A run with an int8 cache; without a scheme it has no checkpoint."""
    if variant == "w8a8_kv8":
        return runs(family, variant, dtype)
    run = runs(family, "noquant", dtype)
    run = QuantizedRun(run.root, run.settings, variant)
    return run


@pytest.mark.parametrize(
    ("family", "variant", "dtype"),
    [
        ("llama", "kv8", "float32"),
        ("qwen3", "w8a8_kv8", "float32"),
        pytest.param("gemma3_text", "kv8", "float32", marks=pytest.mark.long),
    ],
)
def test_a_sound_cache_in_int8_agrees(runs, with_kv, family, variant, dtype):
    gates = looked_at(kv_run(runs, family, variant, dtype))
    assert [gate for _, gate in gates if not gate.passed] == []


@pytest.mark.bank("reading", "{lapse}", LAYERS)
@pytest.mark.parametrize("variant", ["kv8", pytest.param("w8a8_kv8", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "lapse",
    [
        the_cache_left_in_floats,
        one_scale_for_all_heads,
        one_scale_for_a_text,
        a_cache_of_seven_bits,
        values_left_in_floats,
    ],
)
def test_how_keys_and_values_are_kept(runs, monkeypatch, with_kv, lapse, variant):
    lapse(monkeypatch)
    assert LAYERS in failed(looked_at(kv_run(runs, "llama", variant)))


@pytest.mark.bank("float", "attention in bfloat16 for quantized variants alone", LAYERS)
def test_attention_of_a_quantized_variant(runs, monkeypatch):
    assert failed(looked_at(runs("llama", "rtn_w8a8"))) == set()
    attention_in_bfloat16(monkeypatch)
    assert LAYERS in failed(looked_at(runs("llama", "rtn_w8a8")))


@pytest.mark.bank("reading", "logits without the model's cap", LOGPROBS)
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("noquant", "float32"),
        pytest.param("noquant", "bfloat16", marks=pytest.mark.long),
        pytest.param("rtn_w8a8", "float32", marks=pytest.mark.long),
    ],
)
def test_logits_without_their_cap(tmp_path, monkeypatch, variant, dtype):
    settings = yaml.safe_load(STUDY)
    settings["runtime"] |= {"dtype": dtype}
    run = QuantizedRun(tmp_path, settings, variant)
    run.save_source("gemma3_text", final_logit_softcapping=0.5)
    if VARIANTS[variant]:
        run.calibrate()
        run.quantize()
    assert failed(looked_at(run)) == set()
    monkeypatch.setattr(
        packed_attention, "head_logits", lambda model, x: model.get_output_embeddings()(x)
    )
    assert failed(looked_at(run)) & {LAYERS, LOGPROBS, GOLDS, TEXT}


@pytest.mark.bank("reading", "{lapse}", LOGPROBS)
@pytest.mark.parametrize(
    "lapse",
    [
        positions_off_by_one_after_a_shared_beginning,
        options_that_see_the_next_token,
        options_that_see_each_other,
    ],
)
def test_log_probabilities_of_the_baseline(runs, monkeypatch, lapse):
    """Read whole, by a model that transformers loads."""
    lapse(monkeypatch)
    assert LOGPROBS in failed(looked_at(runs("llama", "noquant")))


@pytest.mark.parametrize("variant", FLOAT_AND_INT8)
@pytest.mark.bank("reading", "log-probabilities of the token before")
def test_log_probabilities_of_the_wrong_token(runs, monkeypatch, variant):
    """The model is sound; the token before the right one is looked up."""
    whole = protocols.scored_tokens

    def shifted(item, branches):
        return [(max(0, at - 1), token, k) for at, token, k in whole(item, branches)]

    monkeypatch.setattr(protocols, "scored_tokens", shifted)
    assert failed(looked_at(runs("llama", variant))) == {LOGPROBS, GOLDS}


@pytest.mark.parametrize("variant", FLOAT_AND_INT8)
@pytest.mark.bank("reading", "an option scored without its last token")
def test_an_option_without_its_last_token(runs, monkeypatch, variant):
    whole = protocols.scored_tokens
    monkeypatch.setattr(protocols, "scored_tokens", lambda *args: whole(*args)[:-1])
    assert failed(looked_at(runs("llama", variant))) == {LOGPROBS, GOLDS}


def golds_of_the_token_before(patch):
    """Each token of a gold looked up where the one before it is predicted."""
    whole = protocols.packed_option_sums

    def early(model, hidden, placed, **options):
        return whole(model, hidden, [(start - 1, *rest) for start, *rest in placed], **options)

    patch.setattr(protocols, "packed_option_sums", early)


def a_foil_stored_as_the_gold(patch):
    whole = engine.gold_fields

    def swapped(golds, tokens, loglikelihoods):
        return whole(golds, tokens, loglikelihoods[::-1])

    patch.setattr(engine, "gold_fields", swapped)


def golds_scored_with_their_form(patch):
    """Although the row says that they are scored without."""
    whole = protocols.scored_tokens
    patch.setattr(
        protocols, "scored_tokens", lambda item, branches: whole(replace(item, form=0), branches)
    )


@pytest.mark.parametrize("variant", FLOAT_AND_INT8)
@pytest.mark.bank("reading", "{lapse}", GOLDS)
@pytest.mark.parametrize(
    "lapse",
    [golds_of_the_token_before, a_foil_stored_as_the_gold, golds_scored_with_their_form],
)
def test_log_likelihoods_of_golds(runs, monkeypatch, lapse, variant):
    lapse(monkeypatch)
    wrong = failed(looked_at(runs("llama", variant)))
    assert GOLDS in wrong
    assert wrong <= {GOLDS, LOGPROBS}


@pytest.mark.parametrize("variant", FLOAT_AND_INT8)
@pytest.mark.bank("reading", "golds read after a prompt without its end", LAYERS)
def test_golds_after_a_prompt_without_its_end(runs, monkeypatch, variant):
    """Golds do not see the last tokens of their prompt; the generated answer is right."""
    whole = packed_attention.Segment._mask

    def short(self, window):
        mask = whole(self, window)
        if self.branches and packed_attention.TRUNK not in self.branches:
            mask[:, self.start - 4 : self.start] = False
        return mask

    monkeypatch.setattr(packed_attention.Segment, "_mask", short)
    assert {LAYERS} <= failed(looked_at(runs("llama", variant)))


@pytest.mark.parametrize("variant", FLOAT_AND_INT8)
@pytest.mark.bank("reading", "golds of another item read after a prompt", GOLDS)
def test_golds_of_another_item(runs, monkeypatch, variant):
    whole = engine.answer_tokens

    def others(tokenizer, prompt, texts, ask):
        return whole(tokenizer, prompt, [f"{text}!" for text in texts], ask)

    monkeypatch.setattr(engine, "answer_tokens", others)
    assert failed(looked_at(runs("llama", variant))) == {GOLDS}


@pytest.mark.parametrize("variant", FLOAT_AND_INT8)
@pytest.mark.bank("reading", "the second likeliest token is taken")
def test_the_second_likeliest_token(runs, monkeypatch, variant):
    take = protocols.Decoder._append_tokens

    def second(self, first, logits):
        if first == 0 and self.active and len(self.active[0].tokens) == 2:
            logits = logits.clone().scatter_(1, logits.argmax(1)[:, None], -50.0)
        yield from take(self, first, logits)

    monkeypatch.setattr(protocols.Decoder, "_append_tokens", second)
    assert failed(looked_at(runs("llama", variant))) == {TOKENS}


@pytest.mark.parametrize("variant", FLOAT_AND_INT8)
@pytest.mark.bank("reading", "answers cut short, as if they had ended")
def test_an_answer_cut_short(runs, monkeypatch, variant):
    """The text is the beginning of what the model says, and its end was made up."""
    take = protocols.AnswerInProgress.append_token

    def early(self, token, finite, ends):
        return take(self, token, finite, ends) or ("stop" if len(self.tokens) == 4 else None)

    monkeypatch.setattr(protocols.AnswerInProgress, "append_token", early)
    assert failed(looked_at(runs("llama", variant))) == {TOKENS}


@pytest.mark.parametrize("variant", FLOAT_AND_INT8)
@pytest.mark.bank("text", "loss on the wrong token")
def test_the_loss_on_the_wrong_token(runs, monkeypatch, variant):
    whole = perplexity.passage_rows

    def shifted(passages, tokens, states, reference, **options):
        moved = [[*t[:1], *t[:-1]] for t in tokens]
        return whole(passages, moved, states, reference, **options)

    monkeypatch.setattr(perplexity, "passage_rows", shifted)
    assert failed(looked_at(runs("llama", variant))) == {TEXT}


def a_layer_that_is_skipped(model):
    model.model.layers[1].forward = lambda hidden_states, *_args, **_kwargs: hidden_states


def another_rope(model):
    model.model.rotary_emb.inv_freq *= 1.05


def another_activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()


@torch.no_grad()
def embeddings_moved(model):
    model.model.embed_tokens.weight += 1e-3


@pytest.mark.bank("reading", "{change}", LAYERS, at="the loaded model")
@pytest.mark.parametrize("variant", FLOAT_AND_INT8)
@pytest.mark.parametrize(
    "change", [a_layer_that_is_skipped, another_rope, another_activation, embeddings_moved]
)
def test_another_model_than_that_of_the_files(runs, variant, change):
    assert LAYERS in failed(looked_at(runs("llama", variant), change))


@pytest.mark.bank(
    "rope",
    "positions that depend on the longest text beside",
    LOGPROBS,
    at="the model's rotary embedding",
)
def test_positions_that_depend_on_the_longest_text_beside(runs):
    """Alone a short text is read well; in company its rope is that of long ones."""

    def change(model):
        rope = model.model.rotary_emb
        whole = rope.forward

        def forward(x, position_ids):
            several = int((position_ids == 0).sum()) > 1
            return whole(x, position_ids * (1.02 if several else 1))

        rope.forward = forward

    gates = looked_at(runs("llama", "noquant"), change)
    assert ("arc", LOGPROBS) in {(what, g.name) for what, g in gates if not g.passed}


@pytest.mark.bank("rope", "long texts packed though their positions depend on their length")
def test_texts_packed_whose_positions_depend_on_their_length(tmp_path, monkeypatch):
    """Half of the questions are beyond the limit, and the others are read beside them."""
    run, limit = QuantizedRun(tmp_path, yaml.safe_load(STUDY), "noquant"), 120
    rope = LONGROPE | {"original_max_position_embeddings": limit}
    changes = {"rope_parameters": rope, "original_max_position_embeddings": limit}
    run.save_source("phi3", sliding_window=None, **changes)

    def gate():
        with run.outputs():
            job = run.job
            engine = (*load_variant(job), job.study)
            rows, apart = ask_all(*engine)["arc"], ask_alone(*engine)["arc"]
        return invariance_gate(job.study, "noquant", rows, rows, apart)

    assert gate().passed
    for module in (protocols, perplexity, protocols):
        monkeypatch.setattr(module, "reads_alone", lambda *_: False)
    assert not gate().passed


def test_a_look_that_fails_is_a_gate_that_fails(runs, monkeypatch):
    monkeypatch.setattr("helpers.evaluation.checks.forward_passes.Trace.rows_of", lambda *_: None)
    gates = looked_at(runs("llama", "rtn_w8a8"))
    assert failed(gates) == {LAYERS, LOGPROBS, TOKENS, GOLDS, TEXT}
    assert any("did not read this text" in gate.measured for _, gate in gates)
