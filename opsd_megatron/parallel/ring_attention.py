"""Exact attention over a token tree that is dealt to cp ranks: keys and values travel round a ring of ranks.

Each rank keeps its queries. On hop h it holds the keys and values of rank (own - h) mod size, sends them on while it
computes on them, and merges what it computed by log-sum-exp:  lse = log(e^lse1 + e^lse2),
out = out1 e^(lse1 - lse) + out2 e^(lse2 - lse).  (Ring Attention, Liu, Zaharia and Abbeel 2023, section 3.)

With c = local_tokens * kv_heads * head_dim * element_size, one rank sends 2 (W-1) c bytes in forward, and in backward
2 (W-1) c for keys and values again and 2 (W-1) c' for their gradients (c' = c in float32): what a rank adds to the
gradients of its own keys and values never travels, so theirs set out on hop 1 and are at home after hop W-1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd_megatron.parallel.attention_plan import FlashCall
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.context import ContextShard
from opsd_megatron.parallel.flash import flash_backward, flash_forward

_KEY_VALUE_TAG, _GRADIENT_TAG = 1, 3  # and the number after each: two tensors go together


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
        key, value = key.contiguous(), value.contiguous()  # to be sent, and to keep no larger tensor alive
        out, lse = _attend(query, (key, value), shard, scale)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.shard, ctx.scale = shard, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, out, lse = ctx.saved_tensors
        rows = _Rows(grad_out.contiguous(), query, out, lse)
        grads = _attend_backward(rows, (key, value), ctx.shard, ctx.scale)
        return *(grad.to(query.dtype) for grad in grads), None, None


def _attend(query: Tensor, key_value: Sequence[Tensor], shard: ContextShard, scale: float) -> tuple[Tensor, Tensor]:
    sum_dtype = torch.promote_types(query.dtype, torch.float32)
    out = lse = None
    for hop, calls in enumerate(shard.calls):
        arriving = _pass_on(key_value, shard.cp, _KEY_VALUE_TAG) if hop + 1 < shard.cp.size else None
        for call in calls:
            key, value = (tensor[call.keys] for tensor in key_value)
            part_out, part_lse = flash_forward(query[call.queries], key, value, call.is_causal, scale)
            if out is not None and lse is not None and not call.is_causal:
                _merge(out[call.queries], lse[call.queries], part_out, part_lse)
            else:  # the first call on its queries: each has one that is causal, and the plan puts those first
                out = _add(out, call.queries, part_out, query.shape[0], sum_dtype)
                lse = _add(lse, call.queries, part_lse, query.shape[0], sum_dtype)
        if arriving is not None:
            key_value = arriving.wait()
    if out is None or lse is None:  # nothing but padding
        return torch.zeros_like(query, dtype=sum_dtype), query.new_zeros(query.shape[:2], dtype=sum_dtype)
    return out, lse


def _merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Adds in place the attention over further keys: out moves towards `part_out` by e^part_lse / e^(merged lse)."""
    out.lerp_(part_out.to(out.dtype), torch.sigmoid(part_lse - lse)[..., None])
    torch.logaddexp(lse, part_lse, out=lse)


@dataclass(frozen=True)
class _Rows:
    """What backward needs of the queries' side."""

    grad_out: Tensor
    query: Tensor
    out: Tensor
    lse: Tensor

    def at(self, place: slice) -> "_Rows":
        return _Rows(self.grad_out[place], self.query[place], self.out[place], self.lse[place])


def _attend_backward(rows: _Rows, key_value: Sequence[Tensor], shard: ContextShard, scale: float) -> list[Tensor]:
    """Gradients of query, key and value."""
    axis = shard.cp
    grad_query: Tensor | None = None
    own: list[Tensor] = []
    travelling = None
    for hop, calls in enumerate(shard.calls):
        arriving = _pass_on(key_value, axis, _KEY_VALUE_TAG) if hop + 1 < axis.size else None
        grad_query, *grads = _hop_backward(calls, grad_query, rows, key_value, scale)
        if travelling is not None:
            for grad, so_far in zip(grads, travelling.wait(), strict=True):
                grad += so_far
        if hop == 0:
            own = grads
        else:
            travelling = _pass_on(grads, axis, _GRADIENT_TAG)
        if arriving is not None:
            key_value = arriving.wait()
    if travelling is not None:
        for grad, from_others in zip(own, travelling.wait(), strict=True):
            grad += from_others
    assert grad_query is not None  # there is at least one hop, the own one
    return [grad_query, *own]


def _hop_backward(
    calls: Sequence[FlashCall], grad_query: Tensor | None, rows: _Rows, key_value: Sequence[Tensor], scale: float
) -> list[Tensor]:
    """The gradient of query so far with this hop's part, and this hop's parts of those of key and value."""
    sums: list[Tensor | None] = [grad_query, None, None]
    lengths = [rows.query.shape[0], *(tensor.shape[0] for tensor in key_value)]
    for call in calls:
        key, value = (tensor[call.keys] for tensor in key_value)
        at = rows.at(call.queries)
        parts = flash_backward(at.grad_out, at.query, key, value, at.out, at.lse, call.is_causal, scale)
        places = (call.queries, call.keys, call.keys)
        for index, (place, part, length) in enumerate(zip(places, parts, lengths, strict=True)):
            sums[index] = _add(sums[index], place, part, length, rows.lse.dtype)
    like = (rows.query, *key_value)
    return [torch.zeros_like(one, dtype=rows.lse.dtype) if s is None else s for s, one in zip(sums, like, strict=True)]


def _add(total: Tensor | None, place: slice, part: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """`total`, zero at first, with `part` added; a first part that covers all of it becomes the total, uncopied."""
    if total is not None:
        total[place] += part
        return total
    if part.shape[0] == length:
        return part.to(dtype).contiguous()
    first = torch.zeros((length, *part.shape[1:]), dtype=dtype, device=part.device)
    first[place] = part
    return first


@dataclass
class _Transfer:
    """Tensors under way to the next rank, and their like from the previous one."""

    sent: Sequence[Tensor]  # kept alive until they are gone
    received: list[Tensor]
    works: list

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.received


def _pass_on(message: Sequence[Tensor], axis: Axis, first_tag: int) -> _Transfer:
    """Starts sending `message` to the next rank of the ring and receiving its like from the previous one."""
    received = [torch.empty_like(tensor) for tensor in message]
    transfers = []
    for tag, (outgoing, incoming) in enumerate(zip(message, received, strict=True), start=first_tag):
        transfers.append(dist.P2POp(dist.isend, outgoing, axis.next_rank, axis.group, tag))
        transfers.append(dist.P2POp(dist.irecv, incoming, axis.previous_rank, axis.group, tag))
    return _Transfer(message, received, dist.batch_isend_irecv(transfers))
