"""Requests, pauses and weight versions: what makes an engine a server. Everything here runs on one event loop."""

import asyncio
import functools
import itertools
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace

from opsd_megatron.server.admission import QueueLimits
from opsd_megatron.server.engine import Engine, Job
from opsd_megatron.server.in_flight import InFlight
from opsd_megatron.server.metrics import Metrics
from opsd_megatron.server.prefix_cache import salt_suffix
from opsd_megatron.server.refusal import Refusal
from opsd_megatron.server.requests import Live, PauseMode, Sample, Watch
from opsd_megatron.server.scoring import score_tokens
from opsd_megatron.server.sleep import Sleep
from opsd_megatron.server.transfer import Receiver
from opsd_megatron.server.weights import WeightStore

log = logging.getLogger(__name__)
WATCH_S = 1.0


class Service:
    """One engine and its weights.

    A swap waits until no request is in flight. Only under `pause("keep")` are requests carried over it: their spans
    then say which tokens came from which version, and they compute their keys again, so that no token is ever sampled
    from keys and values of older weights.
    """

    def __init__(self, engine: Engine, weights: WeightStore, version: str, limits: QueueLimits):
        self.engine, self.weights, self.version, self.limits = engine, weights, version, limits
        self.receiver = Receiver(weights.model.device)
        self.paused: PauseMode | None = None
        self.broken: str | None = None
        self.is_stopping = False
        self._last_update_s = 0.0
        self.requests = InFlight(engine)
        self._at_gate: dict[str, Job] = {}
        self._gate = asyncio.Event()
        self._gate.set()
        self._numbers = itertools.count()
        self.control = asyncio.Lock()
        self._engine_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-control")
        self.sleep = Sleep(self)
        self.metrics = Metrics(self._figures)

    async def start(self, vocab_size: int) -> None:
        """Ready once the engine has made its first tokens."""
        self.engine.start(self.requests.deliver)
        self._watch = asyncio.create_task(self._fail_what_a_dead_engine_left())
        prompt = tuple(token % vocab_size for token in range(1, 9))
        job = Job("warm-up", prompt, 1, 2, 1.0, 1.0, 0, 0, frozenset())
        await asyncio.wait_for(self.generate(job, "warm-up"), timeout=600)

    async def stop(self) -> None:
        self._watch.cancel()
        self.receiver.leave()
        await self.in_engine_thread(self.engine.stop)
        self._engine_thread.shutdown()

    async def finish_or_abort(self, patience_s: float) -> None:
        """Takes nothing new; what still runs after `patience_s` ends with what it has."""
        self.is_stopping = True
        try:
            await asyncio.wait_for(self.requests.until_idle(), patience_s)
        except TimeoutError:
            log.info("stopping: %d requests end with what they have", await self.abort(None))

    @property
    def transports(self) -> list[str]:
        """Ways in which new weights can come."""
        return ["http", *(["disk"] if self.weights.root else []), *self.receiver.kinds]

    @property
    def is_healthy(self) -> bool:
        """Sleeping is healthy; weights without content are not."""
        can_answer = bool(self.sleep.asleep) or not self.weights.is_hollow
        return self.broken is None and self.engine.is_alive() and can_answer

    def next_job_id(self, cache_salt: str | None = None) -> str:
        return f"job-{next(self._numbers)}{salt_suffix(cache_salt)}"

    async def generate(self, job: Job, request_id: str, watch: Watch | None = None) -> list[Sample]:
        """One sample per `job.samples`, in order. Refusal 503 while the server is paused (other than by `keep`, which
        makes it wait) or asleep, and where too much waits already.

        `watch` sees every delivery of a streamed job and may end a sample.
        """
        self._check_open()
        if self.limits.are_set:
            self._check_queue()
        self._at_gate[job.job_id] = job
        try:
            while not self._gate.is_set():
                await self._gate.wait()
                self._check_open()
        finally:
            del self._at_gate[job.job_id]
        arrived = time.perf_counter()
        live = self.requests.add(job, request_id, watch, self.version)
        try:
            self.requests.start(live)
            samples = await live.done
            return samples if job.scored is None else await self.in_engine_thread(lambda: self._score(live, samples))
        except BaseException:  # hung up, or one sample failed: the others are of no use
            self.engine.cancel(job.keys)
            raise
        finally:
            self.requests.forget(job.job_id)
            self._count(live, time.perf_counter() - arrived)

    async def pause(self, mode: PauseMode) -> None:
        async with self.control:
            if self.paused == mode:
                return
            if self.paused is not None:
                raise Refusal(409, f"already paused with mode={self.paused}; POST /resume first")
            if mode == "wait" and self.sleep.is_held and self.requests:
                raise Refusal(409, "requests that sleep cannot finish; POST /wake_up first")
            self.paused = mode
            self._gate.clear()
            if mode == "wait":
                await self.requests.until_idle()
            await self.in_engine_thread(self.engine.freeze)
            if mode == "abort":
                self.requests.end(self.requests)

    async def resume(self) -> None:
        async with self.control:
            if self.paused is not None:
                await self.in_engine_thread(self.engine.thaw)
                self.paused = None
                self.open_gate()

    async def abort(self, request_ids: Sequence[str] | None) -> int:
        """Number of requests ended with what they have; None ends all."""
        async with self.control:
            wanted = None if request_ids is None else {name.removeprefix("generate-tokens-") for name in request_ids}
            async with self.frozen():
                chosen = [live for live in self.requests if wanted is None or live.request_id in wanted]
                self.requests.end(chosen)
            return len(chosen)

    async def publish_staged(self, version: str) -> float:
        """Swaps the staged weights in and returns for how many seconds nothing was generated."""
        async with self.control:
            self.weights.check_complete()
            self._gate.clear()
            replaced = []
            try:
                if self.paused is None and not self.sleep.is_held:
                    await self.requests.until_idle()
                started = time.perf_counter()
                async with self.frozen():
                    replaced = await self._swap(version)
                await self.sleep.go_on()
            finally:
                self.open_gate()
            seconds = time.perf_counter() - started
            replaced.clear()
            self._last_update_s = seconds
            self.metrics.add("weight_update_seconds_total", seconds)
            return seconds

    async def reset_prefix_cache(self, restart_running: bool) -> bool:
        """False, and nothing is dropped, where requests hold blocks and may not be restarted."""
        async with self.control, self.frozen():
            if self.engine.in_flight() and not restart_running:
                return False
            await self.in_engine_thread(self.engine.drop_cache)
            return True

    async def checksums(self) -> dict[str, str]:
        async with self.control:
            return await asyncio.to_thread(self.weights.checksums)

    async def _swap(self, version: str) -> list:
        """What was replaced, to be dropped when the engine runs again."""
        progress = self.engine.in_flight()
        try:
            replaced = await self.in_engine_thread(self.weights.swap)
        except Exception as error:
            self.broken = f"a weight swap failed half-way ({error}); restart the server or publish again"
            raise
        await self.in_engine_thread(self.engine.drop_cache)
        self.version, self.broken = version, None
        self.requests.mark(version, progress)
        return replaced

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
                is_wanted = job.job_id in self.requests and sample.finish_reason != "abort"
                scored.append(replace(sample, scores=score(tokens)) if is_wanted else sample)
            return scored
        finally:
            self.engine.thaw()

    def open_gate(self) -> None:
        """New requests enter the engine, unless something else still keeps them out."""
        if self.paused is None and not self.sleep.is_held:
            self._gate.set()

    def close_gate(self) -> None:
        self._gate.clear()

    def turn_away_who_waits(self) -> None:
        """Who waits at the closed gate looks again whether the server is open at all."""
        self._gate.set()
        self._gate.clear()

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        await self.in_engine_thread(self.engine.freeze)
        try:
            yield
        finally:
            await self.in_engine_thread(self.engine.thaw)

    def _check_open(self) -> None:
        if self.broken:
            raise Refusal(503, self.broken)
        if not self.engine.is_alive():
            raise Refusal(503, "the engine has stopped; restart the server")
        if self.is_stopping:
            raise Refusal(503, "the server is stopping")
        self.sleep.check_awake()
        if self.paused in ("wait", "abort"):
            raise Refusal(503, "the server is paused; try again after /resume")

    def _waiting(self) -> list[Job]:
        names = self.engine.waiting()
        return [*self._at_gate.values(), *(live.job for live in self.requests if live.job.job_id in names)]

    def _check_queue(self) -> None:
        try:
            self.limits.check(self._waiting())
        except Refusal:
            self.metrics.add("admission_rejections_total")
            raise

    async def _fail_what_a_dead_engine_left(self) -> None:
        """A request that reaches an engine as it dies is told of it by nobody else."""
        while self.engine.is_alive():
            await asyncio.sleep(WATCH_S)
        self.requests.fail("the engine has stopped; restart the server")

    def _figures(self) -> dict[str, float]:
        waiting = len(self._waiting())
        return {
            "requests_waiting": waiting,
            "requests_running": len(self.requests) + len(self._at_gate) - waiting,
            "last_weight_update_seconds": self._last_update_s,
            "is_paused": self.paused is not None,
            "is_sleeping": bool(self.sleep.asleep),
            **self.engine.figures(),
        }

    def _count(self, live: Live, seconds: float) -> None:
        outcome = "ok" if len(live.samples) == live.job.samples else "failed"
        self.metrics.add("requests_total", outcome=outcome)
        self.metrics.add("request_seconds_total", seconds)
        self.metrics.add("prompt_tokens_total", len(live.job.prompt))
        for sample in live.samples.values():
            self.metrics.add("samples_total", finish_reason=sample.finish_reason)
            self.metrics.add("generation_tokens_total", len(sample.token_ids))

    async def in_engine_thread(self, function):
        return await asyncio.get_running_loop().run_in_executor(self._engine_thread, function)
