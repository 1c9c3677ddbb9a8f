"""The student's weights, out to the inference server: HF names, one bounded bucket at a time, under a version."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from opsd_megatron.checkpoint.model_weights import export_weights
from opsd_megatron.models.architecture import Architecture
from opsd_megatron.parallel.mesh import Mesh
from opsd_megatron.parallel.reduce import broadcast_object
from opsd_megatron.rollout.backend import RolloutBackend

BUCKET_BYTES = 256 << 20


def version_name(step: int) -> str:
    """Weights after `step` optimizer steps."""
    return f"step-{step}"


def publish(chunks: list, architecture: Architecture, mesh: Mesh, backend: RolloutBackend | None, version: str) -> None:
    """Collective over all ranks: gathers the weights on global rank 0, whose `backend` sends them.

    An error there reaches all ranks.

    The server stages every bucket and swaps them whole, so that it serves either the old weights or these.
    """
    named = export_weights(chunks, architecture, mesh)
    failure: Exception | None = None
    if backend is not None and mesh.world.rank == 0:
        try:
            backend.begin_update(version)
            for bucket in _buckets(named, BUCKET_BYTES):
                backend.push(bucket)
            backend.finish_update(version)
        except Exception as error:
            failure = error
    for _ in named:  # the other ranks' part; after a failure rank 0 too, so that nobody waits in a gather
        pass
    failure = broadcast_object(failure, mesh.world, source_rank=0)
    if failure is not None:
        raise failure


def _buckets(named: Iterable[tuple[str, Tensor | None]], limit_bytes: int) -> Iterator[dict[str, Tensor]]:
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named:
        if tensor is None:
            raise AssertionError(f"global rank 0 was not given {name}")
        if bucket and size + tensor.nbytes > limit_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor.cpu()
        size += tensor.nbytes
    if bucket:
        yield bucket
