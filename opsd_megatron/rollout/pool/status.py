"""What a pool has done: counted for the metrics of a step, shown while the step's rollouts run."""

import time
from dataclasses import dataclass, field

from opsd_megatron.rollout.backend import GenerateResult


@dataclass
class Counts:
    """Of one pool since it was last asked."""

    started: float = field(default_factory=time.monotonic)
    total: int = 0
    """Requests begun."""
    requests: int = 0
    """Requests answered."""
    response_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    told_tokens: int = 0
    """Prompt tokens of replies that say how many of them were cached."""
    retries: int = 0
    resumed: int = 0
    malformed: int = 0
    evictions: int = 0

    def finish(self, result: GenerateResult) -> None:
        self.requests += 1
        self.response_tokens += sum(len(sample.token_ids) for sample in result.samples)
        self.prompt_tokens += result.prompt_tokens
        if result.cached_tokens is not None:
            self.cached_tokens += result.cached_tokens
            self.told_tokens += result.prompt_tokens


def metrics(parts: list[Counts], seconds: float) -> dict[str, float]:
    """Values for the step's record, summed over the pools of all replicas."""
    told = sum(part.told_tokens for part in parts)
    values = {
        "rollout/tokens_per_s": sum(part.response_tokens for part in parts) / max(seconds, 1e-9),
        "rollout/retries": float(sum(part.retries for part in parts)),
        "rollout/evictions": float(sum(part.evictions for part in parts)),
        "rollout/malformed_replies": float(sum(part.malformed for part in parts)),
        "rollout/resumed": float(sum(part.resumed for part in parts)),
    }
    if told:
        values["rollout/cached_share"] = sum(part.cached_tokens for part in parts) / told
    return values


def status_line(counts: Counts, running: int, waiting: int, states: dict[str, int]) -> str:
    """One line for a person: answered, tokens/s, running, waiting, cache hits, evictions, servers by state."""
    speed = counts.response_tokens / max(time.monotonic() - counts.started, 1e-9)
    parts = [f"rollouts {counts.requests}/{counts.total}", f"{speed:.0f} tokens/s"]
    parts += [f"running {running}", f"waiting {waiting}"]
    if counts.told_tokens:
        parts.append(f"cached {counts.cached_tokens / counts.told_tokens:.0%}")
    if counts.evictions or counts.retries:
        parts.append(f"evictions {counts.evictions}, retries {counts.retries}")
    return "  ".join([*parts, ", ".join(f"{number} {state}" for state, number in states.items())])
