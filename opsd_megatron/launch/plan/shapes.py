"""config.json of published models, as far as it decides on memory and FLOPs; a model directory's own comes first."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opsd_megatron.errors import ConfigError


def _qwen(
    family: str, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, positions: int
) -> dict[str, Any]:
    return {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    } | ({"head_dim": 128} if family == "qwen3" else {})


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": _qwen("qwen3", 36, 4096, 12288, 32, 8, 151936, 40960),
    "qwen3-14b": _qwen("qwen3", 40, 5120, 17408, 40, 8, 151936, 40960),
    "qwen3-32b": _qwen("qwen3", 64, 5120, 25600, 64, 8, 151936, 40960),
    "qwen2.5-7b": _qwen("qwen2", 28, 3584, 18944, 28, 4, 152064, 32768),
    "qwen2.5-14b": _qwen("qwen2", 48, 5120, 13824, 40, 8, 152064, 32768),
    "qwen2.5-32b": _qwen("qwen2", 64, 5120, 27648, 40, 8, 152064, 32768),
}


def hf_config_of(path: Path) -> Mapping[str, Any]:
    """Of `path`/config.json, or, where there is no such file, of the published model that `path` is named after.

    Raises:
        ConfigError: neither is known.
    """
    file = path if path.suffix == ".json" else path / "config.json"
    if file.is_file():
        return json.loads(file.read_text())
    name = path.name.lower().removesuffix("-instruct")
    if name not in SHAPES:
        raise ConfigError(
            f"model.path={path}: no config.json there, and not the name of a known model; set --model.path to a model "
            f"directory, a config.json or one of {', '.join(SHAPES)}"
        )
    return SHAPES[name]
