"""Tiny random models of every family, written by transformers as Hugging Face directories."""

from pathlib import Path
from typing import Any

import torch

VOCAB = 250  # no multiple of 4 or 8: padding is part of every tp test
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}


def write_tiny_model(directory: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A seeded float32 model whose logits reach about 3; `changes` are fields of the Hugging Face config.

    Every weight that starts as 1 or 0 (norms, biases) is random, so that no layer is an identity.
    """
    model = tiny_model(family, seed, **changes)
    model.save_pretrained(directory)
    return Path(directory)


def tiny_model(family: str, seed: int = 0, **changes: Any):
    """The transformers model that `write_tiny_model` writes."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
            else:
                width = 0.65 if name.endswith(("embed_tokens.weight", "lm_head.weight")) else 1.0
                parameter.copy_(width * parameter.shape[-1] ** -0.5 * torch.randn_like(parameter))
    return model


def tiny_config(family: str, **changes: Any):
    """4 layers, 4 query and 2 key-value heads; Qwen3's heads are wider than hidden / heads."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    classes = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig, "mistral": MistralConfig}
    own = {
        "qwen2": {"rope_parameters": PLAIN},
        "qwen3": {"rope_parameters": PLAIN, "head_dim": 24},
        "llama": {"rope_parameters": LLAMA3},
        "mistral": {"rope_parameters": PLAIN, "sliding_window": None},
    }
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        **own[family],
        **changes,
    }
    fields["rope_parameters"] = dict(fields["rope_parameters"])  # transformers writes into it
    return classes[family](**fields)
