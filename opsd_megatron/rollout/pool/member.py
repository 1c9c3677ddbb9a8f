"""One server of a pool: the state that it is in, and what it must show before it gets requests."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection
from typing import Literal

from opsd_megatron.rollout.backend import (
    GenerateRequest,
    MalformedReply,
    RolloutBackend,
    ServerInfo,
    ServerUnreachable,
    WrongWeightVersion,
)
from opsd_megatron.rollout.pool.options import PoolOptions

log = logging.getLogger(__name__)
State = Literal["unknown", "ready", "paused", "updating", "dirty", "evicted"]
"""unknown: to be looked at; dirty: answers, but not with the wanted weights whole; evicted: not asked for a while.

Only a ready server gets requests. unknown -> ready takes health, a canary and the wanted version; dirty and evicted
servers come back through a whole update only, unless they are what they were: same process, same version, no update
that failed since.
"""
CANARY_NUMBERS = itertools.count()


class Interrupted(ServerUnreachable):
    """The server was evicted, or became dirty, while a request was open there; ask another."""


class Member:
    """Methods may be called from any thread."""

    def __init__(self, name: str, backend: RolloutBackend, options: PoolOptions):
        self.name, self.backend, self.options = name, backend, options
        self.state: State = "unknown"
        self.fault: Exception | None = None
        """Why it is not ready; None where nothing went wrong."""
        self.server_id: str | None = None
        self.synced: str | None = None
        """Version of the last update that it finished; None before, and after one that failed."""
        self.is_tainted = False
        """An update failed, so that its weights may be a mixture."""
        self.outstanding_tokens, self.running = 0, 0
        self.failures, self.malformed, self.evictions_in_a_row, self.evictions = 0, 0, 0, 0
        self.retry_at, self.last_reply_at, self.looked_at = 0.0, 0.0, 0.0
        self.interrupts: set[Callable[[Exception], None]] = set()
        """One for each open request: ends the waiting for its reply."""
        self._lock = threading.RLock()

    def needs_sync(self, wanted: str | None) -> bool:
        return self.is_tainted or (wanted is not None and self.synced != wanted)

    def has_room(self, tokens: int) -> bool:
        limit = self.options.max_outstanding_tokens
        fits = limit is None or not self.running or self.outstanding_tokens + tokens <= limit
        return fits and self.running < self.options.max_concurrent

    def admit(self, tokens: int) -> None:
        """A request of so many tokens is given to it."""
        with self._lock:
            self.running, self.outstanding_tokens = self.running + 1, self.outstanding_tokens + tokens

    def release(self, tokens: int) -> None:
        with self._lock:
            self.running, self.outstanding_tokens = self.running - 1, self.outstanding_tokens - tokens

    def evict(self, error: Exception) -> None:
        """No requests until the breaker half-opens; what is open there is given up."""
        with self._lock:
            now, options = time.monotonic(), self.options
            self.fault = error
            if self.state == "evicted" and now < self.retry_at:
                return  # it was looked at although its breaker is open, because no server was left
            if self.state == "updating":
                self.is_tainted, self.synced = True, None
            pause = min(options.breaker_s * 2**self.evictions_in_a_row, options.breaker_max_s)
            self.evictions += self.state != "evicted"
            self.evictions_in_a_row += 1
            self.state, self.retry_at = "evicted", now + pause
            interrupts = list(self.interrupts)
        log.warning("%s: evicted for %.0f s: %s", self.name, pause, error)
        for interrupt in interrupts:
            interrupt(Interrupted(f"{self.name} was evicted: {error}"))

    def soil(self, error: Exception) -> None:
        """Its weights are not to be trusted: nothing that it has in work, or sends before a whole update, counts."""
        with self._lock:
            self.state, self.fault, self.is_tainted, self.synced = "dirty", error, True, None
            interrupts = list(self.interrupts)
        log.warning("%s: dirty until its weights are published again: %s", self.name, error)
        for interrupt in interrupts:
            interrupt(Interrupted(f"{self.name} became dirty: {error}"))

    def count_failure(self, error: Exception, is_gone: bool) -> None:
        """`is_gone`: it does not even answer /health."""
        self.failures += 1
        if is_gone or self.failures >= self.options.max_failures:
            self.evict(error)

    def count_malformed(self, error: MalformedReply) -> None:
        self.malformed += 1
        log.warning("%s: malformed reply: %s", self.name, error)
        if self.malformed >= self.options.max_malformed:
            self.evict(error)
            self.is_tainted, self.synced = True, None

    def count_reply(self) -> None:
        self.failures = self.malformed = self.evictions_in_a_row = 0
        self.last_reply_at = time.monotonic()

    def finish_update(self, version: str) -> None:
        with self._lock:
            self.synced, self.is_tainted, self.state, self.fault = version, False, "unknown", None

    def expect(self, synced: str | None, server_id: str | None) -> None:
        """What the process that publishes knows of this server; it is looked at again before its next request."""
        with self._lock:
            self.synced, self.server_id, self.is_tainted = synced, server_id, synced is None
            if self.state in ("ready", "dirty"):
                self.state = "unknown"

    def meet(self, inspect: Callable[[RolloutBackend], None]) -> tuple[ServerInfo, bool]:
        """What it says of itself, and whether it is another process than before; `inspect` has looked at that then."""
        info = self.backend.info()
        is_other = info.server_id != self.server_id
        if is_other:
            inspect(self.backend)
            self.server_id = info.server_id
        return info, is_other

    def prove(self, wanted: str | None, valid: Collection[str], inspect: Callable[[RolloutBackend], None]) -> None:
        """Leaves it ready, dirty or evicted. `inspect` looks at a process that was not met before."""
        before = self.state
        try:
            if not self.backend.health():
                raise ServerUnreachable(f"{self.name} is not healthy")
            was_known = self.server_id is not None
            info, is_other_process = self.meet(inspect)
            if is_other_process and was_known:
                self.synced = None
            if wanted is not None and info.weight_version not in ("", wanted):
                self.synced = None
            if self.needs_sync(wanted):
                self._leave(before, "dirty", self._unsynced(wanted, info.weight_version))
                return
            if before == "evicted":
                self.backend.resume()  # it may have missed a resume while it was away
            self._canary(valid)
        except Exception as error:  # whatever it is, this server cannot be used
            self.evict(error)
            return
        self.last_reply_at = time.monotonic()
        self._leave(before, "ready", None)

    def _canary(self, valid: Collection[str]) -> None:
        request = GenerateRequest(f"canary-{next(CANARY_NUMBERS)}", [0], max_tokens=1, ignore_eos=True)
        (result,) = self.backend.generate([request])
        for sample in result.samples:
            if sample.finish_reason == "abort" or not sample.token_ids:
                raise ServerUnreachable(f"{self.name} aborted its canary")
            check_versions(self.name, sample.version_spans, valid)

    def _leave(self, before: State, state: State, fault: Exception | None) -> None:
        with self._lock:
            if self.state == before:  # otherwise an update, or a fault, came in between and counts more
                self.state, self.fault, self.failures = state, fault, 0

    def _unsynced(self, wanted: str | None, version: str) -> WrongWeightVersion:
        return WrongWeightVersion(
            f"{self.name} serves weights {version or 'of unknown version'} and {wanted} were wanted, or an update "
            "failed there; publish the weights again"
        )


def check_versions(name: str, spans, valid: Collection[str]) -> None:
    """WrongWeightVersion where a token came from weights outside of `valid`; empty: all are."""
    wrong = {span.version for span in spans if valid and span.version not in valid}
    if wrong:
        raise WrongWeightVersion(
            f"{name} sent tokens of weights {', '.join(sorted(wrong))}, wanted was {' or '.join(sorted(valid))}; "
            "publish the weights again"
        )
