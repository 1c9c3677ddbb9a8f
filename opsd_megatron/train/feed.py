"""Where each step's rollouts come from: the server, at once or one step ahead, or a recording.

What a checkpoint must know about them is here too: the position in the data behind the last batch that was trained on,
and the responses to the batch after it where the server has given them already. So nothing is lost or trained twice,
and a resumed run goes on bit for bit.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from opsd_megatron.checkpoint.agreement import raise_on_all
from opsd_megatron.config import RunConfig
from opsd_megatron.data.pairs import build_pairs
from opsd_megatron.data.records import Records
from opsd_megatron.data.stream import RecordStream
from opsd_megatron.data.tokenizer import Tokenizer, check_same_vocabulary
from opsd_megatron.errors import ConfigError
from opsd_megatron.parallel.mesh import Mesh
from opsd_megatron.parallel.reduce import broadcast_object, gather_objects
from opsd_megatron.rollout.recording import read_step, response_fields, rollout_of
from opsd_megatron.train.sampling import Sampling
from opsd_megatron.types import PromptPair, Rollout

log = logging.getLogger(__name__)


class Feed(Protocol):
    """All methods are collective over the run."""

    def take(self, step: int, version: str) -> list[Rollout] | None:
        """This replica's rollouts for the step, by weights `version` unless they were asked for before; None where the
        server had other weights: publish and take again."""
        ...

    def ask_ahead(self, step: int, version: str) -> None:
        """The server begins with that step's batch and goes on in the background."""
        ...

    def settle(self) -> None:
        """Waits until the server has nothing left to do, so that its weights may change."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON, the same on every rank."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class _Batch:
    step: int
    pairs: Sequence[PromptPair]
    position: Mapping[str, Any]
    """Of the stream, behind it."""
    is_asked: bool = False
    rollouts: list[Rollout] | None = None


class LiveFeed:
    """Rollouts from the server."""

    def __init__(
        self,
        config: RunConfig,
        records: Records,
        stream: RecordStream,
        tokenizer: Tokenizer,
        sampling: Sampling,
        mesh: Mesh,
    ):
        self._config, self._records, self._stream = config, records, stream
        self._tokenizer, self._sampling, self._mesh = tokenizer, sampling, mesh
        self._position: Mapping[str, Any] = stream.state_dict()
        self._batch: _Batch | None = None

    def take(self, step: int, version: str) -> list[Rollout] | None:
        batch = self._batch
        if batch is None or (batch.rollouts is None and not batch.is_asked):
            self.ask_ahead(step, version)
        self.settle()
        batch = self._batch
        assert batch is not None and batch.step == step
        if batch.rollouts is not None:
            self._batch, self._position = None, batch.position
        return batch.rollouts

    def ask_ahead(self, step: int, version: str) -> None:
        self._batch = self._batch or self._draw(step)
        self._batch.is_asked = True
        self._sampling.ask(self._batch.pairs, step, version)

    def settle(self) -> None:
        if self._batch is not None and self._batch.is_asked:
            self._batch.is_asked = False
            self._batch.rollouts = self._sampling.answer()

    def state(self) -> dict[str, Any]:
        self.settle()
        state: dict[str, Any] = {"stream": self._position}
        if self._batch is not None and self._batch.rollouts is not None:
            own = [response_fields(rollout) for rollout in self._batch.rollouts]
            state["ahead"] = [fields for part in gather_objects(own, self._mesh.dp) for fields in part]
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Responses that were given ahead are used again in the overlapped mode, else their prompts are asked again."""
        self._position = state["stream"]
        self._stream.load_state_dict(state["stream"])
        ahead, step = state.get("ahead"), state["step"]
        if ahead is None or self._config.rollout.overlap == "none":
            return
        samples, dp = self._config.rollout.samples_per_prompt, self._mesh.dp
        if len(ahead) != samples * self._config.batch.prompts_per_step:
            log.warning("%d responses in the checkpoint do not fit this batch size and are asked again", len(ahead))
            return
        batch = self._draw(step)
        count = samples * len(batch.pairs)
        own = ahead[dp.rank * count : (dp.rank + 1) * count]
        batch.rollouts = [rollout_of(batch.pairs[number // samples], fields) for number, fields in enumerate(own)]
        self._batch = batch

    def _draw(self, step: int) -> _Batch:
        """The prompts behind the last batch; the same on all ranks of a replica."""
        numbers = self._stream.next_batch(self._config.batch.prompts_per_step)
        pairs = build_pairs(self._records, numbers, self._config.data, self._tokenizer)
        return _Batch(step, pairs, self._stream.state_dict())


class ReplayFeed:
    """Rollouts from `rollout.replay_from`, under any number of replicas; the position in the data moves along."""

    def __init__(self, config: RunConfig, stream: RecordStream, tokenizer: Tokenizer, mesh: Mesh):
        self._config, self._stream, self._tokenizer, self._mesh = config, stream, tokenizer, mesh

    def take(self, step: int, version: str) -> list[Rollout] | None:
        rollouts: list[Rollout] = []
        problem: Exception | None = None
        if self._mesh.replica.rank == 0:
            try:
                rollouts = self._read(step + 1)
            except Exception as error:
                problem = error
        raise_on_all(problem)
        self._stream.next_batch(self._config.batch.prompts_per_step)
        return broadcast_object(rollouts, self._mesh.replica)

    def _read(self, step: int) -> list[Rollout]:
        """This replica's even share of the step's prompts."""
        directory, dp = self._config.rollout.replay_from, self._mesh.dp
        assert directory is not None
        recorded = read_step(directory, step)
        check_same_vocabulary(self._tokenizer.fingerprint, recorded.header["vocabulary"], f"{directory}, step {step},")
        groups: list[list[Rollout]] = []
        for row in recorded.rollouts:
            if groups and groups[-1][0].pair == row.rollout.pair and row.rollout.sample:
                groups[-1].append(row.rollout)
            else:
                groups.append([row.rollout])
        share, rest = divmod(len(groups), dp.size)
        if rest or not share:
            raise ConfigError(f"{directory}: step {step} has {len(groups)} prompts, which dp={dp.size} does not divide")
        return [rollout for group in groups[dp.rank * share : (dp.rank + 1) * share] for rollout in group]

    def ask_ahead(self, step: int, version: str) -> None:
        raise AssertionError("a recording has no server")

    def settle(self) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {"stream": self._stream.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._stream.load_state_dict(state["stream"])
