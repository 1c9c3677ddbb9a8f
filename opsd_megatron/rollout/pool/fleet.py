"""Servers as one: what is asked of all of them, of one, and what their answers add up to."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from opsd_megatron.rollout.backend import (
    Capabilities,
    MalformedReply,
    Memory,
    PauseMode,
    RolloutBackend,
    ServerInfo,
    ServerRefused,
    ServerUnauthorized,
    ServerUnreachable,
    WrongWeightVersion,
)
from opsd_megatron.rollout.pool.fanout import call_each
from opsd_megatron.rollout.pool.member import Member
from opsd_megatron.rollout.pool.options import PoolOptions
from opsd_megatron.rollout.pool.updates import WAIT_S, in_reach
from opsd_megatron.rollout.pool.watch import nobody_serves

Result = TypeVar("Result")


class Fleet:
    """The members of a pool and the calls that have neither a batch nor an update."""

    def __init__(
        self,
        backends: Mapping[str, RolloutBackend],
        options: PoolOptions,
        inspect: Callable[[RolloutBackend], None],
    ):
        if not backends:
            raise ValueError("a pool needs a server")
        self.options = options
        self.members = [Member(name, backend, options) for name, backend in backends.items()]
        self.wanted: str | None = None
        """Version of the weights that every token must come from; None: any."""
        self.threads = ThreadPoolExecutor(len(backends) * (2 * options.max_concurrent + 4), thread_name_prefix="pool")
        self._inspect, self._paused = inspect, False

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        for member in self.members:
            member.backend.close()

    def health(self) -> bool:
        healthy, _ = call_each(in_reach(self.members), self.threads, lambda member: member.backend.health())
        return any(healthy.values())

    def wait_until_healthy(self, timeout_s: float) -> None:
        """Waits for all; goes on without those that are not there in time. ServerUnreachable where none is.

        What `inspect` finds wrong with a server that is there, and a wrong token, is raised at once."""
        deadline = time.monotonic() + timeout_s
        missing = list(self.members)
        while missing:
            _, errors = call_each(missing, self.threads, self._meet)
            for error in errors.values():
                if not isinstance(error, ServerUnreachable):
                    raise error
            missing = list(errors)
            if missing and time.monotonic() > deadline:
                for member in missing:
                    member.evict(errors[member])
                if len(missing) == len(self.members):
                    raise nobody_serves(self.members, timeout_s)
                return
            time.sleep(0.1 if missing else 0.0)

    def _meet(self, member: Member) -> None:
        if not member.backend.health():
            raise ServerUnreachable(f"no healthy server at {member.name}")
        member.meet(self._inspect)

    def info(self) -> ServerInfo:
        """What holds for every server: the smallest limits; seeded where all are."""
        infos = list(self._ask_all(lambda backend: backend.info()).values())
        sizes = {info.vocab_size for info in infos}
        if len(sizes) > 1:
            raise ServerRefused(
                f"the servers of a pool have vocabularies of {sorted(sizes)}; they must serve one model"
            )
        versions = {info.weight_version for info in infos}
        return ServerInfo(
            server_id="+".join(info.server_id for info in infos),
            engine="+".join(sorted({info.engine for info in infos})),
            seeded=all(info.seeded for info in infos),
            dtype="+".join(sorted({info.dtype for info in infos})),
            vocab_size=sizes.pop(),
            max_model_len=min(info.max_model_len for info in infos),
            weight_version=versions.pop() if len(versions) == 1 else "",
        )

    def weight_version(self) -> str:
        """Empty where the servers differ."""
        return self.info().weight_version

    def capabilities(self) -> Capabilities:
        """What every server can do."""
        all_can = list(self._ask_all(lambda backend: backend.capabilities()).values())
        kinds = {one.logprob_kind for one in all_can}
        if len(kinds) > 1:
            raise ServerRefused("some servers give raw log-probs and some processed ones; start them alike")
        return Capabilities(
            logprob_kind=all_can[0].logprob_kind,
            seeded=all(one.seeded for one in all_can),
            has_spans=all(one.has_spans for one in all_can),
            pause_modes=frozenset.intersection(*(one.pause_modes for one in all_can)),
            transports=frozenset.intersection(*(one.transports for one in all_can)),
            has_atomic_updates=all(one.has_atomic_updates for one in all_can),
            has_checksum=all(one.has_checksum for one in all_can),
            can_score=all(one.can_score for one in all_can),
            can_sleep=all(one.can_sleep for one in all_can),
        )

    def checksum(self) -> dict[str, str]:
        """Of the servers that hold the wanted weights; a server that differs from the first of them is dirty, and
        WrongWeightVersion is raised."""
        sums = self._ask_all(lambda backend: backend.checksum(), self._synced_members())
        first = next(iter(sums.values()))
        for member, other in sums.items():
            if other != first:
                error = WrongWeightVersion(f"{member.name} holds other weights than the first server of the pool")
                member.soil(error)
                raise error
        return first

    def pause(self, mode: PauseMode) -> None:
        self._paused = True
        for member in self.members:
            if member.state == "ready":
                member.state = "paused"
        self._ask_all(lambda backend: backend.pause(mode))

    def resume(self) -> None:
        self._ask_all(lambda backend: backend.resume())
        self._paused = False
        for member in self.members:
            if member.state == "paused":
                member.state = "ready"

    def abort(self, request_ids: Sequence[str] | None = None) -> int:
        return sum(self._ask_all(lambda backend: backend.abort(request_ids)).values())

    def flush_cache(self) -> None:
        self._ask_all(lambda backend: backend.flush_cache())

    def sleep(self) -> None:
        self._ask_all(lambda backend: backend.sleep())

    def wake(self, what: Sequence[Memory]) -> None:
        self._ask_all(lambda backend: backend.wake(what))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._ask_one(lambda backend: backend.score(sequences))

    def world_size(self) -> int:
        """Of the servers that can be reached now."""
        return sum(self._ask_all(lambda backend: backend.world_size()).values())

    def _synced_members(self) -> list[Member]:
        members = in_reach(self.members)
        return [member for member in members if not member.needs_sync(self.wanted)] or members

    def _ask_all(
        self, function: Callable[[RolloutBackend], Result], members: Sequence[Member] | None = None
    ) -> dict[Member, Result]:
        """Answers of those that can be reached; one that cannot is evicted. When none can be, waits up to `retry_s`."""
        deadline = time.monotonic() + self.options.retry_s
        while True:
            chosen = (members if members is not None else in_reach(self.members)) or self.members
            answers, errors = call_each(chosen, self.threads, lambda member: function(member.backend))
            for member, error in errors.items():
                if not isinstance(error, ServerUnreachable | ServerUnauthorized | MalformedReply):
                    raise error
                member.evict(error)
            if answers:
                return answers
            final = [error for error in errors.values() if not isinstance(error, ServerUnreachable)]
            if final:
                raise final[0]
            if time.monotonic() > deadline:
                raise nobody_serves(self.members, self.options.retry_s)
            time.sleep(WAIT_S)

    def _ask_one(self, function: Callable[[RolloutBackend], Result]) -> Result:
        """Of the first server with the wanted weights that answers."""
        fault: Exception | None = None
        for member in sorted(self._synced_members(), key=lambda one: one.outstanding_tokens):
            try:
                return function(member.backend)
            except (ServerUnreachable, ServerUnauthorized, MalformedReply) as error:
                member.evict(error)
                fault = error
        raise fault or ServerUnreachable("no server can be reached")
