"""One batch of requests on the servers of a pool: admitted, answered, repeated elsewhere, and none lost."""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from opsd_megatron.rollout.backend import (
    GenerateRequest,
    GenerateResult,
    MalformedReply,
    RolloutBackend,
    ServerRefused,
    ServerUnauthorized,
    ServerUnreachable,
    WrongWeightVersion,
)
from opsd_megatron.rollout.partial import Unfinished
from opsd_megatron.rollout.pool.member import Interrupted, Member, check_versions
from opsd_megatron.rollout.pool.options import PoolOptions
from opsd_megatron.rollout.pool.routing import Router
from opsd_megatron.rollout.pool.status import Counts
from opsd_megatron.rollout.pool.watch import Watch

LONGEST_BACKOFF_S = 8.0
MAX_ATTEMPTS = 8
"""A request that failed so often, and for `retry_s`, although servers were ready, is given up."""
SETTLE_S = 5.0
"""The first requests of a batch wait so long for servers that are being looked at, to be shared among all of them."""
Result = TypeVar("Result")


class Shared(Protocol):
    """What a batch needs of its pool."""

    members: list[Member]
    options: PoolOptions
    counts: Counts
    threads: ThreadPoolExecutor

    def valid_versions(self, since: int) -> Collection[str]: ...

    @property
    def version_mark(self) -> int: ...


@dataclass
class _Ask:
    """One request to whichever server takes it."""

    number: int
    """Of the request in its batch: what it shares with others is known by that."""
    request: GenerateRequest

    @property
    def tokens(self) -> int:
        return len(self.request.token_ids) + self.request.n * self.request.max_tokens


class Generation:
    """Lives for one call, on an event loop of its own; the servers are called from threads."""

    def __init__(self, pool: Shared, watch: Watch, requests: Sequence[GenerateRequest]):
        self._pool, self._watch, self._requests = pool, watch, requests
        self._router = Router(requests)
        self._seen_versions = pool.version_mark

    async def run(self) -> list[GenerateResult]:
        """One result per request, in order; what `Watch` raises when no server can go on."""
        watching = asyncio.create_task(self._watch.run())
        work = asyncio.create_task(self._finish_all())
        try:
            await asyncio.wait({work, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done() and not work.done():
                watching.result()
            return await work
        finally:
            for task in (watching, work):
                task.cancel()
            await asyncio.gather(watching, work, return_exceptions=True)

    async def _finish_all(self) -> list[GenerateResult]:
        await self._watch.settle(SETTLE_S)
        finishing = (self._finish(number, request) for number, request in enumerate(self._requests))
        return await asyncio.gather(*finishing)

    async def _finish(self, number: int, request: GenerateRequest) -> GenerateResult:
        unfinished = Unfinished(request, self._pool.options.on_abort)
        while asked := unfinished.open_requests():
            answers = await asyncio.gather(*(self._answer(_Ask(number, one)) for one in asked))
            for one, answer in zip(asked, answers, strict=True):
                unfinished.take(one, answer)
            self._pool.counts.resumed += len(asked) if unfinished.resumed else 0
        result = unfinished.result()
        self._pool.counts.finish(result)
        return result

    async def _answer(self, ask: _Ask) -> GenerateResult:
        """From the first server that gives a whole and valid reply."""
        options = self._pool.options
        attempt, failed_since, avoid, refused = 0, None, set[Member](), set[Member]()
        while True:
            member, cost = await self._admit(ask, avoid | refused)
            try:
                return await self._ask(member, ask, attempt)
            except ServerRefused:
                refused.add(member)  # its limits may be narrower than another's; it is no fault of the server
                if all(one in refused for one in self._pool.members if one.state == "ready"):
                    raise
            except (ServerUnreachable, ServerUnauthorized, MalformedReply, WrongWeightVersion):
                now = time.monotonic()
                failed_since = failed_since or now
                if attempt >= MAX_ATTEMPTS and now - failed_since > options.retry_s:
                    raise
                avoid = {member}
            finally:
                member.release(cost)
                self._watch.notify()
            self._pool.counts.retries += 1
            await asyncio.sleep(random.uniform(0, min(options.backoff_s * 2**attempt, LONGEST_BACKOFF_S)))
            attempt += 1

    async def _admit(self, ask: _Ask, avoid: Collection[Member]) -> tuple[Member, int]:
        """(a ready server with room, the tokens that this request takes of it)"""
        while True:
            ready = [member for member in self._pool.members if member.state == "ready"]
            place = self._router.choose(ask.number, ask.tokens, ready, avoid)
            if place is not None:
                member, cost = place
                member.admit(cost)
                return member, cost
            await self._watch.change()

    async def _ask(self, member: Member, ask: _Ask, attempt: int) -> GenerateResult:
        request = ask.request
        if attempt:
            request = replace(request, request_id=f"{request.request_id}-try{attempt}")
        limit_s = self._pool.options.timeout_s(len(request.token_ids), request.max_tokens)
        try:
            results = await self._call(member, lambda backend: backend.generate([request]), limit_s)
            self._check(member, request, results)
            if member.is_tainted:
                raise Interrupted(f"{member.name}: an update failed while {request.request_id} was open")
        except (Interrupted, asyncio.CancelledError):
            self._give_up(member, request)
            raise
        except TimeoutError:
            self._give_up(member, request)
            error = ServerUnreachable(f"{member.name} did not answer {request.request_id} within {limit_s:.1f} s")
            await self._count_failure(member, error)
            raise error from None
        except ServerUnreachable as error:
            await self._count_failure(member, error)
            raise
        except ServerUnauthorized as error:
            member.evict(error)
            raise
        except MalformedReply as error:
            self._pool.counts.malformed += 1
            member.count_malformed(error)
            raise
        except WrongWeightVersion as error:
            member.soil(error)
            raise
        member.count_reply()
        return replace(results[0], request_id=ask.request.request_id)

    def _check(self, member: Member, request: GenerateRequest, results: Sequence[GenerateResult]) -> None:
        if len(results) != 1 or len(results[0].samples) != request.n:
            raise MalformedReply(f"{member.name} sent {[len(one.samples) for one in results]} samples, not {request.n}")
        valid = self._pool.valid_versions(self._seen_versions)
        for sample in results[0].samples:
            check_versions(member.name, sample.version_spans, valid)

    async def _count_failure(self, member: Member, error: ServerUnreachable) -> None:
        if member.state != "ready":
            return
        try:
            is_healthy = await self._call(member, lambda backend: backend.health(), self._pool.options.health_s)
        except (TimeoutError, ServerUnreachable):
            is_healthy = False
        if member.state == "ready":
            member.count_failure(error, is_gone=not is_healthy)

    def _give_up(self, member: Member, request: GenerateRequest) -> None:
        """Asks the server to stop what nobody waits for; whether it does is of no matter here."""

        def work() -> None:
            with contextlib.suppress(Exception):
                member.backend.abort([request.request_id])

        if member.state != "evicted":
            self._pool.threads.submit(work)

    async def _call(self, member: Member, function: Callable[[RolloutBackend], Result], limit_s: float) -> Result:
        """`function` of the server in a thread. Ends early, with that fault, when the server is evicted or soiled."""
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Result] = loop.create_future()

        def settle(value: Result | None, error: BaseException | None) -> None:
            if not reply.done():
                reply.set_exception(error) if error is not None else reply.set_result(value)  # type: ignore[arg-type]

        def post(value: Result | None, error: BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the batch is over, its loop closed: nobody waits for this
                loop.call_soon_threadsafe(settle, value, error)

        def work() -> None:
            try:
                value = function(member.backend)
            except BaseException as error:
                post(None, error)
            else:
                post(value, None)

        def interrupt(error: Exception) -> None:
            post(None, error)

        member.interrupts.add(interrupt)
        try:
            self._pool.threads.submit(work)
            return await asyncio.wait_for(reply, limit_s)
        finally:
            member.interrupts.discard(interrupt)
