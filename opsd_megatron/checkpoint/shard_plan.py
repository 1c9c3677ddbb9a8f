"""safetensors files planned from names, dtypes and shapes alone: every byte's place is known before any is written."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from opsd_megatron.checkpoint.hf_files import SINGLE_FILE
from opsd_megatron.errors import CheckpointError
from opsd_megatron.safetensors_header import make_header


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardPlan:
    """One file: its header, then its tensors in this order without gaps."""

    file: str
    tensors: tuple[TensorSpec, ...]

    @property
    def header(self) -> bytes:
        return make_header((tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors)

    @property
    def num_bytes(self) -> int:
        """Of the tensors; the header comes on top."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def plan_shards(tensors: Sequence[TensorSpec], max_bytes: int) -> list[ShardPlan]:
    """Files of at most `max_bytes` of tensors, or of one larger tensor, with Hugging Face's names (counted from 1).

    Raises:
        CheckpointError: a name comes twice, or there are no tensors.
    """
    groups: list[list[TensorSpec]] = []
    room, seen = 0, set()
    for tensor in tensors:
        if tensor.name in seen:
            raise CheckpointError(f"tensor {tensor.name} was given twice")
        seen.add(tensor.name)
        if not groups or tensor.num_bytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(tensor)
        room -= tensor.num_bytes
    if not groups:
        raise CheckpointError("no tensors were given to write")
    if len(groups) == 1:
        return [ShardPlan(SINGLE_FILE, tuple(groups[0]))]
    return [
        ShardPlan(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def index_of(shards: Sequence[ShardPlan]) -> str:
    """The text of model.safetensors.index.json."""
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(shard.num_bytes for shard in shards)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
