"""Sums, maxima and objects over one axis. On an axis of one rank all of them return their input untouched.

A sum over ranks has two gradients, depending on what happens to its result; the two differentiable sums are named by
their backward. Where every rank computes the same loss from the result, the loss is counted once and each summand's
gradient is the result's: `sum_replicated`. Where each rank's loss is its own share of one global loss, the result's
gradient is the sum of all ranks' gradients: `sum_consumed`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd_megatron.parallel.axis import Axis


def sum_replicated(summand: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis, for a result that all ranks use alike; backward is the identity."""
    return summand if axis.size == 1 else _SumReplicated.apply(summand, axis)


def sum_consumed(summand: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis, for a result that each rank uses in its own share of the loss; backward sums as well."""
    return summand if axis.size == 1 else _SumConsumed.apply(summand, axis)


class _SumReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, summand, axis: Axis):
        return sum_over(summand, axis)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _SumConsumed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, summand, axis: Axis):
        ctx.axis = axis
        return sum_over(summand, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return sum_over(grad, ctx.axis), None


def sum_over(summand: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis without gradient, in a new tensor."""
    return _reduce(summand, axis, dist.ReduceOp.SUM)


def max_over(values: Tensor, axis: Axis) -> Tensor:
    """Elementwise maximum over the axis without gradient, in a new tensor."""
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
