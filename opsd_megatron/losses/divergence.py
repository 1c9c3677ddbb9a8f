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

All of it is bound by memory: what lies between two reductions is one function of `losses.block`, compiled on request.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opsd_megatron.config import Distill
from opsd_megatron.losses import block
from opsd_megatron.losses.block import stage
from opsd_megatron.losses.vocabulary import VocabShard
from opsd_megatron.parallel.reduce import max_over, sum_over

WriteGradient = Callable[[Float[Tensor, "rows"]], object]
"""Turns the student's logits to their gradient, multiplied by a factor for each row."""


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


class Scale(NamedTuple):
    """What makes logits probabilities: [distributions, rows] each, over all tp ranks."""

    peaks: Tensor
    totals: Tensor

    def logprobs(self, picked: Tensor) -> Tensor:
        """Log-probs of picked logits, [distributions, rows] too."""
        return picked - self.peaks - self.totals.log()


def scale_of(shard: VocabShard, compiled: bool, *logits: Float[Tensor, "rows vocab_shard"]) -> Scale:
    """One max and one sum all-reduce over tp for all distributions together."""
    peaks = max_over(stage(block.row_peaks, compiled, shard.width)(*logits), shard.tp)
    return Scale(peaks, sum_over(stage(block.row_totals, compiled, shard.width)(peaks, *logits), shard.tp))


def compare(
    student_logits: Float[Tensor, "rows vocab_shard"],
    teacher_logits: Float[Tensor, "rows vocab_shard"],
    targets: Int[Tensor, "rows"],
    shard: VocabShard,
    objective: Distill,
    compiled: bool = False,
) -> tuple[Comparison, WriteGradient]:
    """D(student || teacher) as the objective wants it, the student's entropy and both log-probs of the targets.

    The second result makes `student_logits` factor * dD/dlogits of each row, or factor * d(-log p(target))/dlogits for
    the sampled estimator. Three all-reduces over tp of a few numbers per row, and three more for top k.
    """
    logits = student_logits, teacher_logits
    scale = scale_of(shard, compiled, *logits)
    kind, beta = objective.direction, objective.jsd_beta
    sums = stage(block.row_sums, compiled, shard.width)(kind, beta, *scale, *logits)
    picked = [shard.pick(one, targets[:, None])[:, 0] for one in logits]
    summed = sum_over(torch.stack([*sums, *picked]), shard.tp)
    cross, divergence, reverse_kl, slope_mean = summed[:4]

    if objective.estimator == "sampled":
        write = negative_logprob_gradient(student_logits, scale, targets, shard, compiled)
    elif objective.top_k is not None:
        divergence, write = _compare_outcomes(*logits, scale, shard, objective)
    else:
        of_rows = stage(block.logits_to_gradient, compiled, shard.width)
        write = partial(of_rows, kind, beta, *scale, slope_mean, *logits)
    logprobs = scale.logprobs(summed[4:])
    return Comparison(divergence, reverse_kl, cross + scale.totals[0].log(), *logprobs), write


def negative_logprob_gradient(
    logits: Float[Tensor, "rows vocab_shard"],
    scale: Scale,
    targets: Int[Tensor, "rows"],
    shard: VocabShard,
    compiled: bool,
) -> WriteGradient:
    """d(-log p(target))/dlogits = p - onehot(target)."""

    def write_gradient(factor: Tensor) -> None:
        stage(block.logits_to_probs, compiled, shard.width)(*scale, factor, logits)
        shard.add_(logits, targets[:, None], -factor[:, None])

    return write_gradient


def _compare_outcomes(
    student: Tensor, teacher: Tensor, scale: Scale, shard: VocabShard, objective: Distill
) -> tuple[Tensor, WriteGradient]:
    """Divergence and gradient over `top_k` tokens and everything else as one outcome; eager."""
    tokens = _likeliest(teacher, objective.top_k, shard)  # type: ignore[arg-type]
    (p, _), (q, _) = (block.softmax(*of_one) for of_one in zip((student, teacher), *scale, strict=True))
    picked = [shard.pick(one, tokens) for one in (p, q, block.log_ratio(*scale, student, teacher))]
    for rest, own in zip((p, q), picked, strict=False):
        shard.add_(rest, tokens, -own)  # p - p is exactly 0
    tails = torch.stack([p.sum(-1), q.sum(-1), p.new_zeros(len(p))])
    p_out, q_out, d_out = sum_over(torch.cat([torch.stack(picked), tails[..., None]], -1), shard.tp)
    least = torch.finfo(p.dtype).tiny  # of a tail: what lies below is lost to underflow already
    p_tail, q_tail = p_out[:, -1].clamp(min=least), q_out[:, -1].clamp(min=least)
    d_out[:, -1] = (p_tail / q_tail).log()
    difference = block.difference(p_out, q_out, d_out)
    if objective.direction == "reverse":
        slope_mean = (p_out * d_out).sum(-1)
        divergence = slope_mean - difference.sum(-1)
        gradient = p_out * (d_out - slope_mean[:, None])
    else:
        divergence = difference.sum(-1) - (q_out * d_out).sum(-1)
        gradient = difference

    def write_gradient(factor: Tensor) -> None:
        # the tail's gradient falls to its tokens by p
        torch.mul(p, (factor * gradient[:, -1] / p_tail)[:, None], out=student)
        shard.add_(student, tokens, factor[:, None] * gradient[:, :-1])

    return divergence, write_gradient


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
