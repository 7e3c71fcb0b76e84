"""An evaluation as 03_evaluation makes it, on a tiny quantized run, for tests to break.

A test hands over a function that changes the loaded model, or patches what runs; the names of
the gates that fail come back.
"""

from types import MethodType

import torch
from torch.nn.functional import linear

from helpers.evaluation.checks.evaluation_data import ask_alone, opinion_gates
from helpers.evaluation.checks.recorded_calls import PACKED, SHARED_TEXT, call_gates, call_recorder
from helpers.evaluation.checks.second_opinion import open_second_opinion
from helpers.evaluation.engine import ask_all
from helpers.inference import perplexity, protocols
from helpers.inference.perplexity import passage_rows, passage_tokens, read_passages
from helpers.quantization.int8_linear import Int8Linear
from helpers.quantization.variants import load_variant
from helpers.sources.sampling import shared_passages


def loaded(job, change=None):
    """(model, tokenizer) as 03_evaluation loads them, and what is done to the model afterwards."""
    model, tokenizer = load_variant(job)
    if kv := job.recipe.kv:
        protocols.prove_engine(model)
        protocols.keep_keys_and_values(model, kv, at=job.variant)
    if change:
        change(model)
    return model, tokenizer


def asked(run, change=None, *, resumed=None):
    """The gates on the calls of one evaluation.

    Args:
        change: what is done to the model after it is loaded.
    """
    with run.outputs():
        job = run.job
        model, tokenizer = loaded(job, change)
        calls = call_recorder(job, model)
        with calls.during(PACKED):
            predictions = ask_all(model, tokenizer, job.study)
        wanted, passages = job.study.evaluation.shared_text, shared_passages(job.study)
        tokens = passage_tokens(tokenizer, passages, max_tokens=wanted.max_tokens)
        with calls.during(SHARED_TEXT):
            states = read_passages(model, tokens, batch_tokens=job.study.evaluation.batch.tokens)
            first = perplexity.first_scored_token(tokenizer)
            rows = passage_rows(passages, tokens, states, None, first=first)
        return call_gates(job, calls, predictions, rows, resumed or {})


def looked_at(run, change=None):
    """The gates that transformers' own forward pass gives on answers, as (what, Gate).

    Args:
        change: what is done to the model after it is loaded.
    """
    with run.outputs():
        job = run.job
        model, tokenizer = loaded(job, change)
        wanted, passages = job.study.evaluation, shared_passages(job.study)
        tokens = passage_tokens(tokenizer, passages, max_tokens=wanted.shared_text.max_tokens)
        states = read_passages(model, tokens, batch_tokens=wanted.batch.tokens)
        first = perplexity.first_scored_token(tokenizer)
        rows = perplexity.passage_rows(passages, tokens, states, None, first=first)
        predictions = ask_all(model, tokenizer, job.study)
        opinion = open_second_opinion(job, model, tokenizer)
        ask_alone(model, tokenizer, job.study, opinion)
        return opinion_gates(job, model, tokenizer, opinion, predictions, rows)


def failed(gates) -> set[str]:
    return {gate.name for gate in gates if not gate.passed}


def each_int8(model, forward) -> None:
    """Give every int8 Linear another forward."""
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.forward = MethodType(forward, module)


def multiplied(module, x, scale, *, rounding=torch.round):
    """An int8 product written out, with a scale and a rule of rounding of its own."""
    scale = torch.as_tensor(scale).clamp(min=1e-30)  # rows without an answer may be all zero
    levels = rounding(x.float() / scale).clamp(-128, 127)
    y = (levels.double() @ module.weight_t.double()).float() * scale * module.weight_scale
    y = y if module.bias is None else y + module.bias.float()
    return y.to(x.dtype)


def scale_of_each_token(x):
    return x.float().abs().amax(-1, keepdim=True) / 127.5


def dequantized(module, x):
    """The Linear with float activations."""
    weight = (module.weight_t.float() * module.weight_scale).T
    bias = None if module.bias is None else module.bias.float()
    return linear(x.float(), weight, bias).to(x.dtype)


def in_bfloat16(module, x):
    """A float Linear multiplied in bfloat16 and given in its own type."""
    bias = None if module.bias is None else module.bias.bfloat16()
    return linear(x.bfloat16(), module.weight.bfloat16(), bias).to(x.dtype)
