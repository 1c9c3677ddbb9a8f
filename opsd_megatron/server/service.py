"""Requests, pauses and weight versions: what makes an engine a server. Everything here runs on one event loop."""

import asyncio
import functools
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

from opsd_megatron.server.engine import Continuation, Engine, Job, SampleKey
from opsd_megatron.server.metrics import Metrics
from opsd_megatron.server.refusal import Refusal
from opsd_megatron.server.scoring import TokenScore, score_tokens
from opsd_megatron.server.transfer import Receiver
from opsd_megatron.server.weights import WeightStore
from opsd_megatron.types import VersionSpan

log = logging.getLogger(__name__)
FinishReason = Literal["stop", "length", "abort"]
PauseMode = Literal["keep", "wait", "abort"]
Watch = Callable[[int, Continuation], int | None]
"""Given a sample's number and what it has; returns after how many tokens it ends, None where it goes on."""


@dataclass(frozen=True)
class Sample:
    """One finished response and the versions of the weights that sampled its tokens."""

    token_ids: list[int]
    logprobs: list[float]
    raw_logprobs: list[float] | None
    finish_reason: FinishReason
    stop_token: int | None
    spans: list[VersionSpan]
    scores: list[TokenScore] | None = None
    """Of all tokens but the first that the job wants scored; None for an aborted sample."""


@dataclass
class Live:
    """A job inside the engine."""

    job: Job
    request_id: str
    done: asyncio.Future
    marks: dict[SampleKey, list[tuple[str, int]]]
    """For each sample (version, first token sampled by it), in order."""
    watch: Watch | None = None
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

    async def generate(self, job: Job, request_id: str, watch: Watch | None = None) -> list[Sample]:
        """One sample per `job.samples`, in order. Refusal 503 while paused (other than `keep`, which makes it wait).

        `watch` sees every delivery of a streamed job and may end a sample.
        """
        while True:
            self._check_open()
            if self._gate.is_set():
                break
            await self._gate.wait()
        arrived = time.perf_counter()
        live = Live(job, request_id, asyncio.get_running_loop().create_future(), {}, watch)
        live.marks = {key: [(self.version, 0)] for key in job.keys}
        self._live[job.job_id] = live
        self._idle.clear()
        try:
            if job.max_tokens:
                self.engine.submit(job)
            else:
                for key in job.keys:
                    self._finish(live, key, Continuation(), "length")
            samples = await live.done
            return samples if job.scored is None else await self._in_engine_thread(lambda: self._score(live, samples))
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
        if live is None or live.done.done() or key in live.samples:
            return
        if result.error is not None:
            live.done.set_exception(RuntimeError(f"the engine failed: {result.error}"))
            return
        try:
            end = live.watch(key[1], result) if live.watch else None
        except Exception as error:  # must not reach the results of other requests, delivered by the same call
            self.engine.cancel(live.job.keys)
            live.done.set_exception(RuntimeError(f"the tokens cannot be written as text: {error}"))
            return
        if end is not None:
            if not result.is_finished:
                self.engine.cancel([key])
            self._finish(live, key, result.first(end), "stop")
        elif result.is_finished:
            is_stop = result.token_ids[-1] in live.job.stop_token_ids
            self._finish(live, key, result, "stop" if is_stop else "length")

    def _finish(self, live: Live, key: SampleKey, result: Continuation, reason: FinishReason) -> None:
        last = result.token_ids[-1] if reason == "stop" else None
        stop_token = last if last in live.job.stop_token_ids else None
        spans = version_spans(live.marks[key], len(result.token_ids))
        live.samples[key] = Sample(
            result.token_ids, result.logprobs, result.raw_logprobs, reason, stop_token, spans
        )  # fmt: skip
        if len(live.samples) == live.job.samples and not live.done.done():
            live.done.set_result([live.samples[key] for key in live.job.keys])

    def _score(self, live: Live, samples: list[Sample]) -> list[Sample]:
        """`samples` with their scores. On the engine's thread, where no swap of weights runs, with the engine frozen.

        The request counts as in flight until then, so that a swap waits for its scores as it does for its tokens.
        """
        job, model = live.job, self.weights.model
        score = functools.lru_cache(maxsize=1)(lambda tokens: score_tokens(model, tokens, job.top_logprobs))
        self.engine.freeze()
        try:
            scored = []
            for sample in samples:
                tokens = job.prompt if job.scored == "prompt" else (*job.prompt, *sample.token_ids)
                is_wanted = job.job_id in self._live and sample.finish_reason != "abort"
                scored.append(replace(sample, scores=score(tokens)) if is_wanted else sample)
            return scored
        finally:
            self.engine.thaw()

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
