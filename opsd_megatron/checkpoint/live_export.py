"""A live, sharded model written in Hugging Face layout, several ranks writing at once."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from opsd_megatron.checkpoint.agreement import on_rank_zero, raise_on_all
from opsd_megatron.checkpoint.hf_writer import DEFAULT_SHARD_BYTES, check_target, finish_directory, write_shard
from opsd_megatron.checkpoint.model_weights import Writer, export_specs, export_weights
from opsd_megatron.checkpoint.shard_plan import plan_shards
from opsd_megatron.checkpoint.staging import FileRecord
from opsd_megatron.models.architecture import Architecture
from opsd_megatron.parallel.mesh import Mesh


def save_hf(
    chunks: Sequence[nn.Module],
    architecture: Architecture,
    mesh: Mesh,
    source_dir: Path | None,
    out_dir: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes the model to `out_dir`, whole or not at all; collective over the world, on a file system that all share.

    Shard i is written by writer i mod n, where the writers are the first tp ranks of all stages of all replicas: one
    or more on every node of a layout that spans nodes by pipeline or data parallelism. Global rank 0 adds config,
    index, manifest (with `facts`) and what belongs beside them from `source_dir`. An error on any rank is raised on
    all, and leaves nothing. CheckpointError if `out_dir` is not empty and `overwrite` is not set.
    """
    out_dir = Path(out_dir)
    on_rank_zero(lambda: check_target(out_dir, overwrite))
    shards = plan_shards(export_specs(chunks, architecture, mesh, dtype), max_shard_bytes)
    writers = [Writer(replica, stage) for stage in range(mesh.pp.size) for replica in range(mesh.dp_cp.size)]
    writer_of = {
        tensor.name: writers[number % len(writers)] for number, shard in enumerate(shards) for tensor in shard.tensors
    }
    me = Writer(mesh.dp_cp.rank, mesh.pp.rank) if mesh.tp.rank == 0 else None
    staging = out_dir.with_name(f".{out_dir.name}.saving")
    on_rank_zero(lambda: _empty(staging))
    tensors = export_weights(chunks, architecture, mesh, dtype, writer_of=writer_of.__getitem__)
    delivered = ((name, tensor) for name, tensor in tensors if tensor is not None)
    records, failure = [], None
    try:
        records = [write_shard(staging, shard, delivered) for shard in shards if writer_of[shard.tensors[0].name] == me]
    except Exception as error:
        failure = error
    for _ in tensors:  # a rank that failed must not leave the others waiting for its part of the tensors
        pass
    try:
        raise_on_all(failure)
        written = _gather(records)
        facts = {"source": "training", **(facts or {})}
        on_rank_zero(
            lambda: finish_directory(staging, out_dir, shards, written, architecture.hf_config, source_dir, facts)
        )
    except Exception:
        if mesh.world.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _gather(records: list[FileRecord]) -> Iterator[FileRecord]:
    """Those of all ranks, on every rank."""
    everyone: list[list[FileRecord]] = [records]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, records)
    return (record for own in everyone for record in own)
