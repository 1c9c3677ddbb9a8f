"""Runs of the heads on a problem, on one rank."""

from dataclasses import replace

import torch
from torch import Tensor

from opsd_megatron.config import Distill
from opsd_megatron.losses.head import cross_entropy_head, distill_head
from opsd_megatron.parallel.axis import Axis
from tests.losses.dense import Problem

TP = Axis.single("tp")


def run_head(problem: Problem, objective: Distill):
    return distill_head(
        problem.student_hidden,
        problem.student_weight,
        problem.teacher_hidden,
        problem.teacher_weight,
        problem.targets,
        problem.weights,
        problem.behaviour_logprobs,
        objective=objective,
        temperature=problem.temperature,
        tp=TP,
        vocab_size=problem.vocab_size,
    )


def run_cross_entropy(problem: Problem, chunk_tokens: int = 8):
    return cross_entropy_head(
        problem.student_hidden,
        problem.student_weight,
        problem.targets,
        problem.weights,
        temperature=problem.temperature,
        tp=TP,
        vocab_size=problem.vocab_size,
        chunk_tokens=chunk_tokens,
    )


def with_leaves(problem: Problem) -> Problem:
    return replace(
        problem,
        student_hidden=problem.student_hidden.requires_grad_(),
        student_weight=problem.student_weight.requires_grad_(),
    )


def gradients(problem: Problem, loss_sum: Tensor) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss_sum, (problem.student_hidden, problem.student_weight))
