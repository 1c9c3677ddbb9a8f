"""The distillation objective: its share of the loss, and metrics against closed forms, whatever the cut."""

from dataclasses import replace

import pytest
import torch

from opsd_megatron.config import Distill, NoCorrection, SelfSft
from opsd_megatron.errors import ConfigError
from opsd_megatron.objectives.build import build_objective
from opsd_megatron.objectives.distill import DistillObjective
from opsd_megatron.objectives.metrics import add_metrics, finish_metrics
from opsd_megatron.objectives.mismatch import mismatch_metrics
from opsd_megatron.objectives.objective import LossSums
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.types import ResponseTable
from tests.losses.dense import OBJECTIVES, Problem, dense_distillation, dense_factors, make_problem

TP, CP = Axis.single("tp"), Axis.single("cp")


def responses_of(problem: Problem) -> ResponseTable:
    rows = len(problem.targets)
    return ResponseTable(
        token_ids=problem.targets,
        weights=problem.weights,
        behaviour_logprobs=problem.behaviour_logprobs,
        rollout=torch.zeros(rows, dtype=torch.long),
        position=torch.arange(rows) * 3,
    )


def loss_of_rows(problem: Problem, config: Distill, rows: slice) -> LossSums:
    objective = DistillObjective(config, problem.temperature, TP, CP, problem.vocab_size)
    index = torch.arange(len(problem.targets))[rows]
    return objective.loss(
        problem.student_hidden[index],
        problem.student_weight,
        problem.teacher_hidden[index],
        problem.teacher_weight,
        responses_of(problem).select(index),
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_metrics_equal_their_definitions_over_tokens_with_a_weight(name):
    problem, config = make_problem(), OBJECTIVES[name]
    exact, counted = dense_distillation(problem, config), problem.weights > 0
    share = loss_of_rows(problem, config, slice(None))
    metrics = finish_metrics(share.metric_sums)
    advantage = (exact.teacher_logprob - exact.student_logprob)[counted]
    expected = {
        "loss/per_token": exact.loss_sum / counted.sum(),
        "loss/reverse_kl_nats": exact.reverse_kl[counted].mean(),
        "advantage/mean_nats": advantage.mean(),
        "advantage/max_nats": advantage.max(),
        "advantage/abs_mean_nats": advantage.abs().mean(),
        "advantage/abs_max_nats": advantage.abs().max(),
        "advantage/negative_share": (advantage < 0).double().mean(),
        "teacher/logprob_nats": exact.teacher_logprob[counted].mean(),
        "student/logprob_nats": exact.student_logprob[counted].mean(),
        "student/entropy_nats": exact.entropy[counted].mean(),
    }
    own = {
        "full forward": "loss/forward_kl_nats",
        "full jsd": "loss/jsd_nats",
        "forward token mask": "loss/forward_kl_nats",
        "top 5 reverse": "loss/top_k_reverse_kl_nats",
        "top 5 forward": "loss/top_k_forward_kl_nats",
    }
    if name in own:
        expected[own[name]] = exact.divergence[counted].mean()
    if not isinstance(config.used_correction, NoCorrection):
        ratio = (exact.student_logprob - problem.behaviour_logprobs)[counted].exp()
        factor = dense_factors(ratio, config.used_correction)
        expected["importance/mean"] = factor.mean()
        expected["importance/clipped_share"] = (factor != ratio).double().mean()
    assert share.count == counted.sum()
    for metric, value in expected.items():
        assert metrics.pop(metric) == pytest.approx(float(value), rel=1e-10), metric
    assert all(metric.startswith(("loss/reverse_kl_at_", "mismatch/")) for metric in metrics)


def test_reverse_kl_by_position_splits_the_whole_without_rest():
    problem = make_problem()
    exact, counted, position = dense_distillation(problem, Distill()), problem.weights > 0, torch.arange(37) * 3
    metrics = finish_metrics(loss_of_rows(problem, Distill(), slice(None)).metric_sums)
    assert "loss/reverse_kl_at_0_nats" not in metrics, "the only token at position 0 has weight 0"
    for label, inside in {
        "1_3": (position >= 1) & (position <= 3),
        "4_15": (position >= 4) & (position <= 15),
        "16_63": (position >= 16) & (position <= 63),
        "64_up": position >= 64,
    }.items():
        value = exact.reverse_kl[counted & inside].mean()
        assert metrics[f"loss/reverse_kl_at_{label}_nats"] == pytest.approx(float(value), rel=1e-10)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_shares_add_up_to_the_whole_with_an_empty_share_among_them(name):
    problem, config = make_problem(), OBJECTIVES[name]
    whole = loss_of_rows(problem, config, slice(None))
    shares = [loss_of_rows(problem, config, rows) for rows in (slice(0, 5), slice(5, 5), slice(5, 37))]
    total = shares[0].metric_sums
    for share in shares[1:]:
        assert share.metric_sums.keys() == whole.metric_sums.keys()
        total = add_metrics(total, share.metric_sums)
    assert finish_metrics(total) == pytest.approx(finish_metrics(whole.metric_sums), rel=1e-12)
    assert sum(share.count for share in shares) == whole.count
    torch.testing.assert_close(sum(share.loss_sum for share in shares), whole.loss_sum, rtol=1e-12, atol=0)


def test_k3_mismatch_is_the_kl_from_server_to_trainer_in_expectation():
    # each token as often as the server draws it in 20 rollouts, so that the mean over rows is the expectation
    draws = torch.tensor([8, 6, 3, 2, 1])
    server = (draws.double() / 20).log()
    trainer = torch.randn(5, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    token = torch.arange(5).repeat_interleave(draws)
    metrics = finish_metrics(mismatch_metrics(trainer[token], server[token], torch.ones(20, dtype=torch.bool)))
    kl = (server.exp() * (server - trainer)).sum()
    ratio = (trainer - server)[token].exp()
    assert metrics["mismatch/k3_kl_nats"] == pytest.approx(float(kl), rel=1e-12)
    assert metrics["mismatch/logprob_mean_nats"] == pytest.approx(-float(kl), rel=1e-12)
    assert metrics["mismatch/effective_sample_share"] == pytest.approx(
        float(ratio.sum() ** 2 / (20 * (ratio**2).sum()))
    )
    assert metrics["mismatch/logprob_abs_max_nats"] == pytest.approx(float((trainer - server).abs().max()))
    assert metrics["mismatch/chi_square"] == pytest.approx(float((ratio**2).mean() - 1))
    assert metrics["mismatch/clipped_share"] == pytest.approx(float((ratio >= 2).double().mean()))
    perplexities = [(-logprobs[token].mean()).exp() for logprobs in (trainer, server)]
    assert metrics["mismatch/perplexity_ratio"] == pytest.approx(float(perplexities[0] / perplexities[1]))


def test_equal_log_probs_show_no_mismatch():
    logprobs = -torch.rand(9)
    metrics = finish_metrics(mismatch_metrics(logprobs, logprobs, torch.ones(9, dtype=torch.bool)))
    assert metrics.pop("mismatch/effective_sample_share") == pytest.approx(1.0)
    assert metrics.pop("mismatch/perplexity_ratio") == 1.0
    assert set(metrics.values()) == {0.0}


def test_gradients_flow_through_the_objective_and_not_through_its_metrics():
    problem = make_problem()
    problem = replace(problem, student_hidden=problem.student_hidden.requires_grad_())
    share = loss_of_rows(problem, Distill(), slice(None))
    assert not any(value.requires_grad for value in share.metric_sums.values())
    gradient = torch.autograd.grad(share.loss_sum, problem.student_hidden)[0]
    torch.testing.assert_close(gradient, dense_distillation(problem, Distill()).hidden_gradient, rtol=1e-10, atol=1e-13)


def test_distillation_without_a_teacher_is_refused():
    problem = make_problem()
    objective = build_objective(Distill(), problem.temperature, TP, CP, problem.vocab_size)
    with pytest.raises(ValueError, match="needs the teacher's hidden states"):
        objective.loss(problem.student_hidden, problem.student_weight, None, None, responses_of(problem))


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 0},
        {"top_k": 5, "direction": "jsd"},
        {"top_k": 5, "estimator": "sampled"},
        {"student_temperature": 0.0},
        {"teacher_temperature": -1.0},
    ],
)
def test_objectives_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ConfigError, match=rf"objective\.{next(iter(wrong))}="):
        Distill(**wrong)


def test_self_sft_is_built_at_temperature_1_and_needs_no_teacher():
    objective = build_objective(SelfSft(), 0.7, TP, CP, 101)
    assert objective.temperature == 1.0 and not objective.needs_teacher
    assert build_objective(Distill(), 0.7, TP, CP, 101).needs_teacher
