"""Corrections by sequence against a dense float64 oracle, and all corrections under parallel layouts."""

from dataclasses import replace

import pytest
import torch

from opsd_megatron.config import Distill, ParallelConfig, SequenceMask, SequenceTis, TokenMask
from opsd_megatron.errors import ConfigError
from opsd_megatron.objectives.distill import DistillObjective
from opsd_megatron.objectives.metrics import finish_metrics
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.types import ResponseTable
from tests.losses.dense import dense_distillation, dense_factors, make_problem
from tests.losses.runs import gradients, with_leaves
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model
from tests.train.parallel_step import make_rollouts, parallel_step

LENGTHS = (1, 9, 4, 16, 7)
BY_SEQUENCE = {
    "tis mean": SequenceTis(1.2),
    "tis sum": SequenceTis(1.5, over="sum"),
    "mask mean": SequenceMask(0.9, 1.6),
    "mask sum": SequenceMask(0.2, 30.0, over="sum"),
}


def small_mismatch():
    """A problem whose server is off by a tenth of a nat or so, another amount for each of its responses."""
    problem = make_problem(rows=sum(LENGTHS))
    exact = dense_distillation(problem, Distill())
    rollout = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    generator = torch.Generator().manual_seed(3)
    noise = 0.2 * torch.randn(len(rollout), generator=generator) + torch.tensor([0.0, -0.4, 0.3, 0.1, 0.6])[rollout]
    problem.behaviour_logprobs = exact.student_logprob - noise
    problem.behaviour_logprobs[problem.weights == 0] = torch.nan
    return with_leaves(problem), rollout


@pytest.mark.parametrize("estimator", ["full", "sampled"])
@pytest.mark.parametrize("name", BY_SEQUENCE)
def test_a_sequence_correction_weighs_whole_responses_in_loss_and_gradient(name, estimator):
    problem, rollout = small_mismatch()
    config = Distill(estimator=estimator, correction=BY_SEQUENCE[name], chunk_tokens=8)
    table = ResponseTable(
        problem.targets, problem.weights, problem.behaviour_logprobs, rollout, torch.zeros_like(rollout)
    )
    objective = DistillObjective(config, problem.temperature, Axis.single("tp"), Axis.single("cp"), problem.vocab_size)
    share = objective.loss(
        problem.student_hidden, problem.student_weight, problem.teacher_hidden, problem.teacher_weight, table
    )

    exact = dense_distillation(problem, Distill(correction=None))
    ratios = torch.ones(len(rollout), dtype=torch.float64)
    for number in range(len(LENGTHS)):
        rows = (rollout == number) & (problem.weights > 0)
        log_ratios = (exact.student_logprob - problem.behaviour_logprobs)[rows]
        log_ratio = log_ratios.sum() if BY_SEQUENCE[name].over == "sum" else log_ratios.mean()
        ratios[rows] = log_ratio.exp()
    factors = torch.where(problem.weights > 0, dense_factors(ratios, BY_SEQUENCE[name]), 1)
    clipped = (factors != ratios)[problem.weights > 0]
    assert clipped.any() and not clipped.all(), "both cases must occur"
    weighted = replace(problem, weights=problem.weights * factors)
    unweighted = Distill(estimator=estimator, chunk_tokens=8)
    if estimator == "sampled":  # importance of 1
        weighted.behaviour_logprobs = exact.student_logprob
    expected = dense_distillation(weighted, unweighted)
    torch.testing.assert_close(share.loss_sum.detach(), expected.loss_sum, rtol=1e-12, atol=0)
    hidden, weight = gradients(problem, share.loss_sum)
    torch.testing.assert_close(hidden, expected.hidden_gradient, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(
        weight[: problem.vocab_size], expected.weight_gradient[: problem.vocab_size], rtol=1e-10, atol=1e-13
    )
    metrics = finish_metrics(share.metric_sums)
    assert metrics["importance/clipped_share"] == pytest.approx(float(clipped.double().mean()))
    assert metrics["importance/mean"] == pytest.approx(float(factors[problem.weights > 0].mean()))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.mark.parametrize("layout", [ParallelConfig(cp=2), ParallelConfig(tp=2)], ids=["cp2", "tp2"])
@pytest.mark.parametrize("correction", [SequenceMask(0.015, 0.03), TokenMask(0.015, 0.03)], ids=["sequence", "token"])
def test_corrections_do_not_depend_on_the_layout(model, layout, correction):
    """Behaviour log-probs are all -1 there, the trainer's about -5: the bounds leave some responses out."""
    objective = Distill(correction=correction)
    (alone,) = run_on_ranks(1, parallel_step, model, make_rollouts(), ParallelConfig(), objective)
    assert 0.02 < alone.metrics["importance/clipped_share"] < 0.98
    cut = run_on_ranks(2, parallel_step, model, make_rollouts(), layout, objective)
    assert cut[0].loss == pytest.approx(alone.loss, rel=1e-5)
    for name, value in alone.metrics.items():
        assert cut[0].metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    scale = torch.stack([gradient.norm() for gradient in alone.gradients.values()]).norm()
    assert all((cut[0].gradients[name] - value).norm() <= 1e-5 * scale for name, value in alone.gradients.items())


def test_another_temperature_in_the_loss_leaves_the_mismatch_at_the_rollouts_temperature():
    problem = make_problem()
    problem.behaviour_logprobs = dense_distillation(problem, Distill()).student_logprob
    rows = torch.zeros(len(problem.targets), dtype=torch.long)
    table = ResponseTable(problem.targets, problem.weights, problem.behaviour_logprobs, rows, rows)
    config = Distill(student_temperature=0.7, correction=TokenMask())
    objective = DistillObjective(config, problem.temperature, Axis.single("tp"), Axis.single("cp"), problem.vocab_size)
    arguments = (problem.student_hidden, problem.student_weight, problem.teacher_hidden, problem.teacher_weight)
    metrics = finish_metrics(objective.loss(*arguments, table).metric_sums)
    assert metrics["mismatch/logprob_abs_max_nats"] <= 1e-12
    assert metrics["importance/mean"] == pytest.approx(1.0)
    assert metrics["student/logprob_nats"] != pytest.approx(float(problem.behaviour_logprobs.mean()), abs=0.01)


def test_corrections_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"correction\.low=2"):
        SequenceMask(low=2.0, high=1.0)
    with pytest.raises(ConfigError, match="leave it None"):
        Distill(correction=SequenceTis(), student_temperature=0.5)
