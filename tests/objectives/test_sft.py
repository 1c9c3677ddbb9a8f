"""Cross-entropy on given responses."""

import pytest
import torch

from opsd_megatron.config import SelfSft
from opsd_megatron.objectives.metrics import finish_metrics
from opsd_megatron.objectives.sft import SftObjective
from opsd_megatron.parallel.axis import Axis
from tests.losses.dense import make_problem
from tests.objectives.test_distill import responses_of


def test_loss_and_metrics_are_the_negative_log_likelihood():
    problem = make_problem()
    hidden = problem.student_hidden.requires_grad_()
    objective = SftObjective(SelfSft(chunk_tokens=8), 1.0, Axis.single("tp"), problem.vocab_size)
    share = objective.loss(hidden, problem.student_weight, None, None, responses_of(problem))
    logprobs = (hidden @ problem.student_weight[:101].T).log_softmax(-1)
    nll, counted = -logprobs.gather(1, problem.targets[:, None])[:, 0], problem.weights > 0
    loss_sum = (problem.weights * nll).sum()
    torch.testing.assert_close(share.loss_sum, loss_sum, rtol=1e-12, atol=0)
    for mine, exact in zip(
        torch.autograd.grad(share.loss_sum, hidden), torch.autograd.grad(loss_sum, hidden), strict=True
    ):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-13)
    metrics = finish_metrics(share.metric_sums)
    assert share.count == counted.sum()
    assert metrics["loss/nll_nats"] == pytest.approx(nll[counted].mean().item(), rel=1e-12)
    assert metrics["loss/per_token"] == pytest.approx(loss_sum.item() / share.count, rel=1e-12)
    assert metrics["student/entropy_nats"] == pytest.approx(
        -(logprobs.exp() * logprobs).sum(-1)[counted].mean().item(), rel=1e-12
    )
