"""The chunked head cut over tp: loss and gradients equal dense float64, and every reduction is needed."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from opsd_megatron.config import Distill
from opsd_megatron.losses import chunked, divergence, head
from opsd_megatron.parallel.axis import Axis
from tests.losses.dense import (
    OBJECTIVES,
    TOLERANCE,
    assert_gradient_close,
    dense_distillation,
    gradient_tolerance,
    make_problem,
)
from tests.ranks import run_on_ranks

_REDUCED_ROWS = {"log-sum-exp sum": 2, "divergence sum": 6}  # quantities stacked in that all-reduce of divergence.py


def head_on_rank(problem_arguments: dict, objective: Distill, left_out: str | None) -> dict[str, Tensor]:
    tp = Axis.of_group("tp", dist.group.WORLD)
    problem = make_problem(**problem_arguments)
    held = problem.student_weight.shape[0] // tp.size
    mine = slice(tp.rank * held, (tp.rank + 1) * held)
    hidden, weight = problem.student_hidden.requires_grad_(), problem.student_weight[mine].requires_grad_()
    restore = leave_out(left_out)
    pieces = chunked.PART_ELEMENTS, chunked.BLOCK_ELEMENTS
    # the ranks' columns differ in number, and no piece is as large as the one that holds it
    chunked.PART_ELEMENTS, chunked.BLOCK_ELEMENTS = 6 * held, {"cpu": 3 * held}
    try:
        result = head.distill_head(
            hidden,
            weight,
            problem.teacher_hidden,
            problem.teacher_weight[mine],
            problem.targets,
            problem.weights,
            problem.behaviour_logprobs,
            objective=objective,
            temperature=problem.temperature,
            tp=tp,
            vocab_size=problem.vocab_size,
        )
        hidden_gradient, weight_gradient = torch.autograd.grad(result.loss_sum, (hidden, weight))
    finally:
        chunked.PART_ELEMENTS, chunked.BLOCK_ELEMENTS = pieces
        restore()
    return {
        "loss_sum": result.loss_sum.detach(),
        "hidden_gradient": hidden_gradient,
        "weight_gradient": weight_gradient,
        "teacher_logprob": result.teacher_logprob,
        "reverse_kl": result.reverse_kl,
        "entropy": result.entropy,
    }


def leave_out(reduction: str | None):
    """Makes one all-reduce the identity; returns what puts it back."""
    kept = divergence.max_over, divergence.sum_over, chunked.sum_over

    def restore():
        divergence.max_over, divergence.sum_over, chunked.sum_over = kept

    if reduction == "log-sum-exp max":
        divergence.max_over = lambda values, axis: values
    elif reduction == "hidden gradient sum":
        chunked.sum_over = lambda values, axis: values
    elif reduction is not None:
        quantities = _REDUCED_ROWS[reduction]
        divergence.sum_over = lambda values, axis: values if len(values) == quantities else kept[1](values, axis)
    return restore


def assert_equal_to_dense(tp: int, name: str, dtype: str, left_out: str | None = None, **arguments) -> None:
    arguments = {**arguments, "dtype": getattr(torch, dtype)}
    objective = replace(OBJECTIVES[name], chunk_tokens=8)
    problem, tolerance = make_problem(**arguments), TOLERANCE[arguments["dtype"]]
    of_gradient = gradient_tolerance(name, arguments["dtype"])
    exact = dense_distillation(problem, objective)
    ranks = run_on_ranks(tp, head_on_rank, arguments, objective, left_out)
    for rank in ranks:
        torch.testing.assert_close(rank["loss_sum"].double(), exact.loss_sum, rtol=tolerance / 2, atol=0)
        assert_gradient_close(rank["hidden_gradient"], exact.hidden_gradient, of_gradient)
        for quantity in ("teacher_logprob", "reverse_kl", "entropy"):
            torch.testing.assert_close(rank[quantity].double(), getattr(exact, quantity), rtol=0, atol=tolerance / 2)
    weight_gradient = torch.cat([rank["weight_gradient"] for rank in ranks])
    assert_gradient_close(weight_gradient[: problem.vocab_size], exact.weight_gradient, of_gradient)
    assert weight_gradient[problem.vocab_size :].abs().max() == 0


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("tp", [2, 4])
def test_loss_and_gradients_are_invariant_to_tp(tp, name, dtype):
    assert_equal_to_dense(tp, name, dtype)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_that_hold_only_padding_take_part(name):
    assert_equal_to_dense(4, name, "float64", vocab_size=50, held=128)


@pytest.mark.parametrize(
    ("left_out", "name"),
    [
        ("log-sum-exp max", "full reverse"),
        ("log-sum-exp sum", "full reverse"),
        ("log-sum-exp sum", "sampled"),
        ("divergence sum", "full jsd"),
        ("divergence sum", "sampled"),
        ("hidden gradient sum", "full forward"),
        ("hidden gradient sum", "sampled"),
    ],
)
def test_leaving_out_a_reduction_is_noticed(left_out, name):
    with pytest.raises(AssertionError, match=r"not close|times the allowed error"):
        assert_equal_to_dense(2, name, "float32", left_out)
    assert_equal_to_dense(2, name, "float32", None)


def cross_entropy_on_rank(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    tp = Axis.of_group("tp", dist.group.WORLD)
    problem = make_problem(rows=rows)
    held = problem.student_weight.shape[0] // tp.size
    hidden = problem.student_hidden.requires_grad_()
    weight = problem.student_weight[tp.rank * held : (tp.rank + 1) * held].requires_grad_()
    result = head.cross_entropy_head(
        hidden, weight, problem.targets, problem.weights, temperature=1.0, tp=tp, vocab_size=101, chunk_tokens=8
    )
    return result.loss_sum.detach(), *torch.autograd.grad(result.loss_sum, (hidden, weight))


@pytest.mark.parametrize("tp", [2, 4])
def test_cross_entropy_and_its_gradients_are_invariant_to_tp(tp):
    problem = make_problem()
    hidden, weight = problem.student_hidden.requires_grad_(), problem.student_weight[:101].requires_grad_()
    logprob = (hidden @ weight.T).log_softmax(-1).gather(1, problem.targets[:, None])[:, 0]
    loss_sum = -(problem.weights * logprob).sum()
    exact = torch.autograd.grad(loss_sum, (hidden, weight))
    ranks = run_on_ranks(tp, cross_entropy_on_rank, 37)
    for rank_loss_sum, hidden_gradient, _ in ranks:
        torch.testing.assert_close(rank_loss_sum, loss_sum.detach(), rtol=1e-13, atol=0)
        assert_gradient_close(hidden_gradient, exact[0], 1e-12)
    assert_gradient_close(torch.cat([weight_gradient for *_, weight_gradient in ranks])[:101], exact[1], 1e-12)


def test_no_rows_on_any_tp_rank_give_zero_gradients():
    arguments = {"rows": 0}
    for rank in run_on_ranks(2, head_on_rank, arguments, Distill(), None):
        assert float(rank["loss_sum"]) == 0 and torch.count_nonzero(rank["weight_gradient"]) == 0
    for loss_sum, _, weight_gradient in run_on_ranks(2, cross_entropy_on_rank, 0):
        assert float(loss_sum) == 0 and torch.count_nonzero(weight_gradient) == 0
