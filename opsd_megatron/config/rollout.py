"""Inference servers: where they are, how they sample and get weights, and when they disagree too much."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opsd_megatron.config.check import require


@dataclass(frozen=True)
class RolloutConfig:
    """The inference server and how it samples."""

    url: str = "http://127.0.0.1:8199"
    """Base URL of the server, or of several, separated by commas; they may run on other GPUs or nodes, or be started by
    the example."""
    token_variable: str = "OPSD_SERVER_TOKEN"
    """Environment variable that holds the bearer token; the token itself is never in a config or log."""
    samples_per_prompt: int = 1
    """Responses per prompt and step."""
    max_response_tokens: int = 16
    """Sampling stops here; the response then counts as truncated."""
    temperature: float = 1.0
    """The sampled-token estimator is unbiased only at 1; student and teacher are scored at the same temperature."""
    seeded: bool = False
    """Use the server's seeded exact mode: bitwise repeatable, slow; for tests."""
    request_timeout_s: float = 120.0
    """Constant part of the longest wait for a reply; prompt and response length add to it."""
    retry_s: float = 120.0
    """How long a step waits when no server is left before the run stops with a checkpoint."""
    transport: Literal["auto", "disk", "http", "gloo", "nccl"] = "auto"
    """How new weights reach the server. disk: files in shared_directory; http: bodies of requests; gloo and nccl: a
    broadcast from rank 0. auto takes the fastest that trainer and server share."""
    shared_directory: Path | None = None
    """For disk: a directory of this run's own that trainer and server see under the same path, below the server's
    --weights-root. Older weights in it are deleted."""
    transfer_host: str = "127.0.0.1"
    """For gloo and nccl: an address of rank 0's machine that the servers can reach."""
    pause: Literal["keep", "wait", "abort"] = "wait"
    """What happens to requests in flight while weights are exchanged: they stand still and go on with the new weights,
    are finished first, or end with what they have."""
    checksum_every: int = 0
    """Compare the sha256 of every served tensor with the trainer's after each so many updates; 0 never."""
    colocated: bool = False
    """Trainer and server share their GPUs and take turns: the server sleeps while the trainer trains, the trainer's
    state waits in host memory while the server answers."""
    overlap: Literal["none", "one_step_off"] = "none"
    """one_step_off: the server answers the next step's prompts, with this step's weights, while this step trains."""
    record_to: Path | None = None
    """Directory that keeps every step's rollouts with per-token advantages; `python -m opsd_megatron.launch.view` shows
    them."""
    replay_from: Path | None = None
    """Train on rollouts recorded there instead of asking a server; none is needed then."""
    prefill_tokens_per_s: float = 2000.0
    """A reply may take the time that the prompt takes at this speed, besides request_timeout_s."""
    decode_tokens_per_s: float = 10.0
    """And the time that max_response_tokens take at this speed."""
    max_outstanding_tokens: int | None = None
    """Prompt and response tokens that one server is given at once: what its cache holds. None: 64 requests."""
    on_abort: Literal["resume", "drop_partial"] = "resume"
    """A response that a server aborts goes on behind the tokens that it has, or starts again."""
    max_staleness: int = 0
    """Response tokens whose weights lag more steps than this behind the step's carry no loss."""
    server: Literal["auto", "embedded", "vllm", "sglang"] = "auto"
    """Kind of all servers in `url`; auto asks them."""
    admin_token_variable: str | None = None
    """Environment variable with the token for routes that change a server, where that is another one."""

    def __post_init__(self):
        require(
            self.transport != "disk" or self.shared_directory is not None,
            "rollout.transport=disk needs rollout.shared_directory, a directory that trainer and server see",
        )
        require(
            not (self.colocated and self.transport == "nccl"),
            "rollout.transport=nccl cannot join two processes on one GPU; with rollout.colocated=True take auto, disk, "
            "gloo or http",
        )
        require(
            not (self.colocated and self.overlap != "none"),
            f"rollout.overlap={self.overlap} needs a server that answers while this run trains; rollout.colocated=True "
            "lets them take turns",
        )
        require(self.checksum_every >= 0, f"rollout.checksum_every={self.checksum_every}: 0 or more")
        require(self.temperature > 0, f"rollout.temperature={self.temperature}: must be above 0")
        require(self.samples_per_prompt >= 1, f"rollout.samples_per_prompt={self.samples_per_prompt}: 1 or more")
        require(self.max_response_tokens >= 1, f"rollout.max_response_tokens={self.max_response_tokens}: 1 or more")
        require(
            self.replay_from is None or (self.overlap == "none" and self.record_to != self.replay_from),
            f"rollout.replay_from={self.replay_from} needs overlap=none, and record_to None or another directory",
        )
        require(bool(self.urls), f"rollout.url={self.url!r}: at least one address is needed")
        require(len(set(self.urls)) == len(self.urls), f"rollout.url={self.url!r} names a server twice")
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            require(getattr(self, name) > 0, f"rollout.{name}={getattr(self, name)}: must be above 0")
        require(
            self.max_outstanding_tokens is None or self.max_outstanding_tokens >= 1,
            f"rollout.max_outstanding_tokens={self.max_outstanding_tokens}: 1 or more, or None for no bound",
        )
        require(self.max_staleness >= 0, f"rollout.max_staleness={self.max_staleness}: 0 or more")

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses in `url`."""
        return tuple(one.strip().rstrip("/") for one in self.url.split(",") if one.strip())


@dataclass(frozen=True)
class MismatchConfig:
    """How far trainer and inference server may be apart before the run stops."""

    probe_every_publications: int = 1
    """Compare both on fixed tokens after every so many weight publications, where the server can score; 0: never."""
    probe_tokens: int = 256
    """Length of the probe, from the first record's prompt; RoPE settings that differ only far out need a long one."""
    probe_limit_nats: float = 0.05
    """Largest mean |difference| of the probe's log-probs."""
    k3_limit_nats: float = 0.1
    """Largest D(server || trainer) of a step's rollouts (mismatch/k3_kl_nats) ..."""
    k3_steps: int = 3
    """... that may be exceeded for so many steps running, less one. Replayed rollouts are not held to it."""

    def __post_init__(self):
        require(self.probe_every_publications >= 0, "mismatch.probe_every_publications: 0 or more")
        require(self.probe_tokens >= 2, f"mismatch.probe_tokens={self.probe_tokens}: 2 or more")
        require(self.k3_steps >= 1, f"mismatch.k3_steps={self.k3_steps}: 1 or more")
