"""Losses from hidden states: LM head and divergence together, vocabulary-parallel, in chunks of rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opsd_megatron.config import Distill
from opsd_megatron.losses.block import row_cross, stage
from opsd_megatron.losses.chunked import ChunkedPass, Distribution, gradient_dtype, run_chunks
from opsd_megatron.losses.correction import token_factors
from opsd_megatron.losses.divergence import Comparison, compare, negative_logprob_gradient, scale_of
from opsd_megatron.losses.vocabulary import VocabShard
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.reduce import sum_over


@dataclass(frozen=True)
class HeadResult:
    """A distillation loss and what each row gave to it: detached, in nats, float32 (float64 in float64)."""

    loss_sum: Float[Tensor, ""]
    """Differentiable for hidden states and head of the student; equal on every tp rank."""
    divergence: Float[Tensor, "rows"]
    """Exact divergence in the objective's direction, over its outcomes."""
    reverse_kl: Float[Tensor, "rows"]
    """Exact D(student || teacher) over the vocabulary, whatever the loss."""
    student_logprob: Float[Tensor, "rows"]
    teacher_logprob: Float[Tensor, "rows"]
    """Of the response tokens."""
    advantage: Float[Tensor, "rows"]
    """Teacher's minus student's log-prob of the response token (OPSDL Eq. 2)."""
    entropy: Float[Tensor, "rows"]
    """Of the student's distribution."""
    importance: Float[Tensor, "rows"]
    """Factor by which the objective's correction weighs each row; 1 at weight 0."""


@dataclass(frozen=True)
class CrossEntropyResult:
    """A cross-entropy and, for every row, detached log-prob of the target and entropy, in nats."""

    loss_sum: Float[Tensor, ""]
    logprob: Float[Tensor, "rows"]
    entropy: Float[Tensor, "rows"]


def distill_head(
    student_hidden: Float[Tensor, "rows hidden"],
    student_weight: Float[Tensor, "vocab_shard hidden"],
    teacher_hidden: Float[Tensor, "rows teacher_hidden"],
    teacher_weight: Float[Tensor, "teacher_vocab_shard teacher_hidden"],
    targets: Int[Tensor, "rows"],
    weights: Float[Tensor, "rows"],
    behaviour_logprobs: Float[Tensor, "rows"],
    *,
    objective: Distill,
    temperature: float,
    tp: Axis,
    vocab_size: int,
    factors: Float[Tensor, "rows"] | None = None,
) -> HeadResult:
    """Sum over rows of weight times the distillation loss, from hidden states after the final norm.

    full: sg(r) times the exact divergence, or that over `top_k` outcomes and the rest. sampled (OPSDL Eq. 3 and 4):
    -sg(r A) log p(y) with A = log q(y) - log p(y). r is `factors`, or, None, what the objective's correction by tokens
    makes of p(y) / behaviour(y). `temperature`, the rollouts', is that of both distributions where the objective
    has none of its own.

    The `vocab_size` tokens that both models know are columns of both heads; columns beyond are padding and never
    computed. Weights are this rank's shards; the student's says which tokens are on a rank, and the teacher's must
    begin at the same token and may hold more or fewer rows of padding. Hidden states are equal on all tp ranks, and so
    is the gradient that they get back. No rows: a connected loss of 0 with zero gradients. `run_chunks` says where the
    head's gradient goes.
    """
    shard = VocabShard.of(student_weight.shape[0], vocab_size, tp)
    _check_targets(targets, vocab_size)
    _check_teacher(teacher_weight, shard)
    exact = gradient_dtype(student_hidden)
    weights, behaviour_logprobs = weights.to(exact), behaviour_logprobs.to(exact)
    student_temperature = objective.student_temperature or temperature
    teacher_temperature = objective.teacher_temperature or temperature
    teacher = Distribution(teacher_hidden.detach(), teacher_weight.detach()[: shard.width], teacher_temperature)

    compiled = objective.is_compiled(student_hidden.is_cuda)

    def score(rows: slice, logits: Sequence[Tensor], with_gradient: bool) -> Tensor:
        student_logits, teacher_logits = logits
        compared, write_gradient = compare(student_logits, teacher_logits, targets[rows], shard, objective, compiled)
        given = None if factors is None else factors[rows]
        values, factor = _weigh(compared, objective, weights[rows], behaviour_logprobs[rows], given)
        if with_gradient:
            write_gradient(factor / student_temperature)
        return values

    plan = ChunkedPass(score, 8, (teacher,), shard, student_temperature, objective.chunk_tokens, compiled)
    loss_sum, values = run_chunks(student_hidden, student_weight, plan)
    _, divergence, reverse_kl, entropy, student_logprob, teacher_logprob, advantage, importance = values
    return HeadResult(
        loss_sum, divergence, reverse_kl, student_logprob, teacher_logprob, advantage, entropy, importance
    )


def _weigh(
    compared: Comparison, objective: Distill, weights: Tensor, behaviour_logprobs: Tensor, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Quantities of each row with its loss first, and the factor of its gradient."""
    advantage = compared.teacher_logprob - compared.student_logprob
    importance = given
    if importance is None:
        log_ratio = compared.student_logprob - behaviour_logprobs
        importance = token_factors(objective.used_correction, log_ratio, weights)
    if objective.estimator == "full":
        scale = weights * importance
        loss = scale * compared.divergence
    else:
        scale = weights * importance * advantage
        loss = -scale * compared.student_logprob
    return torch.stack([loss, *compared, advantage, importance]), scale


def cross_entropy_head(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab_shard hidden"],
    targets: Int[Tensor, "rows"],
    weights: Float[Tensor, "rows"],
    *,
    temperature: float,
    tp: Axis,
    vocab_size: int,
    chunk_tokens: int,
) -> CrossEntropyResult:
    """Sum over rows of -weight log p(target); conventions as in `distill_head`."""
    shard = VocabShard.of(weight.shape[0], vocab_size, tp)
    _check_targets(targets, vocab_size)
    weights = weights.to(gradient_dtype(hidden))

    compiled = hidden.is_cuda

    def score(rows: slice, logits: Sequence[Tensor], with_gradient: bool) -> Tensor:
        scale = scale_of(shard, compiled, *logits)
        cross = stage(row_cross, compiled, shard.width)(*scale, *logits)
        picked = shard.pick(logits[0], targets[rows, None])[:, 0]
        cross, picked = sum_over(torch.stack([cross, picked]), tp)
        logprob = scale.logprobs(picked)[0]
        if with_gradient:
            write_gradient = negative_logprob_gradient(logits[0], scale, targets[rows], shard, compiled)
            write_gradient(weights[rows] / temperature)
        return torch.stack([-weights[rows] * logprob, logprob, cross + scale.totals[0].log()])

    plan = ChunkedPass(score, 3, (), shard, temperature, chunk_tokens, compiled)
    loss_sum, values = run_chunks(hidden, weight, plan)
    return CrossEntropyResult(loss_sum, values[1], values[2])


@torch.no_grad()
def logprob_head(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab_shard hidden"],
    targets: Int[Tensor, "rows"],
    *,
    temperature: float,
    tp: Axis,
    vocab_size: int,
    chunk_tokens: int,
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """Log-prob of each target and entropy of each row, in nats, without gradient."""
    unweighted = hidden.new_ones(hidden.shape[0])
    result = cross_entropy_head(
        hidden,
        weight,
        targets,
        unweighted,
        temperature=temperature,
        tp=tp,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
    )
    return result.logprob, result.entropy


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    if targets.numel() and not bool(((targets >= 0) & (targets < vocab_size)).all()):
        raise ValueError(
            f"response token ids from {int(targets.min())} to {int(targets.max())} do not fit vocab_size {vocab_size}; "
            f"student, teacher and rollout server must use the same tokenizer"
        )


def _check_teacher(weight: Tensor, shard: VocabShard) -> None:
    if weight.shape[0] < shard.width:
        raise ValueError(
            f"the teacher's LM head has {weight.shape[0]} rows on this rank, the student's tokens here are "
            f"{shard.start} to {shard.start + shard.width - 1}: cut the teacher's head at the student's tokens, so "
            f"that a row is the same token"
        )
