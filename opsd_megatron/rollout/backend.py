"""What the trainer asks of an inference server: token ids in, token ids and log-probs with their weight version out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


class HalfUpdated(ServerError):
    """An update failed part way on a server that cannot undo it: its weights are a mixture that looks healthy.

    Nothing that it generates may be used before a whole update has succeeded.
    """


class WrongChecksum(ServerError):
    """The server's weights are not those that were published; nothing that it generates may be used."""


class Unsupported(ServerError):
    """This kind of server cannot do it; its capabilities say so beforehand."""


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
    min_p: float = 0.0
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
    cached_tokens: int | None = None
    """Of the prompt, found in the server's prefix cache; None where it does not say."""


@dataclass(frozen=True)
class ServerInfo:
    """What serves; numbers are 0 and names empty where a server does not say."""

    server_id: str
    """Another one after a restart."""
    engine: str
    seeded: bool
    """Equal seeds give equal responses, bit for bit."""
    dtype: str
    vocab_size: int
    max_model_len: int
    weight_version: str


PauseMode = Literal["keep", "wait", "abort"]
"""keep: requests stand still and go on later; wait: they finish first; abort: they end with what they have."""
Transport = Literal["disk", "http", "gloo", "nccl"]
Memory = Literal["weights", "kv_cache"]


@dataclass(frozen=True)
class Capabilities:
    """What a server can do, probed from its routes and replies."""

    logprob_kind: Literal["raw", "processed"]
    seeded: bool
    """Equal seeds give equal responses, bit for bit."""
    has_spans: bool
    """Replies say which weights sampled which token."""
    pause_modes: frozenset[PauseMode]
    transports: frozenset[Transport]
    has_atomic_updates: bool
    """A failed update leaves the old weights whole; elsewhere it leaves a mixture that looks healthy."""
    has_checksum: bool
    can_score: bool
    can_sleep: bool
    """Gives its memory back and takes it again: `sleep` and `wake`."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that will be broadcast, under its Hugging Face name."""

    name: str
    dtype: str
    """As torch spells it, without the prefix: bfloat16."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TransferGroup:
    """A process group of the trainer's sender (rank 0) and all ranks of the servers."""

    kind: Literal["gloo", "nccl"]
    host: str
    port: int
    """Of the store at which the members meet."""
    rank_offset: int
    """Rank of the first of this server's ranks."""
    world_size: int
    name: str
    """Another one after every change of members."""
    bucket_bytes: int
    """Tensors are broadcast in packed buckets, each closed right after it exceeds this."""
    nccl_unique_id: str = field(default="", repr=False)
    """Base64 of the 128 bytes that rank 0 made, for servers that meet through NCCL itself and not through the store."""


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

    def capabilities(self) -> Capabilities: ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """For each sequence the log-probs, in nats at temperature 1, of its tokens but the first."""
        ...

    def pause(self, mode: PauseMode) -> None: ...

    def resume(self) -> None: ...

    def abort(self, request_ids: Sequence[str] | None = None) -> int:
        """Number of requests ended with what they have (0 where the server does not say); None ends all."""
        ...

    def flush_cache(self) -> None:
        """No later request reads keys and values that were computed before."""
        ...

    def begin_update(self, version: str) -> None: ...

    def push(self, bucket: Mapping[str, Tensor]) -> None:
        """Transport http: stages tensors under their Hugging Face names."""
        ...

    def world_size(self) -> int:
        """Ranks that take part in a transfer group."""
        ...

    def join_group(self, group: TransferGroup) -> None:
        """Transports gloo and nccl: blocks until the server's ranks have met the others."""
        ...

    def receive(self, tensors: Sequence[TensorInfo]) -> None:
        """Between `begin_update` and `finish_update`: blocks until all have come through the group, in this order."""
        ...

    def leave_group(self) -> None: ...

    def finish_update(self, version: str) -> None:
        """The server serves what it was given, under that version, or raises."""
        ...

    def abort_update(self) -> None: ...

    def update_from_disk(self, path: str, version: str) -> None:
        """A whole update from a Hugging Face directory that the server can read."""
        ...

    def checksum(self) -> dict[str, str]:
        """sha256 of each served tensor, by Hugging Face name."""
        ...

    def sleep(self) -> None:
        """Releases the memory of weights and cache; the server serves nothing until it has been woken."""
        ...

    def wake(self, what: Sequence[Memory]) -> None:
        """Takes that memory again. Woken weights hold nothing until an update has filled them."""
        ...

    def close(self) -> None: ...
