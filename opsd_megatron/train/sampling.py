"""A run's side of the inference server: which rank talks to it, what it is asked, what happens when it goes away."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from opsd_megatron.checkpoint.agreement import raise_on_all
from opsd_megatron.config import Distill, LogConfig, RunConfig
from opsd_megatron.data.records import read_records
from opsd_megatron.data.tokenizer import Tokenizer
from opsd_megatron.evaluation.exact_match import evaluate_lengths, length_of
from opsd_megatron.parallel.mesh import Mesh
from opsd_megatron.parallel.reduce import broadcast_object, gather_objects
from opsd_megatron.rollout.backend import GenerateRequest, RolloutBackend, WrongWeightVersion
from opsd_megatron.rollout.pool.servers import ServerPool
from opsd_megatron.rollout.pool.status import metrics
from opsd_megatron.rollout.sampler import sample_rollouts
from opsd_megatron.train.servers import connect
from opsd_megatron.types import PromptPair, Rollout


class Sampling:
    """The first rank of every replica is a client of the servers; the others get their rollouts from it."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, mesh: Mesh):
        self._config, self._tokenizer, self._mesh = config, tokenizer, mesh
        self.backend: ServerPool | None = None
        self.values: dict[str, float] = {}
        """How the last sampling went, for the step's record; equal on every rank."""
        problem: Exception | None = None
        if mesh.replica.rank == 0:
            try:
                self.backend = connect(config, tokenizer)
            except Exception as error:
                problem = error
        raise_on_all(problem)
        self._probe_records = _probe_records(config.log) if mesh.world.rank == 0 else []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self._asked: Future[tuple[list[Rollout], float]] | None = None

    def ask(self, pairs: Sequence[PromptPair], step: int, version: str) -> None:
        """The servers begin to answer; `answer` must be called before the next `ask`. Collective over the run."""
        is_publisher = self.backend is not None and self._mesh.world.rank == 0
        synced = broadcast_object(self.backend.synced() if self.backend and is_publisher else {}, self._mesh.world)
        if self.backend is not None:
            self._asked = self._thread.submit(self._ask, pairs, self.backend, synced, step, version)

    def answer(self) -> list[Rollout] | None:
        """This replica's rollouts, on all its ranks; None on every rank of the run where no server had these weights.

        Servers that are all down are waited for (`rollout.retry_s`); what cannot be recovered from is raised on every
        rank.
        """
        rollouts: list[Rollout] = []
        seconds = 0.0
        problem: Exception | None = None
        has_wrong_weights = False
        if self._asked is not None:
            try:
                rollouts, seconds = self._asked.result()
            except WrongWeightVersion:
                has_wrong_weights = True
            except Exception as error:
                problem = error
        raise_on_all(problem)
        if any(gather_objects(has_wrong_weights, self._mesh.world)):
            return None
        self._measure(rollouts, seconds)
        return broadcast_object(rollouts, self._mesh.replica)

    def has_stale_servers(self) -> bool:
        """Whether a server waits for a publication to serve again; equal on every rank."""
        mine = self.backend is not None and bool(self.backend.stale_servers())
        return any(gather_objects(mine, self._mesh.world))

    def report_to(self, report: Callable[[str], None]) -> None:
        """`report` is given a line about the rollouts twice a second while they run."""
        if self.backend is not None:
            self.backend.report = report

    def probe(self) -> dict[str, float]:
        """Exact match by context length on the probe's records, asked greedily by rank 0; equal on every rank."""
        values: dict[str, float] = {}
        backend = self.backend
        if backend is not None and self._mesh.world.rank == 0:
            data = self._config.data
            scores = evaluate_lengths(
                lambda prompts: greedy(backend, prompts, self._tokenizer, self._config.rollout.max_response_tokens),
                self._probe_records,
                data.template,
                self._tokenizer,
                budget_tokens=data.student_tokens,
            )
            values = {f"probe/exact_match/{score.length}": score.accuracy for score in scores}
        return broadcast_object(values, self._mesh.world)

    def close(self) -> None:
        if self.backend is not None:
            self.backend.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _measure(self, rollouts: Sequence[Rollout], seconds: float) -> None:
        masked = sum(not is_kept for rollout in rollouts for is_kept in rollout.loss_mask)
        mine = (self.backend.take_counts(), masked, seconds) if self.backend is not None else None
        parts = [part for part in gather_objects(mine, self._mesh.world) if part is not None]
        self.values = metrics([counts for counts, _, _ in parts], max(seconds for _, _, seconds in parts))
        self.values["rollout/stale_tokens"] = float(sum(masked for _, masked, _ in parts))

    def _ask(
        self,
        pairs: Sequence[PromptPair],
        backend: ServerPool,
        synced: Mapping[str, str],
        step: int,
        version: str,
    ) -> tuple[list[Rollout], float]:
        """Rollouts, and the seconds that they took; in a thread of its own."""
        started = time.monotonic()
        backend.expect(version, synced)
        return self._sample(pairs, backend, step, version), time.monotonic() - started

    def _sample(self, pairs: Sequence[PromptPair], backend: RolloutBackend, step: int, version: str) -> list[Rollout]:
        config, stops = self._config, self._tokenizer.eos_ids
        if isinstance(config.objective, Distill):
            return sample_rollouts(pairs, backend, config.rollout, stops, config.seed, step, version)
        # self-SFT learns, under the long context, what the starting model says under the short one
        swapped = [replace(pair, student_prompt=pair.teacher_prompt) for pair in pairs]
        rollouts = sample_rollouts(swapped, backend, config.rollout, stops, config.seed, step, version, greedy=True)
        originals = [pair for pair in pairs for _ in range(config.rollout.samples_per_prompt)]
        return [replace(rollout, pair=pair) for rollout, pair in zip(rollouts, originals, strict=True)]


def greedy(
    backend: RolloutBackend, prompts: Sequence[tuple[int, ...]], tokenizer: Tokenizer, max_tokens: int
) -> list[tuple[int, ...]]:
    """The likeliest responses, in the order of the prompts."""
    requests = [
        GenerateRequest(
            f"greedy-{number}", prompt, max_tokens=max_tokens, temperature=0.0, stop_token_ids=tokenizer.eos_ids
        )
        for number, prompt in enumerate(prompts)
    ]
    return [result.samples[0].token_ids for result in backend.generate(requests)]


def _probe_records(log: LogConfig) -> list:
    """The first `probe_items` records of each context length."""
    if log.probe_path is None or not log.probe_every_steps:
        return []
    by_length: dict[int, list] = {}
    for record in read_records(log.probe_path):
        by_length.setdefault(length_of(record), []).append(record)
    return [record for records in by_length.values() for record in records[: log.probe_items]]
