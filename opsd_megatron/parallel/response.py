"""Response rows moved between ranks: from the ranks that hold them to the ranks that compute the loss on them.

Zigzag leaves the end of a sequence, and with it the response, on few cp ranks, and the teacher's rows lie where the
teacher scored them. Row exchange brings both into one even spread. Every rank knows the whole plan beforehand.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd_megatron.parallel.axis import Axis


def even_shares(response_ids: Int64[Tensor, "rows"], size: int) -> list[Tensor]:
    """`response_ids` cut into `size` runs whose lengths differ by at most 1; some are empty if there are few."""
    return list(torch.tensor_split(response_ids, size))


class RowExchange:
    """Moves rows named by response ids from the layout `held` to the layout `wanted`, both given for every rank."""

    def __init__(self, held: Sequence[Tensor], wanted: Sequence[Tensor], axis: Axis):
        if not len(held) == len(wanted) == axis.size:
            raise ValueError(f"{len(held)} and {len(wanted)} layouts for the {axis.size} ranks of axis {axis.name}")
        self.axis = axis
        self.held_rows, self.wanted_rows = held[axis.rank].numel(), wanted[axis.rank].numel()
        holder, row = _locate(held, wanted)
        mine = axis.rank
        send = [torch.from_numpy(row[to][holder[to] == mine]) for to in range(axis.size)]
        receive = [torch.from_numpy(np.flatnonzero(holder[mine] == source)) for source in range(axis.size)]
        self.send_counts = [rows.numel() for rows in send]
        self.receive_counts = [rows.numel() for rows in receive]
        self.send_rows, self.receive_rows = torch.cat(send), torch.cat(receive)

    def move(self, rows: Float[Tensor, "held hidden"]) -> Float[Tensor, "wanted hidden"]:
        """The wanted rows, in the order asked for; gradients travel back and are summed where a row went twice.

        Collective over the axis in forward and, where `rows` needs a gradient, in backward: then the result must take
        part in the loss on every rank, also where it is empty.
        """
        if rows.shape[0] != self.held_rows:
            raise ValueError(f"{rows.shape[0]} rows where this rank holds {self.held_rows}")
        return _Move.apply(rows, self)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, exchange: RowExchange):
        ctx.exchange = exchange
        parcel = rows.index_select(0, exchange.send_rows.to(rows.device))
        arrived = _all_to_all(parcel, exchange.send_counts, exchange.receive_counts, exchange.axis)
        result = rows.new_empty(exchange.wanted_rows, rows.shape[1])
        return result.index_copy_(0, exchange.receive_rows.to(rows.device), arrived)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        exchange = ctx.exchange
        parcel = grad.index_select(0, exchange.receive_rows.to(grad.device))
        returned = _all_to_all(parcel, exchange.receive_counts, exchange.send_counts, exchange.axis)
        sum_dtype = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros((exchange.held_rows, grad.shape[1]), dtype=sum_dtype)
        total.index_add_(0, exchange.send_rows.to(grad.device), returned.to(sum_dtype))
        return total.to(grad.dtype), None


def _all_to_all(parcel: Tensor, send_counts: list[int], receive_counts: list[int], axis: Axis) -> Tensor:
    if axis.size == 1:
        return parcel
    arrived = parcel.new_empty(sum(receive_counts), parcel.shape[1])
    dist.all_to_all_single(arrived, parcel, receive_counts, send_counts, group=axis.group)
    return arrived


def _locate(held: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each rank and each row it wants: the rank that holds it, and its row there."""
    ids = np.concatenate([part.cpu().numpy() for part in held])
    rank_of = np.repeat(np.arange(len(held)), [part.numel() for part in held])
    row_of = np.concatenate([np.arange(part.numel()) for part in held])
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(np.diff(ids[order]) == 0)
    if twice.size:
        raise ValueError(f"response token {ids[order][twice[0]]} is held twice; one row must predict it")
    holder, row = [], []
    for part in wanted:
        found = np.searchsorted(ids[order], part.cpu().numpy())
        missing = np.setdiff1d(part.cpu().numpy(), ids)
        if missing.size:
            raise ValueError(f"response token {missing[0]} is wanted but held by no rank ({missing.size} such)")
        holder.append(rank_of[order][found])
        row.append(row_of[order][found])
    return holder, row
