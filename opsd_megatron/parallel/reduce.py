"""Sums, maxima and objects over one axis, without gradient. On an axis of one rank all return their input untouched."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_megatron.parallel.axis import Axis


def sum_over(summand: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis, in a new tensor."""
    return _reduce(summand, axis, dist.ReduceOp.SUM)


def max_over(values: Tensor, axis: Axis) -> Tensor:
    """Elementwise maximum over the axis, in a new tensor."""
    return _reduce(values, axis, dist.ReduceOp.MAX)


def _reduce(values: Tensor, axis: Axis, operation) -> Tensor:
    if axis.size == 1:
        return values
    result = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, operation, group=axis.group)
    return result


def broadcast_object(value: Any, axis: Axis, source_rank: int = 0) -> Any:
    """`value` of the axis's rank `source_rank` on every rank; picklable, small."""
    if axis.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=axis.ranks[source_rank], group=axis.group)
    return box[0]


def gather_objects(value: Any, axis: Axis) -> list[Any]:
    """Every rank's `value` in axis order, on every rank; picklable, small."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values
