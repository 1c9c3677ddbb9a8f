"""Divergences of two next-token distributions cut over the vocabulary, and their gradients, for one block of rows.

Notation: p student, q teacher, d = log p - log q; sums run over the real vocabulary of all tp ranks.
    reverse   D(p || q) = sum p d
    forward   D(q || p) = - sum q d
    jsd       (1 - b) D(p || m) + b D(q || m),   m = (1 - b) p + b q,   b = jsd_beta
    top k     reverse or forward over k + 1 outcomes: the k tokens that the teacher finds most likely, and all others

With s = dD/dp taken for each token (any constant may be added to it), the gradient for the student's logits is
p s - p sum(p s). For reverse s = d, for jsd s = (1 - b) log(p / m), for forward it is p - q. Over outcomes s of a token
is that of its outcome.

Where the distributions nearly agree, sum p d is small beside the rounding of the two log-sum-exps inside d, which is
of first order. sum(p d) - sum(p - q) has the same value, since p and q both sum to 1, and that error enters it in
second order only: equal logits give exactly 0, and divergences of 1e-9 nats can be told from rounding in float32.
p - q must then carry d's own rounding and is built from it: p - q = max(p, q) * sign(d) * (1 - exp(-|d|)).

The work is bound by memory: tensors as large as the logits are few, given by the caller and written in place.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opsd_megatron.config import Distill
from opsd_megatron.losses.vocabulary import VocabShard
from opsd_megatron.parallel.reduce import max_over, sum_over

_LARGEST_LOG_RATIO = 80.0  # exp of it is finite in float32

SPARE_BUFFERS = 3
"""As large as the logits: what `compare_` works in beside them."""


class Comparison(NamedTuple):
    """Student against teacher at every row, in nats, the same on every tp rank."""

    divergence: Float[Tensor, "rows"]
    """In the objective's direction."""
    reverse_kl: Float[Tensor, "rows"]
    """Over the whole vocabulary, whatever the objective."""
    entropy: Float[Tensor, "rows"]
    """Of the student."""
    student_logprob: Float[Tensor, "rows"]
    teacher_logprob: Float[Tensor, "rows"]
    """Of the targets."""


def softmax_(
    shard: VocabShard,
    logits: Sequence[Float[Tensor, "rows vocab_shard"]],
    probs: Sequence[Float[Tensor, "rows vocab_shard"]],
) -> Float[Tensor, "distributions rows"]:
    """Fills `probs` with the softmax of each of `logits`, which are shifted by their row maxima.

    Returns logarithms that turn the shifted logits to log-probabilities when subtracted. One max and one sum
    all-reduce over tp for all distributions together.
    """
    peaks = max_over(torch.stack([_row_max(one) for one in logits]), shard.tp)
    for one, peak, prob in zip(logits, peaks, probs, strict=True):
        torch.exp(one.sub_(peak[:, None]), out=prob)
    totals = sum_over(torch.stack([prob.sum(-1) for prob in probs]), shard.tp)
    for prob, total in zip(probs, totals, strict=True):
        prob.mul_(total.reciprocal()[:, None])
    return totals.log()


def compare_(
    student_logits: Float[Tensor, "rows vocab_shard"],
    teacher_logits: Float[Tensor, "rows vocab_shard"],
    spare: Sequence[Float[Tensor, "rows vocab_shard"]],
    targets: Int[Tensor, "rows"],
    shard: VocabShard,
    objective: Distill,
    with_gradient: bool,
) -> Comparison:
    """D(student || teacher) as the objective wants it, the student's entropy and both log-probs of the targets.

    With gradient, `student_logits` become dD/dlogits of each row, or d(-log p(target))/dlogits for the sampled
    estimator. Everything else that is given is overwritten: the teacher's logits and SPARE_BUFFERS like them; jsd takes
    three more for a while. Three all-reduces over tp of a few numbers per row, and three more for top k.
    """
    p, q, scratch = spare
    kind = objective.direction if objective.top_k is None else "top k"
    kind = kind if objective.estimator == "full" else "sampled"
    of_target = targets[:, None]
    log_total, teacher_log_total = softmax_(shard, (student_logits, teacher_logits), (p, q))
    # each rank's part of -sum p log p, without the term that all ranks know
    local = [-_row_dot(p, student_logits, scratch)]
    local += [shard.pick(logits, of_target)[:, 0] for logits in (student_logits, teacher_logits)]
    outcomes = _likeliest(teacher_logits, objective.top_k, shard) if objective.top_k is not None else of_target

    d = student_logits.sub_(teacher_logits).sub_((log_total - teacher_log_total)[:, None])
    p_minus_q = _difference_(p, q, d, teacher_logits, scratch)
    excess = p_minus_q.sum(-1)
    slope_mean = d.mul_(p).sum(-1) if kind == "reverse" else _row_dot(p, d, scratch)
    divergence = reverse_kl = slope_mean - excess
    if kind == "forward":
        divergence = excess - _row_dot(q, d, scratch)
    elif kind == "jsd":
        divergence, slope_mean = _jsd_(p, q, d, objective.jsd_beta, scratch)

    summed = sum_over(torch.stack([*local, divergence, reverse_kl, slope_mean]), shard.tp)
    cross, student_pick, teacher_pick, divergence, reverse_kl, slope_mean = summed
    if kind == "top k":
        divergence = _compare_outcomes_(d, p, q, outcomes, shard, objective.direction, with_gradient)
    elif with_gradient and kind == "sampled":
        negative_logprob_gradient_(student_logits, p, targets, shard)
    elif with_gradient and kind == "forward":
        student_logits.copy_(p_minus_q)
    elif with_gradient:
        student_logits.addcmul_(p, slope_mean[:, None], value=-1)
    return Comparison(
        divergence, reverse_kl, cross + log_total, student_pick - log_total, teacher_pick - teacher_log_total
    )


def negative_logprob_gradient_(
    gradient: Float[Tensor, "rows vocab_shard"],
    probs: Float[Tensor, "rows vocab_shard"],
    targets: Int[Tensor, "rows"],
    shard: VocabShard,
) -> None:
    """Makes `gradient` d(-log p(target))/dlogits = p - onehot(target)."""
    gradient.copy_(probs)
    shard.add_(gradient, targets[:, None], gradient.new_full((len(targets), 1), -1.0))


def _row_max(values: Tensor) -> Tensor:
    return values.amax(-1) if values.shape[-1] else values.new_full(values.shape[:-1], -math.inf)


def _row_dot(first: Tensor, second: Tensor, scratch: Tensor) -> Tensor:
    # not a batched matrix product: that one may run in TF32
    return torch.mul(first, second, out=scratch).sum(-1)


def _difference_(p: Tensor, q: Tensor, d: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    """p - q, consistent with the rounding of d."""
    shrinkage = torch.copysign(d, -1.0, out=scratch).expm1_().copysign_(d)  # sign(d) * (1 - exp(-|d|))
    return torch.maximum(p, q, out=out).mul_(shrinkage)


def _jsd_(p: Tensor, q: Tensor, d: Tensor, beta: float, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of the JSD and of sum p dD/dp; d becomes p dD/dp."""
    # not log(p / m) - d: where p is far below q that difference of large numbers is all that counts
    to_teacher = _row_dot(q, _log_ratio_to_mixture(d.neg(), 1 - beta), scratch)
    weighted_slope = torch.mul(_log_ratio_to_mixture(d, beta), p, out=d).mul_(1 - beta)
    slope_mean = weighted_slope.sum(-1)
    return slope_mean + beta * to_teacher, slope_mean


def _log_ratio_to_mixture(d: Tensor, beta: float) -> Tensor:
    """log(p / m) = -log(1 - b + b exp(-d)), which is linear in d where exp(-d) would overflow."""
    clamped = d.clamp(min=-_LARGEST_LOG_RATIO)
    rest = d - clamped
    return rest.sub_(clamped.neg_().expm1_().mul_(beta).log1p_())


def _likeliest(logits: Tensor, count: int, shard: VocabShard) -> Tensor:
    """[rows, count]: the tokens with the largest logits of all tp ranks, the same and in the same order on each."""
    if count >= shard.vocab_size:
        raise ValueError(
            f"objective.top_k={count} leaves nothing of a vocabulary of {shard.vocab_size} tokens to the rest; lower it"
        )
    values, tokens = logits.topk(min(count, shard.width))
    tokens = tokens + shard.start
    if shard.tp.size == 1:
        return tokens
    # every rank fills its own slots, so that the sum over ranks is all of them one after the other
    slots = logits.new_full((shard.tp.size, len(logits), count), 0.0)
    slots[shard.tp.rank] = -math.inf
    slots[shard.tp.rank, :, : values.shape[1]] = values
    named = tokens.new_zeros(slots.shape)
    named[shard.tp.rank, :, : values.shape[1]] = tokens
    slots, named = (sum_over(one, shard.tp).transpose(0, 1).flatten(1) for one in (slots, named))
    return named.gather(1, slots.topk(count).indices)


def _compare_outcomes_(
    d: Tensor, p: Tensor, q: Tensor, tokens: Tensor, shard: VocabShard, direction: str, with_gradient: bool
) -> Tensor:
    """The divergence over `tokens` [rows, k] and everything else as one outcome; d becomes its gradient."""
    picked = torch.stack([shard.pick(one, tokens) for one in (p, q, d)])
    for rest, own in zip((p, q), picked, strict=False):
        shard.add_(rest, tokens, -own)  # p - p is exactly 0
    tails = torch.stack([p.sum(-1), q.sum(-1), d.new_zeros(len(d))])
    p_out, q_out, d_out = sum_over(torch.cat([picked, tails[..., None]], -1), shard.tp)
    least = torch.finfo(p.dtype).tiny  # of a tail: what lies below is lost to underflow already
    p_tail, q_tail = p_out[:, -1].clamp(min=least), q_out[:, -1].clamp(min=least)
    d_out[:, -1] = (p_tail / q_tail).log()
    difference = _difference_(p_out, q_out, d_out, torch.empty_like(d_out), torch.empty_like(d_out))
    if direction == "reverse":
        slope_mean = (p_out * d_out).sum(-1)
        divergence = slope_mean - difference.sum(-1)
        gradient = p_out * (d_out - slope_mean[:, None])
    else:
        divergence = difference.sum(-1) - (q_out * d_out).sum(-1)
        gradient = difference
    if with_gradient:
        torch.mul(p, (gradient[:, -1] / p_tail)[:, None], out=d)  # the tail's gradient falls to its tokens by p
        shard.add_(d, tokens, gradient[:, :-1])
    return divergence
