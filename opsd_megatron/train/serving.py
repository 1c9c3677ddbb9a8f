"""The inference servers as a run sees them: which weights they serve, and whose turn it is on a shared device."""

from opsd_megatron.rollout.backend import HalfUpdated, UpdateLost
from opsd_megatron.train.colocated import Turns
from opsd_megatron.train.feed import Feed
from opsd_megatron.train.mismatch import MismatchGuard
from opsd_megatron.train.sampling import Sampling
from opsd_megatron.train.weight_sync import Publisher

PUBLISH_ATTEMPTS = 3


class Serving:
    """All methods are collective over the run."""

    def __init__(
        self,
        chunks: list,
        sampling: Sampling,
        feed: Feed,
        publisher: Publisher,
        turns: Turns | None,
        guard: MismatchGuard,
    ):
        self.guard = guard
        self._chunks, self._sampling, self._feed = chunks, sampling, feed
        self._publisher, self._turns = publisher, turns
        self._served: str | None = None  # a server may have restarted, or be serving another checkpoint
        self._probed: dict[str, float] = {}

    def publish(self, version: str, is_student: bool) -> None:
        """The weights in the chunks, as `version`, unless all servers have it; compared with the student's own
        log-probs when that is due."""
        if self._is_served(version) and not self._sampling.has_stale_servers():
            return
        self._feed.settle()  # no response has tokens of two versions
        self._send(version)
        self._served = version
        if is_student and self._turns is None:  # colocated, the trainer's own weights are parked now
            self._probed |= self.guard.probe(self._chunks, self._sampling.backend, version)

    def forget(self) -> None:
        """A server has other weights than it was given."""
        self._served = None

    def to_trainer(self) -> None:
        """The servers sleep where they share the trainer's device."""
        if self._turns is not None:
            self._turns.to_trainer()

    def rescue(self) -> None:
        """The trainer's state back where it can be saved from, whatever happened."""
        if self._turns is not None:
            self._turns.rescue()

    def probe_lengths(self) -> dict[str, float]:
        """Exact match by context length; see Sampling."""
        values = self._sampling.probe()
        self.to_trainer()
        return values

    def take_values(self) -> dict[str, float]:
        """What was measured of servers and publications since the last call."""
        values, self._probed = self._sampling.values | self._probed, {}
        return values

    def close(self) -> None:
        self._publisher.close()
        self._sampling.close()

    def _is_served(self, version: str) -> bool:
        """A server that has slept has lost everything."""
        return self._served == version and (self._turns is None or self._turns.turn == "server")

    def _send(self, version: str) -> None:
        """Again from the start where a server restarted in between."""
        turns = self._turns
        value_of = turns.parking.value_of if turns else None

        def send() -> None:
            self._publisher.publish(self._chunks, version, value_of)

        for attempts_left in reversed(range(PUBLISH_ATTEMPTS)):
            try:
                turns.to_server(send) if turns else send()
                return
            except (UpdateLost, HalfUpdated):
                if not attempts_left:
                    raise
