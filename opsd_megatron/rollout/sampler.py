"""Rollouts of a step: prompts to the server, checked responses back, in the order of the prompts."""

from collections import Counter
from collections.abc import Collection, Sequence

from opsd_megatron.config import RolloutConfig
from opsd_megatron.rollout.backend import (
    GenerateRequest,
    GenerateResult,
    MalformedReply,
    RolloutBackend,
    Sample,
    ServerRefused,
    WrongWeightVersion,
)
from opsd_megatron.rollout.partial import Unfinished, mask_stale, seed_of, staleness
from opsd_megatron.types import PromptPair, Rollout, Turn


def sample_rollouts(
    pairs: Sequence[PromptPair],
    backend: RolloutBackend,
    config: RolloutConfig,
    stop_token_ids: Collection[int],
    seed: int,
    step: int,
    weight_version: str | None,
    greedy: bool = False,
) -> list[Rollout]:
    """`config.samples_per_prompt` responses per pair under its student prompt, in the order of pairs, then of samples.

    A response that was aborted is finished as `config.on_abort` says. Tokens of weights that lag more than
    `config.max_staleness` steps behind `weight_version` carry no loss; a response of nothing else, or with tokens of
    unrelated weights, is WrongWeightVersion (`weight_version` None: any weights will do). With `config.seeded` the
    server must honour seeds. `greedy` takes the likeliest tokens instead of sampling.
    """
    if config.seeded and not backend.info().seeded:
        raise ServerRefused(
            "rollout.seeded=True needs a server that honours seeds; start it with --engine exact or set seeded=False"
        )
    temperature = 0.0 if greedy else config.temperature
    requests = _requests(pairs, config, stop_token_ids, seed, step, temperature)
    results = _complete(requests, backend, config)
    rollouts = [
        _rollout(pair, number, sample, result.server_id)
        for pair, result in zip(pairs, results, strict=True)
        for number, sample in enumerate(result.samples)
    ]
    if weight_version is not None:
        _require_version(rollouts, weight_version, config.max_staleness)
        rollouts = [mask_stale(rollout, weight_version, config.max_staleness) for rollout in rollouts]
    return rollouts


def sample_seed(seed: int, step: int, record_id: str, occurrence: int = 0) -> int:
    """Seed of a prompt's first sample, in [0, 2**62); sample i adds i."""
    return seed_of(f"{seed}/{step}/{record_id}/{occurrence}")


def _requests(
    pairs: Sequence[PromptPair],
    config: RolloutConfig,
    stop_token_ids: Collection[int],
    seed: int,
    step: int,
    temperature: float,
) -> list[GenerateRequest]:
    """One per pair; a record that occurs again gets other seeds."""
    occurrences: Counter[str] = Counter()
    requests = []
    for number, pair in enumerate(pairs):
        occurrence = occurrences[pair.record_id]
        occurrences[pair.record_id] += 1
        requests.append(
            GenerateRequest(
                request_id=f"step{step}-{number}-{pair.record_id}"[:200],
                token_ids=pair.student_prompt,
                n=config.samples_per_prompt,
                max_tokens=config.max_response_tokens,
                temperature=temperature,
                seed=sample_seed(seed, step, pair.record_id, occurrence),
                stop_token_ids=sorted(stop_token_ids),
            )
        )
    return requests


def _complete(
    requests: Sequence[GenerateRequest], backend: RolloutBackend, config: RolloutConfig
) -> list[GenerateResult]:
    """Results of which no sample was aborted."""
    works = [Unfinished(request, config.on_abort) for request in requests]
    while asked := [(work, request) for work in works for request in work.open_requests()]:
        for (work, request), result in zip(asked, backend.generate([one for _, one in asked]), strict=True):
            work.take(request, result)
    return [work.result() for work in works]


def _rollout(pair: PromptPair, number: int, sample: Sample, server_id: str) -> Rollout:
    count = len(sample.token_ids)
    if not count:
        raise MalformedReply(f"record {pair.record_id}, sample {number}: the server sent an empty response")
    return Rollout(
        pair=pair,
        sample=number,
        token_ids=sample.token_ids,
        logprobs=sample.logprobs,
        logprob_kind=sample.logprob_kind,
        loss_mask=(True,) * count,
        finish_reason=sample.finish_reason,
        version_spans=sample.version_spans,
        turns=(Turn("model", 0, count),),
        server_id=server_id,
    )


def _require_version(rollouts: Sequence[Rollout], wanted: str, max_staleness: int) -> None:
    """WrongWeightVersion for tokens of unrelated weights, and for responses that are too old as a whole."""
    wrong: Counter[str] = Counter()
    for rollout in rollouts:
        lags = [(span, staleness(span.version, wanted)) for span in rollout.version_spans]
        is_too_old = all(lag is None or lag > max_staleness for _, lag in lags)
        for span, lag in lags:
            if lag is None or is_too_old:
                wrong[span.version] += span.end - span.start
    if wrong:
        listed = ", ".join(f"{tokens} tokens from {version}" for version, tokens in sorted(wrong.items()))
        raise WrongWeightVersion(
            f"weights {wanted} were expected, but got {listed}; publish the weights again and redo the step"
        )
