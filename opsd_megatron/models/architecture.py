"""What a Hugging Face config.json says about the network; what it says and is not understood is refused by name."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from opsd_megatron.config import ParallelConfig
from opsd_megatron.errors import CheckpointError, ConfigError

Family = Literal["qwen2", "qwen3", "llama", "mistral"]
FAMILIES: tuple[Family, ...] = ("qwen2", "qwen3", "llama", "mistral")

_NEEDED = {
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
}
_READ = _NEEDED | {
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
}
_WITHOUT_EFFECT = {
    "architectures",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "max_window_layers",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
    "_name_or_path",
}


def _is(*allowed) -> Callable[[Any], bool]:
    return lambda value: value in allowed


_MUST_BE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hidden_act": (_is("silu"), "silu"),
    "attention_bias": (_is(False, None), "false: a bias on the output projection is not supported"),
    "mlp_bias": (_is(False, None), "false"),
    "attention_dropout": (_is(0, 0.0, None), "0"),
    "use_sliding_window": (_is(False, None), "false: sliding windows are not supported"),
    "partial_rotary_factor": (_is(1, 1.0, None), "1"),
    "use_mrope": (_is(False, None), "false"),
    "quantization_config": (_is(None), "none: take the unquantized model"),
    "layer_types": (
        lambda value: value is None or set(value) <= {"full_attention"},
        "full_attention in every layer: sliding windows are not supported",
    ),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions; the parameters of each kind are those of Hugging Face's rope_parameters."""

    theta: float
    kind: Literal["default", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    """Context length of the pre-training that the frequencies are stretched from."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True)
class Architecture:
    """The network of a dense decoder: RMSNorm, SwiGLU, grouped-query attention, rotary positions."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the Hugging Face embedding; Megatron's may have more (`padded_vocab`)."""
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    rope: RopeConfig
    max_positions: int
    hf_config: Mapping[str, Any]
    """config.json as it should be written beside exported weights."""

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices: as many multiply-adds for every token."""
        attention = 2 * self.hidden_size * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.hidden_size * self.ffn_size

    @property
    def pair_cost(self) -> float:
        """FLOPs of attention for one (query, key) pair over those of the layers' matrices for one token."""
        return 2 * self.heads * self.head_dim / self.layer_weights


def read_architecture(
    hf_dir: Path, yarn_factor: float | None = None, yarn_original_positions: int | None = None
) -> Architecture:
    """The architecture of a model directory.

    `yarn_factor` stretches a model with plain rotary positions (YaRN, arXiv:2309.00071) and is written into
    `hf_config`, so that servers of exported weights compute the same.

    Raises:
        CheckpointError: no readable config.json.
        ConfigError: the config asks for something that is not implemented here; the message names the key.
    """
    path = Path(hf_dir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; model.path must be a Hugging Face model directory") from error
    return architecture_of(config, yarn_factor, yarn_original_positions, source=str(path))


def architecture_of(
    config: Mapping[str, Any],
    yarn_factor: float | None = None,
    yarn_original_positions: int | None = None,
    source: str = "config",
) -> Architecture:
    """The architecture of a parsed config.json; errors as `read_architecture`."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"{source}: model_type={family!r} is not one of {', '.join(FAMILIES)}")
    _refuse_unknown(config, family, source)
    if missing := sorted(key for key in _NEEDED if config.get(key) is None):
        raise ConfigError(f"{source}: {', '.join(missing)} missing; nothing is assumed for these")
    rope = _read_rope(config, source)
    if yarn_factor is not None:
        original = yarn_original_positions or config["max_position_embeddings"]
        rope, config = _stretch(rope, config, yarn_factor, original, source)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if config.get("head_dim") is None and family == "qwen3":
        raise ConfigError(f"{source}: head_dim missing; a qwen3 config must state it")
    return Architecture(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        ffn_size=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        norm_eps=config["rms_norm_eps"],
        rope=rope,
        max_positions=config["max_position_embeddings"],
        hf_config=dict(config),
    )


def check_layout(architecture: Architecture, parallel: ParallelConfig) -> None:
    """ConfigError where the layout does not divide the network."""
    for name, count in (
        ("attention heads", architecture.heads),
        ("key-value heads", architecture.kv_heads),
        ("MLP columns", architecture.ffn_size),
    ):
        if count % parallel.tp:
            raise ConfigError(
                f"parallel.tp={parallel.tp} does not divide the model's {count} {name}; lower parallel.tp"
            )
    chunks = parallel.pp * (parallel.vpp or 1)
    if architecture.num_layers % chunks:
        given = f"parallel.pp={parallel.pp}" + (f" x parallel.vpp={parallel.vpp}" if parallel.vpp else "")
        raise ConfigError(
            f"{given} = {chunks} model chunks do not divide {architecture.num_layers} layers; choose a divisor"
        )


def padded_vocab(architecture: Architecture, tp: int) -> int:
    """Rows of Megatron's embedding: the vocabulary rounded up to a multiple of tp."""
    return -(-architecture.vocab_size // tp) * tp


def _refuse_unknown(config: Mapping[str, Any], family: str, source: str) -> None:
    for key, value in config.items():
        if key in _MUST_BE:
            allowed, expected = _MUST_BE[key]
            if not allowed(value):
                raise ConfigError(f"{source}: {key}={value!r} is not supported; expected {expected}")
        elif key == "sliding_window":
            # qwen configs keep a window that use_sliding_window switches off; elsewhere it is active where it is set
            if value is not None and family not in ("qwen2", "qwen3"):
                raise ConfigError(f"{source}: sliding_window={value} is not supported; expected null")
        elif key not in _READ and key not in _WITHOUT_EFFECT:
            raise ConfigError(
                f"{source}: {key}={value!r} is not understood; remove it if it does not change what the model computes"
            )


def _read_rope(config: Mapping[str, Any], source: str) -> RopeConfig:
    """From transformers 5's `rope_parameters`, or `rope_theta` and `rope_scaling` before it."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = given.pop("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ConfigError(f"{source}: rope_theta missing, in rope_parameters and beside it")
    if config.get("rope_theta") not in (None, theta):
        raise ConfigError(f"{source}: rope_theta={config['rope_theta']} contradicts rope_parameters.rope_theta={theta}")
    legacy = given.pop("type", None)
    kind = given.pop("rope_type", legacy) or "default"
    if given.pop("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise ConfigError(f"{source}: partial_rotary_factor in rope_parameters is not supported; expected 1")
    needed = {
        "default": set(),
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        "yarn": {"factor", "original_max_position_embeddings"},
    }
    optional = {"yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}}
    if kind not in needed:
        raise ConfigError(f"{source}: rope_type={kind!r} is not supported; expected one of {', '.join(needed)}")
    values = {key: value for key, value in given.items() if value is not None}
    if missing := sorted(needed[kind] - set(values)):
        raise ConfigError(f"{source}: rope_type={kind} needs {', '.join(missing)} in rope_parameters")
    if unknown := sorted(set(values) - needed[kind] - optional.get(kind, set())):
        raise ConfigError(f"{source}: rope_type={kind} with {', '.join(unknown)} is not understood")
    original = values.pop("original_max_position_embeddings", 0)
    return RopeConfig(theta=float(theta), kind=kind, original_max_positions=original, **values)


def _stretch(rope: RopeConfig, config: Mapping[str, Any], factor: float, original: int, source: str):
    if rope.kind != "default":
        raise ConfigError(
            f"model.yarn_factor={factor} needs plain rotary positions, but {source} has rope_type={rope.kind}; "
            "set model.yarn_factor to None"
        )
    if factor < 1:
        raise ConfigError(f"model.yarn_factor={factor}: 1 or more")
    positions = max(config["max_position_embeddings"], int(factor * original))
    config = {**config, "max_position_embeddings": positions}
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if "rope_parameters" in config:
        written = {**config, "rope_parameters": {**scaling, "rope_theta": rope.theta}}
    else:
        written = {**config, "rope_scaling": scaling}
    return replace(rope, kind="yarn", factor=factor, original_max_positions=original), written
