"""A server made of a Python function, in this process: for what a pool decides, not for how servers fail."""

import threading
from collections.abc import Callable, Sequence

from opsd_megatron.rollout.backend import (
    Capabilities,
    GenerateRequest,
    GenerateResult,
    RolloutBackend,
    Sample,
    ServerInfo,
)
from opsd_megatron.types import VersionSpan


def whole(request: GenerateRequest, number: int, version: str) -> Sample:
    """The only right response: token i behind a sequence of length L is (L + i) % 97."""
    ids = tuple((len(request.token_ids) + step) % 97 for step in range(request.max_tokens))
    spans = (VersionSpan(version, 0, len(ids)),)
    return Sample(ids, tuple(-float(token) for token in ids), "length", None, spans, "processed")


def cut(sample: Sample, length: int) -> Sample:
    """`sample` aborted after `length` tokens."""
    spans = tuple(VersionSpan(span.version, span.start, length) for span in sample.version_spans if length)
    return Sample(sample.token_ids[:length], sample.logprobs[:length], "abort", None, spans, "processed")


class Scripted(RolloutBackend):
    """`answer(request, sample number, version)` makes a sample or raises; everything that was asked is kept."""

    def __init__(
        self, name: str, answer: Callable[[GenerateRequest, int, str], Sample] = whole, is_atomic: bool = True
    ):
        self.name, self.answer, self.is_atomic = name, answer, is_atomic
        self.version, self.asked, self.calls = "step-0", list[GenerateRequest](), list[str]()
        self.open_tokens, self.most_tokens = 0, 0
        self.joined: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def health(self) -> bool:
        return True

    def info(self) -> ServerInfo:
        return ServerInfo(self.name, "scripted", True, "float32", 97, 10**6, self.version)

    def capabilities(self) -> Capabilities:
        nothing = frozenset()
        return Capabilities("processed", True, True, nothing, nothing, self.is_atomic, False, False, False)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        results = []
        for request in requests:
            tokens = len(request.token_ids) + request.n * request.max_tokens
            with self._lock:
                self.asked.append(request)
                self.open_tokens += tokens
                self.most_tokens = max(self.most_tokens, self.open_tokens)
            try:
                samples = tuple(self.answer(request, number, self.version) for number in range(request.n))
            finally:
                with self._lock:
                    self.open_tokens -= tokens
            results.append(GenerateResult(request.request_id, samples, len(request.token_ids), self.name))
        return results

    def traffic(self) -> list[GenerateRequest]:
        """What was asked, without canaries."""
        return [request for request in self.asked if not request.request_id.startswith("canary")]

    def abort(self, request_ids=None) -> int:
        return 0

    def pause(self, mode) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")

    def begin_update(self, version) -> None:
        self.calls.append(f"begin {version}")

    def push(self, bucket) -> None:
        self.calls.append("push")

    def finish_update(self, version) -> None:
        self.version = version

    def abort_update(self) -> None:
        self.calls.append("abort")

    def world_size(self) -> int:
        return 2

    def join_group(self, group) -> None:
        self.joined = group.rank_offset, group.world_size

    def receive(self, tensors) -> None:
        self.calls.append("receive")

    def leave_group(self) -> None:
        self.joined = None

    def close(self) -> None:
        pass
