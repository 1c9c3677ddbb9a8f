"""Exact attention over a token tree that is dealt to cp ranks: keys and values travel round a ring of ranks.

Each rank keeps its queries. On hop h it holds the keys and values of rank (own - h) mod size, sends them on while it
computes on them, and merges what it computed by log-sum-exp:  lse = log(e^lse1 + e^lse2),
out = out1 e^(lse1 - lse) + out2 e^(lse2 - lse).  (Ring Attention, Liu, Zaharia and Abbeel 2023, section 3.)

With c = local_tokens * kv_heads * head_dim * element_size, one rank sends 2 (W-1) c bytes in forward, and in backward
2 (W-1) c for keys and values again and 2 W c' for their gradients, which travel home (c' = c in float32).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.context import ContextShard
from opsd_megatron.parallel.flash import flash_backward, flash_forward

_KEY_VALUE_TAG, _GRADIENT_TAG = 1, 2


def ring_attention(
    query: Float[Tensor, "local_tokens heads head_dim"],
    key: Float[Tensor, "local_tokens kv_heads head_dim"],
    value: Float[Tensor, "local_tokens kv_heads head_dim"],
    shard: ContextShard,
    scale: float,
) -> Float[Tensor, "local_tokens heads head_dim"]:
    """softmax(scale * query key^T) value over all tokens that each local token sees, wherever they are held.

    Collective over `shard.cp`, in forward and in backward; silent when that axis has one rank. Padding tokens get
    output 0 and pass no gradient. Sums are kept in float32 (float64 for float64 inputs).
    """
    if query.shape[0] != shard.local_tokens:
        raise ValueError(f"{query.shape[0]} queries for a shard of {shard.local_tokens} local tokens")
    return _RingAttention.apply(query, key, value, shard, scale)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, shard: ContextShard, scale: float):
        key_value = torch.stack((key, value))  # [2, local_tokens, kv_heads, head_dim], one message per hop
        out, lse = _attend(query, key_value, shard, scale)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key_value, out, lse)
        ctx.shard, ctx.scale = shard, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key_value, out, lse = ctx.saved_tensors
        grad_query, grad_key_value = _attend_backward(grad_out, query, key_value, out, lse, ctx.shard, ctx.scale)
        grad_key, grad_value = grad_key_value.to(key_value.dtype)
        return grad_query.to(query.dtype), grad_key, grad_value, None, None


def _attend(query: Tensor, key_value: Tensor, shard: ContextShard, scale: float) -> tuple[Tensor, Tensor]:
    sum_dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros_like(query, dtype=sum_dtype, memory_format=torch.contiguous_format)
    lse = query.new_full(query.shape[:2], -torch.inf, dtype=sum_dtype)  # [local_tokens, heads]
    for hop, calls in enumerate(shard.calls):
        arriving = _pass_on(key_value, shard.cp, _KEY_VALUE_TAG) if hop + 1 < shard.cp.size else None
        for call in calls:
            key, value = key_value[:, call.keys]
            part = flash_forward(query[call.queries], key, value, call.is_causal, scale)
            if call.is_causal:  # the first call on its queries; a plan has no others that are causal
                out[call.queries], lse[call.queries] = part
            else:
                _merge(out[call.queries], lse[call.queries], *part)
        if arriving is not None:
            key_value = arriving.wait()
    return out, lse


def _merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Adds in place the attention over further keys; every row of `part_lse` is finite."""
    merged = torch.logaddexp(lse, part_lse)
    out.mul_(torch.exp(lse - merged)[..., None])
    out.addcmul_(part_out.to(out.dtype), torch.exp(part_lse - merged)[..., None])
    lse.copy_(merged)


def _attend_backward(grad_out, query, key_value, out, lse, shard: ContextShard, scale: float) -> tuple[Tensor, Tensor]:
    axis = shard.cp
    grad_out = grad_out.contiguous()
    grad_query = torch.zeros_like(query, dtype=lse.dtype, memory_format=torch.contiguous_format)
    travelling = None  # gradients of the keys and values that this rank will hold on the next hop, summed so far
    grad_key_value = torch.empty(0)
    for hop, calls in enumerate(shard.calls):
        arriving = _pass_on(key_value, axis, _KEY_VALUE_TAG) if hop + 1 < axis.size else None
        grad_key_value = torch.zeros_like(key_value, dtype=lse.dtype)
        for call in calls:
            key, value = key_value[:, call.keys]
            rows = call.queries
            parts = flash_backward(grad_out[rows], query[rows], key, value, out[rows], lse[rows], call.is_causal, scale)
            grad_query[rows] += parts[0]
            grad_key_value[0, call.keys] += parts[1]
            grad_key_value[1, call.keys] += parts[2]
        if travelling is not None:
            grad_key_value += travelling.wait()
        if axis.size > 1:
            travelling = _pass_on(grad_key_value, axis, _GRADIENT_TAG)
        if arriving is not None:
            key_value = arriving.wait()
    return grad_query, grad_key_value if travelling is None else travelling.wait()


@dataclass
class _Transfer:
    """A message under way to the next rank, and one from the previous rank."""

    sent: Tensor  # kept alive until it is gone
    received: Tensor
    works: list

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


def _pass_on(message: Tensor, axis: Axis, tag: int) -> _Transfer:
    """Starts sending `message` to the next rank of the ring and receiving its like from the previous one."""
    received = torch.empty_like(message)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, message, axis.next_rank, axis.group, tag),
            dist.P2POp(dist.irecv, received, axis.previous_rank, axis.group, tag),
        ]
    )
    return _Transfer(message, received, works)
