"""Responses that were aborted half-way: what they have is kept, and the rest is asked for behind it."""

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Literal

from opsd_megatron.rollout.backend import GenerateRequest, GenerateResult, Sample, ServerRefused
from opsd_megatron.types import Rollout, VersionSpan

MAX_ABORTS = 3


@dataclass
class _Work:
    """One response so far."""

    number: int
    kept: Sample | None = None
    is_done: bool = False
    aborts: int = 0
    """In a row, without a token to keep."""


class Unfinished:
    """One request until each of its samples has ended by itself.

    The first round asks for all samples at once; every aborted one is then asked for on its own, behind the tokens that
    it has (`resume`) or from the start with its own seed (`drop_partial`).
    """

    def __init__(self, request: GenerateRequest, on_abort: Literal["resume", "drop_partial"] = "resume"):
        self.request, self.on_abort = request, on_abort
        self.resumed = 0
        """Responses that went on, or began again, after an abort."""
        self._works = [_Work(number) for number in range(request.n)]
        self._round = 0
        self._about: dict[str, _Work] = {}
        self._first: GenerateResult | None = None
        self._servers: list[str] = []

    def open_requests(self) -> list[GenerateRequest]:
        """What to ask for next; empty when all samples are there. ServerRefused where aborts lead nowhere."""
        left = [work for work in self._works if not work.is_done]
        if self._first is None:
            return [self.request]
        stuck = [work for work in left if work.aborts > MAX_ABORTS]
        if stuck:
            raise ServerRefused(
                f"{len(stuck)} samples of {self.request.request_id} were aborted {stuck[0].aborts} times in a row; who "
                "pauses the server?"
            )
        self._round += 1
        self.resumed += len(left)
        requests = [self._rest(work) for work in left]
        self._about = {request.request_id: work for request, work in zip(requests, left, strict=True)}
        return requests

    def take(self, request: GenerateRequest, result: GenerateResult) -> None:
        """`result` answers `request`, one of `open_requests`."""
        self._servers.append(result.server_id)
        if self._first is None:
            self._first = result
            works = self._works
        else:
            works = [self._about[request.request_id]]
        for work, sample in zip(works, result.samples, strict=True):
            self._add(work, sample)

    def result(self) -> GenerateResult:
        """All samples in order, under the name of the first request and the server that answered last."""
        assert self._first is not None
        samples = tuple(work.kept for work in self._works if work.kept is not None)
        return replace(
            self._first, request_id=self.request.request_id, samples=samples, server_id=self._servers[-1]
        )  # fmt: skip

    def _add(self, work: _Work, sample: Sample) -> None:
        is_aborted = sample.finish_reason == "abort"
        if is_aborted and (self.on_abort == "drop_partial" or not sample.token_ids):
            work.aborts += 1
            return
        work.kept = sample if work.kept is None else join(work.kept, sample)
        work.is_done = not is_aborted
        work.aborts = 0
        if is_aborted and len(work.kept.token_ids) >= self.request.max_tokens:
            work.kept, work.is_done = replace(work.kept, finish_reason="length"), True

    def _rest(self, work: _Work) -> GenerateRequest:
        request, kept = self.request, work.kept.token_ids if work.kept else ()
        seed = None if request.seed is None else request.seed + work.number
        return replace(
            request,
            request_id=f"{request.request_id}-s{work.number}-{self._round}",
            token_ids=[*request.token_ids, *kept],
            n=1,
            max_tokens=request.max_tokens - len(kept),
            seed=_continued(seed, len(kept)) if seed is not None and kept else seed,
        )


def join(kept: Sample, rest: Sample) -> Sample:
    """One response: `rest` continues `kept`, its spans are shifted behind it."""
    if kept.logprob_kind != rest.logprob_kind:
        raise ServerRefused(
            f"one server gives {kept.logprob_kind} log-probs and another {rest.logprob_kind} ones; they cannot share a "
            "response: start the servers alike"
        )
    length = len(kept.token_ids)
    spans = list(kept.version_spans)
    for span in rest.version_spans:
        if spans and spans[-1].version == span.version:
            spans[-1] = VersionSpan(span.version, spans[-1].start, span.end + length)
        else:
            spans.append(VersionSpan(span.version, span.start + length, span.end + length))
    return replace(
        rest,
        token_ids=kept.token_ids + rest.token_ids,
        logprobs=kept.logprobs + rest.logprobs,
        version_spans=tuple(spans),
    )


def staleness(version: str, wanted: str) -> int | None:
    """Steps by which `version` lags behind `wanted` ("step-3" behind "step-5": 2); None: unrelated, or newer."""
    if version == wanted:
        return 0
    one, other = (re.fullmatch(r"(.*?)(\d+)", name) for name in (version, wanted))
    if one is None or other is None or one[1] != other[1] or int(one[2]) > int(other[2]):
        return None
    return int(other[2]) - int(one[2])


def mask_stale(rollout: Rollout, wanted: str, max_staleness: int) -> Rollout:
    """`rollout` without loss on tokens whose weights lag more than `max_staleness` steps behind `wanted`."""
    mask = list(rollout.loss_mask)
    for span in rollout.version_spans:
        lag = staleness(span.version, wanted)
        if lag is None or lag > max_staleness:
            mask[span.start : span.end] = [False] * (span.end - span.start)
    return replace(rollout, loss_mask=tuple(mask))


def _continued(seed: int, length: int) -> int:
    """Another seed for the rest, so that it does not draw the same random numbers once more."""
    return seed_of(f"{seed}/{length}")


def seed_of(text: str) -> int:
    """A seed in [0, 2**62), another one for every text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2
