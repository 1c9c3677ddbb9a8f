"""What an engine is: something that continues token sequences and can be frozen between two tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

SampleKey = tuple[str, int]
"""(job, number of the sample among those of the same prompt)"""


@dataclass(frozen=True)
class Job:
    """One prompt to be continued `samples` times."""

    job_id: str
    """Names that end in the digest of different cache salts share no blocks of a prefix cache."""
    prompt: tuple[int, ...]
    samples: int
    max_tokens: int
    """0 samples nothing: such a job is only scored, and never reaches an engine."""
    temperature: float
    """0 takes the likeliest token."""
    top_p: float
    """1 is off."""
    top_k: int
    """0 is off."""
    seed: int | None
    """Sample i draws from seed + i; only an engine that is `seeded` can honour it."""
    stop_token_ids: frozenset[int]
    is_streamed: bool = False
    """Deliver what a sample has after each token too."""
    scored: Literal["prompt", "all"] | None = None
    """Whether the prompt, or the prompt with each response, is scored once the responses are complete."""
    top_logprobs: int = 0
    """Likeliest tokens that a score names at each position."""

    @property
    def keys(self) -> list[SampleKey]:
        return [(self.job_id, sample) for sample in range(self.samples)]


@dataclass(frozen=True)
class Continuation:
    """Tokens that followed a prompt; a stop token is the last of them."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Nats, after temperature, top-k and top-p; 0 where the likeliest token was taken (temperature 0)."""
    raw_logprobs: list[float] | None = None
    """Nats, of the model's own distribution; None where the engine does not keep them."""
    error: str | None = None
    is_finished: bool = True
    cached_tokens: int = 0
    """Of the prompt, found in the prefix cache; for samples that share one prefill, those of the first."""

    def first(self, count: int) -> "Continuation":
        """Its first `count` tokens."""
        raw = None if self.raw_logprobs is None else self.raw_logprobs[:count]
        return Continuation(self.token_ids[:count], self.logprobs[:count], raw, cached_tokens=self.cached_tokens)


Deliver = Callable[[SampleKey, Continuation], None]
"""Called on the event loop, once for each finished sample, and where the job is streamed after each token before."""


@runtime_checkable
class Engine(Protocol):
    """`start`, `submit` and `cancel` are called on the event loop; the others on one and the same other thread."""

    seeded: bool
    """Equal seeds give equal tokens, bit for bit, whatever else runs."""

    def start(self, deliver: Deliver) -> None: ...

    def submit(self, job: Job) -> None: ...

    def cancel(self, keys: list[SampleKey]) -> None:
        """These samples need not be finished; some may still be delivered."""
        ...

    def freeze(self) -> None:
        """Returns when nothing runs and all finished samples are on their way to the event loop; nests."""
        ...

    def thaw(self) -> None: ...

    def in_flight(self) -> dict[SampleKey, Continuation]:
        """What each unfinished sample has so far; only while frozen. Samples that have nothing may be missing."""
        ...

    def drop_cache(self) -> None:
        """While frozen: no later token is computed from keys and values of before. Unfinished samples keep their tokens
        and compute those keys again."""
        ...

    def release_cache(self) -> None:
        """`drop_cache`, and the memory is given back; the engine stays frozen until `restore_cache`."""
        ...

    def restore_cache(self) -> None: ...

    def waiting(self) -> set[str]:
        """Jobs of which some sample has not begun, or has to begin again; at any time, from any thread."""
        ...

    def figures(self) -> dict[str, float]:
        """Values of the metrics that only the engine knows; at any time, from any thread."""
        ...

    def is_alive(self) -> bool: ...

    def stop(self) -> None: ...
