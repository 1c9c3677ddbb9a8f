"""The order in which records are read: one seeded permutation per epoch for all ranks, resumable at any record."""

from collections.abc import Mapping, Sized
from typing import Any

import numpy as np
from jaxtyping import Int64

from opsd_megatron.errors import ConfigError, DataError


class RecordStream:
    """Deals the records of each step over the data-parallel ranks.

    The global batch of a step depends on seed and position alone, so it is the same under any dp, and a state saved
    under one dp goes on under another. An epoch's last batch is filled up from the next epoch.
    """

    def __init__(
        self,
        records: Sized,
        seed: int,
        shuffle: bool,
        dp_rank: int,
        dp_size: int,
        runs: Int64[np.ndarray, "records"] | None = None,
    ):
        """Records with the same number in `runs` stay neighbours when shuffled; None: every record for itself."""
        if not len(records):
            raise DataError("no records to stream")
        self.num_records = len(records)
        self._runs = np.arange(len(records)) if runs is None else runs
        self.num_runs = int(self._runs.max()) + 1
        self.seed, self.shuffle = seed, shuffle
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.epoch, self.position = 0, 0  # position: records of this epoch that all ranks together have taken
        self._order = self._epoch_order(0)

    def share(self, prompts_per_step: int) -> int:
        """Prompts of one replica; ConfigError where the replicas do not divide them."""
        share, rest = divmod(prompts_per_step, self.dp_size)
        if share < 1 or rest:
            raise ConfigError(
                f"batch.prompts_per_step={prompts_per_step} is not a multiple of dp={self.dp_size}; "
                f"set it to {max(1, share) * self.dp_size} or {(share + 1) * self.dp_size}"
            )
        return share

    def next_batch(self, prompts_per_step: int) -> tuple[int, ...]:
        """This rank's record numbers for the next step of `prompts_per_step` prompts over all ranks.

        Rank r gets the r-th run of prompts_per_step / dp_size neighbours, so that records which share a context meet
        on one rank.
        """
        share = self.share(prompts_per_step)
        batch = [self._take() for _ in range(prompts_per_step)]
        return tuple(batch[self.dp_rank * share : (self.dp_rank + 1) * share])

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, equal on every rank."""
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "num_records": self.num_records,
            "num_runs": self.num_runs,
            "epoch": self.epoch,
            "position": self.position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the state was taken; DataError where it belongs to another order or another file."""
        for name in ("seed", "shuffle", "num_records", "num_runs"):
            if state[name] != getattr(self, name):
                raise DataError(
                    f"the saved data position has {name}={state[name]}, this run has {getattr(self, name)}; "
                    "resume with the same data file, seed, data.shuffle and data.contexts_together, or start a new run"
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._order = self._epoch_order(self.epoch)

    def _take(self) -> int:
        if self.position == self.num_records:
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._epoch_order(self.epoch)
        self.position += 1
        return int(self._order[self.position - 1])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_records)
        # Raw Philox words are the same in every numpy release; the streams of Generator methods need not be.
        words = np.random.Philox(key=[self.seed & (2**64 - 1), epoch]).random_raw(self.num_runs)
        return np.argsort(words[self._runs], kind="stable")
