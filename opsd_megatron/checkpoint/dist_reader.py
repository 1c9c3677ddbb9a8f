"""Megatron's distributed checkpoints read row by row: no model, no process group, no more memory than is asked for.

Every chunk of a tensor lies in its file as a zip archive of torch.save, uncompressed, so that its values are bytes at a
known offset. Of the pickles around them only the few names that such files need are ever resolved.
"""

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader, BytesIO, RawIOBase
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from opsd_megatron.checkpoint.safetensors_file import read_exactly
from opsd_megatron.checkpoint.weight_map import Weight
from opsd_megatron.errors import CheckpointError

_METADATA_MODULES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
_METADATA_NAMES = {("torch", "Size"), ("collections", "OrderedDict"), ("builtins", "set"), ("pathlib", "PosixPath")}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
}


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it is in the tensor, and which record of which file holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    record_start: int
    record_length: int


@dataclass(frozen=True)
class StoredTensor:
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Located:
    """A weight of the table in a checkpoint: under a key of its own, or as one layer of a stacked tensor."""

    key: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype


class DistReader:
    """The tensors of one checkpoint directory, of core's local or Transformer Engine's spec, stacked over layers or
    not, saved under any layout.

    Opening reads metadata and file sizes only. Several threads may read at once.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        for name in (".metadata", "metadata.json"):
            if not (self.directory / name).is_file():
                raise CheckpointError(
                    f"{self.directory} has no {name}, which Megatron writes last: the checkpoint is incomplete"
                )
        metadata = _read_metadata(self.directory / ".metadata")
        self.tensors = _tensors(metadata, self.directory)
        self._data: dict[Chunk, int] = {}
        self._check_files()

    def locate(self, weight: Weight) -> Located | None:
        """Where the merged tensor of a weight is, or None."""
        for name in (weight.row.fused, weight.row.megatron):
            if name is None:
                continue
            if (own := name.replace("{layer}", str(weight.layer))) in self.tensors:
                stored = self.tensors[own]
                return Located(own, None, stored.shape, stored.dtype)
            stacked = name.replace("layers.{layer}.", "layers.")
            if weight.layer is not None and stacked in self.tensors:
                stored = self.tensors[stacked]
                if weight.layer < stored.shape[0]:
                    return Located(stacked, weight.layer, stored.shape[1:], stored.dtype)
        return None

    def read_rows(self, at: Located, start: int, stop: int) -> Shaped[Tensor, "rows *columns"]:
        """Rows `start` to `stop` of the tensor; CheckpointError, with the file's name, where its bytes are missing."""
        out = torch.empty(stop - start, *at.shape[1:], dtype=at.dtype)
        for chunk in self.tensors[at.key].chunks:
            offsets, sizes = chunk.offsets, chunk.sizes
            skipped = 0
            if at.layer is not None:
                if not offsets[0] <= at.layer < offsets[0] + sizes[0]:
                    continue
                skipped = (at.layer - offsets[0]) * sizes[1]
                offsets, sizes = offsets[1:], sizes[1:]
            first, last = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
            if first >= last:
                continue
            target = out[first - start : last - start]
            for dim, (offset, size) in enumerate(zip(offsets[1:], sizes[1:], strict=True), start=1):
                target = target.narrow(dim, offset, size)
            self._fill(target, chunk, (skipped + first - offsets[0]) * prod(sizes[1:]))
        return out

    def _fill(self, target: Tensor, chunk: Chunk, skipped_elements: int) -> None:
        values = target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype)
        wanted = values.view(torch.uint8).numpy().reshape(-1) if values.dim() else values
        start = self._data_start(chunk, target.dtype) + skipped_elements * target.element_size()
        read_exactly(self.directory / chunk.file, wanted, start)
        if values is not target:
            target.copy_(values)

    def _data_start(self, chunk: Chunk, dtype: torch.dtype) -> int:
        """Where the chunk's first value is in its file."""
        if chunk not in self._data:
            path = self.directory / chunk.file
            try:
                with BufferedReader(_Window(path, chunk.record_start, chunk.record_length)) as window:
                    start = chunk.record_start + _values_in_archive(window, chunk.sizes, dtype)
            except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, EOFError, ValueError, OSError) as error:
                raise CheckpointError(
                    f"{path}: the record at {chunk.record_start} is damaged: {error}; copy the checkpoint again"
                ) from error
            self._data[chunk] = start
        return self._data[chunk]

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for key, tensor in self.tensors.items():
            held = sum(prod(chunk.sizes) for chunk in tensor.chunks)
            if held != prod(tensor.shape):
                raise CheckpointError(
                    f"{self.directory}: the chunks of {key} hold {held} of its {prod(tensor.shape)} values"
                )
            for chunk in tensor.chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.record_start + chunk.record_length)
        for file, end in ends.items():
            path = self.directory / file
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; copy the checkpoint again")
            if path.stat().st_size < end:
                raise CheckpointError(
                    f"{path} is cut: {path.stat().st_size} bytes, {end} are needed; copy the checkpoint again"
                )


class _Window(RawIOBase):
    """Part of a file, as a file."""

    def __init__(self, path: Path, start: int, length: int):
        self._descriptor, self._start, self._length, self._at = os.open(path, os.O_RDONLY), start, length, 0

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._descriptor, [view], self._start + self._at) if len(view) else 0
        self._at += count
        return count


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        if is_dtype or module.startswith(_METADATA_MODULES) or (module, name) in _METADATA_NAMES:
            return super().find_class(module, name)
        if module in ("torch.serialization", "torch._utils") and name.startswith("_get_"):
            return super().find_class(module, name)
        raise CheckpointError(f".metadata asks for {module}.{name}, which no checkpoint needs; it is not trusted")


class _TensorUnpickler(pickle.Unpickler):
    """What a tensor is made of, without making it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: arguments
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise ValueError(f"{module}.{name} is not part of a plain tensor")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _read_metadata(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            return _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; copy the checkpoint again") from error


def _tensors(metadata: Any, directory: Path) -> dict[str, StoredTensor]:
    places = {(index.fqn, _ints(index.offset)): stored for index, stored in metadata.storage_data.items()}
    tensors = {}
    for key, described in metadata.state_dict_metadata.items():
        if not hasattr(described, "chunks"):
            continue  # pickled objects: random states, Transformer Engine's extra state
        chunks = []
        for chunk in described.chunks:
            place = places.get((key, _ints(chunk.offsets)))
            if place is None:
                raise CheckpointError(f"{directory}/.metadata does not say where {key} at {_ints(chunk.offsets)} is")
            where = (str(place.relative_path), int(place.offset), int(place.length))
            chunks.append(Chunk(_ints(chunk.offsets), _ints(chunk.sizes), *where))
        tensors[key] = StoredTensor(_ints(described.size), described.properties.dtype, tuple(chunks))
    return tensors


def _ints(values: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(int(value) for value in values or ())


def _values_in_archive(window: IO[bytes], sizes: tuple[int, ...], dtype: torch.dtype) -> int:
    """Offset of the values in an archive of torch.save that holds one contiguous tensor of these sizes."""
    with zipfile.ZipFile(window) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    window.seek(_start_of(window, entries[pickled]))  # not through the archive: torch may have left checksums out
    described = BytesIO(window.read(entries[pickled].file_size))
    storage, offset, found, stride, *_ = _TensorUnpickler(described).load()
    _, stored_dtype, key, _, _ = storage
    contiguous = tuple(prod(sizes[dim + 1 :]) for dim in range(len(sizes)))
    if tuple(found) != sizes or stored_dtype != dtype:
        raise ValueError(f"it holds {list(found)} of {stored_dtype}, .metadata says {list(sizes)} of {dtype}")
    if any(size > 1 and given != own for size, given, own in zip(sizes, stride, contiguous, strict=True)):
        raise ValueError(f"its tensor has strides {list(stride)}, only contiguous ones are read")
    values = entries[pickled.removesuffix("data.pkl") + f"data/{key}"]
    return _start_of(window, values) + offset * dtype.itemsize


def _start_of(window: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Offset of an entry's content, which follows a header of its own length."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is compressed")
    window.seek(entry.header_offset)
    header = window.read(30)
    name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return entry.header_offset + 30 + name_length + extra_length
