"""Distributed checkpoint -> Hugging Face directory on one CPU process, without a model in memory.

Every file is planned from the weight table before any is written; threads read rows, convert, hash and write them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Semaphore
from typing import Any

from opsd_megatron.checkpoint.hf_writer import DEFAULT_SHARD_BYTES, beside_weights, block_of, check_target
from opsd_megatron.checkpoint.manifest import MANIFEST, manifest_text
from opsd_megatron.checkpoint.shard_plan import ShardPlan, plan_shards
from opsd_megatron.checkpoint.staging import Block, Staging
from opsd_megatron.checkpoint.stored_model import BLOCK_BYTES, DistModel, blocks_of, parts_of, refuse_problems, specs_of
from opsd_megatron.errors import CheckpointError

INTERPRETER_BYTES = 500_000_000
"""Python with torch and what this module imports."""
WRITER_BYTES = 30 * BLOCK_BYTES
"""A block that is read, converted, hashed and written, and what the allocator keeps of earlier ones."""


@dataclass(frozen=True)
class ExportJob:
    """What is written; two jobs that are equal write the same files, so one can take up the other's work."""

    checkpoint: Path
    output: Path
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    side_files: Path | None = None
    """Directory that tokenizer, chat template, generation config and licence are copied from."""
    overwrite: bool = False
    writers: int = 2
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest says of source, iteration and method."""


def plan_export(model: DistModel, job: ExportJob) -> list[ShardPlan]:
    """The files with tensors of an export, from headers alone; CheckpointError where names or shapes are wrong."""
    refuse_problems(model, job.checkpoint)
    return plan_shards(specs_of(model), job.max_shard_bytes)


def export_memory(job: ExportJob) -> int:
    """Bytes of resident memory that an export needs at most."""
    return INTERPRETER_BYTES + job.writers * WRITER_BYTES


def export_checkpoint(
    model: DistModel,
    job: ExportJob,
    on_bytes: Callable[[int], None] = lambda _: None,
    before_finish: Callable[[Path], Mapping[str, Any]] = lambda _: {},
    card: Callable[[Mapping[str, Any]], str] | None = None,
) -> Path:
    """Writes `job.output`, whole or not at all, and returns it; interrupted work of an equal job is taken up.

    `before_finish` gets the finished files and returns what was verified about them, for manifest and `card`
    (the text of README.md); an error in it leaves the output unmade.

    Raises:
        CheckpointError: names or shapes are wrong, the output is not empty, or somebody else is writing it.
    """
    check_target(job.output, job.overwrite)
    shards = plan_export(model, job)
    parts = {part.name: part for part in parts_of(model.architecture)}
    at_work = Semaphore(job.writers)

    def blocks(shard: ShardPlan) -> Iterator[Block]:
        with at_work:  # given back before the writer waits for the disk, so that another file is on its way meanwhile
            yield shard.header
            for tensor in shard.tensors:
                for rows in blocks_of(model, parts[tensor.name]):
                    yield block_of(rows)

    with Staging(job.output, _identity(job, shards), on_bytes) as staging:
        with ThreadPoolExecutor(2 * job.writers) as pool:
            written = [pool.submit(staging.write, shard.file, blocks(shard)) for shard in shards]
            for one in written:
                one.result()
        for name, content in beside_weights(shards, model.architecture.hf_config, job.side_files).items():
            staging.write(name, [content])
        verified = before_finish(staging.files)
        if card is not None:
            staging.write("README.md", [card(verified).encode()])
        facts = {**job.provenance, "verification": verified}
        staging.write(MANIFEST, [manifest_text(staging.records.values(), facts).encode()])
        return staging.finish()


def _identity(job: ExportJob, shards: list[ShardPlan]) -> dict[str, Any]:
    metadata = (job.checkpoint / ".metadata").stat()
    return {
        "checkpoint": str(job.checkpoint.resolve()),
        "written": [metadata.st_mtime_ns, metadata.st_size],
        "shards": [[shard.file, [[t.name, str(t.dtype), list(t.shape)] for t in shard.tensors]] for shard in shards],
        "side files": str(job.side_files),
        "facts": json.loads(json.dumps(job.provenance, default=str)),
    }


def refuse_beyond(limit: int | None, needed: int, smallest: str) -> None:
    """CheckpointError where a memory limit cannot be kept, by arithmetic, before anything is read."""
    if limit is not None and needed > limit:
        raise CheckpointError(
            f"--memory-limit {limit / 1e6:.0f} MB is below the {needed / 1e6:.0f} MB that this needs; {smallest}"
        )
