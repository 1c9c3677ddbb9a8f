"""What the trainer asks of an inference server: token ids in, token ids and log-probs with their weight version out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from opsd_megatron.errors import ServerError
from opsd_megatron.types import VersionSpan


class ServerUnreachable(ServerError):
    """Nobody answers at that address, or not in time."""


class ServerUnauthorized(ServerError):
    """The bearer token is wrong or missing."""


class ServerRefused(ServerError):
    """The server understood and will not, or cannot, do it."""


class MalformedReply(ServerError):
    """The reply breaks the protocol; nothing of it can be trusted."""


class UpdateLost(ServerError):
    """The server restarted inside a weight update, or another client ended it; publish again from the start."""


class WrongWeightVersion(ServerError):
    """Responses came from other weights than the trainer's, for example because the server restarted.

    Publish the weights again and sample again.
    """


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt and how to continue it."""

    request_id: str
    token_ids: Sequence[int]
    n: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """1 is off."""
    top_k: int = 0
    """0 is off."""
    seed: int | None = None
    """Sample i draws from seed + i, where the server honours seeds."""
    stop_token_ids: Sequence[int] = ()
    """Stop after one of these; it stays in the response."""
    ignore_eos: bool = False
    """Do not stop at the model's own end tokens."""


@dataclass(frozen=True)
class Sample:
    """One response."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Nats, one per token."""
    finish_reason: Literal["stop", "length", "abort"]
    stop_token: int | None
    version_spans: tuple[VersionSpan, ...]
    """Contiguous over the response."""
    logprob_kind: Literal["raw", "processed"]
    """processed = after temperature, top-k and top-p; raw = before."""


@dataclass(frozen=True)
class GenerateResult:
    """The samples of one request, in order."""

    request_id: str
    samples: tuple[Sample, ...]
    prompt_tokens: int
    server_id: str


@dataclass(frozen=True)
class ServerInfo:
    """What serves."""

    server_id: str
    """Another one after a restart."""
    engine: str
    seeded: bool
    """Equal seeds give equal responses, bit for bit."""
    dtype: str
    vocab_size: int
    max_model_len: int
    weight_version: str


@runtime_checkable
class RolloutBackend(Protocol):
    """Calls block. They raise a ServerError where the server cannot be reached, refuses or answers nonsense."""

    def health(self) -> bool:
        """Whether the server can generate now; False where it cannot be reached."""
        ...

    def info(self) -> ServerInfo: ...

    def weight_version(self) -> str: ...

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        """One result per request, in order; the requests run concurrently."""
        ...

    def pause(self, mode: Literal["keep", "wait", "abort"]) -> None: ...

    def resume(self) -> None: ...

    def abort(self, request_ids: Sequence[str] | None = None) -> int:
        """Number of requests ended with what they have; None ends all."""
        ...

    def begin_update(self, version: str) -> None: ...

    def push(self, bucket: Mapping[str, Tensor]) -> None:
        """Stages tensors under their Hugging Face names."""
        ...

    def finish_update(self, version: str) -> None:
        """The server swaps everything staged in at once, or refuses and serves the old weights."""
        ...

    def abort_update(self) -> None: ...

    def update_from_disk(self, path: str, version: str) -> None: ...

    def checksum(self) -> dict[str, str]:
        """sha256 of each served tensor, by Hugging Face name."""
        ...
