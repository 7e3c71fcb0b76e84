"""A model with seeded random weights and a byte-level tokenizer: tiny, or of a real size.

It speaks nonsense; what it shares with a real model is its architecture, its file
layout and its chat format, and at full size its time and memory.
"""

from pathlib import Path

from helpers.core.cached_folders import cached_folder
from helpers.core.hashing import canonical_json, sha256_text
from helpers.core.paths import cache_root

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

    from helpers.runtime.moe_experts import linear_experts

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
        (model if size == "tiny" else model.bfloat16()).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)

    name = f"random-{family}-{size}-{seed}-{config_hash}"
    return cached_folder(cache_root() / "models" / name, fill)
