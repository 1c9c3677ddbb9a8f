"""The seeded engine: one sequence at a time, so that a result depends on its prompt, its seed and the weights only."""

import asyncio
import copy
import logging
import secrets
import threading
from collections import deque
from dataclasses import replace

import torch
from jaxtyping import Float32
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opsd_megatron.server.engine import Continuation, Deliver, Job, SampleKey

log = logging.getLogger(__name__)


class ExactEngine:
    """A dense key-value cache loop in a thread of its own. Slow, and bitwise repeatable.

    After a weight swap under a freeze the cache of a half-finished sequence is computed again, so that no token is
    ever sampled from keys and values of older weights.
    """

    seeded = True

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._jobs: deque[Job] = deque()
        self._cancelled: set[SampleKey] = set()
        self._partial: dict[SampleKey, Continuation] = {}
        self._change = threading.Condition()
        self._freezes = 0
        self._is_parked = False
        self._is_stopping = False
        self._cache: DynamicCache | None = None
        self._prefilled: tuple[DynamicCache, Tensor] | None = None
        self._prefilled_tokens = 0
        self._thread = threading.Thread(target=self._run, name="exact-engine", daemon=True)

    def start(self, deliver: Deliver) -> None:
        loop = asyncio.get_running_loop()
        self._deliver = lambda key, result: loop.call_soon_threadsafe(deliver, key, result)
        self._thread.start()

    def submit(self, job: Job) -> None:
        with self._change:
            self._jobs.append(job)
            self._change.notify_all()

    def cancel(self, keys: list[SampleKey]) -> None:
        with self._change:
            self._cancelled.update(keys)

    def freeze(self) -> None:
        with self._change:
            self._freezes += 1
            self._change.notify_all()
            self._change.wait_for(lambda: self._is_parked or not self._thread.is_alive())

    def thaw(self) -> None:
        with self._change:
            self._freezes -= 1
            self._change.notify_all()

    def in_flight(self) -> dict[SampleKey, Continuation]:
        return copy.deepcopy(self._partial)

    def drop_cache(self) -> None:
        self._cache = self._prefilled = None

    def release_cache(self) -> None:
        self.drop_cache()

    def restore_cache(self) -> None:
        """It grows with each sequence; there is nothing to take in advance."""

    def waiting(self) -> set[str]:
        return {job.job_id for job in list(self._jobs)}

    def figures(self) -> dict[str, float]:
        return {"prefill_tokens_total": self._prefilled_tokens}

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        with self._change:
            self._is_stopping = True
            self._change.notify_all()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while (job := self._next_job()) is not None:
            for key in job.keys:
                try:
                    result = self._continue(job, key)
                except Exception as error:
                    log.exception("job %s failed", job.job_id)
                    result = Continuation(error=f"{type(error).__name__}: {error}")
                self._partial.pop(key, None)
                if result is not None:
                    self._deliver(key, result)
            self.drop_cache()

    def _next_job(self) -> Job | None:
        """None when stopping. Parked while frozen or idle."""
        with self._change:
            if not self._jobs:
                self._cancelled.clear()
            self._park_until(lambda: self._is_stopping or (self._jobs and not self._freezes))
            return None if self._is_stopping else self._jobs.popleft()

    def _park_until(self, condition) -> None:
        self._is_parked = True
        self._change.notify_all()
        self._change.wait_for(condition)
        self._is_parked = False

    def _may_go_on(self, key: SampleKey) -> bool:
        """Between two tokens: waits out a freeze; False for a sample that nobody wants any more."""
        with self._change:
            if self._freezes:
                self._park_until(lambda: self._is_stopping or not self._freezes)
            return not self._is_stopping and key not in self._cancelled

    @torch.inference_mode()
    def _continue(self, job: Job, key: SampleKey) -> Continuation | None:
        seed = secrets.randbits(62) if job.seed is None else job.seed + key[1]
        generator = torch.Generator().manual_seed(seed % 2**63)
        result = self._partial[key] = Continuation([], [], [])
        assert result.raw_logprobs is not None
        self._cache = None
        while True:
            if not self._may_go_on(key):
                return None
            if self._cache is None:
                logits = self._prefill(job, result.token_ids)
            else:
                logits = self._forward(result.token_ids[-1:], self._cache)
            token, logprob = choose(logits, job, generator)
            result.token_ids.append(token)
            result.logprobs.append(logprob)
            result.raw_logprobs.append(float(torch.log_softmax(logits, dim=-1)[token]))
            if token in job.stop_token_ids or len(result.token_ids) == job.max_tokens:
                return result
            if job.is_streamed:
                self._deliver(key, replace(copy.deepcopy(result), is_finished=False))

    def _prefill(self, job: Job, generated: list[int]) -> Float32[Tensor, "vocab"]:
        """Logits after prompt and `generated`, whose keys are then in the cache; the prompt's serve all its samples."""
        if self._prefilled is None:
            cache = DynamicCache()
            self._prefilled = cache, self._forward(list(job.prompt), cache)
            self._prefilled_tokens += len(job.prompt)
        self._cache, logits = copy.deepcopy(self._prefilled[0]), self._prefilled[1]
        for token in generated:
            logits = self._forward([token], self._cache)
        return logits

    def _forward(self, token_ids: list[int], cache: DynamicCache) -> Float32[Tensor, "vocab"]:
        inputs = torch.tensor([token_ids], device=self.model.device)
        output = self.model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1].float().cpu()


def choose(logits: Float32[Tensor, "vocab"], job: Job, generator: torch.Generator) -> tuple[int, float]:
    """(token, its log-probability after temperature, top-k and top-p), drawn with `generator`."""
    if job.temperature == 0:
        return int(logits.argmax()), 0.0
    logprobs = torch.log_softmax(restrict(logits / job.temperature, job.top_k, job.top_p), dim=-1)
    token = int(torch.multinomial(logprobs.exp(), 1, generator=generator))
    return token, float(logprobs[token])


def restrict(logits: Float32[Tensor, "vocab"], top_k: int, top_p: float) -> Float32[Tensor, "vocab"]:
    """`logits`, minus infinity outside the `top_k` likeliest and outside the smallest set that holds `top_p`."""
    if 0 < top_k < logits.shape[0]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(dim=-1)
        is_cut = probability.cumsum(dim=-1) - probability >= top_p
        logits = logits.masked_fill(torch.zeros_like(is_cut).scatter(0, order, is_cut), -torch.inf)
    return logits
