"""Requests, pauses and weight versions: what makes an engine a server. Everything here runs on one event loop."""

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from opsd_megatron.server.engine import Continuation, Engine, Job, SampleKey
from opsd_megatron.server.metrics import Metrics
from opsd_megatron.server.refusal import Refusal
from opsd_megatron.server.transfer import Receiver
from opsd_megatron.server.weights import WeightStore
from opsd_megatron.types import VersionSpan

log = logging.getLogger(__name__)
FinishReason = Literal["stop", "length", "abort"]
PauseMode = Literal["keep", "wait", "abort"]


@dataclass(frozen=True)
class Sample:
    """One finished response and the versions of the weights that sampled its tokens."""

    token_ids: list[int]
    logprobs: list[float]
    raw_logprobs: list[float] | None
    finish_reason: FinishReason
    stop_token: int | None
    spans: list[VersionSpan]


@dataclass
class Live:
    """A job inside the engine."""

    job: Job
    request_id: str
    done: asyncio.Future
    marks: dict[SampleKey, list[tuple[str, int]]]
    """For each sample (version, first token sampled by it), in order."""
    samples: dict[SampleKey, Sample] = field(default_factory=dict)


class Service:
    """One engine and its weights.

    A swap waits until no request is in flight, so that no token is sampled from keys and values of older weights. Only
    under `pause("keep")` are requests carried over a swap; their spans then say which tokens came from which version.
    """

    def __init__(self, engine: Engine, weights: WeightStore, version: str):
        self.engine, self.weights, self.version = engine, weights, version
        self.receiver = Receiver(weights.model.device)
        self.metrics = Metrics()
        self.metrics.gauge("requests_running", lambda: len(self._live))
        self.metrics.gauge("is_paused", lambda: self.paused is not None)
        self.paused: PauseMode | None = None
        self.broken: str | None = None
        self._live: dict[str, Live] = {}
        self._names = (f"job-{number}" for number in itertools.count())
        self._control = asyncio.Lock()
        self._engine_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-control")

    async def start(self, vocab_size: int) -> None:
        """Ready once the engine has made its first tokens."""
        self._gate, self._idle = asyncio.Event(), asyncio.Event()
        self._gate.set()
        self._idle.set()
        self.engine.start(self._deliver)
        prompt = tuple(token % vocab_size for token in range(1, 9))
        job = Job("warm-up", prompt, 1, 2, 1.0, 1.0, 0, 0, frozenset())
        await asyncio.wait_for(self.generate(job, "warm-up"), timeout=600)

    async def stop(self) -> None:
        self.receiver.leave()
        await self._in_engine_thread(self.engine.stop)
        self._engine_thread.shutdown()

    @property
    def transports(self) -> list[str]:
        """Ways in which new weights can come."""
        return ["http", *(["disk"] if self.weights.root else []), *self.receiver.kinds]

    @property
    def is_healthy(self) -> bool:
        return self.broken is None and self.engine.is_alive()

    def next_job_id(self) -> str:
        return next(self._names)

    async def generate(self, job: Job, request_id: str) -> list[Sample]:
        """One sample per `job.samples`, in order. Refusal 503 while paused (other than `keep`, which makes it wait)."""
        while True:
            self._check_open()
            if self._gate.is_set():
                break
            await self._gate.wait()
        arrived = time.perf_counter()
        live = Live(job, request_id, asyncio.get_running_loop().create_future(), {})
        live.marks = {key: [(self.version, 0)] for key in job.keys}
        self._live[job.job_id] = live
        self._idle.clear()
        try:
            self.engine.submit(job)
            return await live.done
        except asyncio.CancelledError:
            self.engine.cancel(job.keys)
            raise
        finally:
            self._forget(job.job_id)
            self._count(live, time.perf_counter() - arrived)

    async def pause(self, mode: PauseMode) -> None:
        async with self._control:
            if self.paused == mode:
                return
            if self.paused is not None:
                raise Refusal(409, f"already paused with mode={self.paused}; POST /resume first")
            self.paused = mode
            self._gate.clear()
            if mode == "wait":
                await self._idle.wait()
            await self._in_engine_thread(self.engine.freeze)
            if mode == "abort":
                self._abort(list(self._live.values()))

    async def resume(self) -> None:
        async with self._control:
            if self.paused is not None:
                await self._in_engine_thread(self.engine.thaw)
                self.paused = None
                self._gate.set()

    async def abort(self, request_ids: Sequence[str] | None) -> int:
        """Number of requests ended with what they have; None ends all."""
        async with self._control:
            wanted = None if request_ids is None else {name.removeprefix("generate-tokens-") for name in request_ids}
            await self._in_engine_thread(self.engine.freeze)
            try:
                chosen = [live for live in self._live.values() if wanted is None or live.request_id in wanted]
                self._abort(chosen)
            finally:
                await self._in_engine_thread(self.engine.thaw)
            return len(chosen)

    async def publish_staged(self, version: str) -> float:
        """Swaps the staged weights in and returns for how many seconds nothing was generated."""
        async with self._control:
            self.weights.check_complete()
            was_paused = self.paused is not None
            self._gate.clear()
            replaced = []
            try:
                if not was_paused:
                    await self._idle.wait()
                started = time.perf_counter()
                await self._in_engine_thread(self.engine.freeze)
                try:
                    replaced = await self._swap(version)
                finally:
                    await self._in_engine_thread(self.engine.thaw)
            finally:
                if not was_paused:
                    self._gate.set()
            seconds = time.perf_counter() - started
            replaced.clear()
            self.metrics.add("weight_update_seconds_total", seconds)
            return seconds

    async def checksums(self) -> dict[str, str]:
        async with self._control:
            return await asyncio.to_thread(self.weights.checksums)

    async def _swap(self, version: str) -> list:
        """What was replaced, to be dropped when the engine runs again."""
        progress = self.engine.in_flight()
        try:
            replaced = await self._in_engine_thread(self.weights.swap)
        except Exception as error:
            self.broken = f"a weight swap failed half-way ({error}); restart the server or publish again"
            raise
        self.engine.weights_changed()
        self.version, self.broken = version, None
        for live in self._live.values():
            for key in live.marks.keys() - live.samples.keys():
                live.marks[key].append((version, len(progress.get(key, Continuation()).token_ids)))
        return replaced

    def _deliver(self, key: SampleKey, result: Continuation) -> None:
        """A finished sample. Comes before whatever follows a later freeze, so `marks` are those it was made under."""
        live = self._live.get(key[0])
        if live is None or live.done.done():
            return
        if result.error is not None:
            live.done.set_exception(RuntimeError(f"the engine failed: {result.error}"))
            return
        last = result.token_ids[-1]
        reason: FinishReason = "stop" if last in live.job.stop_token_ids else "length"
        self._finish(live, key, result, reason)

    def _finish(self, live: Live, key: SampleKey, result: Continuation, reason: FinishReason) -> None:
        stop_token = result.token_ids[-1] if reason == "stop" else None
        spans = version_spans(live.marks[key], len(result.token_ids))
        live.samples[key] = Sample(
            result.token_ids, result.logprobs, result.raw_logprobs, reason, stop_token, spans
        )  # fmt: skip
        if len(live.samples) == live.job.samples and not live.done.done():
            live.done.set_result([live.samples[key] for key in live.job.keys])

    def _abort(self, lives: list[Live]) -> None:
        """Ends these with what they have; the engine is frozen."""
        progress = self.engine.in_flight()
        for live in lives:
            open_keys = [key for key in live.job.keys if key not in live.samples]
            self.engine.cancel(open_keys)
            for key in open_keys:
                self._finish(live, key, progress.get(key, Continuation()), "abort")
            self._forget(live.job.job_id)

    def _forget(self, job_id: str) -> None:
        self._live.pop(job_id, None)
        if not self._live:
            self._idle.set()

    def _check_open(self) -> None:
        if self.broken:
            raise Refusal(503, self.broken)
        if not self.engine.is_alive():
            raise Refusal(503, "the engine has stopped; restart the server")
        if self.paused in ("wait", "abort"):
            raise Refusal(503, "the server is paused; try again after /resume")

    def _count(self, live: Live, seconds: float) -> None:
        outcome = "ok" if len(live.samples) == live.job.samples else "failed"
        self.metrics.add("requests_total", outcome=outcome)
        self.metrics.add("request_seconds_total", seconds)
        self.metrics.add("prompt_tokens_total", len(live.job.prompt))
        for sample in live.samples.values():
            self.metrics.add("samples_total", finish_reason=sample.finish_reason)
            self.metrics.add("generation_tokens_total", len(sample.token_ids))

    async def _in_engine_thread(self, function):
        return await asyncio.get_running_loop().run_in_executor(self._engine_thread, function)


def version_spans(marks: list[tuple[str, int]], length: int) -> list[VersionSpan]:
    """Contiguous spans over [0, length); versions that sampled nothing are left out."""
    ends = [start for _, start in marks[1:]] + [length]
    return [VersionSpan(version, start, end) for (version, start), end in zip(marks, ends, strict=True) if end > start]
