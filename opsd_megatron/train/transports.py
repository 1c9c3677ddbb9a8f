"""Ways for a stream of named tensors from the trainer's rank 0 to an inference server: disk, http, gloo, nccl."""

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from opsd_megatron.checkpoint.hf_writer import beside_weights, block_of
from opsd_megatron.checkpoint.shard_plan import ShardPlan, TensorSpec
from opsd_megatron.checkpoint.staging import write_all
from opsd_megatron.errors import ServerError
from opsd_megatron.models.architecture import Architecture
from opsd_megatron.rollout.backend import RolloutBackend, TensorInfo, TransferGroup, Transport, UpdateLost
from opsd_megatron.transfer import Kind, Member, TransferError, open_store, pack

NamedTensors = list[tuple[str, Tensor]]
GROUP_S = 120.0
"""Longest wait for the members of a group to meet, and for one broadcast."""


class Carrier(Protocol):
    """One way. Calls of an update: `begin`, then for each bucket `prepare` and `send`, then `finish`, or `abort`.

    `prepare` runs where the tensors are made, `send` in another thread, bucket after bucket.
    """

    transport: Transport
    bucket_bytes: int
    touches_early: bool
    """The server's weights may change before `finish`, where its updates are not atomic."""

    def begin(self, version: str, buckets: Sequence[Sequence[TensorSpec]]) -> None: ...

    def prepare(self, bucket: NamedTensors) -> "Cargo": ...

    def send(self, cargo: "Cargo") -> None: ...

    def finish(self, version: str) -> None: ...

    def abort(self) -> None:
        """Nothing is under way afterwards; raises nothing that the failure before does not say better."""
        ...

    def close(self) -> None: ...


class Cargo:
    """A bucket on its way: its tensors, and the bytes to send where a carrier packs them."""

    def __init__(self, tensors: NamedTensors, packed: Tensor | None = None, room: Tensor | None = None):
        self.tensors, self.packed, self.room = tensors, packed, room


class HttpCarrier:
    """Bodies of requests, which the server stages."""

    transport: Transport = "http"
    bucket_bytes = 256 << 20
    touches_early = False

    def __init__(self, backend: RolloutBackend):
        self._backend = backend

    def begin(self, version: str, buckets: Sequence[Sequence[TensorSpec]]) -> None:
        self._backend.begin_update(version)

    def prepare(self, bucket: NamedTensors) -> Cargo:
        return Cargo([(name, tensor.cpu()) for name, tensor in bucket])

    def send(self, cargo: Cargo) -> None:
        self._backend.push(dict(cargo.tensors))

    def finish(self, version: str) -> None:
        self._backend.finish_update(version)

    def abort(self) -> None:
        with suppress(ServerError):
            self._backend.abort_update()

    def close(self) -> None:
        pass


class DiskCarrier:
    """A Hugging Face directory, which the server reads. Each bucket is a file of its own.

    Nothing is synced: these files are read at once and deleted with the next update.
    """

    transport: Transport = "disk"
    bucket_bytes = 512 << 20
    touches_early = False
    PREFIX = "weights-"

    def __init__(self, backend: RolloutBackend, directory: Path, architecture: Architecture):
        self._backend, self._root, self._architecture = backend, directory.resolve(), architecture

    def begin(self, version: str, buckets: Sequence[Sequence[TensorSpec]]) -> None:
        shards = [
            ShardPlan(f"model-{number:05d}-of-{len(buckets):05d}.safetensors", tuple(bucket))
            for number, bucket in enumerate(buckets, start=1)
        ]
        self._target = self._root / f"{self.PREFIX}{version}"
        self._partial = self._root / f".{self.PREFIX}{version}"
        for old in (*self._root.glob(f"{self.PREFIX}*"), *self._root.glob(f".{self.PREFIX}*")):
            shutil.rmtree(old, ignore_errors=True)
        self._partial.mkdir(parents=True)
        hf_config = self._architecture.hf_config
        for name, content in beside_weights(shards, hf_config, None).items():
            (self._partial / name).write_bytes(content)
        if len(shards) == 1:  # transformers looks for model.safetensors only, unless there is an index
            shards = [ShardPlan("model.safetensors", shards[0].tensors)]
        self._coming = iter(shards)

    def prepare(self, bucket: NamedTensors) -> Cargo:
        return Cargo([(name, tensor.cpu()) for name, tensor in bucket])

    def send(self, cargo: Cargo) -> None:
        shard = next(self._coming)
        with open(self._partial / shard.file, "wb", buffering=0) as out:
            for block in (memoryview(shard.header), *(block_of(tensor) for _, tensor in cargo.tensors)):
                write_all(out, block)

    def finish(self, version: str) -> None:
        self._partial.rename(self._target)
        self._backend.update_from_disk(str(self._target), version)

    def abort(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        with suppress(ServerError):
            self._backend.abort_update()

    def close(self) -> None:
        pass


class GroupCarrier:
    """Broadcasts through a process group of rank 0 and the servers' ranks, which lasts from update to update.

    Any failure ends the group; the next update makes another, with the servers that there are then.
    """

    bucket_bytes = 64 << 20
    touches_early = True
    ROOMS = 3
    """One bucket is packed while another is sent."""
    _numbers = count()

    def __init__(self, backend: RolloutBackend, kind: Kind, host: str, device: torch.device):
        self.transport: Transport = kind
        self._kind: Kind = kind
        self._backend, self._host, self._device = backend, host, device
        self._member: Member | None = None
        self._store: object = None
        self._world_size = 0
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="transfer")
        self._received: Future | None = None
        self._rooms: SimpleQueue[Tensor] = SimpleQueue()
        self._room_bytes = 0

    def join(self) -> None:
        """Idempotent. UpdateLost where the members do not meet."""
        world_size = 1 + self._backend.world_size()
        if self._member is not None and world_size == self._world_size:
            return
        self._leave()
        name = f"opsd-{os.getpid()}-{next(self._numbers)}"
        self._store = open_store(self._host, GROUP_S)
        port = self._store.port
        group = TransferGroup(self._kind, self._host, port, 1, world_size, name, self.bucket_bytes)
        where = (self._kind, self._host, port, 0, world_size, name, GROUP_S, self._device)
        mine = self._threads.submit(Member, *where)
        try:
            self._backend.join_group(group)
            self._member = mine.result(GROUP_S)
        except (TransferError, FutureTimeout) as error:
            raise UpdateLost(f"the transfer group was not formed: {error}; publish again") from error
        finally:
            if self._member is None:
                self._store = None  # a rank that still waits for others gives up
        self._world_size = world_size

    def begin(self, version: str, buckets: Sequence[Sequence[TensorSpec]]) -> None:
        self.join()
        self._make_rooms(max(sum(spec.num_bytes for spec in bucket) for bucket in buckets))
        self._backend.begin_update(version)
        described = [
            TensorInfo(spec.name, str(spec.dtype).removeprefix("torch."), tuple(spec.shape))
            for bucket in buckets
            for spec in bucket
        ]
        self._received = self._threads.submit(self._backend.receive, described)

    def prepare(self, bucket: NamedTensors) -> Cargo:
        room = self._rooms.get()
        return Cargo(bucket, pack([tensor for _, tensor in bucket], room), room)

    def send(self, cargo: Cargo) -> None:
        assert cargo.packed is not None and cargo.room is not None
        try:
            if self._member is not None:
                self._member.broadcast(cargo.packed, self._check_receiver)
        except TransferError as error:
            self._explain(error)
        finally:
            self._rooms.put(cargo.room)

    def finish(self, version: str) -> None:
        assert self._received is not None
        self._received.result(GROUP_S)
        self._backend.finish_update(version)

    def abort(self) -> None:
        self._leave()
        self._room_bytes = 0  # a bucket that was never sent has taken its room with it
        with suppress(ServerError):
            self._backend.abort_update()

    def close(self) -> None:
        self._leave()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _check_receiver(self) -> None:
        """Raises what the server said, as soon as it has said it."""
        if self._received is not None and self._received.done():
            self._received.result()

    def _explain(self, error: TransferError) -> None:
        """The server's own words say more than a broken connection."""
        assert self._received is not None
        with suppress(FutureTimeout):
            self._received.result(5.0)
        raise UpdateLost(f"{error}; publish again") from error

    def _leave(self) -> None:
        member, self._member, self._store = self._member, None, None
        if member is not None:
            member.close()
            with suppress(ServerError):
                self._backend.leave_group()

    def _make_rooms(self, size: int) -> None:
        if size == self._room_bytes:
            return
        self._rooms, self._room_bytes = SimpleQueue(), size
        device = self._device if self._kind == "nccl" else torch.device("cpu")
        pinned = self._device.type == "cuda" and device.type == "cpu"
        for _ in range(self.ROOMS):
            self._rooms.put(torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned))
