"""The chunked head on one rank: values and gradients against dense float64, work and memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opsd_megatron.config import Distill
from opsd_megatron.losses import chunked
from opsd_megatron.losses.head import logprob_head
from tests.losses.dense import (
    OBJECTIVES,
    TOLERANCE,
    Problem,
    assert_gradient_close,
    dense_distillation,
    gradient_tolerance,
    make_problem,
)
from tests.losses.runs import TP, gradients, run_cross_entropy, run_head, with_leaves


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_equal_dense_float64(name, dtype):
    problem, objective = with_leaves(make_problem(dtype=dtype)), replace(OBJECTIVES[name], chunk_tokens=8)
    exact, tolerance = dense_distillation(problem, objective), TOLERANCE[dtype]
    head = run_head(problem, objective)
    hidden_gradient, weight_gradient = gradients(problem, 0.7 * head.loss_sum)
    torch.testing.assert_close(head.loss_sum.detach().double(), exact.loss_sum, rtol=tolerance / 2, atol=0)
    tolerance = gradient_tolerance(name, dtype)
    assert_gradient_close(hidden_gradient, 0.7 * exact.hidden_gradient, tolerance)
    assert_gradient_close(weight_gradient[: problem.vocab_size], 0.7 * exact.weight_gradient, tolerance)
    assert weight_gradient[problem.vocab_size :].abs().max() == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_equal_dense_float64_and_are_detached(name, dtype):
    problem, objective = with_leaves(make_problem(dtype=dtype)), OBJECTIVES[name]
    exact, head = dense_distillation(problem, objective), run_head(problem, objective)
    for quantity in ("divergence", "reverse_kl", "student_logprob", "teacher_logprob", "entropy"):
        values = getattr(head, quantity)
        assert values.dtype == dtype and not values.requires_grad
        torch.testing.assert_close(
            values.double(), getattr(exact, quantity), rtol=0, atol=TOLERANCE[dtype] / 2, msg=quantity
        )
    advantage = exact.teacher_logprob - exact.student_logprob
    torch.testing.assert_close(head.advantage.double(), advantage, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_do_not_depend_on_the_chunk_size(name):
    problem = with_leaves(make_problem())
    whole = run_head(problem, replace(OBJECTIVES[name], chunk_tokens=1000))
    expected = gradients(problem, whole.loss_sum)
    for chunk_tokens in (1, 5, 36, 37):
        cut = run_head(problem, replace(OBJECTIVES[name], chunk_tokens=chunk_tokens))
        torch.testing.assert_close(cut.loss_sum, whole.loss_sum, rtol=1e-13, atol=0)
        torch.testing.assert_close(gradients(problem, cut.loss_sum), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_neither_do_they_depend_on_parts_blocks_and_slices(monkeypatch, name, dtype):
    problem, objective = with_leaves(make_problem(dtype=dtype)), replace(OBJECTIVES[name], chunk_tokens=12)
    whole = run_head(problem, objective)
    expected = gradients(problem, whole.loss_sum)
    monkeypatch.setattr(chunked, "PART_ELEMENTS", 5 * 128)
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", {"cpu": 2 * 128})
    monkeypatch.setattr(chunked, "SLICE_COLUMNS", 7)
    cut = run_head(problem, objective)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(cut.loss_sum, whole.loss_sum, rtol=min(tolerance, 1e-6), atol=0)
    for one, other in zip(gradients(problem, cut.loss_sum), expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("name", ["full reverse", "full jsd", "sampled"])
def test_compiled_passes_give_the_same_for_blocks_of_any_size(monkeypatch, name):
    problem = with_leaves(make_problem(dtype=torch.float32))
    eager = run_head(problem, OBJECTIVES[name])
    expected = gradients(problem, eager.loss_sum)
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", {"cpu": 2 * 128})
    compiled = run_head(problem, replace(OBJECTIVES[name], compiled=True, chunk_tokens=20))
    for quantity in ("divergence", "reverse_kl", "student_logprob", "teacher_logprob", "entropy"):
        torch.testing.assert_close(getattr(compiled, quantity), getattr(eager, quantity), rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(problem, compiled.loss_sum), expected, strict=True):
        assert_gradient_close(one, other.double(), 2e-5)


@pytest.mark.parametrize("rows", [101, 109, 240])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_teachers_head_may_have_other_padding(name, rows):
    problem = with_leaves(make_problem())
    expected = run_head(problem, OBJECTIVES[name])
    real = problem.teacher_weight[: problem.vocab_size]
    padding = real.new_full((rows - problem.vocab_size, real.shape[1]), torch.nan)
    padded = run_head(replace(problem, teacher_weight=torch.cat([real, padding])), OBJECTIVES[name])
    assert torch.equal(padded.loss_sum, expected.loss_sum)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cross_entropy_and_its_gradients_equal_dense_float64(dtype):
    problem = with_leaves(make_problem(dtype=dtype))
    hidden = problem.student_hidden.detach().double().requires_grad_()
    weight = problem.student_weight.detach()[: problem.vocab_size].double().requires_grad_()
    logprobs = (hidden @ weight.T / problem.temperature).log_softmax(-1)
    logprob = logprobs.gather(1, problem.targets[:, None])[:, 0]
    loss_sum = -(problem.weights.double() * logprob).sum()
    exact = torch.autograd.grad(loss_sum, (hidden, weight))

    head = run_cross_entropy(problem)
    hidden_gradient, weight_gradient = gradients(problem, head.loss_sum)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(head.loss_sum.double(), loss_sum, rtol=tolerance / 10, atol=0)
    torch.testing.assert_close(head.logprob.double(), logprob.detach(), rtol=0, atol=tolerance / 2)
    torch.testing.assert_close(
        head.entropy.double(), -(logprobs.exp() * logprobs).sum(-1).detach(), rtol=0, atol=tolerance / 2
    )
    assert_gradient_close(hidden_gradient, exact[0], tolerance)
    assert_gradient_close(weight_gradient[: problem.vocab_size], exact[1], tolerance)


def test_logprob_head_equals_the_rows_of_the_distillation_head():
    problem = make_problem(dtype=torch.float32)
    head = run_head(problem, Distill(chunk_tokens=8))
    logprob, entropy = logprob_head(
        problem.student_hidden,
        problem.student_weight,
        problem.targets,
        temperature=problem.temperature,
        tp=TP,
        vocab_size=problem.vocab_size,
        chunk_tokens=8,
    )
    assert torch.equal(logprob, head.student_logprob)
    torch.testing.assert_close(entropy, head.entropy)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_rows_give_a_connected_loss_of_zero_with_zero_gradients(name):
    problem = with_leaves(make_problem(rows=0))
    head = run_head(problem, OBJECTIVES[name])
    cross_entropy = run_cross_entropy(problem)
    for loss_sum in (head.loss_sum, cross_entropy.loss_sum):
        hidden_gradient, weight_gradient = gradients(problem, loss_sum)
        assert loss_sum.item() == 0 and hidden_gradient.shape == problem.student_hidden.shape
        assert torch.count_nonzero(weight_gradient) == 0 and weight_gradient.shape == problem.student_weight.shape
    assert len(head.divergence) == len(cross_entropy.logprob) == 0


def test_bfloat16_keeps_losses_in_float32_and_gradients_within_its_own_rounding():
    problem = with_leaves(make_problem(rows=300, dtype=torch.bfloat16))
    exact = dense_distillation(problem, Distill())
    head = run_head(problem, Distill(chunk_tokens=16))
    hidden_gradient, weight_gradient = gradients(problem, head.loss_sum)
    assert head.loss_sum.dtype == head.reverse_kl.dtype == torch.float32
    assert hidden_gradient.dtype == weight_gradient.dtype == torch.bfloat16
    torch.testing.assert_close(head.loss_sum.detach().double(), exact.loss_sum, rtol=2e-3, atol=0)
    for actual, expected in (
        (hidden_gradient, exact.hidden_gradient),
        (weight_gradient[: problem.vocab_size], exact.weight_gradient),
    ):
        assert (actual.double() - expected).norm() < 1e-2 * expected.norm()


def test_importance_is_the_capped_probability_ratio():
    problem = make_problem(dtype=torch.float64)
    head = run_head(problem, OBJECTIVES["sampled"])
    ratio = (head.student_logprob - problem.behaviour_logprobs).exp()
    counted = problem.weights > 0
    assert (ratio[counted] > 2).any() and (ratio[counted] < 2).any()
    torch.testing.assert_close(head.importance[counted], ratio[counted].clamp(max=2), rtol=1e-12, atol=0)
    assert torch.equal(head.importance[~counted], torch.ones_like(ratio[~counted]))
    assert torch.equal(run_head(problem, Distill()).importance, torch.ones_like(ratio))


def test_a_token_of_weight_0_may_have_any_behaviour_log_prob():
    problem = with_leaves(make_problem())
    plain = gradients(problem, run_head(problem, OBJECTIVES["sampled"]).loss_sum)
    problem.behaviour_logprobs[problem.weights == 0] = torch.nan
    poisoned = gradients(problem, run_head(problem, OBJECTIVES["sampled"]).loss_sum)
    assert torch.equal(plain[0], poisoned[0]) and torch.equal(plain[1], poisoned[1])


# Work and memory.


class OperationLog(TorchDispatchMode):
    """Size of the largest tensor that any operation made, and how many matrix products there were."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_tensor_is_larger_than_a_chunk_of_logits_or_a_gradient(name):
    problem = with_leaves(make_problem(rows=1024, hidden=8, vocab_size=300, held=320))
    with OperationLog() as log:
        gradients(problem, run_head(problem, replace(OBJECTIVES[name], chunk_tokens=32)).loss_sum)
    assert log.largest <= 1024 * (8 + 3)  # the hidden states of the teacher, more than a chunk of 32 x 300
    with OperationLog() as dense:
        dense_distillation(problem, OBJECTIVES[name])
    assert dense.largest >= 1024 * 300, "the log does not see a tensor of all rows and all tokens"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_matrix_products_per_chunk_are_two_without_gradient_and_four_with_both(name):
    problem, objective = make_problem(rows=32), replace(OBJECTIVES[name], chunk_tokens=8)

    def products(problem: Problem) -> int:
        with OperationLog() as log:
            run_head(problem, objective)
        return log.products

    learning = with_leaves(make_problem(rows=32))
    frozen_head = replace(learning, student_weight=learning.student_weight.detach())
    with torch.no_grad():
        measuring = products(learning)
    assert [products(problem), measuring, products(frozen_head), products(learning)] == [8, 8, 12, 16]


# Refusals.


def test_targets_outside_the_vocabulary_are_refused():
    problem = make_problem()
    problem.targets[3] = problem.vocab_size
    with pytest.raises(ValueError, match="do not fit vocab_size 101"):
        run_head(problem, Distill())


def test_a_top_k_of_the_whole_vocabulary_is_refused():
    with pytest.raises(ValueError, match="top_k=101 leaves nothing of a vocabulary of 101 tokens"):
        run_head(make_problem(), Distill(top_k=101))


def test_a_teacher_without_all_tokens_is_refused():
    problem = make_problem()
    problem.teacher_weight = problem.teacher_weight[:100]
    with pytest.raises(ValueError, match="has 100 rows on this rank, the student's tokens here are 0 to 100"):
        run_head(problem, Distill())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_bfloat16_on_a_gpu_equals_dense_float64_within_its_own_rounding(name):
    problem = make_problem(rows=300, dtype=torch.bfloat16)
    on_gpu = with_leaves(
        Problem(**{key: one.cuda() if isinstance(one, Tensor) else one for key, one in vars(problem).items()})
    )
    exact = dense_distillation(problem, OBJECTIVES[name])
    hidden_gradient, weight_gradient = gradients(on_gpu, run_head(on_gpu, OBJECTIVES[name]).loss_sum)
    for actual, expected in (
        (hidden_gradient, exact.hidden_gradient),
        (weight_gradient[: problem.vocab_size], exact.weight_gradient),
    ):
        assert (actual.cpu().double() - expected).norm() < 1e-2 * expected.norm()
