"""What a pool may be told; the defaults suit servers of 7B to 32B models."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PoolOptions:
    """Times in seconds."""

    request_s: float = 120.0
    """Constant part of the longest wait for a reply."""
    prefill_tokens_per_s: float = 2000.0
    """A prompt token adds the inverse of this to that wait."""
    decode_tokens_per_s: float = 10.0
    """A response token that may come adds the inverse of this to it."""
    retry_s: float = 120.0
    """How long a request, or a publication, may go without any server that serves it."""
    max_outstanding_tokens: int | None = None
    """Prompt and response tokens that one server is given at once; None: no bound but `max_concurrent`."""
    max_concurrent: int = 64
    """Requests that one server is given at once."""
    on_abort: Literal["resume", "drop_partial"] = "resume"
    """What becomes of the tokens of an aborted response: the response goes on behind them, or starts again."""
    backoff_s: float = 0.5
    """Longest pause before the first retry; doubles up to 8 s, the pause itself is drawn between 0 and it."""
    breaker_s: float = 30.0
    """An evicted server is looked at again after this time, doubled at every eviction in a row."""
    breaker_max_s: float = 600.0
    health_s: float = 5.0
    """Time between two looks at the health of a server that has requests."""
    canary_after_s: float = 30.0
    """A server that was idle for so long proves itself with one token before it is given requests."""
    canary_s: float = 60.0
    """Longest wait for that token."""
    poll_s: float = 5.0
    """Longest pause between two looks at the servers when none is left."""
    max_failures: int = 3
    """Failures in a row, or missed looks at its health, after which a server is evicted."""
    max_malformed: int = 3
    """Replies in a row that break the protocol after which a server is evicted."""

    def timeout_s(self, prompt_tokens: int, max_tokens: int) -> float:
        """Longest wait for one reply."""
        return self.request_s + prompt_tokens / self.prefill_tokens_per_s + max_tokens / self.decode_tokens_per_s
