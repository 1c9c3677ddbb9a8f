"""Factors of the loss for tokens that other log-probs sampled than the trainer's, without gradient.

d = log p_train(token) - log p_rollout(token), of a response's tokens that have a weight. A token's ratio is exp(d), a
response's is exp of the mean or of the sum of its d. Truncated importance sampling: min(ratio, cap). Masks: the ratio
inside of bounds, 0 outside (IcePop).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opsd_megatron.config import Correction, NoCorrection, SequenceMask, SequenceTis, TokenMask, TokenTis
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.reduce import max_over, sum_over


def token_factors(
    correction: Correction, log_ratios: Float[Tensor, "rows"], weights: Float[Tensor, "rows"]
) -> Float[Tensor, "rows"]:
    """Of NoCorrection, TokenTis or TokenMask; 1 at weight 0: a token that nobody sampled may have any log-prob."""
    if isinstance(correction, NoCorrection):
        return torch.ones_like(log_ratios)
    return torch.where(weights == 0, 1, _bounded(correction, log_ratios))


def sequence_factors(
    correction: SequenceTis | SequenceMask,
    log_ratios: Float[Tensor, "rows"],
    weights: Float[Tensor, "rows"],
    rollout: Int[Tensor, "rows"],
    cp: Axis,
) -> Float[Tensor, "rows"]:
    """Of SequenceTis or SequenceMask, for rows of the rollouts with the numbers `rollout`; 1 at weight 0.

    Collective over cp, among whose ranks all rows of each response must be; every rank calls it, with rows or without.
    """
    last = rollout.max() if rollout.numel() else rollout.new_tensor(-1)
    totals = log_ratios.new_zeros(2, int(max_over(last, cp)) + 1, dtype=torch.float64)
    counted = weights > 0
    totals[0].index_add_(0, rollout, torch.where(counted, log_ratios, 0).double())
    totals[1].index_add_(0, rollout, counted.double())
    log_ratio, count = sum_over(totals, cp)
    if correction.over == "mean":
        log_ratio = log_ratio / count.clamp(min=1)
    factors = _bounded(correction, log_ratio)[rollout].to(log_ratios.dtype)
    return torch.where(weights == 0, 1, factors)


def _bounded(correction: Correction, log_ratios: Tensor) -> Tensor:
    ratio = log_ratios.exp()
    if isinstance(correction, TokenTis | SequenceTis):
        return ratio.clamp(max=correction.cap)
    assert isinstance(correction, TokenMask | SequenceMask)
    return torch.where((ratio >= correction.low) & (ratio <= correction.high), ratio, 0)


def clipped(correction: Correction, factors: Float[Tensor, "rows"]) -> Tensor:
    """[rows] of truths: where a cap or a bound took something away."""
    if isinstance(correction, TokenTis | SequenceTis):
        return factors >= correction.cap
    return factors == 0
