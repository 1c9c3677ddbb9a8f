"""Bytes that this rank sends on each axis, counted where every torch.distributed call ends: at its process group.

Callers bind functions of torch.distributed at import (Megatron does), so the methods of ProcessGroup are wrapped, not
the functions. Point-to-point messages and all-to-all count as they are. A collective counts as its ring algorithm
over n ranks, averaged over the ranks, of a tensor of b bytes in full:

    all-gather, reduce-scatter, broadcast, gather, scatter, reduce:  (n-1)/n b
    all-reduce:                                                      2 (n-1)/n b
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

OTHER = "other"


@dataclass
class Traffic:
    """What this rank sent while the counting was on; axes that moved nothing are there with 0."""

    bytes_sent: Counter[str] = field(default_factory=Counter)
    """Bytes per axis name; groups that no axis was named for are under "other"."""
    bytes_by_operation: Counter[tuple[str, str]] = field(default_factory=Counter)
    """The same by (axis name, method of the process group)."""

    def __getitem__(self, axis: str) -> int:
        return self.bytes_sent[axis]


@contextmanager
def count_traffic(axes: Mapping[str, dist.ProcessGroup | Sequence[dist.ProcessGroup] | None]) -> Iterator[Traffic]:
    """Counts while active; `axes` names the process groups, several to a name if an axis has several.

    None stands for an axis of one rank. Where two names share a group, the first is charged.
    """
    traffic = Traffic(Counter(dict.fromkeys(axes, 0)))
    name_of: dict[str, str] = {}
    for name, groups in axes.items():
        for group in groups if isinstance(groups, Sequence) else [groups]:
            if group is not None:
                name_of.setdefault(group.group_name, name)
    own = vars(dist.ProcessGroup)  # not getattr: it unwraps the binding to the instance, which then cannot be restored
    originals = {method: own[method] for method in _BYTES if method in own}
    for method in originals:
        setattr(dist.ProcessGroup, method, _counted(method, getattr(dist.ProcessGroup, method), name_of, traffic))
    try:
        yield traffic
    finally:
        for method, original in originals.items():
            setattr(dist.ProcessGroup, method, original)


def _counted(method: str, original, name_of: Mapping[str, str], traffic: Traffic):
    def call(group, *arguments, **options):
        axis = name_of.get(group.group_name, OTHER)
        sent = math.ceil(_BYTES[method](group, *arguments)) if group.size() > 1 else 0
        traffic.bytes_sent[axis] += sent
        traffic.bytes_by_operation[axis, method] += sent
        return original(group, *arguments, **options)

    return call


def _size(tensors) -> int:
    """Bytes of a tensor or of a nested list of tensors."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_size(tensor) for tensor in tensors)


def _share(group) -> float:
    return (group.size() - 1) / group.size()


def _all_reduce(group, tensors, *_):
    return 2 * _share(group) * _size(tensors)


def _of_first(group, tensors, *_):
    return _share(group) * _size(tensors)


def _of_second(group, _first, tensors, *_):
    return _share(group) * _size(tensors)


def _gather(group, _outputs, inputs, *_):
    return _share(group) * _size(inputs) * group.size()


def _scatter(group, outputs, *_):
    return _share(group) * _size(outputs) * group.size()


def _send(_group, tensors, *_):
    return _size(tensors)


def _all_to_all_single(group, _output, tensor: Tensor, _output_splits, input_splits, *_):
    if not input_splits:
        return _share(group) * _size(tensor)
    row_bytes = _size(tensor) // max(tensor.shape[0], 1)
    return (sum(input_splits) - input_splits[group.rank()]) * row_bytes


def _all_to_all(group, _outputs, inputs, *_):
    return sum(_size(tensor) for rank, tensor in enumerate(inputs) if rank != group.rank())


# torch 2.13 renamed _allgather_base, _reduce_scatter_base and alltoall_base; whichever exist are wrapped.
_BYTES = {
    "allreduce": _all_reduce,
    "allreduce_coalesced": _all_reduce,
    "allgather": _of_first,
    "allgather_coalesced": _gather,
    "_allgather_base": _of_first,
    "all_gather_single": _of_first,
    "allgather_into_tensor_coalesced": _of_first,
    "all_gather_single_coalesced": _of_first,
    "reduce_scatter": _of_second,
    "_reduce_scatter_base": _of_second,
    "reduce_scatter_single": _of_second,
    "reduce_scatter_tensor_coalesced": _of_second,
    "reduce_scatter_single_coalesced": _of_second,
    "broadcast": _of_first,
    "reduce": _of_first,
    "gather": _gather,
    "scatter": _scatter,
    "send": _send,
    "alltoall_base": _all_to_all_single,
    "all_to_all_single": _all_to_all_single,
    "alltoall": _all_to_all,
}
