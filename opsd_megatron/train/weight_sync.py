"""The student's weights, out to the inference server: HF names, one bounded bucket at a time, under a version.

All ranks gather tensor after tensor on rank 0; a thread there sends a bucket while the next one is gathered.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from queue import Queue

import torch
from torch import Tensor
from torch.nn import Parameter

from opsd_megatron.checkpoint.agreement import raise_on_all
from opsd_megatron.checkpoint.hf_writer import block_of
from opsd_megatron.checkpoint.model_weights import export_specs, export_weights
from opsd_megatron.checkpoint.shard_plan import TensorSpec
from opsd_megatron.config import RolloutConfig
from opsd_megatron.errors import ConfigError, ServerError
from opsd_megatron.models.architecture import Architecture
from opsd_megatron.parallel.mesh import Mesh
from opsd_megatron.rollout.backend import (
    Capabilities,
    HalfUpdated,
    PauseMode,
    RolloutBackend,
    ServerRefused,
    Transport,
    Unsupported,
    UpdateLost,
    WrongChecksum,
)
from opsd_megatron.train.transports import Cargo, Carrier, DiskCarrier, GroupCarrier, HttpCarrier, NamedTensors
from opsd_megatron.transfer import packed_buckets

log = logging.getLogger(__name__)
Named = Iterator[tuple[str, Tensor | None]]
"""As `export_weights` makes it."""


def version_name(step: int) -> str:
    """Weights after `step` optimizer steps."""
    return f"step-{step}"


@dataclass(frozen=True)
class Published:
    """How an update went; measured on rank 0."""

    transport: Transport
    seconds: float
    paused_seconds: float
    """For how long the server was asked to stand still; 0 where it was not asked and did it by itself."""


class Publisher:
    """Rank 0 sends; the other ranks only gather. `backend` is None there, and `publish` is called on all."""

    def __init__(self, config: RolloutConfig, architecture: Architecture, mesh: Mesh, backend: RolloutBackend | None):
        self._config, self._architecture, self._mesh = config, architecture, mesh
        self._backend = backend if mesh.world.rank == 0 else None
        self._carriers: dict[Transport, Carrier] = {}
        self._unusable: set[Transport] = set()
        self._count = 0

    def publish(
        self, chunks: list, version: str, value_of: Callable[[Parameter], Tensor] | None = None
    ) -> Published | None:
        """Collective: the server serves these weights as `version`, or every rank raises. None on all but rank 0.

        Publishing the same version again is harmless. A server that undoes what fails goes on with its old weights;
        of any other nothing may be used until another update has succeeded, and HalfUpdated says so. UpdateLost:
        try again, from the start. `value_of` as for `export_weights`.
        """
        specs = export_specs(chunks, self._architecture, self._mesh)
        named = export_weights(chunks, self._architecture, self._mesh, value_of=value_of)
        problem, published = None, None
        if self._backend is not None:
            try:
                offered = self._backend.capabilities()
                update = _Update(self._backend, offered, self._config, self._is_checked())
                published = update.run(self._choose(self._backend, offered), specs, named, version)
                self._count += 1
            except Exception as error:
                problem = error
        for _ in named:  # the other ranks' part; after a failure rank 0's too, so that nobody waits in a gather
            pass
        raise_on_all(problem)
        return published

    def close(self) -> None:
        for carrier in self._carriers.values():
            carrier.close()

    def _is_checked(self) -> bool:
        every = self._config.checksum_every
        return every > 0 and self._count % every == 0

    def _choose(self, backend: RolloutBackend, offered: Capabilities) -> Carrier:
        """Under `auto` a group that cannot be formed gives way to the next transport, for good."""
        for transport in possible_transports(self._config, offered, self._mesh.device):
            if transport in self._unusable:
                continue
            carrier = self._carriers.get(transport) or self._make(transport, backend)
            self._carriers[transport] = carrier
            if isinstance(carrier, GroupCarrier):
                try:
                    carrier.join()
                except (UpdateLost, ServerRefused) as error:
                    if self._config.transport != "auto":
                        raise
                    log.warning("rollout.transport=auto leaves %s out: %s", transport, error)
                    self._unusable.add(transport)
                    continue
            return carrier
        raise Unsupported(
            f"the server takes new weights by {sorted(offered.transports)}, this run can send them by none of "
            f"these (rollout.transport={self._config.transport}, device {self._mesh.device.type}); for disk set "
            "rollout.shared_directory"
        )

    def _make(self, transport: Transport, backend: RolloutBackend) -> Carrier:
        match transport:
            case "disk":
                assert self._config.shared_directory is not None
                return DiskCarrier(backend, self._config.shared_directory, self._architecture)
            case "http":
                return HttpCarrier(backend)
            case "gloo" | "nccl":
                return GroupCarrier(backend, transport, self._config.transfer_host, self._mesh.device)


def possible_transports(config: RolloutConfig, capabilities: Capabilities, device: torch.device) -> list[Transport]:
    """What trainer and server share, best first: nccl between GPUs, a directory that was named, gloo, http."""
    shared: dict[Transport, bool] = {
        "nccl": device.type == "cuda" and not config.colocated,  # NCCL has no two ranks on one GPU
        "disk": config.shared_directory is not None,
        "gloo": True,
        "http": True,
    }
    wanted = shared if config.transport == "auto" else {config.transport: shared[config.transport]}
    return [name for name, has in wanted.items() if has and name in capabilities.transports]


class _Update:
    """One update of one server, on rank 0."""

    def __init__(self, backend: RolloutBackend, offered: Capabilities, config: RolloutConfig, is_checked: bool):
        self._backend = backend
        self._mode: PauseMode = config.pause
        self._sums: dict[str, str] | None = {} if is_checked else None
        self._paused_at: float | None = None
        self._paused_seconds = 0.0
        self._is_atomic = offered.has_atomic_updates
        if self._mode not in offered.pause_modes:
            raise ConfigError(f"rollout.pause={self._mode}: this server knows {', '.join(sorted(offered.pause_modes))}")
        if is_checked and not offered.has_checksum:
            raise ConfigError("rollout.checksum_every: this server computes no checksums; set it to 0")

    def run(self, carrier: Carrier, specs: Sequence[TensorSpec], named: Named, version: str) -> Published:
        """A server that undoes what fails is paused for the exchange alone, any other while its weights change."""
        started = time.perf_counter()
        sizes = [spec.num_bytes for spec in specs]
        buckets = [[specs[i] for i in bucket] for bucket in packed_buckets(sizes, carrier.bucket_bytes)]
        is_touched = False
        try:
            if carrier.touches_early and not self._is_atomic:
                self._pause()
                is_touched = True
            carrier.begin(version, buckets)
            send_buckets(carrier, named, buckets, self._sums)
            self._pause()
            is_touched = not self._is_atomic
            carrier.finish(version)
            self._backend.flush_cache()
            if is_touched:
                self._check()
            self._resume()
        except Exception as error:
            carrier.abort()
            if is_touched:
                raise HalfUpdated(
                    f"update {version} failed on a server that cannot undo it: {error}; it stays paused until another "
                    "update succeeds"
                ) from error
            with suppress(ServerError):
                self._resume()
            raise
        if self._is_atomic:
            self._check()
        return Published(carrier.transport, time.perf_counter() - started, self._paused_seconds)

    def _pause(self) -> None:
        """Not where the server by itself exchanges weights between two requests, which is as `wait`."""
        if self._paused_at is None and not (self._is_atomic and self._mode == "wait"):
            self._paused_at = time.perf_counter()
            self._backend.pause(self._mode)

    def _resume(self) -> None:
        if self._paused_at is not None:
            self._backend.resume()
            self._paused_seconds = time.perf_counter() - self._paused_at

    def _check(self) -> None:
        """WrongChecksum unless the server holds what was sent; a tied tensor may be held once and sent twice."""
        if self._sums is None:
            return
        served = self._backend.checksum()
        wrong = sorted(name for name, value in served.items() if self._sums.get(name) != value)
        if wrong or not served:
            first = f", first {wrong[0]}" if wrong else ""
            raise WrongChecksum(f"{len(wrong)} of {len(served)} served tensors differ from those that were sent{first}")


def send_buckets(
    carrier: Carrier, named: Named, buckets: Sequence[Sequence[TensorSpec]], sums: dict[str, str] | None
) -> None:
    """Sends everything, a bucket in a thread while the next one is gathered here; `sums` are filled with sha256s."""
    queue: Queue[Cargo | None] = Queue(1)
    problems: list[Exception] = []

    def send() -> None:
        while (cargo := queue.get()) is not None:
            if problems:
                continue
            try:
                if sums is not None:
                    sums.update(sha256s(cargo.tensors))
                carrier.send(cargo)
            except Exception as error:
                problems.append(error)

    thread = threading.Thread(target=send, name="weight-sync")
    thread.start()
    try:
        for bucket in buckets:
            tensors = _expected(bucket, named)
            if problems:
                break
            queue.put(carrier.prepare(tensors))
    finally:
        queue.put(None)
        thread.join()
    if problems:
        raise problems[0]


def _expected(bucket: Sequence[TensorSpec], named: Named) -> NamedTensors:
    """The next tensors, which are those that the server was told of."""
    tensors: NamedTensors = []
    for spec, (name, tensor) in zip(bucket, islice(named, len(bucket)), strict=True):
        found = None if tensor is None else TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        if tensor is None or found != spec:
            raise AssertionError(f"{spec} was planned, rank 0 was given {found or name}")
        tensors.append((name, tensor))
    return tensors


def sha256s(tensors: NamedTensors) -> dict[str, str]:
    return {name: hashlib.sha256(block_of(tensor.detach().cpu())).hexdigest() for name, tensor in tensors}
