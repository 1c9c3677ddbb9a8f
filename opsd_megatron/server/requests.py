"""A request inside the server, and what comes of it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from opsd_megatron.server.engine import Continuation, Job, SampleKey
from opsd_megatron.server.scoring import TokenScore
from opsd_megatron.types import VersionSpan

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
    cached_tokens: int = 0
    """Of the prompt, found in the prefix cache."""


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

    def finish(self, key: SampleKey, result: Continuation, reason: FinishReason) -> None:
        """One sample is whole; the last one makes the request so."""
        last = result.token_ids[-1] if reason == "stop" else None
        self.samples[key] = Sample(
            result.token_ids,
            result.logprobs,
            result.raw_logprobs,
            reason,
            last if last in self.job.stop_token_ids else None,
            version_spans(self.marks[key], len(result.token_ids)),
            cached_tokens=result.cached_tokens,
        )
        if len(self.samples) == self.job.samples and not self.done.done():
            self.done.set_result([self.samples[key] for key in self.job.keys])

    def fail(self, reason: str) -> None:
        self.done.set_exception(RuntimeError(reason))


def version_spans(marks: list[tuple[str, int]], length: int) -> list[VersionSpan]:
    """Contiguous spans over [0, length); versions that sampled nothing are left out."""
    ends = [start for _, start in marks[1:]] + [length]
    return [VersionSpan(version, start, end) for (version, start), end in zip(marks, ends, strict=True) if end > start]
