"""The head's gradient goes straight into `main_grad`, whole and once, and only where a gradient is wanted."""

import pytest
import torch
from torch import Tensor

from opsd_megatron.config import Distill
from tests.losses.dense import OBJECTIVES, Problem, make_problem
from tests.losses.runs import gradients, run_cross_entropy, run_head, with_leaves


def with_main_grad(problem: Problem, held: float = 2.0) -> Problem:
    """The same problem; the head is a parameter as Megatron's DDP leaves it, with `held` in its main gradient."""
    problem.student_hidden = problem.student_hidden.detach().requires_grad_()
    problem.student_weight = torch.nn.Parameter(problem.student_weight.detach())
    problem.student_weight.main_grad = torch.full_like(problem.student_weight, held)
    problem.student_weight.grad_added_to_main_grad = False
    return problem


@pytest.mark.parametrize("name", OBJECTIVES)
def test_main_grad_gains_what_autograd_would_return(name):
    expected = gradients(problem := with_leaves(make_problem()), run_head(problem, OBJECTIVES[name]).loss_sum)
    problem = with_main_grad(make_problem())
    run_head(problem, OBJECTIVES[name]).loss_sum.backward()
    torch.testing.assert_close(problem.student_hidden.grad, expected[0], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(problem.student_weight.main_grad, expected[1] + 2, rtol=1e-13, atol=1e-15)


def test_the_hook_of_the_parameter_runs_and_sees_a_gradient_without_storage():
    problem = with_main_grad(make_problem())
    weight, seen = problem.student_weight, []
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: seen.append((weight.grad.untyped_storage().nbytes(), weight.grad_added_to_main_grad)))
    run_head(problem, Distill()).loss_sum.backward()
    assert seen == [(weight.element_size(), True)]


def test_a_tied_weight_is_left_the_gradient_of_its_other_use():
    problem = with_main_grad(make_problem())
    problem.student_weight.zero_out_wgrad = True  # core's mark
    (run_head(problem, Distill()).loss_sum + 3 * problem.student_weight[:2].sum()).backward()
    assert problem.student_weight.grad[:2].eq(3).all() and problem.student_weight.grad[2:].eq(0).all()
    assert problem.student_weight.main_grad.ne(2).any()


@pytest.mark.parametrize("factor", [0.5, 2.0, 0.0])
def test_any_other_upstream_gradient_is_refused(factor):
    problem = with_main_grad(make_problem())
    with pytest.raises(RuntimeError, match="the gradient of this loss must be 1"):
        (factor * run_head(problem, Distill()).loss_sum).backward()


def test_measuring_does_not_touch_main_grad():
    problem = with_main_grad(make_problem())
    with torch.no_grad():
        run_head(problem, Distill())
        run_cross_entropy(problem)
    problem.student_weight.requires_grad_(False)
    run_head(problem, Distill()).loss_sum.backward()
    assert problem.student_weight.main_grad.eq(2).all() and problem.student_weight.grad is None


def test_no_rows_leave_main_grad_and_still_report():
    problem = with_main_grad(make_problem(rows=0))
    run_head(problem, Distill()).loss_sum.backward()
    assert problem.student_weight.main_grad.eq(2).all() and problem.student_weight.grad_added_to_main_grad


def test_bfloat16_head_accumulates_in_float32():
    def run(dtype: torch.dtype) -> Tensor:
        problem = make_problem(rows=300, dtype=torch.bfloat16)
        for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight"):
            setattr(problem, name, getattr(problem, name).to(dtype))
        problem = with_main_grad(problem, held=0.0)
        problem.student_weight.main_grad = problem.student_weight.main_grad.float()
        run_head(problem, Distill(chunk_tokens=8)).loss_sum.backward()
        return problem.student_weight.main_grad

    kept, exact = run(torch.bfloat16), run(torch.float32)
    assert kept.dtype == torch.float32 and (kept - exact).norm() < 1e-2 * exact.norm()
