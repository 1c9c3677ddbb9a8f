"""One pass from hidden states through the LM head and a loss, in chunks of rows, with the gradient taken on the way.

A chunk's logits are made, scored, turned into their own gradient and multiplied back to hidden states and weights,
then forgotten, so that peak memory does not grow with the number of rows. Computing the logits again in the backward
pass would cost half as many matrix products more. Three sizes of pieces:
    chunk   the rows whose gradient for the logits is kept: each chunk reads and writes the head's gradient once
    part    the rows whose logits are kept
    block   the rows that are scored at once: on a CPU few enough for all of that work to stay in its cache

Where the head's parameter has a `main_grad` (Megatron's DDP), its gradient is added there in the forward pass: the
upstream gradient is known beforehand to be 1, because `calculate_per_token_loss` divides only at the very end. Any
other upstream gradient is an error. Without `main_grad` the gradient is returned as usual and scaled in the backward
pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from opsd_megatron.losses.vocabulary import VocabShard
from opsd_megatron.parallel.reduce import sum_over

PART_ELEMENTS = 2**26
"""Logits of a part."""
BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**25}
"""Logits of an eager block, by kind of device. A compiled one has four times as many: nothing of its size is stored."""
SLICE_COLUMNS = 512
"""That a CPU multiplies at once: 256 rows with the whole head in one call take a fifth longer."""

ScoreBlock = Callable[[slice, Sequence[Tensor], bool], Tensor]
"""(rows, logits, with_gradient) -> [quantities, rows] with the loss first.

The logits [rows, vocab_shard] are the student's and those of the plan's `fixed`, all free to be overwritten; if there
is to be a gradient, the first are left as that of the student's hidden @ columns.T.
"""


@dataclass(frozen=True)
class Distribution:
    """softmax(hidden @ columns.T / temperature) over the columns of this tp rank."""

    hidden: Float[Tensor, "rows hidden"]
    columns: Float[Tensor, "vocab_shard hidden"]
    temperature: float

    def write_logits(self, rows: slice, logits: Float[Tensor, "rows vocab_shard"]) -> None:
        width = logits.shape[1] if logits.is_cuda else SLICE_COLUMNS
        for columns, products in zip(self.columns.split(width), logits.split(width, dim=1), strict=True):
            _multiply(self.hidden[rows], columns.t(), products, 1 / self.temperature)


@dataclass(frozen=True)
class ChunkedPass:
    """A loss and what a pass over its rows needs."""

    score: ScoreBlock
    quantities: int
    fixed: tuple[Distribution, ...]
    """Beside the student's: without gradient."""
    shard: VocabShard
    temperature: float
    """Of the student."""
    chunk_tokens: int
    compiled: bool


def run_chunks(
    hidden: Float[Tensor, "rows hidden"], weight: Float[Tensor, "vocab_shard hidden"], plan: ChunkedPass
) -> tuple[Float[Tensor, ""], Float[Tensor, "quantities rows"]]:
    """Sum of the losses, differentiable for `hidden` and `weight`, and the quantities of every row, detached.

    Losses, quantities and gradients on the way are float32 (float64 for float64 hidden states). Where no gradient is
    wanted none is computed, and `main_grad` is not touched. Every tp rank must bring the same rows.

    Raises:
        RuntimeError: in the backward pass, for an upstream gradient other than 1 where `weight` has a `main_grad`.
    """
    return _ChunkedHead.apply(hidden, weight, plan, torch.is_grad_enabled())


class _ChunkedHead(torch.autograd.Function):
    """(hidden, weight) -> (sum of the losses, [quantities, rows] detached)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, plan: ChunkedPass, grad_enabled: bool):
        exact = gradient_dtype(hidden)
        hidden_needs, weight_needs = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        main_grad = getattr(weight, "main_grad", None) if weight_needs else None
        hidden_gradient = torch.zeros_like(hidden, dtype=exact) if hidden_needs else None
        weight_gradient = main_grad
        if weight_needs and main_grad is None:
            weight_gradient = torch.zeros_like(weight, dtype=exact)
        values = _run(hidden, weight, plan, hidden_gradient, weight_gradient)
        if hidden_gradient is not None:
            hidden_gradient = sum_over(hidden_gradient, plan.shard.tp)
        ctx.save_for_backward(hidden_gradient, weight_gradient if main_grad is None else None)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.done_weight = weight if main_grad is not None else None
        ctx.mark_non_differentiable(values)
        return values[0].sum(), values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor, _values):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        if ctx.done_weight is not None:
            torch._assert_async(upstream == 1, _WRONG_UPSTREAM)  # on CUDA without waiting for the device
            _report_to_ddp(ctx.done_weight)
        elif weight_gradient is not None:
            weight_gradient = (weight_gradient * upstream).to(weight_dtype)
        if hidden_gradient is not None:
            hidden_gradient = (hidden_gradient * upstream).to(hidden_dtype)
        return hidden_gradient, weight_gradient, None, None


_WRONG_UPSTREAM = (
    "the gradient of this loss must be 1: the LM head's gradient has been added to its main_grad at that scale. "
    "Add the loss as it is, without a factor or a loss scale, and divide by the count of all tokens at the end "
    "(calculate_per_token_loss)"
)


def _report_to_ddp(weight: Tensor) -> None:
    """Tells the hook of Megatron's DDP (core/distributed/distributed_data_parallel.py) that main_grad is complete.

    The hook runs although no gradient is returned for the weight, and with overlap_grad_reduce it insists on one.
    Returned, a gradient without storage would be copied to a full one; set here it never exists. A weight that is the
    embedding too has core's mark `zero_out_wgrad`: then a gradient comes from there and the hook adds it.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if not getattr(weight, "zero_out_wgrad", False):
        weight.grad = weight.new_zeros(()).expand_as(weight)


def _run(
    hidden: Tensor, weight: Tensor, plan: ChunkedPass, hidden_gradient: Tensor | None, weight_gradient: Tensor | None
) -> Tensor:
    """The quantities of every row; adds the gradients of the sum of the losses to those that are given."""
    exact, width, kind = gradient_dtype(hidden), plan.shard.width, hidden.device.type
    columns = weight[:width]
    student = Distribution(hidden, columns, plan.temperature)
    values = hidden.new_empty(plan.quantities, hidden.shape[0], dtype=exact)
    with_gradient = hidden_gradient is not None or weight_gradient is not None
    # by the columns held, padding too: every tp rank must cut the rows alike, since each block is reduced over tp
    block_elements = BLOCK_ELEMENTS[kind] * (4 if plan.compiled else 1)
    part_rows, block_rows = (max(1, most // weight.shape[0]) for most in (PART_ELEMENTS, block_elements))
    # one set of buffers for all chunks: the pages of a fresh tensor cost a CPU as much as an exponential
    rows_at_most = min(plan.chunk_tokens, hidden.shape[0])
    gradient = hidden.new_empty(rows_at_most if with_gradient else 0, width)
    in_place = with_gradient and gradient.dtype == exact
    own = gradient if in_place else values.new_empty(min(part_rows, rows_at_most), width)
    fixed = [values.new_empty(min(part_rows, rows_at_most), width) for _ in plan.fixed]
    for chunk in pieces(slice(0, hidden.shape[0]), plan.chunk_tokens):
        for part in pieces(chunk, part_rows):
            logits = [own[_within(part, chunk if in_place else part)], *(one[_within(part, part)] for one in fixed)]
            for distribution, written in zip((student, *plan.fixed), logits, strict=True):
                distribution.write_logits(part, written)
            for block in pieces(part, block_rows):
                of_block = [one[_within(block, part)] for one in logits]
                values[:, block] = plan.score(block, of_block, with_gradient)
                if with_gradient and not in_place:
                    gradient[_within(block, chunk)] = of_block[0]
        if hidden_gradient is not None:
            _multiply(gradient[_within(chunk, chunk)], columns, hidden_gradient[chunk])
        if weight_gradient is not None:
            _add_product_(weight_gradient[:width], gradient[_within(chunk, chunk)].t(), hidden[chunk])
    return values


def pieces(rows: slice, most: int) -> list[slice]:
    """As few slices of `rows` as `most` rows in each allow, as even as can be."""
    total = rows.stop - rows.start
    count = -(-total // most)
    edges = [rows.start + total * number // count for number in range(count + 1)] if count else []
    return [slice(*ends) for ends in pairwise(edges)]


def _within(rows: slice, outer: slice) -> slice:
    """`rows` counted from the first row of `outer`."""
    return slice(rows.start - outer.start, rows.stop - outer.start)


def gradient_dtype(hidden: Tensor) -> torch.dtype:
    """Losses, reductions and gradients are kept in it."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _multiply(left: Tensor, right: Tensor, product: Tensor, factor: float = 1.0) -> None:
    """product = factor * left @ right."""
    if left.dtype == product.dtype:
        product.addmm_(left, right, beta=0, alpha=factor)
        return
    if left.is_cuda:
        torch.mm(left, right, out_dtype=product.dtype, out=product)  # its float32 sums stay as they are; CUDA only
    else:
        product.copy_(torch.mm(left, right))
    if factor != 1:
        product.mul_(factor)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right: where the gradient of the LM head is made, in the dtype of `total`."""
    if left.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
