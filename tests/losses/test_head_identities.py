"""Identities that link the estimators, by exact enumeration through the head."""

from dataclasses import replace

import pytest
import torch

from opsd_megatron.config import Distill, NoCorrection, TokenTis
from tests.losses.dense import OBJECTIVES, Problem, make_problem
from tests.losses.runs import gradients, run_cross_entropy, run_head, with_leaves


def every_token_of_one_row(weight_of_token, behaviour_of_token) -> Problem:
    """One row repeated for every token of the vocabulary; weights and behaviour are functions of (log p, log b)."""
    one = make_problem(rows=1, vocab_size=40, held=40)
    log_p = (one.student_hidden @ one.student_weight.T / one.temperature).log_softmax(-1)[0]
    log_b = (log_p * 0.8).log_softmax(-1)
    return with_leaves(
        replace(
            one,
            student_hidden=one.student_hidden.expand(40, -1).clone(),
            teacher_hidden=one.teacher_hidden.expand(40, -1).clone(),
            targets=torch.arange(40),
            weights=weight_of_token(log_p, log_b),
            behaviour_logprobs=behaviour_of_token(log_p, log_b),
        )
    )


@pytest.mark.parametrize("sampled_from", ["the student", "the server, with importance weights"])
def test_sampled_loss_has_the_expected_gradient_of_the_full_one(sampled_from):
    if sampled_from == "the student":
        tokens = every_token_of_one_row(lambda log_p, _: log_p.exp(), lambda log_p, _: log_p)
        objective = Distill(estimator="sampled", correction=NoCorrection())
    else:
        tokens = every_token_of_one_row(lambda _, log_b: log_b.exp(), lambda _, log_b: log_b)
        objective = Distill(estimator="sampled", correction=TokenTis(1e9))
    hidden_gradient, weight_gradient = gradients(tokens, run_head(tokens, objective).loss_sum)

    one = with_leaves(replace(make_problem(rows=1, vocab_size=40, held=40), weights=torch.ones(1)))
    full_hidden_gradient, full_weight_gradient = gradients(one, run_head(one, Distill()).loss_sum)
    torch.testing.assert_close(hidden_gradient.sum(0, keepdim=True), full_hidden_gradient, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weight_gradient, full_weight_gradient, rtol=1e-12, atol=1e-14)


def test_log_prob_averaged_over_its_own_distribution_has_no_gradient():
    tokens = every_token_of_one_row(lambda log_p, _: log_p.exp(), lambda log_p, _: log_p)
    hidden_gradient, weight_gradient = gradients(tokens, run_cross_entropy(tokens).loss_sum)
    assert hidden_gradient.sum(0).abs().max() < 1e-15 and weight_gradient.abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "two temperatures"])
def test_a_teacher_equal_to_the_student_leaves_nothing_to_learn(name, dtype):
    problem = make_problem(dtype=dtype)
    same = {"teacher_hidden": problem.student_hidden.clone(), "teacher_weight": problem.student_weight.clone()}
    problem = with_leaves(replace(problem, **same))
    head = run_head(problem, OBJECTIVES[name])
    assert head.divergence.abs().max() <= 1e-9 and head.advantage.abs().max() == 0
    for gradient in gradients(problem, head.loss_sum):
        assert torch.count_nonzero(gradient) == 0
