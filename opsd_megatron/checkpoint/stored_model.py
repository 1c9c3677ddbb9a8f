"""A model at rest, on either side: a Hugging Face directory or a distributed checkpoint, read through the weight table.

Both are read in rows of a Hugging Face tensor, so that copying, comparing and checking are one loop over names.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Shaped
from torch import Tensor

from opsd_megatron.checkpoint.dist_reader import DistReader, Located
from opsd_megatron.checkpoint.hf_files import HfReader, problems_of, refuse
from opsd_megatron.checkpoint.reshard import Piece, pieces_of
from opsd_megatron.checkpoint.shard_plan import TensorSpec
from opsd_megatron.checkpoint.weight_map import Weight, weights_of
from opsd_megatron.models.architecture import Architecture

BLOCK_BYTES = 1 << 20
"""Rows are read, converted and written in blocks of about this size: small enough for the allocator to use them again,
and for the hash to find them in the cache."""
_NOT_WEIGHTS = ("optimizer.", "chained_", "teacher.", "rng_state", "random_state", "rerun_state")


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor, as part of a weight of the table."""

    weight: Weight
    number: int

    @property
    def name(self) -> str:
        return self.weight.hf_names[self.number]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.hf_shapes[self.number]


def parts_of(architecture: Architecture) -> list[Part]:
    """Every Hugging Face tensor of the model, in the order of the table."""
    return [Part(weight, number) for weight in weights_of(architecture) for number in range(len(weight.hf_names))]


class StoredModel(Protocol):
    """What `HfModel` and `DistModel` have in common."""

    @property
    def architecture(self) -> Architecture: ...

    def problems(self) -> list[str]:
        """What is missing, spare or of another shape or dtype, by name, from headers alone; empty when all is well."""
        ...

    def dtype(self, part: Part) -> torch.dtype: ...

    def read_rows(self, part: Part, start: int, stop: int) -> Shaped[Tensor, "rows *columns"]:
        """Rows of the part, in the dtype in which they are stored."""
        ...


class HfModel:
    """A Hugging Face directory."""

    def __init__(self, directory: Path, architecture: Architecture):
        self.architecture, self.reader = architecture, HfReader(directory)

    def problems(self) -> list[str]:
        return problems_of(self.reader, self.architecture)

    def dtype(self, part: Part) -> torch.dtype:
        return self.reader.dtype(part.name)

    def read_rows(self, part: Part, start: int, stop: int) -> Tensor:
        return self.reader.read_rows(part.name, start, stop)


class DistModel:
    """A distributed checkpoint of any layout and spec; with `dtype`, as if it had been stored in that."""

    def __init__(self, directory: Path, architecture: Architecture, dtype: torch.dtype | None = None):
        self.architecture, self.reader, self._dtype = architecture, DistReader(directory), dtype

    @cached_property
    def _located(self) -> dict[str, Located]:
        found = {weight.megatron: self.reader.locate(weight) for weight in weights_of(self.architecture)}
        return {name: located for name, located in found.items() if located is not None}

    def problems(self) -> list[str]:
        found = []
        for weight in weights_of(self.architecture):
            located = self._located.get(weight.megatron)
            if located is None:
                found.append(f"{weight.stored} is missing")
                continue
            rows, columns = sum(shape[0] for shape in weight.hf_shapes), weight.hf_shapes[0][1:]
            enough = located.shape[0] >= rows if weight.is_vocabulary else located.shape[0] == rows
            if not enough or located.shape[1:] != columns:
                found.append(
                    f"{located.key} has shape {list(located.shape)}, the model asks for {[rows, *columns]}"
                    + (" or more rows" if weight.is_vocabulary else "")
                )
        used = {located.key for located in self._located.values()}
        spare = [key for key in self.reader.tensors if key not in used and not _is_other_state(key)]
        return found + [f"{key} has no row in the {self.architecture.family} weight table" for key in sorted(spare)]

    def dtype(self, part: Part) -> torch.dtype:
        return self._dtype or self._located[part.weight.megatron].dtype

    def read_rows(self, part: Part, start: int, stop: int) -> Tensor:
        located = self._located[part.weight.megatron]
        read = [
            self.reader.read_rows(located, piece.merged_start + first, piece.merged_start + last)
            for piece, first, last in _overlaps(self._pieces(part), start, stop)
        ]
        return (read[0] if len(read) == 1 else torch.cat(read)).to(self.dtype(part))

    def read_merged(self, weight: Weight) -> Tensor:
        """Megatron's whole tensor, padding of the vocabulary included."""
        located = self._located[weight.megatron]
        return self.reader.read_rows(located, 0, located.shape[0]).to(self._dtype or located.dtype)

    def _pieces(self, part: Part) -> list[Piece]:
        rows = [shape[0] for shape in part.weight.hf_shapes]
        pieces = pieces_of(part.weight.row.merge, rows, self.architecture.kv_heads)
        return [piece for piece in pieces if piece.part == part.number]


def _overlaps(pieces: Sequence[Piece], start: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
    """Pieces that hold rows `start` to `stop` of their part, with the first and past-the-last row inside the piece."""
    for piece in pieces:
        first, last = max(start - piece.part_start, 0), min(stop - piece.part_start, piece.count)
        if first < last:
            yield piece, first, last


def _is_other_state(key: str) -> bool:
    return key.startswith(_NOT_WEIGHTS) or "_extra_state" in key


def refuse_problems(model: StoredModel, where: Any) -> None:
    """CheckpointError that names everything that is wrong with the names and shapes of a model at rest."""
    refuse(model.problems(), where)


def blocks_of(model: StoredModel, part: Part) -> Iterator[Shaped[Tensor, "rows *columns"]]:
    """A whole part, block by block."""
    for start, stop in row_blocks(part.shape, model.dtype(part).itemsize):
        yield model.read_rows(part, start, stop)


def row_blocks(shape: Sequence[int], itemsize: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about BLOCK_BYTES each."""
    step = max(1, BLOCK_BYTES // (itemsize * prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def specs_of(model: StoredModel) -> list[TensorSpec]:
    """What an export of the model holds."""
    return [TensorSpec(part.name, model.dtype(part), part.shape) for part in parts_of(model.architecture)]
