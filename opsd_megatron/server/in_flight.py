"""The requests inside the engine: results reach them, weights change under them, and they are ended."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping

from opsd_megatron.server.engine import Continuation, Engine, Job, SampleKey
from opsd_megatron.server.requests import Live, Watch


class InFlight:
    """Jobs from their submission until their samples are whole; everything on one event loop."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._live: dict[str, Live] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Live]:
        return iter(list(self._live.values()))

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._live

    async def until_idle(self) -> None:
        await self._idle.wait()

    def add(self, job: Job, request_id: str, watch: Watch | None, version: str) -> Live:
        """A request that counts from now on; the engine has weights of `version`."""
        marks = {key: [(version, 0)] for key in job.keys}
        live = Live(job, request_id, asyncio.get_running_loop().create_future(), marks, watch)
        self._live[job.job_id] = live
        self._idle.clear()
        return live

    def start(self, live: Live) -> None:
        if live.job.max_tokens:
            self._engine.submit(live.job)
            return
        for key in live.job.keys:
            live.finish(key, Continuation(), "length")

    def forget(self, job_id: str) -> None:
        self._live.pop(job_id, None)
        if not self._live:
            self._idle.set()

    def deliver(self, key: SampleKey, result: Continuation) -> None:
        """What the engine has of a sample. Comes before whatever follows a later freeze, so that the marks are those
        under which it was made."""
        live = self._live.get(key[0])
        if live is None or live.done.done() or key in live.samples:
            return
        if result.error is not None or not result.token_ids:
            live.fail(f"the engine failed: {result.error or 'a response without tokens'}")
            return
        try:
            end = live.watch(key[1], result) if live.watch else None
        except Exception as error:  # must not reach the results of other requests, delivered by the same call
            self._engine.cancel(live.job.keys)
            live.fail(f"the tokens cannot be written as text: {error}")
            return
        if end is not None:
            if not result.is_finished:
                self._engine.cancel([key])
            live.finish(key, result.first(end), "stop")
        elif result.is_finished:
            is_stop = result.token_ids[-1] in live.job.stop_token_ids
            live.finish(key, result, "stop" if is_stop else "length")

    def mark(self, version: str, progress: Mapping[SampleKey, Continuation]) -> None:
        """Whatever is sampled from now on is of `version`; `progress` is what the engine has."""
        for live in self._live.values():
            for key in live.marks.keys() - live.samples.keys():
                live.marks[key].append((version, len(progress.get(key, Continuation()).token_ids)))

    def end(self, chosen: Iterable[Live]) -> None:
        """Ends these with what they have; the engine is frozen."""
        progress = self._engine.in_flight()
        for live in chosen:
            open_keys = [key for key in live.job.keys if key not in live.samples]
            self._engine.cancel(open_keys)
            for key in open_keys:
                live.finish(key, progress.get(key, Continuation()), "abort")
            self.forget(live.job.job_id)

    def fail(self, reason: str) -> None:
        for live in self:
            if not live.done.done():
                live.fail(reason)
