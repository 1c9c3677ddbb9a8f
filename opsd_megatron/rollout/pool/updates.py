"""A weight update of several servers: those that fail are left dirty, the others go on without them."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor

from torch import Tensor

from opsd_megatron.errors import UserError
from opsd_megatron.rollout.backend import (
    RolloutBackend,
    ServerError,
    ServerUnauthorized,
    ServerUnreachable,
    TensorInfo,
    TransferGroup,
    UpdateLost,
)
from opsd_megatron.rollout.groups import divide_group
from opsd_megatron.rollout.pool.fanout import call_each
from opsd_megatron.rollout.pool.member import Member
from opsd_megatron.rollout.pool.options import PoolOptions
from opsd_megatron.rollout.pool.watch import nobody_serves

WAIT_S = 0.25


class Update:
    """The members that take part, from `begin` to `finish`; a new one for every publication.

    Every call goes to all of them at once. A member that fails leaves the update and is dirty, or evicted where it
    cannot be reached: the next publication takes it in again. When the last one fails, its error is raised; what a
    repetition from the start may cure is UpdateLost.
    """

    def __init__(
        self,
        members: Sequence[Member],
        options: PoolOptions,
        threads: Executor,
        inspect: Callable[[RolloutBackend], None],
        group: Sequence[Member],
    ):
        """`group`: the members that have joined a transfer group, none for the other transports."""
        self._all, self._options, self._threads, self._inspect = members, options, threads, inspect
        self._group = set(group)
        self.members: list[Member] = []

    def begin(self, version: str) -> None:
        """Waits up to `retry_s` for one server that takes part."""
        self._gather(lambda member: member.backend.begin_update(version))

    def push(self, bucket: Mapping[str, Tensor]) -> None:
        self._each(lambda member: member.backend.push(bucket))

    def receive(self, tensors: Sequence[TensorInfo]) -> None:
        """UpdateLost where the group and the members of this update differ: join a new group, then begin again."""
        if self._group != set(self.members):
            raise UpdateLost(
                "the servers of this update are not those of the transfer group; join a group again and publish again"
            )
        self._each(lambda member: member.backend.receive(tensors))

    def finish(self, version: str) -> None:
        self._each(lambda member: member.backend.finish_update(version))
        for member in self.members:
            member.finish_update(version)

    def update_from_disk(self, path: str, version: str) -> None:
        """Begins and finishes by itself."""
        self._gather(lambda member: member.backend.update_from_disk(path, version))
        for member in self.members:
            member.finish_update(version)

    def abort(self) -> None:
        """Members whose updates are atomic serve what they served before; the others are dirty."""
        whole, errors = call_each(self.members, self._threads, _abort)
        for member, error in errors.items():
            self._lose(member, error)
        for member, is_whole in whole.items():
            if is_whole:
                member.state = "unknown"
            else:
                member.soil(UpdateLost(f"an update of {member.name} was aborted"))
        self.members = []

    def _gather(self, function: Callable[[Member], None]) -> None:
        deadline = time.monotonic() + self._options.retry_s
        while True:
            is_last = time.monotonic() > deadline
            candidates = in_reach(self._all) or list(self._all)
            begun, errors = call_each(candidates, self._threads, lambda member: self._open(member, function))
            for member, error in errors.items():
                self._lose(member, error)
            self.members = list(begun)
            if self.members:
                return
            final = [error for error in errors.values() if not isinstance(error, ServerUnreachable)]
            if final:
                raise final[0]
            if is_last:
                raise nobody_serves(self._all, self._options.retry_s)
            time.sleep(WAIT_S)

    def _open(self, member: Member, function: Callable[[Member], None]) -> None:
        member.meet(self._inspect)
        member.state, member.fault = "updating", None
        function(member)

    def _each(self, function: Callable[[Member], None]) -> None:
        _, errors = call_each(self.members, self._threads, function)
        for member, error in errors.items():
            self._lose(member, error)
            self.members.remove(member)
        if self.members or not errors:
            return
        error = next(iter(errors.values()))
        lost = next((one for one in errors.values() if isinstance(one, UpdateLost | ServerUnreachable)), None)
        if lost is not None:
            raise UpdateLost(f"every server was lost in the update ({lost}); publish again") from lost
        raise error

    def _lose(self, member: Member, error: Exception) -> None:
        if isinstance(error, ServerUnreachable | ServerUnauthorized):
            member.evict(error)
        elif isinstance(error, ServerError):
            member.soil(error)
        elif isinstance(error, UserError):  # `inspect` found that it is not fit to serve
            member.evict(error)
        else:
            raise error


def in_reach(members: Sequence[Member]) -> list[Member]:
    """Those that are worth a call: not evicted, or evicted so long ago that they may be back."""
    now = time.monotonic()
    return [member for member in members if member.state != "evicted" or now >= member.retry_at]


def join_group(members: Sequence[Member], threads: Executor, group: TransferGroup, sizes: Mapping[Member, int]) -> None:
    """All at once, since each blocks until the others are there; the ranks follow one another in this order.

    The first error is raised: without one member nobody meets. UpdateLost where the servers are not those of which the
    group's size was made.
    """
    try:
        groups = divide_group(group, [sizes[member] for member in members])
    except ValueError as error:
        raise UpdateLost(f"{error}: servers came or went; ask for world_size again") from error
    group_of = dict(zip(members, groups, strict=True))
    _, errors = call_each(members, threads, lambda member: member.backend.join_group(group_of[member]))
    for error in errors.values():
        raise error


def _abort(member: Member) -> bool:
    """Whether its old weights are whole."""
    member.backend.abort_update()
    return member.backend.capabilities().has_atomic_updates
