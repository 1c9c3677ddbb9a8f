"""Looks after the servers while a batch runs: proves them, notices the dead, and says when nobody is left to ask."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from opsd_megatron.rollout.backend import MalformedReply, ServerError, ServerUnauthorized, ServerUnreachable
from opsd_megatron.rollout.pool.member import Member
from opsd_megatron.rollout.pool.options import PoolOptions

TICK_S = 0.05
FIRST_POLL_S = 0.1


class Watch:
    """Runs beside one batch, on its loop."""

    def __init__(
        self,
        members: Sequence[Member],
        options: PoolOptions,
        threads: Executor,
        prove: Callable[[Member], None],
        is_paused: Callable[[], bool],
        report: Callable[[int], None],
    ):
        """`prove` leaves a member ready, dirty or evicted, and blocks; while `is_paused` nothing is looked at; `report`
        is told at every tick how many requests wait for room."""
        self._members, self._options, self._threads = members, options, threads
        self._prove, self._is_paused, self._report = prove, is_paused, report
        self._busy: set[Member] = set()
        self._tasks: set[asyncio.Task] = set()
        self._waiting: list[asyncio.Future] = []
        self._missed: dict[Member, int] = {}
        self._poll_s, self._poll_at, self._nobody_since = FIRST_POLL_S, 0.0, None

    async def run(self) -> None:
        """Never returns. ServerError when no server can serve without a publication, or none came back in time."""
        try:
            while True:
                if not self._is_paused():
                    self._look()
                self._report(len(self._waiting))
                self.notify()
                await asyncio.sleep(TICK_S)
        finally:
            for task in self._tasks:
                task.cancel()

    async def settle(self, limit_s: float) -> None:
        """Returns when no server is left to be looked at, or after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while any(one.state == "unknown" for one in self._members) and time.monotonic() < deadline:
            await self.change()

    def notify(self) -> None:
        """Those who wait for room look again."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None)

    async def change(self) -> None:
        """Returns when a server may have become ready or have room."""
        one = asyncio.get_running_loop().create_future()
        self._waiting.append(one)
        await one

    def _look(self) -> None:
        now = time.monotonic()
        is_nobody_left = not any(one.state in ("ready", "paused", "updating") for one in self._members)
        for member in self._members:
            if member in self._busy:
                continue
            if self._is_due(member, now, is_nobody_left):
                if member.state == "ready":
                    member.state = "unknown"  # idle for long: no requests before it has proved itself again
                self._start(member, self._prove_in_thread(member))
            elif member.state == "ready" and member.running and now - member.looked_at > self._options.health_s:
                member.looked_at = now
                self._start(member, self._look_at_health(member))
        if not is_nobody_left:
            self._nobody_since, self._poll_s = None, FIRST_POLL_S
        elif self._poll_at <= now:
            self._poll_at, self._poll_s = now + self._poll_s, min(2 * self._poll_s, self._options.poll_s)
        if is_nobody_left and not self._busy:
            self._despair(now)

    def _is_due(self, member: Member, now: float, is_nobody_left: bool) -> bool:
        if member.state == "unknown":
            return True
        if member.state == "evicted":
            is_hopeless = isinstance(member.fault, ServerUnauthorized | MalformedReply)
            return now >= member.retry_at or (is_nobody_left and not is_hopeless and now >= self._poll_at)
        is_idle = not member.running and now - member.last_reply_at > self._options.canary_after_s
        return member.state == "ready" and is_idle

    def _start(self, member: Member, work) -> None:
        self._busy.add(member)
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(lambda done: (self._tasks.discard(done), self._busy.discard(member), self.notify()))

    async def _prove_in_thread(self, member: Member) -> None:
        loop = asyncio.get_running_loop()
        try:
            await asyncio.wait_for(loop.run_in_executor(self._threads, self._prove, member), self._options.canary_s)
        except TimeoutError:
            member.evict(ServerUnreachable(f"{member.name} gave no canary within {self._options.canary_s:.1f} s"))

    async def _look_at_health(self, member: Member) -> None:
        loop = asyncio.get_running_loop()
        try:
            looked = loop.run_in_executor(self._threads, member.backend.health)
            is_healthy = await asyncio.wait_for(looked, self._options.health_s)
        except TimeoutError:
            is_healthy = False
        self._missed[member] = 0 if is_healthy else self._missed.get(member, 0) + 1
        if self._missed[member] >= self._options.max_failures:
            self._missed[member] = 0
            member.evict(ServerUnreachable(f"{member.name} missed {self._options.max_failures} looks at its health"))

    def _despair(self, now: float) -> None:
        """Raises what ends the batch, now that no server is ready or being looked at."""
        dirty = [member.fault for member in self._members if member.state == "dirty" and member.fault is not None]
        if dirty:
            raise dirty[0]
        faults = [member.fault for member in self._members if member.fault is not None]
        if faults and all(isinstance(fault, ServerUnauthorized | MalformedReply) for fault in faults):
            raise faults[0]
        self._nobody_since = self._nobody_since or now
        if now - self._nobody_since > self._options.retry_s:
            raise nobody_serves(self._members, self._options.retry_s)


def nobody_serves(members: Sequence[Member], waited_s: float) -> ServerError:
    """What to raise when every server stayed away; the fault itself where there is one server."""
    named = "; ".join(f"{member.name}: {member.fault}" for member in members)
    return ServerUnreachable(
        f"no server serves, for {waited_s:.0f} s ({named}); is the server running, and is rollout.url its address?"
    )
