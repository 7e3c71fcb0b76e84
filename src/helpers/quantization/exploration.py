"""One Linear at any α, and one text token by token: what notebooks/explore.ipynb looks into.

Nothing is written, and no stage imports this module.

A Linear is read from files alone: the calibrated statistics of its input and the weights of the
float model. No input is stored, so that the SQNR is taken on drawn tokens whose channels have the
calibrated median, 99th percentile and maximum, independently of each other. On the demo's 210
Linears that SQNR is 2 dB below the one measured on real inputs, while what smoothing adds to it is
right within 1 dB (NOTES.md).

A text is read by the float model and by a variant, each loaded as its evaluation loads it. KL and
both models' likeliest tokens belong to the token that is predicted.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.core.architectures import Place
from helpers.core.errors import StudyError, valid_unicode
from helpers.core.records import check_checksums, read_json, sha256_folder
from helpers.inference import vllm_client
from helpers.inference.packed_attention import logits_at
from helpers.inference.perplexity import HiddenStates, first_scored_token, log_softmax
from helpers.inference.protocols import HEAD_ROWS, hidden_states
from helpers.quantization.calibration import SmoothingGroup
from helpers.quantization.channel_maxima import channel_maxima
from helpers.quantization.simulation import SmoothedLinear, decibels
from helpers.quantization.smoothing import ChannelSmoothing, representable_scales, smoothing_scales
from helpers.quantization.variants import load_variant
from helpers.runtime.discovery import places
from helpers.sources.chat import plain_tokens
from helpers.sources.model_files import TensorFiles, load_config
from helpers.sources.models import model_folder
from helpers.study.loading import Job
from helpers.study.schema import Variant

DRAWN_TOKENS = 64
SEED = 20261127  # of the drawn tokens: the same for every α, so that only α moves the SQNR
TOP = 5  # likeliest next tokens shown of each model


def drawn_tokens(
    absmax: Tensor, p99: Tensor, median: Tensor, *, calibrated: int, rows: int
) -> Tensor:
    """(rows, in_features) seeded draws with the calibrated quantiles of every channel.

    |x| is piecewise linear in -log of the share of tokens that exceed it, through 0 (all tokens),
    the median (half of them), the 99th percentile (1 %) and the maximum (one token). Channels are
    independent, and signs are even.

    Args:
        absmax, p99, median: (in_features,) of |x| over the calibration tokens.
        calibrated: the number of calibration tokens.
        rows: the number of tokens to draw.
    """
    generator = torch.Generator().manual_seed(SEED)
    shape = (rows, len(absmax))
    depth = -(1 - torch.rand(shape, generator=generator)).log()  # (0, 1] to [0, ∞)
    knots = [0.0, math.log(2), math.log(100), math.log(max(calibrated, 101))]
    levels = [torch.zeros_like(absmax), median, p99, absmax]
    magnitude = torch.zeros(shape)
    for k in range(len(knots) - 1):
        part = ((depth - knots[k]) / (knots[k + 1] - knots[k])).clamp(0, 1)
        magnitude += part * (levels[k + 1] - levels[k])
    return torch.where(torch.rand(shape, generator=generator) < 0.5, magnitude, -magnitude)


@dataclass(frozen=True)
class _Linear:
    """A Linear with its calibrated input, as read from the files.

    Attributes:
        place: what feeds it, and the Linears that read the same input.
        weight: (out_features, in_features) float32.
        act_absmax: (in_features,) calibrated abs-max of its input.
        weight_absmax: (in_features,) abs-max over all Linears that read the input.
        tokens: (DRAWN_TOKENS, in_features) drawn inputs.
    """

    place: Place
    weight: Tensor
    act_absmax: Tensor
    weight_absmax: Tensor
    tokens: Tensor


class CalibratedLinears:
    """The Linears of a job's float model, by its files and its calibration.

    Args:
        job: names the model; its runtime is settled (`helpers.runtime.devices.prepare`).

    Attributes:
        names: every calibrated Linear, in layer order.

    Raises:
        StudyError: a file is missing, or the model is not the one that was calibrated.
    """

    def __init__(self, job: Job):
        source = calibrated_source(job)
        self._config = load_config(source)
        self._weights = TensorFiles(source, dtype=getattr(torch, job.study.runtime.dtype))
        self._statistics = load_file(job.paths.calibration(job.model) / "activations.safetensors")
        self._places = {name: place for place in places(self._config) for name in place.consumers}
        self.names = [name for name in self._places if f"{name}.absmax" in self._statistics]
        self._linear = lru_cache(maxsize=1)(self._read_linear)

    def _read_linear(self, name: str) -> _Linear:
        place = self._places[name]
        absmax, p99, median = (
            self._statistics[f"{name}.{statistic}"].float()
            for statistic in ("absmax", "p99", "median")
        )
        calibrated = int(self._statistics[f"{name}.tokens"])
        return _Linear(
            place,
            self._weight(name).float(),
            absmax,
            torch.stack([self._weight(n).abs().amax(0) for n in place.consumers]).amax(0).float(),
            drawn_tokens(absmax, p99, median, calibrated=calibrated, rows=DRAWN_TOKENS),
        )

    def _weight(self, module: str) -> Tensor:
        return self._weights[f"{module}.weight"]

    def unfoldable_reason(self, name: str) -> str | None:
        """The reason why no scales can be folded before this Linear; None if they can."""
        return self._places[name].refusal.format(config=self._config) or None

    def siblings(self, name: str) -> tuple[str, ...]:
        """The Linears that read the same input, itself among them, in the family's order."""
        return self._places[name].consumers

    def producer(self, name: str) -> str:
        """The norm or Linear whose output channels are divided by s; empty if none can be."""
        return self._places[name].producer

    def smoothing(self, name: str, *, alpha: float | None) -> ChannelSmoothing:
        """The channels of a Linear's input and of the weights that read it, smoothed with α.

        Args:
            alpha: in [0, 1]; None for no smoothing.
        """
        linear = self._linear(name)
        place, scales = linear.place, self._scales(linear, alpha)
        group = SmoothingGroup(
            place.target,
            place.producer,
            place.consumers,
            place.readers,
            place.norm_offset,
        )
        channel = channel_maxima(linear.act_absmax.numpy()).channel
        equation_scales = self._equation_scales(linear, alpha)
        return ChannelSmoothing(
            group,
            channel,
            alpha,
            linear.act_absmax.numpy(),
            linear.weight_absmax.numpy(),
            float(equation_scales[channel]),
            scales.numpy(),
        )

    def sqnr(self, name: str, *, alpha: float | None, variant: Variant) -> float:
        """SQNR in dB of a Linear's int8 output on the drawn tokens.

        Args:
            alpha: in [0, 1]; None for no smoothing.
            variant: gives the granularities; of a float variant, per channel and per token.
        """
        linear = self._linear(name)
        scales = self._scales(linear, alpha)
        smoothed = SmoothedLinear(
            linear.tokens / scales, linear.weight * scales, linear.act_absmax / scales
        )
        exact = smoothed.exact()
        noise = exact - smoothed.rounded(variant)
        return decibels(exact.square().sum().item(), noise.square().sum().item())

    def _equation_scales(self, linear: _Linear, alpha: float | None) -> Tensor:
        if alpha is None:
            return torch.ones_like(linear.act_absmax)
        return smoothing_scales(linear.act_absmax, linear.weight_absmax, alpha=alpha)

    def _scales(self, linear: _Linear, alpha: float | None) -> Tensor:
        """(in_features,) s as the producer can hold it."""
        scales, place = self._equation_scales(linear, alpha), linear.place
        if alpha is None or not place.producer:
            return scales
        producer = self._weight(place.producer)
        if producer.ndim > 1:
            return scales
        return representable_scales(producer, scales, norm_offset=place.norm_offset).float()


def calibrated_source(job: Job):
    """The folder of the job's float model, which is the one that was calibrated.

    Raises:
        StudyError: the model or its calibration is missing or has changed.
    """
    folder = job.paths.calibration(job.model)
    check_checksums(folder, made_by="01_calibration")
    record = read_json(folder / "record.json", made_by="01_calibration")
    source = model_folder(job.study, job.model, job.paths)
    if record["inputs"]["model"] != sha256_folder(source):
        raise StudyError(
            f"{job.model}: its files are not those that were calibrated; run make study again"
        )
    return source


class StudyLinears:
    """The calibrated Linears of every model of a study, each model opened when it is needed.

    Args:
        job: of the study, its runtime settled.
    """

    def __init__(self, job: Job):
        self._job = job
        self.of = lru_cache(maxsize=None)(self._of)

    def _of(self, model: str) -> CalibratedLinears:
        return CalibratedLinears(replace(self._job, model=model))


@dataclass(frozen=True)
class TokenDivergence:
    """One token of a text, as the float model and a variant predicted it.

    Attributes:
        text: the token's part of the text; empty for all but the first of the tokens that only
            together make a character.
        kl: KL(float ‖ variant) in nats between the two distributions of this token, given the
            tokens before; None for a token that nothing predicts.
        float_top, variant_top: the likeliest tokens with their probabilities, largest first.
    """

    text: str
    kl: float | None
    float_top: tuple[tuple[str, float], ...] = ()
    variant_top: tuple[tuple[str, float], ...] = ()


class TextReader:
    """Reads texts with the float model of a study and with a variant of it.

    At most one float model and one variant are in memory.

    Args:
        job: of the study, its runtime settled.
    """

    def __init__(self, job: Job):
        self._job = job
        self._loaded: dict[str, tuple] = {}  # by role: (model, variant), what was loaded

    def _load(self, role: str, model: str, variant: str):
        """(model, tokenizer), loaded unless the role has them."""
        key, loaded = self._loaded.get(role, (None, None))
        if key != (model, variant):
            self._loaded.pop(role, None)
            if loaded and vllm_client.is_served(loaded[0]):
                loaded[0].close()
            job = replace(self._job, model=model, variant=variant)
            calibrated_source(job)
            self._loaded[role] = (model, variant), load_variant(job)
        return self._loaded[role][1]

    @torch.inference_mode()
    def read(self, text: str, *, model: str, variant: str) -> list[TokenDivergence]:
        """Every token of a text with its KL and both models' likeliest tokens.

        Raises:
            StudyError: the text has no token that is predicted, or is longer than the context.
        """
        float_model, tokenizer = self._load("float", model, self._job.study.baseline)
        tokens, pieces = token_pieces(tokenizer, valid_unicode(text))
        first = first_scored_token(tokenizer)
        if len(tokens) <= first:
            raise StudyError(f"the text has {len(tokens)} tokens; give at least {first + 1}")
        if len(tokens) > (limit := float_model.config.max_position_embeddings):
            raise StudyError(f"the text has {len(tokens)} tokens but the model reads {limit}")
        quantized, _ = self._load("variant", model, variant)
        states = [text_states(each, tokens) for each in (float_model, quantized)]
        rows = [TokenDivergence(piece, None) for piece in pieces[:first]]
        for start in range(first - 1, len(tokens) - 1, HEAD_ROWS):
            chunk = slice(start, min(start + HEAD_ROWS, len(tokens) - 1))
            logprobs = [log_softmax(s.head(s.hidden[chunk])).cpu() for s in states]
            texts = pieces[chunk.start + 1 : chunk.stop + 1]
            rows += token_divergences(tokenizer, texts, *logprobs)
        return rows


def text_states(model, tokens: list[int]) -> HiddenStates:
    """The model's states at every token of one text that has a next one."""
    if vllm_client.is_served(model):
        return HiddenStates(vllm_client.passage_states(model, [tokens]), model.head)
    return HiddenStates(hidden_states(model, tokens[:-1]), lambda x: logits_at(model, x))


def token_divergences(
    tokenizer, texts: list[str], float_logprobs: Tensor, variant_logprobs: Tensor
) -> list[TokenDivergence]:
    """One row a token, of (tokens, vocabulary) log-probabilities."""
    terms = float_logprobs.exp() * (float_logprobs - variant_logprobs)
    kl = terms.sum(-1, dtype=torch.float64).tolist()
    tops = [likeliest(tokenizer, logprobs) for logprobs in (float_logprobs, variant_logprobs)]
    return [TokenDivergence(*row) for row in zip(texts, kl, *tops, strict=True)]


def likeliest(tokenizer, logprobs: Tensor) -> list[tuple[tuple[str, float], ...]]:
    """The TOP likeliest tokens of every row of (tokens, vocabulary), with probabilities."""
    best = logprobs.topk(TOP, dim=-1)
    tokens = [_token_texts(tokenizer, row) for row in best.indices.tolist()]
    shares = best.values.exp().tolist()
    return [tuple(zip(*row, strict=True)) for row in zip(tokens, shares, strict=True)]


def _token_texts(tokenizer, tokens: list[int]) -> list[str]:
    return [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in tokens]


def token_pieces(tokenizer, text: str) -> tuple[list[int], list[str]]:
    """Token ids of a text as evaluation reads it, and each token's part of the text.

    The parts together are the text, after what the tokenizer puts before it. Of several tokens
    that only together make a character, the first has it.
    """
    tokens = plain_tokens(tokenizer, text)
    if not tokenizer.is_fast:  # it does not say which characters a token stands for
        return tokens, _token_texts(tokenizer, tokens)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    added = len(tokens) - len(offsets)
    pieces = _token_texts(tokenizer, tokens[:added])
    start = 0
    for place, (_, end) in enumerate(offsets, start=1):
        end = len(text) if place == len(offsets) else max(end, start)
        pieces.append(text[start:end])
        start = end
    return tokens, pieces
