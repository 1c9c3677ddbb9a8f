"""The server's side of a transfer group, and the memory that what comes through it is received into."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from opsd_megatron.server.refusal import Refusal
from opsd_megatron.transfer import Kind, Member, TransferError

Result = TypeVar("Result")
NO_GROUP = "NoTransferGroupError"
Described = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""dtype and shape by name, in the order of the broadcasts."""


class InitInfo(BaseModel):
    """vLLM's words for a group, plus where its store is."""

    backend: Kind
    master_address: str = Field(max_length=253)
    master_port: int = Field(ge=1, le=65535)
    rank_offset: int = Field(ge=1)
    world_size: int = Field(ge=2)
    group_name: str = Field(min_length=1, max_length=256)
    packed_buffer_size_bytes: int = Field(ge=1)
    timeout_s: float = Field(default=120.0, gt=0, le=3600)


async def beside_the_loop(function: Callable[[], Result]) -> Result:
    """What `function` returns, run in a thread of its own that does not hold up the end of the process."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="transfer", daemon=True).start()
    return await asyncio.wrap_future(future)


class Receiver:
    """At most one membership. `join` and `receive` block and are called off the event loop."""

    def __init__(self, device: torch.device):
        self._device = device
        self._membership: _Membership | None = None

    @property
    def kinds(self) -> list[Kind]:
        return ["gloo", "nccl"] if self._device.type == "cuda" else ["gloo"]

    def join(self, info: InitInfo) -> None:
        """Leaves the group before; Refusal where the members do not meet in time."""
        if info.backend not in self.kinds:
            raise Refusal(400, f"backend {info.backend}: this server computes on {self._device} and knows {self.kinds}")
        self.leave()
        where = (info.master_address, info.master_port, info.rank_offset, info.world_size, info.group_name)
        try:
            member = Member(info.backend, *where, info.timeout_s, self._device)
        except (TransferError, OSError) as error:
            raise Refusal(409, str(error)) from error
        self.leave()
        self._membership = _Membership(member, info.packed_buffer_size_bytes)

    def receive(self, take: Callable[[Member, int], int]) -> int:
        """What `take(member, bucket_bytes)` returns. An error there ends the membership: nobody waits for it."""
        membership = self._membership
        if membership is None:
            raise Refusal(409, "this server is in no transfer group; POST /init_weight_transfer_engine", NO_GROUP)
        if not membership.at_work.acquire(blocking=False):
            raise Refusal(409, "another transfer is under way; wait for it, or POST /shutdown_weight_transfer_engine")
        try:
            return take(membership.member, membership.bucket_bytes)
        except BaseException as error:
            self.leave(membership)
            if isinstance(error, TransferError):
                raise Refusal(409, str(error), NO_GROUP) from error
            raise
        finally:
            membership.at_work.release()

    def leave(self, only: "_Membership | None" = None) -> None:
        """A broadcast that runs meanwhile is given up, and its thread ends with the group's timeout at the latest."""
        membership = only or self._membership
        if membership is self._membership:
            self._membership = None
        if membership is not None:
            membership.member.close()

    def interrupt(self) -> None:
        """Leaves the group if something is being received."""
        if self._membership is not None and self._membership.at_work.locked():
            self.leave()


@dataclass(frozen=True)
class _Membership:
    member: Member
    bucket_bytes: int
    at_work: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Staging:
    """The tensors of one update, by bucket, and the memory that they lie in."""

    buckets: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rooms: dict[str, list[Tensor]] = field(default_factory=dict)


class Rooms:
    """Memory for staged weights: on a CPU that of weights which were replaced, whose pages the system need not find."""

    def __init__(self):
        self._lock = threading.Lock()
        self._free: list[Tensor] = []
        self._serving: list[Tensor] = []

    def take(self, size: int, device: torch.device, staging: Staging, bucket: str) -> Tensor:
        """`size` bytes, which are that bucket's from now on."""
        with self._lock:
            fitting = (i for i, room in enumerate(self._free) if room.nbytes == size and room.device == device)
            index = next(fitting, None)
            room = None if index is None else self._free.pop(index)
        if room is None:
            room = torch.empty(size, dtype=torch.uint8, device=device)
        staging.rooms.setdefault(bucket, []).append(room)
        return room

    def copy_of(self, tensor: Tensor, staging: Staging, bucket: str) -> Tensor:
        room = self.take(tensor.nbytes, tensor.device, staging, bucket)
        return room.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def serve(self, staging: Staging, keep: bool) -> list[Tensor]:
        """What was staged is served now; what was served before is free, and kept where `keep` and on a CPU. Returns
        what nobody will use again."""
        with self._lock:
            unused = self._free
            self._free = [room for room in self._serving if keep and room.device.type == "cpu"]
            unused += [] if self._free else self._serving
            self._serving = [room for rooms in staging.rooms.values() for room in rooms]
        return unused
