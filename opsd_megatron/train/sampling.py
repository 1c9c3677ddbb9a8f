"""A run's side of the inference server: which rank talks to it, what it is asked, what happens when it goes away."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from opsd_megatron.checkpoint.agreement import raise_on_all
from opsd_megatron.config import Distill, LogConfig, RunConfig
from opsd_megatron.data.records import read_records
from opsd_megatron.data.tokenizer import Tokenizer, check_same_vocabulary
from opsd_megatron.errors import ConfigError
from opsd_megatron.evaluation.exact_match import evaluate_lengths, length_of
from opsd_megatron.parallel.mesh import Mesh
from opsd_megatron.parallel.reduce import broadcast_object, gather_objects
from opsd_megatron.rollout.backend import GenerateRequest, RolloutBackend, WrongWeightVersion
from opsd_megatron.rollout.embedded import EmbeddedBackend
from opsd_megatron.rollout.sampler import sample_rollouts
from opsd_megatron.types import PromptPair, Rollout


class Sampling:
    """The first rank of every replica is a client of the server; the others get their rollouts from it."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, mesh: Mesh):
        self._config, self._tokenizer, self._mesh = config, tokenizer, mesh
        self.backend: EmbeddedBackend | None = None
        problem: Exception | None = None
        if mesh.replica.rank == 0:
            try:
                self.backend = connect(config, tokenizer)
            except Exception as error:
                problem = error
        raise_on_all(problem)
        self._probe_records = _probe_records(config.log) if mesh.world.rank == 0 else []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self._asked: Future[list[Rollout]] | None = None

    def ask(self, pairs: Sequence[PromptPair], step: int, version: str) -> None:
        """The server begins to answer; `answer` must be called before the next `ask`."""
        if self.backend is not None:
            self._asked = self._thread.submit(self._ask, pairs, self.backend, step, version)

    def answer(self) -> list[Rollout] | None:
        """This replica's rollouts, on all its ranks; None on every rank of the run where a server had other weights.

        A server that is down is waited for (`rollout.retry_s`); what it cannot recover from is raised on every rank.
        """
        rollouts: list[Rollout] = []
        problem: Exception | None = None
        has_wrong_weights = False
        if self._asked is not None:
            try:
                rollouts = self._asked.result()
            except WrongWeightVersion:
                has_wrong_weights = True
            except Exception as error:
                problem = error
        raise_on_all(problem)
        if any(gather_objects(has_wrong_weights, self._mesh.world)):
            return None
        return broadcast_object(rollouts, self._mesh.replica)

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

    def _ask(self, pairs: Sequence[PromptPair], backend: RolloutBackend, step: int, version: str) -> list[Rollout]:
        config, stops = self._config, self._tokenizer.eos_ids
        if isinstance(config.objective, Distill):
            return sample_rollouts(pairs, backend, config.rollout, stops, config.seed, step, version)
        # self-SFT learns, under the long context, what the starting model says under the short one
        swapped = [replace(pair, student_prompt=pair.teacher_prompt) for pair in pairs]
        rollouts = sample_rollouts(swapped, backend, config.rollout, stops, config.seed, step, version, greedy=True)
        originals = [pair for pair in pairs for _ in range(config.rollout.samples_per_prompt)]
        return [replace(rollout, pair=pair) for rollout, pair in zip(rollouts, originals, strict=True)]


def connect(config: RunConfig, tokenizer: Tokenizer) -> EmbeddedBackend:
    """A client of the configured server, once it is healthy and known to serve the same vocabulary.

    ConfigError without a token in the environment; ServerError where nobody answers within `rollout.retry_s`.
    """
    rollout = config.rollout
    token = os.environ.get(rollout.token_variable)
    if not token:
        raise ConfigError(
            f"environment variable {rollout.token_variable} is empty; set it to the bearer token of the inference "
            f"server at {rollout.url} (rollout.token_variable names another variable)"
        )
    backend = EmbeddedBackend(rollout.url, token, timeout_s=rollout.request_timeout_s, retry_s=rollout.retry_s)
    backend.wait_until_healthy(rollout.retry_s)
    check_same_vocabulary(
        tokenizer.fingerprint, backend.tokenizer_info()["fingerprint"], f"the server at {rollout.url}"
    )
    return backend


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
