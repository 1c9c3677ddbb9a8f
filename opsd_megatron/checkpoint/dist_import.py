"""Hugging Face directory -> distributed checkpoint on one CPU process, without a model or a process group.

The files are those of torch's distributed checkpoints, which Megatron loads under any layout. torch's own writer keeps
every tensor that it has written until the file is closed (2.13); here a writer holds one chunk.
"""

import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from threading import Semaphore
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from opsd_megatron.checkpoint import state_files
from opsd_megatron.checkpoint.description import plain_description
from opsd_megatron.checkpoint.reshard import pieces_of
from opsd_megatron.checkpoint.stored_model import BLOCK_BYTES, HfModel, Part, refuse_problems, row_blocks
from opsd_megatron.checkpoint.weight_map import Weight, weights_of
from opsd_megatron.config import ParallelConfig
from opsd_megatron.models.architecture import check_layout, padded_vocab

FILE_BYTES = 512 << 20
"""A file goes to the disk while the next ones are made."""
CHUNK_ELEMENTS = 1 << 25
"""Of the largest chunk: what a writer holds."""


@dataclass(frozen=True)
class Cut:
    """A box of one merged tensor, the unit that is read, held and written."""

    weight: Weight
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class ImportJob:
    model: Path
    output: Path
    """Directory in which step_000000 is written."""
    dtype: torch.dtype | None = None
    """Of all tensors; that of the embedding in the files where not given."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The vocabulary is padded and tensors are cut for this layout; any other one can load them."""
    writers: int = 2


def import_checkpoint(model: HfModel, job: ImportJob, on_bytes: Callable[[int], None] = lambda _: None) -> Path:
    """Writes step_000000 under `job.output`, whole or not at all, and returns it.

    Raises:
        CheckpointError: names, shapes or dtypes are wrong, or the directory has a checkpoint already.
        ConfigError: the layout does not divide the model.
    """
    check_layout(model.architecture, job.parallel)
    refuse_problems(model, job.model)
    dtype = import_dtype(model, job)
    staging = state_files.begin(job.output, 0)
    # archives are checked by no reader of ours or Megatron's; their checksums would cost as much as writing them
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        _write(model, dtype, cuts_of(model, job), staging, job.writers, on_bytes)
    finally:
        torch.serialization.set_crc32_options(before)
    torch.save({}, staging / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(staging))
    extra = {"imported_from": str(job.model.resolve())}
    description = plain_description(0, model.architecture, str(dtype).removeprefix("torch."), extra)
    return state_files.finish(staging, description, keep=0)


def import_dtype(model: HfModel, job: ImportJob) -> torch.dtype:
    return job.dtype or model.reader.dtype("model.embed_tokens.weight")


def cuts_of(model: HfModel, job: ImportJob) -> list[Cut]:
    """Every box that is written, in the order of the table."""
    return [cut for weight in weights_of(model.architecture) for cut in _cuts(weight, _shape(weight, model, job), job)]


def _shape(weight: Weight, model: HfModel, job: ImportJob) -> tuple[int, ...]:
    rows = sum(shape[0] for shape in weight.hf_shapes)
    if weight.is_vocabulary:
        rows = padded_vocab(model.architecture, job.parallel.tp)
    return (rows, *weight.hf_shapes[0][1:])


def _cuts(weight: Weight, shape: tuple[int, ...], job: ImportJob) -> list[Cut]:
    """What each tp rank would hold, so that none has to read what is another's, in pieces of at most CHUNK_ELEMENTS.

    Gate and up are cut apart.
    """
    dim, count = weight.row.tp_dim, job.parallel.tp
    if dim is None:
        return [Cut(weight, (0,) * len(shape), shape)]
    count *= 2 if weight.row.merge == "gate_up" else 1
    size = shape[dim] // count
    sizes = (*shape[:dim], size, *shape[dim + 1 :])
    rows = max(1, CHUNK_ELEMENTS // prod(sizes[1:]))
    cuts = []
    for number in range(count):
        offsets = tuple(number * size if axis == dim else 0 for axis in range(len(shape)))
        for start in range(0, sizes[0], rows):
            piece = min(rows, sizes[0] - start)
            cuts.append(Cut(weight, (offsets[0] + start, *offsets[1:]), (piece, *sizes[1:])))
    return cuts


def _write(
    model: HfModel, dtype: torch.dtype, cuts: list[Cut], directory: Path, writers: int, on_bytes: Callable[[int], None]
) -> None:
    """Files of chunks, of about equal size, then `.metadata`, which says where all are."""
    total = sum(prod(cut.sizes) for cut in cuts) * dtype.itemsize
    shares: list[list[Cut]] = [[] for _ in range(max(writers, -(-total // FILE_BYTES)))]
    sizes = [0] * len(shares)
    for cut in sorted(cuts, key=lambda cut: prod(cut.sizes), reverse=True):
        least = sizes.index(min(sizes))
        shares[least].append(cut)
        sizes[least] += prod(cut.sizes)
    names = {cut.weight.stored.removesuffix(".weight") for cut in cuts if ".linear_" in cut.weight.stored}
    objects = sorted(f"{name}._extra_state/shard_0_1" for name in names if not name.endswith("layer_norm_weight"))
    at_work = Semaphore(writers)

    def write(number: int) -> dict[MetadataIndex, _StorageInfo]:
        with open(directory / f"__0_{number}.distcp", "wb") as file:
            with at_work:  # and others when this one waits for the disk
                places = _write_records(model, dtype, shares[number], objects if number == 0 else [], file, on_bytes)
            file.flush()
            os.fsync(file.fileno())
        return places

    with ThreadPoolExecutor(2 * writers) as pool:
        places = list(pool.map(write, range(len(shares))))
    metadata = _metadata(cuts, objects, dtype, {key: place for own in places for key, place in own.items()})
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def _write_records(
    model: HfModel,
    dtype: torch.dtype,
    cuts: list[Cut],
    objects: list[str],
    file: BinaryIO,
    on_bytes: Callable[[int], None],
) -> dict[MetadataIndex, _StorageInfo]:
    """Each an archive of torch.save; where each is."""
    places = {}
    # one buffer for all chunks: the pages of fresh memory take longer to get than to fill
    buffer = bytearray(max((prod(cut.sizes) for cut in cuts), default=0) * dtype.itemsize)

    def record(index: MetadataIndex, value: Any) -> None:
        start = file.tell()
        torch.save(value, file)
        places[index] = _StorageInfo(Path(file.name).name, start, file.tell() - start)

    for key in objects:  # Megatron's linears keep one beside their weight, empty without fp8, and ask for it
        record(MetadataIndex(key), [None])
    for cut in cuts:
        chunk = torch.frombuffer(buffer, dtype=dtype, count=prod(cut.sizes)).view(cut.sizes)
        _read(model, cut, chunk)
        record(MetadataIndex(cut.weight.stored, torch.Size(cut.offsets)), chunk)
        on_bytes(chunk.numel() * dtype.itemsize)
    return places


def _metadata(
    cuts: list[Cut], objects: list[str], dtype: torch.dtype, places: dict[MetadataIndex, _StorageInfo]
) -> Metadata:
    described: dict[str, Any] = {key: BytesStorageMetadata() for key in objects}
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    for cut in cuts:
        chunks.setdefault(cut.weight.stored, []).append(
            ChunkStorageMetadata(torch.Size(cut.offsets), torch.Size(cut.sizes))
        )
    for key, own in chunks.items():
        ends = [[start + size for start, size in zip(one.offsets, one.sizes, strict=True)] for one in own]
        shape = torch.Size(max(along) for along in zip(*ends, strict=True))
        described[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), shape, own)
    return Metadata(described, storage_data=places)


def _read(model: HfModel, cut: Cut, chunk: Tensor) -> None:
    """Rows of the parts in Megatron's order, then the columns of the box; rows beyond the vocabulary become zeros."""
    first, last = cut.offsets[0], cut.offsets[0] + cut.sizes[0]
    rows = [shape[0] for shape in cut.weight.hf_shapes]
    chunk[max(sum(rows) - first, 0) :] = 0
    for piece in pieces_of(cut.weight.row.merge, rows, model.architecture.kv_heads):
        start, stop = max(first, piece.merged_start), min(last, piece.merged_start + piece.count)
        if start >= stop:
            continue
        part, shift = Part(cut.weight, piece.part), piece.part_start - piece.merged_start
        target = chunk[start - first : stop - first]
        if target.dtype == model.dtype(part) and target.shape[1:] == part.shape[1:]:
            model.reader.read_rows(part.name, start + shift, stop + shift, out=target)
            continue
        for begin, end in row_blocks((stop - start, *part.shape[1:]), model.dtype(part).itemsize):
            read = model.read_rows(part, start + begin + shift, start + end + shift)
            if read.dim() > 1:
                read = read[:, cut.offsets[1] : cut.offsets[1] + cut.sizes[1]]
            target[begin:end] = read


def import_memory(model: HfModel, job: ImportJob, interpreter: int) -> int:
    """Bytes of resident memory at most: the largest chunks, one for each writer, and the blocks they are read in."""
    size = import_dtype(model, job).itemsize
    chunks = sorted((prod(cut.sizes) * size for cut in cuts_of(model, job)), reverse=True)
    return interpreter + sum(chunks[: job.writers]) + 2 * job.writers * BLOCK_BYTES
