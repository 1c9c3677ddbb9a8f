"""How much may wait for its turn."""

from collections.abc import Sequence
from dataclasses import dataclass

from opsd_megatron.server.engine import Job
from opsd_megatron.server.refusal import Refusal


@dataclass(frozen=True)
class QueueLimits:
    """None is without limit."""

    requests: int | None = None
    tokens: int | None = None
    """Of their prompts."""

    @property
    def are_set(self) -> bool:
        return self.requests is not None or self.tokens is not None

    def check(self, waiting: Sequence[Job]) -> None:
        """Refusal 503 where no more may join `waiting`."""
        tokens = sum(len(job.prompt) for job in waiting)
        for option, count, limit in (
            ("--max-queued-requests", len(waiting), self.requests),
            ("--max-queued-tokens", tokens, self.tokens),
        ):
            if limit is not None and count >= limit:
                raise Refusal(
                    503,
                    f"{len(waiting)} requests with {tokens} prompt tokens wait already ({option} {limit}); "
                    "try again later",
                )
