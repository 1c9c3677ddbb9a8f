"""The one table of weight names: Hugging Face <-> Megatron-Core's local layer spec.

Loading, exporting, the converter and weight publication all walk these rows. A new family is a new entry in `FAMILIES`,
with rows of its own where its names or conditions differ. Shapes are written in the words of `dimensions`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from opsd_megatron.errors import CheckpointError
from opsd_megatron.models.architecture import Architecture

Merge = Literal["copy", "qkv", "gate_up"]
Condition = Literal["always", "untied", "qkv_bias", "qk_norm"]


@dataclass(frozen=True)
class HfTensor:
    """A tensor of a Hugging Face checkpoint; `{layer}` is the layer's index in the whole model."""

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class WeightRow:
    """One Megatron parameter and the Hugging Face tensors that it is made of."""

    megatron: str
    """Name in the whole model: `{layer}` counts over all pipeline stages (an `{expert}` would, over all experts)."""
    parts: tuple[HfTensor, ...]
    merge: Merge = "copy"
    tp_dim: int | None = None
    """Dimension cut over tp, of each part as of the merged parameter; None is replicated."""
    expert_dim: int | None = None
    """Dimension cut over expert-parallel ranks; no row of a dense family has one."""
    when: Condition = "always"
    fused: str | None = None
    """Its name in Transformer Engine's spec, where that differs: a norm is part of the linear behind it. Core stores
    either spec under this name."""


@dataclass(frozen=True)
class Weight:
    """A row with its layer filled in, for one model."""

    row: WeightRow
    layer: int | None
    megatron: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]

    @property
    def stored(self) -> str:
        """The key under which core's distributed checkpoints keep it."""
        return (self.row.fused or self.row.megatron).replace("{layer}", str(self.layer))

    @property
    def is_vocabulary(self) -> bool:
        """Megatron's tensor may have more rows than Hugging Face's: padding."""
        return self.row.parts[0].shape[0] == "vocab"


def _layer(name: str, *shape: str) -> HfTensor:
    return HfTensor(f"model.layers.{{layer}}.{name}", shape)


def _qkv(kind: str, *columns: str) -> tuple[HfTensor, ...]:
    return tuple(
        _layer(f"self_attn.{part}_proj.{kind}", rows, *columns)
        for part, rows in (("q", "query"), ("k", "key_value"), ("v", "key_value"))
    )


EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
_ATTENTION = "decoder.layers.{layer}.self_attention."
_MLP = "decoder.layers.{layer}.mlp."

_FIRST = (WeightRow(EMBEDDING, (HfTensor("model.embed_tokens.weight", ("vocab", "hidden")),), tp_dim=0),)
_LAYER = (
    WeightRow(
        "decoder.layers.{layer}.input_layernorm.weight",
        (_layer("input_layernorm.weight", "hidden"),),
        fused=_ATTENTION + "linear_qkv.layer_norm_weight",
    ),
    WeightRow(_ATTENTION + "linear_qkv.weight", _qkv("weight", "hidden"), merge="qkv", tp_dim=0),
    WeightRow(_ATTENTION + "linear_qkv.bias", _qkv("bias"), merge="qkv", tp_dim=0, when="qkv_bias"),
    WeightRow(_ATTENTION + "q_layernorm.weight", (_layer("self_attn.q_norm.weight", "head_dim"),), when="qk_norm"),
    WeightRow(_ATTENTION + "k_layernorm.weight", (_layer("self_attn.k_norm.weight", "head_dim"),), when="qk_norm"),
    WeightRow(_ATTENTION + "linear_proj.weight", (_layer("self_attn.o_proj.weight", "hidden", "query"),), tp_dim=1),
    WeightRow(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        (_layer("post_attention_layernorm.weight", "hidden"),),
        fused=_MLP + "linear_fc1.layer_norm_weight",
    ),
    WeightRow(
        _MLP + "linear_fc1.weight",
        (_layer("mlp.gate_proj.weight", "ffn", "hidden"), _layer("mlp.up_proj.weight", "ffn", "hidden")),
        merge="gate_up",
        tp_dim=0,
    ),
    WeightRow(_MLP + "linear_fc2.weight", (_layer("mlp.down_proj.weight", "hidden", "ffn"),), tp_dim=1),
)
_LAST = (
    WeightRow(FINAL_NORM, (HfTensor("model.norm.weight", ("hidden",)),)),
    WeightRow(HEAD, (HfTensor("lm_head.weight", ("vocab", "hidden")),), tp_dim=0, when="untied"),
)
_DENSE = (*_FIRST, *_LAYER, *_LAST)

FAMILIES: dict[str, tuple[WeightRow, ...]] = {"qwen2": _DENSE, "qwen3": _DENSE, "llama": _DENSE, "mistral": _DENSE}

IGNORABLE_SUFFIXES = (".rotary_emb.inv_freq",)
"""Buffers that old files carry and that follow from the config."""


def dimensions(architecture: Architecture) -> dict[str, int]:
    """Sizes of the words that shapes are written in."""
    return {
        "vocab": architecture.vocab_size,
        "hidden": architecture.hidden_size,
        "ffn": architecture.ffn_size,
        "head_dim": architecture.head_dim,
        "query": architecture.heads * architecture.head_dim,
        "key_value": architecture.kv_heads * architecture.head_dim,
    }


def weights_of(architecture: Architecture) -> Iterator[Weight]:
    """Every weight of the model: embedding, layer by layer, final norm, head; CheckpointError for an unknown family."""
    if architecture.family not in FAMILIES:
        raise CheckpointError(
            f"no weight rows for family {architecture.family!r}; known: {sorted(FAMILIES)}; add its rows to FAMILIES"
        )
    rows = [row for row in FAMILIES[architecture.family] if _holds(row.when, architecture)]
    layered = [row for row in rows if "{layer}" in row.megatron]
    first = rows.index(layered[0])
    yield from (_fill(row, architecture) for row in rows[:first])
    for layer in range(architecture.num_layers):
        yield from (_fill(row, architecture, layer) for row in layered)
    yield from (_fill(row, architecture) for row in rows[first + len(layered) :])


def _holds(condition: Condition, architecture: Architecture) -> bool:
    return {
        "always": True,
        "untied": not architecture.tied,
        "qkv_bias": architecture.qkv_bias,
        "qk_norm": architecture.qk_norm,
    }[condition]


def _fill(row: WeightRow, architecture: Architecture, layer: int | None = None) -> Weight:
    sizes = dimensions(architecture)
    return Weight(
        row,
        layer,
        row.megatron.replace("{layer}", str(layer)),
        tuple(part.name.replace("{layer}", str(layer)) for part in row.parts),
        tuple(tuple(sizes[word] for word in part.shape) for part in row.parts),
    )
