"""Rotation and core attention over a token tree, as Megatron's attention layer calls it, and what carries the tree."""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from opsd_megatron.errors import ConfigError
from opsd_megatron.models.rotary import Rotation, rotate
from opsd_megatron.parallel.context import ContextShard
from opsd_megatron.parallel.ring_attention import ring_attention


@dataclass
class ShardCarrier(PackedSeqParams):
    """Takes a shard and its rotary positions through Megatron's layers to attention.

    With `qkv_format` other than thd core leaves q, k and v as [tokens, 1, heads, head_dim].
    """

    qkv_format: str = "sbhd"
    shard: ContextShard | None = None
    rotation: Rotation | None = None


class TreeAttention(torch.nn.Module):
    """softmax(scale * q k^T) v of rotated q and k; a token sees its ancestors in the shard's tree; a ring over cp."""

    def __init__(
        self,
        *,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        cp_comm_type=None,
        softmax_scale=None,
        pg_collection=None,
    ):
        super().__init__()
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask=None,
        *,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params: ShardCarrier | None = None,
    ) -> Tensor:
        """[tokens, 1, heads * head_dim] from [tokens, 1, heads or kv_heads, head_dim]."""
        if packed_seq_params is None or packed_seq_params.shard is None or packed_seq_params.rotation is None:
            raise ValueError("TreeAttention needs the shard in packed_seq_params; call the model as model(shard)")
        query, key = (rotate(heads.squeeze(1), packed_seq_params.rotation) for heads in (query, key))
        mixed = self._mix(query, key, value.squeeze(1), packed_seq_params.shard)
        return mixed.reshape(mixed.shape[0], 1, -1)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, shard: ContextShard) -> Tensor:
        return ring_attention(query, key, value, shard, self.scale)


class EngineAttention(TreeAttention):
    """Transformer Engine's attention, with its own ring over cp, where the shard is one plain sequence dealt as it
    deals them; the tree's own elsewhere."""

    def __init__(self, *, config, layer_number, attention_type, pg_collection=None, **others):
        super().__init__(
            config=config,
            layer_number=layer_number,
            attention_type=attention_type,
            pg_collection=pg_collection,
            **others,
        )
        from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention

        if not HAVE_TE:
            raise ConfigError(
                'model.attention=te needs Transformer Engine: pip install "opsd-megatron[te]", or use ring'
            )
        self.engine = TEDotProductAttention(
            config, layer_number, AttnMaskType.causal, attention_type, None, self.scale, pg_collection=pg_collection
        )

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, shard: ContextShard) -> Tensor:
        if not shard.is_plain:
            return super()._mix(query, key, value, shard)
        heads = (part.unsqueeze(1) for part in (query, key, value))  # [tokens, 1, heads, head_dim]
        return self.engine(*heads, None, AttnMaskType.causal).squeeze(1)
