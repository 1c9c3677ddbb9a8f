"""Losses from hidden states: LM head and divergence together, in chunks of rows, vocabulary-parallel.

One autograd function (`_ChunkedHead`) serves every loss. It takes the gradient while it goes forward: a chunk's logits
are made, scored, turned into their own gradient and multiplied back to hidden states and weights, then forgotten, so
that peak memory is a few [chunk, vocab_shard] buffers and the gradients, whatever the number of rows. Computing the
logits again in the backward pass would cost half as many matrix products more. The backward pass multiplies by the
upstream scalar; normalisation is therefore free to be known late.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opsd_megatron.config import Distill
from opsd_megatron.losses.divergence import (
    Comparison,
    VocabShard,
    compare_,
    divergence_gradient_,
    log_softmax_,
    negative_logprob_gradient_,
    pick_local,
)
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.reduce import sum_over


@dataclass(frozen=True)
class HeadResult:
    """A distillation loss and what each row gave to it: detached, in nats, float32 (float64 in float64)."""

    loss_sum: Float[Tensor, ""]
    """Differentiable for hidden states and head of the student; equal on every tp rank."""
    divergence: Float[Tensor, "rows"]
    """Exact divergence in the objective's direction."""
    reverse_kl: Float[Tensor, "rows"]
    """Exact D(student || teacher), whatever the loss."""
    student_logprob: Float[Tensor, "rows"]
    teacher_logprob: Float[Tensor, "rows"]
    """Of the response tokens."""
    advantage: Float[Tensor, "rows"]
    """Teacher's minus student's log-prob of the response token (OPSDL Eq. 2)."""
    entropy: Float[Tensor, "rows"]
    """Of the student's distribution."""
    importance: Float[Tensor, "rows"]
    """Factor of the sampled estimator: train/rollout probability ratio, capped; 1 at weight 0 and in other losses."""


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
) -> HeadResult:
    """Sum over rows of weight times the distillation loss, from hidden states after the final norm.

    full: the exact divergence. sampled (OPSDL Eq. 3 and 4): -sg(r A) log p(y) with A = log q(y) - log p(y) and
    r = min(p(y) / behaviour(y), importance_cap). Both distributions are taken at `temperature`. Columns at or beyond
    `vocab_size` are padding and never computed. Hidden states are equal on all tp ranks, and so is the gradient that
    they get back; weights are this rank's shard. No rows: a connected loss of 0 with zero gradients.
    """
    shard = VocabShard.of(student_weight.shape[0], vocab_size, tp)
    _check_targets(targets, vocab_size)
    _check_heads(student_weight, teacher_weight)
    teacher_rows, teacher_columns = teacher_hidden.detach(), teacher_weight.detach()[: shard.width]
    exact = _gradient_dtype(student_hidden)
    weights, behaviour_logprobs = weights.to(exact), behaviour_logprobs.to(exact)
    full = objective.estimator == "full"

    def score(rows: slice, buffers: Sequence[Tensor], with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        student_logits, teacher_logits, *spare = buffers
        _project(teacher_rows[rows], teacher_columns, temperature, teacher_logits)
        direction, beta, with_slope = objective.direction, objective.jsd_beta, with_gradient and full
        compared = compare_(student_logits, teacher_logits, spare, targets[rows], shard, direction, beta, with_slope)
        values, scale = _weigh(compared, objective, weights[rows], behaviour_logprobs[rows])
        if not with_gradient:
            return values, None
        if full:
            gradient = divergence_gradient_(compared)
        else:
            gradient = negative_logprob_gradient_(compared.probs, targets[rows], shard)
        return values, gradient.mul_(scale[:, None])

    plan = _Pass(score, 8, 4, shard, temperature, objective.chunk_tokens)
    loss_sum, values = _run(student_hidden, student_weight, plan)
    _, divergence, reverse_kl, entropy, student_logprob, teacher_logprob, advantage, importance = values
    return HeadResult(
        loss_sum, divergence, reverse_kl, student_logprob, teacher_logprob, advantage, entropy, importance
    )


def _weigh(
    compared: Comparison, objective: Distill, weights: Tensor, behaviour_logprobs: Tensor
) -> tuple[Tensor, Tensor]:
    """Quantities of each row with its loss first, and the factor of its gradient."""
    advantage = compared.teacher_logprob - compared.student_logprob
    importance = torch.ones_like(advantage)
    if objective.estimator == "full":
        scale = weights
        loss = scale * compared.divergence
    else:
        if objective.importance_cap is not None:
            ratio = (compared.student_logprob - behaviour_logprobs).exp().clamp(max=objective.importance_cap)
            importance = torch.where(
                weights == 0, 1, ratio
            )  # a token that nobody sampled may have any log-prob, or NaN
        scale = weights * importance * advantage
        loss = -scale * compared.student_logprob
    return torch.stack([loss, *compared[:5], advantage, importance]), scale


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
    weights = weights.to(_gradient_dtype(hidden))

    def score(rows: slice, buffers: Sequence[Tensor], with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        logits, probs = buffers
        log_softmax_(shard, probs, logits)
        torch.exp(logits, out=probs)
        local = torch.stack([pick_local(logits, targets[rows], shard), -logits.mul_(probs).sum(-1)])
        logprob, entropy = sum_over(local, tp)
        values = torch.stack([-weights[rows] * logprob, logprob, entropy])
        if not with_gradient:
            return values, None
        gradient = negative_logprob_gradient_(probs, targets[rows], shard)
        return values, gradient.mul_(weights[rows, None])

    loss_sum, values = _run(hidden, weight, _Pass(score, 3, 2, shard, temperature, chunk_tokens))
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


_Score = Callable[[slice, Sequence[Tensor], bool], tuple[Tensor, Tensor | None]]
"""(rows, buffers, with_gradient) -> ([quantities, rows] with the loss first, its gradient for the logits).

The first buffer holds the logits of the rows; all of them may be overwritten, and the gradient may be one of them.
"""


@dataclass(frozen=True)
class _Pass:
    score: _Score
    quantities: int
    buffers: int
    """[rows of a chunk, vocab_shard] each: what the pass needs beside gradients. The same ones serve every chunk, since
    the pages of a fresh tensor cost a CPU as much as an exponential."""
    shard: VocabShard
    temperature: float
    chunk_tokens: int


def _run(hidden: Tensor, weight: Tensor, plan: _Pass) -> tuple[Tensor, Tensor]:
    return _ChunkedHead.apply(hidden, weight, plan, torch.is_grad_enabled())


class _ChunkedHead(torch.autograd.Function):
    """(hidden, weight) -> (sum of the losses, [quantities, rows] detached)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, plan: _Pass, grad_enabled: bool):
        exact = _gradient_dtype(hidden)
        columns = weight[: plan.shard.width]
        values = hidden.new_empty(plan.quantities, hidden.shape[0], dtype=exact)
        hidden_needs, weight_needs = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        hidden_gradient = torch.zeros_like(hidden, dtype=exact) if hidden_needs else None
        weight_gradient = torch.zeros_like(weight, dtype=exact) if weight_needs else None
        chunks = _chunks(hidden.shape[0], plan.chunk_tokens)
        largest = max((rows.stop - rows.start for rows in chunks), default=0)
        pool = [values.new_empty(largest, plan.shard.width) for _ in range(plan.buffers)]
        for rows in chunks:
            buffers = [buffer[: rows.stop - rows.start] for buffer in pool]
            _project(hidden[rows], columns, plan.temperature, buffers[0])
            values[:, rows], gradient = plan.score(rows, buffers, hidden_needs or weight_needs)
            if gradient is None:
                continue
            gradient = gradient.div_(plan.temperature).to(hidden.dtype)
            if hidden_gradient is not None:
                _multiply(gradient, columns, hidden_gradient[rows])
            if weight_gradient is not None:
                _add_product_(weight_gradient[: plan.shard.width], gradient.t(), hidden[rows])
        if hidden_gradient is not None:
            hidden_gradient = sum_over(hidden_gradient, plan.shard.tp)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(values)
        return values[0].sum(), values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor, _values):
        scaled = (
            None if gradient is None else (gradient * upstream).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None


def _chunks(rows: int, chunk_tokens: int) -> list[slice]:
    """As few slices as `chunk_tokens` allows, as even as can be."""
    count = -(-rows // chunk_tokens)
    return [slice(rows * number // count, rows * (number + 1) // count) for number in range(count)]


def _gradient_dtype(hidden: Tensor) -> torch.dtype:
    """Losses, reductions and gradients are kept in it."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _project(hidden: Tensor, columns: Tensor, temperature: float, logits: Tensor) -> None:
    _multiply(hidden, columns.t(), logits)
    if temperature != 1:
        logits.div_(temperature)


def _multiply(left: Tensor, right: Tensor, product: Tensor) -> None:
    if left.dtype == product.dtype:
        torch.mm(left, right, out=product)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=product.dtype, out=product)  # its float32 sums stay as they are; CUDA only
    else:
        product.copy_(torch.mm(left, right))


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right: where the gradient of the LM head is made, in the dtype of `total`."""
    if left.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    if targets.numel() and not bool(((targets >= 0) & (targets < vocab_size)).all()):
        raise ValueError(
            f"response token ids from {int(targets.min())} to {int(targets.max())} do not fit vocab_size {vocab_size}; "
            f"student, teacher and rollout server must use the same tokenizer"
        )


def _check_heads(student_weight: Tensor, teacher_weight: Tensor) -> None:
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"the student's LM head has {student_weight.shape[0]} rows on this rank, the teacher's "
            f"{teacher_weight.shape[0]}: both must be cut alike, so that a row is the same token"
        )
