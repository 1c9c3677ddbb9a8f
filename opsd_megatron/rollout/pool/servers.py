"""`ServerPool`: one or many inference servers behind one `RolloutBackend`."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from opsd_megatron.rollout.backend import (
    GenerateRequest,
    GenerateResult,
    RolloutBackend,
    ServerRefused,
    TensorInfo,
    TransferGroup,
)
from opsd_megatron.rollout.pool.fanout import call_each
from opsd_megatron.rollout.pool.fleet import Fleet
from opsd_megatron.rollout.pool.generation import Generation
from opsd_megatron.rollout.pool.member import Member
from opsd_megatron.rollout.pool.options import PoolOptions
from opsd_megatron.rollout.pool.status import Counts, status_line
from opsd_megatron.rollout.pool.updates import Update, join_group
from opsd_megatron.rollout.pool.watch import Watch

REPORT_S = 0.5
Result = TypeVar("Result")


class ServerPool(Fleet):
    """Requests go to whichever server can take them; updates go to all.

    A batch ends with one valid result per request as long as one server serves the wanted weights. It raises
    WrongWeightVersion when those that answer need a publication first, and ServerUnreachable when none answers for
    `retry_s`. A server that fails is left out and comes back by a whole update, without anybody's doing.
    """

    def __init__(
        self,
        backends: Mapping[str, RolloutBackend],
        options: PoolOptions | None = None,
        *,
        inspect: Callable[[RolloutBackend], None] = lambda backend: None,
        report: Callable[[str], None] | None = None,
    ):
        """`backends` by the name that messages give them; they should repeat failed calls for a second or so at most.
        `inspect` raises where a server, at first sight and after each restart, is not fit to serve. `report` is given a
        line about a batch twice a second."""
        super().__init__(backends, options or PoolOptions(), inspect)
        self.counts, self.report = Counts(), report
        self._versions: list[str] = []
        """All that were wanted, in order, and the one that is being published."""
        self._wanted_at = -1
        self._update: Update | None = None
        self._group: list[Member] = []
        self._reported, self._evictions = 0.0, 0

    # ---- what is wanted

    def expect(self, version: str, synced: Mapping[str, str]) -> None:
        """Every token must be of `version`, which `synced` servers (name -> process) have; of the publishing pool."""
        if version == self.wanted and synced == self.synced():
            return
        self._want(version)
        for member in self.members:
            process = synced.get(member.name)
            member.expect(version if process is not None else None, process)

    def synced(self) -> dict[str, str]:
        """name -> process of the servers that hold the wanted weights whole."""
        return {
            member.name: member.server_id or ""
            for member in self.members
            if self.wanted is not None and member.synced == self.wanted
        }

    def stale_servers(self) -> list[str]:
        """Servers that answer and would serve if the weights were published once more."""
        return [member.name for member in self.members if member.state == "dirty"]

    @property
    def version_mark(self) -> int:
        """For `valid_versions`: what is wanted now."""
        return self._wanted_at

    def valid_versions(self, since: int) -> Collection[str]:
        """Those wanted since that mark; empty: any."""
        return self._versions[since:] if since >= 0 else ()

    def _want(self, version: str) -> None:
        self.wanted = version
        if version not in self._versions[max(self._wanted_at, 0) :]:
            self._versions.append(version)
        self._wanted_at = len(self._versions) - 1 - self._versions[::-1].index(version)

    # ---- generation

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        if not requests:
            return []
        self.counts.total += len(requests)
        return asyncio.run(self._generate(requests))

    async def _generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        watch = Watch(
            self.members, self.options, self.threads, self._prove, lambda: self._paused, self._report
        )  # fmt: skip
        return await Generation(self, watch, requests).run()

    def take_counts(self) -> Counts:
        """What was done since the last call."""
        taken, self.counts = self._counted(), Counts()
        self._evictions = sum(member.evictions for member in self.members)
        return taken

    def _prove(self, member: Member) -> None:
        member.prove(self.wanted, self.valid_versions(self._wanted_at), self._inspect)

    def _counted(self) -> Counts:
        self.counts.evictions = sum(member.evictions for member in self.members) - self._evictions
        return self.counts

    def _report(self, waiting: int) -> None:
        now = time.monotonic()
        if self.report is not None and now - self._reported >= REPORT_S:
            self._reported = now
            states = Counter(member.state for member in self.members)
            running = sum(member.running for member in self.members)
            self.report(status_line(self._counted(), running, waiting, dict(states)))

    # ---- updates

    def begin_update(self, version: str) -> None:
        self._update = Update(self.members, self.options, self.threads, self._inspect, self._group)
        self._update.begin(version)
        if self.wanted is not None and version not in self._versions[self._wanted_at :]:
            self._versions.append(version)  # a server may finish, and answer from it, before the others do

    def push(self, bucket: Mapping[str, Tensor]) -> None:
        self._open_update().push(bucket)

    def receive(self, tensors: Sequence[TensorInfo]) -> None:
        self._open_update().receive(tensors)

    def finish_update(self, version: str) -> None:
        update = self._open_update()
        update.finish(version)
        self._update = None
        self._want(version)

    def update_from_disk(self, path: str, version: str) -> None:
        update = Update(self.members, self.options, self.threads, self._inspect, self._group)
        update.update_from_disk(path, version)
        self._want(version)

    def abort_update(self) -> None:
        if self._update is not None:
            self._update.abort()
            self._update = None
            del self._versions[self._wanted_at + 1 :]

    def join_group(self, group: TransferGroup) -> None:
        sizes = self._ask_all(lambda backend: backend.world_size())
        join_group(list(sizes), self.threads, group, sizes)
        self._group = list(sizes)

    def leave_group(self) -> None:
        members, self._group = self._group, []
        call_each(members, self.threads, lambda member: member.backend.leave_group())

    def _open_update(self) -> Update:
        if self._update is None:
            raise ServerRefused("no weight update is open; call begin_update first")
        return self._update
