"""A trainer's state out of its device's memory and back, while an inference server uses the device."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from opsd_megatron.models.build import unwrap
from opsd_megatron.models.swap import BUCKET_BYTES

Tensors = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class _Parked:
    storage: torch.UntypedStorage
    size: int
    blocks: Sequence[Tensor] | None
    """The bytes in host memory; None for what was dropped and comes back as zeros."""


class Parking:
    """Moves whole storages: every view of one (parameters, shards of the optimizer, gradients) stays a view of it."""

    def __init__(self, kept: Tensors, dropped: Tensors, device: torch.device):
        """`kept` comes back bit for bit, `dropped` as zeros; both are asked for at every release, for optimizers make
        their states late. What lies on another device than `device` stays where it is."""
        self._kept, self._dropped, self._device = kept, dropped, device
        self._parked: dict[int, _Parked] = {}
        self._blocks: list[Tensor] = []

    def device_bytes(self) -> int:
        """What the state holds of the device now."""
        both = (*self._kept(), *self._dropped())
        return sum(storage.nbytes() for storage in self._storages(both).values())

    def release(self) -> None:
        """The memory is the device's again. Where host memory is short nothing has happened."""
        if self._parked:
            return
        dropped = self._storages(self._dropped())
        kept = {key: storage for key, storage in self._storages(self._kept()).items() if key not in dropped}
        free = iter(self._blocks)
        parked = {
            key: _Parked(storage, storage.nbytes(), self._copy_out(storage, free)) for key, storage in kept.items()
        }
        parked |= {key: _Parked(storage, storage.nbytes(), None) for key, storage in dropped.items()}
        self._settle()
        self._blocks = [block for one in parked.values() for block in one.blocks or ()]
        self._parked = parked
        for one in parked.values():
            one.storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # to the device, not only to this process

    def restore(self) -> None:
        """Everything is back. Where the device's memory is short, what is left comes with the next call."""
        for key, one in list(self._parked.items()):
            one.storage.resize_(one.size)
            values = _bytes_of(one.storage)
            if one.blocks is None:
                values.zero_()
            else:
                for start, block in _places(one.blocks):
                    values[start : start + len(block)].copy_(block, non_blocking=True)
            del self._parked[key]
        self._settle()

    def value_of(self, parameter: Parameter) -> Tensor:
        """The parameter's values on the device, wherever they are now."""
        parked = self._parked.get(parameter.untyped_storage()._cdata)
        if parked is None or parked.blocks is None:
            return parameter.data
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        begin = parameter.storage_offset() * parameter.element_size()
        end, out = begin + value.nbytes, value.view(-1).view(torch.uint8)
        for start, block in _places(parked.blocks):
            first, last = max(start, begin), min(start + len(block), end)
            if first < last:
                out[first - begin : last - begin].copy_(block[first - start : last - start], non_blocking=True)
        return value

    def _storages(self, tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
        found = {}
        for tensor in tensors:
            if tensor.device == self._device:
                storage = tensor.untyped_storage()
                found[storage._cdata] = storage
        return found

    def _copy_out(self, storage: torch.UntypedStorage, free: Iterator[Tensor]) -> list[Tensor]:
        values, blocks = _bytes_of(storage), []
        for piece in values.split(BUCKET_BYTES) if len(values) else ():
            block = next(free, None)
            if block is None or len(block) != len(piece):
                block = torch.empty(len(piece), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            blocks.append(block.copy_(piece, non_blocking=True))
        return blocks

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def park_training(
    chunks: Sequence[Any], optimizer: Any, others: Sequence[torch.nn.Module], device: torch.device
) -> Parking:
    """Parking for Megatron's DDP chunks with their optimizer, and for `others`, such as a teacher of its own.

    Parameters, buffers and the optimizer's state are kept; gradients are dropped: a step begins by zeroing them.
    """

    def kept() -> Iterator[Tensor]:
        for module in (*map(unwrap, chunks), *others):  # DDP has another `buffers`
            yield from module.parameters()
            yield from module.buffers()
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            for group in one.optimizer.param_groups:
                yield from group["params"]
            for state in one.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))

    def dropped() -> Iterator[Tensor]:
        for chunk in chunks:
            yield from (buffer.grad_data for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers))

    return Parking(kept, dropped, device)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _places(blocks: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    start = 0
    for block in blocks:
        yield start, block
        start += len(block)
