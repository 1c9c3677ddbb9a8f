"""Jobs of one request as they run: awaited whole, or followed event by event."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request
from starlette.responses import StreamingResponse

from opsd_megatron.server.engine import Continuation, Job
from opsd_megatron.server.refusal import Refusal, error_body
from opsd_megatron.server.requests import Sample
from opsd_megatron.server.service import Service
from opsd_megatron.server.writing import Writing


@dataclass(frozen=True)
class Delta:
    """What one sample got since its last delta."""

    index: int
    token_ids: list[int]
    logprobs: list[float]
    text: str
    sample: Sample | None
    """Once it is finished."""


class Run:
    """The jobs of one request in the engine, and the text of their samples, which count through all jobs.

    A streamed run keeps the newest state of each sample only: a client that reads slowly finds more in each event, and
    holds up neither the engine nor other clients.
    """

    def __init__(self, service: Service, jobs: Sequence[Job], request_id: str, writings: Sequence[Writing]):
        self.writings = writings
        self._latest: dict[int, Continuation] = {}
        self._changed = asyncio.Event()
        self._sent = [0] * len(writings)
        self._tasks, first = [], 0
        for job in jobs:
            watch = partial(self._watch, first) if job.is_streamed else None
            self._tasks.append(asyncio.ensure_future(service.generate(job, request_id, watch)))
            first += job.samples

    async def finish(self) -> list[Sample]:
        try:
            return self._finished(await asyncio.gather(*self._tasks))
        finally:
            self._cancel()

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """At least one per sample, the last of which has the finished sample."""
        whole = asyncio.gather(*self._tasks)
        whole.add_done_callback(lambda _: self._changed.set())
        try:
            while not whole.done():
                await self._changed.wait()
                self._changed.clear()
                latest, self._latest = self._latest, {}
                for index, state in sorted(latest.items()):
                    if not whole.done() and len(state.token_ids) > self._sent[index]:
                        yield self._delta(index, state, None)
            for index, sample in enumerate(self._finished(whole.result())):
                yield self._delta(index, sample, sample)
        finally:
            self._cancel()

    def _watch(self, first: int, number: int, state: Continuation) -> int | None:
        self._latest[first + number] = state
        self._changed.set()
        return self.writings[first + number].extend(state.token_ids)

    def _delta(self, index: int, state: Continuation | Sample, sample: Sample | None) -> Delta:
        start, self._sent[index] = self._sent[index], len(state.token_ids)
        text = self.writings[index].take(is_last=sample is not None)
        return Delta(index, state.token_ids[start:], state.logprobs[start:], text, sample)

    def _finished(self, answers: list[list[Sample]]) -> list[Sample]:
        samples = [sample for answer in answers for sample in answer]
        for writing, sample in zip(self.writings, samples, strict=True):
            writing.finish(sample.token_ids)
        return samples

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()


async def unless_gone(request: Request, work: Awaitable) -> Any:
    """The result of `work`, which is cancelled when the client hangs up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refusal(499, "the client hung up")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; `bodies` is closed however the response ends."""

    def __init__(self, bodies: AsyncGenerator[dict, None], first: dict):
        super().__init__(_events(bodies, first), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._bodies = bodies

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._bodies.aclose()


async def stream(request: Request, bodies: AsyncGenerator[dict, None]) -> EventStream:
    """Starts once there is a first event, so that what fails before it has a status of its own."""
    return EventStream(bodies, await unless_gone(request, anext(bodies)))


async def _events(bodies: AsyncGenerator[dict, None], first: dict) -> AsyncGenerator[bytes, None]:
    try:
        yield _event(first)
        async for body in bodies:
            yield _event(body)
        yield b"data: [DONE]\n\n"
    except (Refusal, RuntimeError, ValueError) as error:
        yield _event(error_body(error.status if isinstance(error, Refusal) else 500, str(error)))


def _event(body: dict) -> bytes:
    return b"data: " + json.dumps(body, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
