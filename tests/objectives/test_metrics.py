"""Metric sums: what they add up to, over ranks too, and the metrics of rollouts."""

import pytest
import torch
import torch.distributed as dist

from opsd_megatron.objectives.metrics import (
    add_metrics,
    effective_share_of,
    finish_metrics,
    max_of,
    mean_of,
    reduce_metrics,
    rollout_metrics,
)
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.types import PromptPair, Rollout, Turn, VersionSpan
from tests.ranks import run_on_ranks

VALUES = torch.tensor([3.0, -1.0, 4.0, 1.5, -9.0, 2.5])
AMONG = torch.tensor([True, True, False, True, True, True])


def sums_of(rows: slice):
    values, among = VALUES[rows], AMONG[rows]
    return {
        **mean_of("a/mean", values, among),
        **max_of("a/max", values, among),
        **mean_of("a/negative_share", values < 0, among),
        **effective_share_of("a/effective_share", values.exp(), among),
    }


def expected() -> dict[str, float]:
    kept = VALUES[AMONG].double()
    weight = VALUES.exp()[AMONG].double()
    return {
        "a/mean": kept.mean().item(),
        "a/max": 3.0,
        "a/negative_share": 0.4,
        "a/effective_share": (weight.sum() ** 2 / (5 * (weight**2).sum())).item(),
    }


def test_sums_finish_as_means_maxima_and_shares():
    assert finish_metrics(sums_of(slice(None))) == pytest.approx(expected(), rel=1e-12)


def test_metrics_of_nothing_are_left_out_instead_of_being_nan():
    assert finish_metrics(sums_of(slice(2, 3))) == finish_metrics(sums_of(slice(0, 0))) == {}


def test_a_key_that_only_one_side_has_survives_the_addition():
    only = mean_of("b/mean", torch.ones(2), torch.ones(2, dtype=torch.bool))
    assert finish_metrics(add_metrics(sums_of(slice(None)), only)) == pytest.approx(expected() | {"b/mean": 1.0})


def reduced_on_rank() -> dict[str, float]:
    axis = Axis.of_group("dp", dist.group.WORLD)
    rows = [slice(0, 2), slice(2, 3), slice(3, 3), slice(3, 6)][axis.rank]
    return finish_metrics(reduce_metrics(sums_of(rows), axis))


def test_reducing_over_ranks_gives_every_rank_the_metrics_of_all_rows():
    for metrics in run_on_ranks(4, reduced_on_rank):
        assert metrics == pytest.approx(expected(), rel=1e-12)


def rollout(token_ids: tuple[int, ...], finish_reason, dropped_tokens: int = 0) -> Rollout:
    count = len(token_ids)
    return Rollout(
        pair=PromptPair("r", (1, 2), (2,), dropped_tokens),
        sample=0,
        token_ids=token_ids,
        logprobs=(-1.0,) * count,
        logprob_kind="processed",
        loss_mask=(True,) * count,
        finish_reason=finish_reason,
        version_spans=(VersionSpan("0", 0, count),),
        turns=(Turn("model", 0, count),),
        server_id="s",
    )


def test_rollout_metrics_count_lengths_truncations_and_end_tokens():
    rollouts = [
        rollout((5, 6, 2), "stop"),
        rollout((5, 6, 7, 8), "length", dropped_tokens=12),
        rollout((3,), "stop"),
        rollout((2, 9), "abort"),
    ]
    assert finish_metrics(rollout_metrics(rollouts, {2, 3})) == {
        "rollout/response_tokens_mean": 2.5,
        "rollout/response_tokens_max": 4.0,
        "rollout/truncated_share": 0.25,
        "rollout/aborted_share": 0.25,
        "rollout/end_token_share": 0.5,
        "rollout/dropped_context_tokens_mean": 3.0,
    }
    assert finish_metrics(rollout_metrics([], {2})) == {}
