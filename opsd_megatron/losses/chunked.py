"""One pass from hidden states through the LM head and a loss, in chunks of rows, with the gradient taken on the way.

A chunk's logits are made, scored, turned into their own gradient and multiplied back to hidden states and weights,
then forgotten, so that peak memory is a few [chunk, vocab_shard] buffers and the gradients, whatever the number of
rows. Computing the logits again in the backward pass would cost half as many matrix products more. The backward pass
multiplies by the upstream scalar; normalisation is therefore free to be known late.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opsd_megatron.losses.divergence import VocabShard
from opsd_megatron.parallel.reduce import sum_over

ScoreChunk = Callable[[slice, Sequence[Tensor], bool], tuple[Tensor, Tensor | None]]
"""(rows, buffers, with_gradient) -> ([quantities, rows] with the loss first, its gradient for the logits).

The first buffer holds the logits of the rows; all of them may be overwritten, and the gradient may be one of them.
"""


@dataclass(frozen=True)
class ChunkedPass:
    """A loss and what a pass over its rows needs."""

    score: ScoreChunk
    quantities: int
    buffers: int
    """[rows of a chunk, vocab_shard] each: what the pass needs beside gradients. The same ones serve every chunk, since
    the pages of a fresh tensor cost a CPU as much as an exponential."""
    shard: VocabShard
    temperature: float
    chunk_tokens: int


def run_chunks(
    hidden: Float[Tensor, "rows hidden"], weight: Float[Tensor, "vocab_shard hidden"], plan: ChunkedPass
) -> tuple[Float[Tensor, ""], Float[Tensor, "quantities rows"]]:
    """Sum of the losses, differentiable for `hidden` and `weight`, and the quantities of every row, detached.

    Losses, quantities and gradients on the way are float32 (float64 for float64 hidden states). Where no gradient is
    wanted none is computed. Every tp rank must bring the same rows.
    """
    return _ChunkedHead.apply(hidden, weight, plan, torch.is_grad_enabled())


class _ChunkedHead(torch.autograd.Function):
    """(hidden, weight) -> (sum of the losses, [quantities, rows] detached)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, plan: ChunkedPass, grad_enabled: bool):
        exact = gradient_dtype(hidden)
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
            project(hidden[rows], columns, plan.temperature, buffers[0])
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


def gradient_dtype(hidden: Tensor) -> torch.dtype:
    """Losses, reductions and gradients are kept in it."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def project(hidden: Tensor, columns: Tensor, temperature: float, logits: Tensor) -> None:
    """Writes the logits of `hidden` at `columns` [vocab_shard, hidden] of the head, over temperature, into `logits`."""
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
