"""What a study file may say: models, variants, datasets, and how they are compared.

Every scientific setting is required here and has its value in `params/`, so that a
study file is the whole account of a study. Reading and error messages live in
`helpers.study.loading`.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from helpers.study.schema_fields import Count, Name, Number, Strict, Whole
from helpers.study.schema_sources import DatasetSource, ModelSource
from helpers.study.schema_variants import Variant

Adapter = Literal["arc", "squad_v2", "openmath", "boolq"]


class Runtime(Strict):
    """Where jobs run. `threads` is per job: jobs run side by side.

    `auto` takes the best device of the machine a job runs on, and the dtype that suits it;
    `device_map: auto` spreads a model over all its GPUs. `quantized` is what quantized
    variants are evaluated on: this project's int8 runtime, the simulation of
    compressed-tensors, or vLLM in an environment of its own (`make .venv-vllm/.study-ready`).
    `cost: no` leaves out the measurement of speed and memory; the report says so.
    """

    device: Literal["auto", "cpu", "cuda", "mps"]
    dtype: Literal["auto", "float32", "bfloat16"]
    threads: Count
    quantized: Literal["int8", "reference", "vllm"]
    device_map: Literal["auto"] | None = None
    cost: Annotated[bool, Field(strict=True)] = True


class LogLikelihood(Strict):
    """Each option's text is scored as the continuation of the prompt; the best is the answer."""

    protocol: Literal["loglikelihood"]
    normalize: Literal["bytes", "none"]


class Generate(Strict):
    """The model answers a chat greedily; the answer is parsed from its text.

    `stop: answer` ends an answer with its first complete box, `stop: turn` where the model does.
    """

    protocol: Literal["generate"]
    answer: Literal["boxed", "text"]
    stop: Literal["turn", "answer"]
    shots: Annotated[Whole, Field(ge=0, le=3)]
    max_new_tokens: Annotated[Whole, Field(ge=1, le=32768)]

    @model_validator(mode="after")
    def _a_box_to_stop_at(self):
        if self.stop == "answer" and self.answer != "boxed":
            raise ValueError("stop = 'answer' needs answer = 'boxed'; use stop: turn")
        return self


class EvaluationSet(Strict):
    """The items of one evaluation set, and how the model is asked.

    `keep: numeric_answers` leaves out items whose gold answer is no single number; without
    it all items stay, and gold answers that are no numbers are matched as text.
    """

    adapter: Adapter
    source: DatasetSource
    keep: Literal["numeric_answers"] | None = None
    items: Count
    ask: Annotated[LogLikelihood | Generate, Field(discriminator="protocol")]


class SharedText(Strict):
    """Passages on which perplexity, KL and top-1 agreement are measured."""

    dataset: DatasetSource
    passages: Count
    max_tokens: Annotated[Whole, Field(ge=8)]


class Batch(Strict):
    """The limits of one forward pass; answers do not depend on them.

    At most `tokens` tokens of prompts are read at once, and at most `rows` answers generated.
    """

    tokens: Count
    rows: Count


class Evaluation(Strict):
    """The evaluation sets, and the shared text that every variant reads."""

    batch: Batch
    datasets: Annotated[dict[Name, EvaluationSet], Field(min_length=1)]
    shared_text: SharedText


class Calibration(Strict):
    """The items whose activations set the smoothing and the static scales."""

    adapter: Adapter
    dataset: DatasetSource
    items: Count
    max_tokens: Annotated[Whole, Field(ge=8)]
    batch_tokens: Annotated[Whole, Field(ge=64)]


class Comparison(Strict):
    """`variant` is compared with `baseline` on one metric of one dataset, for one model."""

    model: Name
    dataset: Name
    baseline: Name
    variant: Name


class GradedMargins(Strict):
    """Largest harmless differences of graded scores: probability 0-1, and nats a token."""

    probability: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.03
    nats: Annotated[Number, Field(gt=0.0, lt=10.0)] = 0.05


class Statistics(Strict):
    """Confidence, power, equivalence margins and the declared comparisons."""

    confidence: Annotated[Number, Field(gt=0.5, lt=1.0)]
    power: Annotated[Number, Field(gt=0.5, lt=1.0)]
    margin: Annotated[Number, Field(gt=0.0, lt=1.0)]
    graded_margins: GradedMargins = GradedMargins()
    resamples: Annotated[Whole, Field(ge=100)]
    primary: tuple[Comparison, ...]


class Study(Strict):
    """One YAML file: the whole account of a study.

    `enable_thinking` goes to the chat template of models that think aloud before they
    answer; a study of such a model has to say it.
    `old_rules_chapter` names variants that the report also shows, in one chapter, under the
    rules of the report this project redoes (helpers.statistics.naive_rules); mostly there are
    none.
    """

    title: Annotated[str, Field(min_length=1)]
    seed: Annotated[Whole, Field(ge=0, lt=2**32)]
    runtime: Runtime
    enable_thinking: Annotated[bool, Field(strict=True)] | None = None
    models: Annotated[dict[Name, ModelSource], Field(min_length=1)]
    calibration: Calibration
    variants: Annotated[dict[Name, Variant], Field(min_length=1)]
    baseline: Name
    evaluation: Evaluation
    statistics: Statistics
    old_rules_chapter: tuple[Name, ...] = ()
