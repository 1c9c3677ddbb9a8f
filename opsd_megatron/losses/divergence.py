"""Divergences of two next-token distributions cut over the vocabulary, and their gradients, for one chunk of rows.

Notation: p student, q teacher, d = log p - log q; sums run over the real vocabulary of all tp ranks.
    reverse   D(p || q) = sum p d
    forward   D(q || p) = - sum q d
    jsd       (1 - b) D(p || m) + b D(q || m),   m = (1 - b) p + b q,   b = jsd_beta

With s = dD/dp taken for each token (any constant may be added to it), the gradient for the student's logits is
p s - p sum(p s). For reverse s = d, for jsd s = (1 - b) log(p / m), for forward p s = p - q as it stands.

Where the distributions nearly agree, sum p d is small beside the rounding of the two log-sum-exps inside d, which is
of first order. sum(p d) - sum(p - q) has the same value, since p and q both sum to 1, and that error enters it in
second order only: equal logits give exactly 0, and divergences of 1e-9 nats can be told from rounding in float32.
p - q must then carry d's own rounding and is built from it: p - q = max(p, q) * sign(d) * (1 - exp(-|d|)).

Functions whose name ends in an underscore overwrite the logits given to them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.reduce import max_over, sum_over

_LARGEST_LOG_RATIO = 80.0  # exp of it is finite in float32


@dataclass(frozen=True)
class VocabShard:
    """The columns [start, start + width) of the vocabulary on this tp rank, padding left out; width may be 0."""

    start: int
    width: int
    tp: Axis

    @classmethod
    def of(cls, held: int, vocab_size: int, tp: Axis) -> "VocabShard":
        """Of a rank that holds `held` rows of the LM head, when the first `vocab_size` of all are real.

        Raises ValueError when the ranks together hold fewer than `vocab_size`.
        """
        if held * tp.size < vocab_size:
            raise ValueError(
                f"the LM head holds {held} rows on each of {tp.size} tp ranks, fewer than vocab_size {vocab_size}; "
                f"give this rank's shard of the head and the vocabulary size of the same model"
            )
        start = tp.rank * held
        return cls(start, max(0, min(held, vocab_size - start)), tp)


class Comparison(NamedTuple):
    """Student against teacher at every row. The first five are sums over tp, in nats; the rest is for the gradient."""

    divergence: Float[Tensor, "rows"]
    reverse_kl: Float[Tensor, "rows"]
    entropy: Float[Tensor, "rows"]
    student_logprob: Float[Tensor, "rows"]
    teacher_logprob: Float[Tensor, "rows"]
    probs: Float[Tensor, "rows vocab_shard"]
    """p."""
    weighted_slope: Float[Tensor, "rows vocab_shard"] | None
    """p dD/dp, if asked for."""
    slope_mean: Float[Tensor, "rows"]
    """Its sum over the vocabulary."""


def log_softmax_(
    shard: VocabShard, scratch: Float[Tensor, "rows vocab_shard"], *logits: Float[Tensor, "rows vocab_shard"]
) -> None:
    """Makes logits log-probabilities: one max and one sum all-reduce over tp for all the tensors together."""
    peaks = max_over(torch.stack([_row_max(one) for one in logits]), shard.tp)
    shifted = [one.sub_(peak[:, None]) for one, peak in zip(logits, peaks, strict=True)]
    totals = torch.stack([torch.exp(one, out=scratch).sum(-1) for one in shifted])
    for one, total in zip(logits, sum_over(totals, shard.tp), strict=True):
        one.sub_(total.log()[:, None])


def compare_(
    student_logits: Float[Tensor, "rows vocab_shard"],
    teacher_logits: Float[Tensor, "rows vocab_shard"],
    spare: Sequence[Float[Tensor, "rows vocab_shard"]],
    targets: Int[Tensor, "rows"],
    shard: VocabShard,
    direction: Literal["reverse", "forward", "jsd"],
    jsd_beta: float,
    with_slope: bool,
) -> Comparison:
    """D(student || teacher) in the given direction, the entropy of the student and both log-probs of the targets.

    Three all-reduces over tp of a few numbers per row. It works in place of the logits and of two `spare` tensors, on
    which the result keeps standing; jsd takes three more for a while.
    """
    p, scratch = spare
    log_softmax_(shard, scratch, student_logits, teacher_logits)
    log_p, log_q = student_logits, teacher_logits
    torch.exp(log_p, out=p)
    student_logprob, teacher_logprob = pick_local(log_p, targets, shard), pick_local(log_q, targets, shard)
    entropy = -_row_dot(p, log_p, scratch)

    d, q = log_p.sub_(log_q), log_q.exp_()
    q_dot_d = _row_dot(q, d, scratch) if direction == "forward" else 0
    to_mixture = _mixture_terms(p, q, d, jsd_beta, scratch) if direction == "jsd" else None
    p_minus_q = _difference_(p, q, d, scratch)
    excess = p_minus_q.sum(-1)
    weighted_slope = torch.mul(p, d, out=scratch)
    divergence = reverse_kl = weighted_slope.sum(-1) - excess
    if direction == "forward":
        divergence, weighted_slope = excess - q_dot_d, p_minus_q
    elif to_mixture is not None:
        divergence, weighted_slope = to_mixture

    slope_mean = weighted_slope.sum(-1) if with_slope else torch.zeros_like(entropy)
    local = torch.stack([divergence, reverse_kl, entropy, student_logprob, teacher_logprob, slope_mean])
    *in_nats, slope_mean = sum_over(local, shard.tp).unbind()
    return Comparison(*in_nats, probs=p, weighted_slope=weighted_slope if with_slope else None, slope_mean=slope_mean)


def pick_local(
    values: Float[Tensor, "rows vocab_shard"], targets: Int[Tensor, "rows"], shard: VocabShard
) -> Float[Tensor, "rows"]:
    """The value in each row's target column, 0 where another tp rank holds that column: sum over tp."""
    if not shard.width:
        return values.new_zeros(values.shape[0])
    column, here = _local_column(targets, shard)
    return torch.where(here, values.gather(1, column[:, None])[:, 0], 0)


def divergence_gradient_(comparison: Comparison) -> Float[Tensor, "rows vocab_shard"]:
    """dD/dlogits of each row."""
    assert comparison.weighted_slope is not None
    return comparison.weighted_slope.addcmul_(comparison.probs, comparison.slope_mean[:, None], value=-1)


def negative_logprob_gradient_(
    probs: Float[Tensor, "rows vocab_shard"], targets: Int[Tensor, "rows"], shard: VocabShard
) -> Float[Tensor, "rows vocab_shard"]:
    """d(-log p(target))/dlogits = p - onehot(target) of each row, in place of p."""
    if shard.width:
        column, here = _local_column(targets, shard)
        probs.scatter_add_(1, column[:, None], -here.to(probs.dtype)[:, None])
    return probs


def _row_max(values: Tensor) -> Tensor:
    return values.amax(-1) if values.shape[-1] else values.new_full(values.shape[:-1], -math.inf)


def _row_dot(first: Tensor, second: Tensor, scratch: Tensor) -> Tensor:
    # not a batched matrix product: that one may run in TF32
    return torch.mul(first, second, out=scratch).sum(-1)


def _difference_(p: Tensor, q: Tensor, d: Tensor, scratch: Tensor) -> Tensor:
    """p - q, consistent with the rounding of d; overwrites q."""
    shrinkage = torch.abs(d, out=scratch).neg_().expm1_().copysign_(d)  # sign(d) * (1 - exp(-|d|))
    return torch.maximum(p, q, out=q).mul_(shrinkage)


def _mixture_terms(p: Tensor, q: Tensor, d: Tensor, beta: float, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of the JSD, and p dD/dp."""
    # not log(p / m) - d: where p is far below q that difference of large numbers is all that counts
    log_q_over_m = _log_ratio_to_mixture(d.neg(), 1 - beta)
    to_teacher = _row_dot(q, log_q_over_m, scratch)
    del log_q_over_m
    log_p_over_m = _log_ratio_to_mixture(d, beta)
    jsd = (1 - beta) * _row_dot(p, log_p_over_m, scratch) + beta * to_teacher
    return jsd, log_p_over_m.mul_(p).mul_(1 - beta)


def _log_ratio_to_mixture(d: Tensor, beta: float) -> Tensor:
    """log(p / m) = -log(1 - b + b exp(-d)), which is linear in d where exp(-d) would overflow."""
    clamped = d.clamp(min=-_LARGEST_LOG_RATIO)
    rest = d - clamped
    return rest.sub_(clamped.neg_().expm1_().mul_(beta).log1p_())


def _local_column(targets: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    column = targets - shard.start
    return column.clamp(0, shard.width - 1), (column >= 0) & (column < shard.width)
