"""Metrics as sums: they are added over microbatches and ranks, and become numbers once, at the end of a step.

A flat dict of 0-dim float64 tensors, whose keys are the same on every rank that computes them:
    sum/NAME and count/NAME      NAME is their quotient; left out of the result where count is 0
    square/NAME beside the two   NAME is sum^2 / (count * square): the effective share of weighted samples
    log/NAME and count/NAME      NAME is exp of their quotient: a geometric mean
    max/NAME                     NAME is the maximum, which ranks combine by max instead of by sum; -inf is "none"
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.reduce import max_over, sum_over
from opsd_megatron.types import Rollout

MetricSums = dict[str, Tensor]

LARGEST_EXPONENT = 700.0
"""exp of it is finite in float64."""
POSITION_BUCKETS = ((0, 0), (1, 3), (4, 15), (16, 63), (64, None))
"""First and last response position of each bucket; None is open."""


def mean_of(name: str, values: Tensor, among: Tensor) -> MetricSums:
    """NAME as the mean of `values` (numbers or truths) where `among` is true."""
    # selecting with where instead of an index: an index makes a GPU wait for its host
    return {f"sum/{name}": torch.where(among, values.double(), 0).sum(), f"count/{name}": among.sum().double()}


def geometric_mean_of(name: str, logs: Tensor, among: Tensor) -> MetricSums:
    """NAME as exp of the mean of `logs` where `among` is true."""
    return {f"log/{name}": torch.where(among, logs.double(), 0).sum(), f"count/{name}": among.sum().double()}


def max_of(name: str, values: Tensor, among: Tensor) -> MetricSums:
    """NAME as the largest of `values` where `among` is true."""
    kept = torch.where(among, values.double(), -math.inf)
    return {f"max/{name}": torch.cat([kept, kept.new_full((1,), -math.inf)]).max()}


def effective_share_of(name: str, weights: Tensor, among: Tensor) -> MetricSums:
    """NAME as the effective share of samples, (sum w)^2 / (n sum w^2), of importance weights where `among` is true."""
    square = torch.where(among, weights.double(), 0).square().sum()
    return mean_of(name, weights, among) | {f"square/{name}": square}


def mean_by_position(name: str, unit: str, values: Tensor, positions: Tensor, among: Tensor) -> MetricSums:
    """NAME_at_BUCKET_UNIT for each of POSITION_BUCKETS, as the mean of `values` at those response positions."""
    sums: MetricSums = {}
    for first, last in POSITION_BUCKETS:
        bucket = (positions >= first) & (positions <= (last if last is not None else positions))
        label = {None: f"{first}_up", first: f"{first}"}.get(last, f"{first}_{last}")
        sums |= mean_of(f"{name}_at_{label}_{unit}", values, among & bucket)
    return sums


def add_metrics(total: MetricSums, more: MetricSums) -> MetricSums:
    """Both together; a key that one of them lacks is taken from the other."""
    both = total | more
    for key in total.keys() & more.keys():
        both[key] = torch.maximum(total[key], more[key]) if key.startswith("max/") else total[key] + more[key]
    return both


def reduce_metrics(sums: MetricSums, axis: Axis, device: torch.device | None = None) -> MetricSums:
    """Over the ranks of an axis: one sum and one max all-reduce on `device` (NCCL needs the GPU; None: as they are).

    Every rank must bring the same keys.
    """
    reduced: MetricSums = {}
    for kind_is_max, reduce in ((False, sum_over), (True, max_over)):
        keys = sorted(key for key in sums if key.startswith("max/") == kind_is_max)
        if keys:
            stacked = torch.stack([sums[key].to(device=device) for key in keys])
            reduced |= zip(keys, reduce(stacked, axis).unbind(), strict=True)
    return reduced


def finish_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Name -> number, from the sums of the whole step."""
    totals = {key: float(value) for key, value in sums.items()}
    numbers: dict[str, float] = {}
    for key, value in totals.items():
        kind, name = key.split("/", 1)
        if kind == "max" and value > -math.inf:
            numbers[name] = value
        elif kind == "log" and (count := totals[f"count/{name}"]):
            numbers[name] = math.exp(min(value / count, LARGEST_EXPONENT))
        elif kind == "sum" and (count := totals[f"count/{name}"]):
            square = totals.get(f"square/{name}")
            numbers[name] = value / count if square is None else value**2 / (count * square)
    return numbers


def rollout_metrics(rollouts: Sequence[Rollout], end_token_ids: Collection[int]) -> MetricSums:
    """Lengths in tokens and how responses end. Reduce over ranks with different rollouts only: those of dp."""
    responses = torch.ones(len(rollouts), dtype=torch.bool)

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float64)

    lengths = column(len(one.token_ids) for one in rollouts)
    truncated = column(one.finish_reason == "length" for one in rollouts)
    aborted = column(one.finish_reason == "abort" for one in rollouts)
    ended = column(one.token_ids[-1] in end_token_ids for one in rollouts)
    dropped = column(one.pair.dropped_tokens for one in rollouts)
    return {
        **mean_of("rollout/response_tokens_mean", lengths, responses),
        **max_of("rollout/response_tokens_max", lengths, responses),
        **mean_of("rollout/truncated_share", truncated, responses),
        **mean_of("rollout/aborted_share", aborted, responses),
        **mean_of("rollout/end_token_share", ended, responses),
        **mean_of("rollout/dropped_context_tokens_mean", dropped, responses),
    }
