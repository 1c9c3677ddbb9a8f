"""Divergences and gradients of one chunk of logits, against float64 and the identities that link the estimators."""

import pytest
import torch
from torch import Tensor

from opsd_megatron.config import Distill
from opsd_megatron.losses.divergence import compare as compare_blocks
from opsd_megatron.losses.vocabulary import VocabShard
from opsd_megatron.parallel.axis import Axis
from tests.losses.dense import dense_divergence

VOCAB = 50
DIRECTIONS = {
    "reverse": Distill(),
    "forward": Distill(direction="forward"),
    "jsd": Distill(direction="jsd"),
    "top 5 reverse": Distill(top_k=5),
    "top 5 forward": Distill(direction="forward", top_k=5),
}


def random_logits(rows: int, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, rows, VOCAB, generator=generator, dtype=torch.float64) * scale)


def compare(student: Tensor, teacher: Tensor, objective: Distill, targets: Tensor | None = None):
    """(comparison, dD/dlogits)"""
    targets = torch.zeros(len(student), dtype=torch.long) if targets is None else targets
    shard, student = VocabShard.of(VOCAB, VOCAB, Axis.single("tp")), student.clone()
    compared, write_gradient = compare_blocks(student, teacher.clone(), targets, shard, objective)
    write_gradient(torch.ones_like(student[:, 0]))
    return compared, student


def full_gradient(student: Tensor, teacher: Tensor, direction: str) -> Tensor:
    return compare(student, teacher, DIRECTIONS[direction])[1]


def expected_gradient(student: Tensor, teacher: Tensor, loss_of_token) -> Tensor:
    """Of loss_of_token(log p, log q) at tokens drawn from the student, by summing over the vocabulary."""
    student = student.clone().requires_grad_()
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    expected = (log_p.exp().detach() * loss_of_token(log_p, log_q)).sum()
    return torch.autograd.grad(expected, student)[0]


def test_reverse_kl_gradient_is_p_times_log_ratio_minus_kl():
    student, teacher = random_logits(rows=7)
    p, d = student.softmax(-1), student.log_softmax(-1) - teacher.log_softmax(-1)
    kl = (p * d).sum(-1, keepdim=True)
    torch.testing.assert_close(full_gradient(student, teacher, "reverse"), p * (d - kl), rtol=0, atol=1e-14)


def test_the_papers_sampled_loss_has_the_gradient_of_reverse_kl_in_expectation():
    student, teacher = random_logits(rows=7)
    sampled = expected_gradient(student, teacher, lambda log_p, log_q: -(log_q - log_p).detach() * log_p)
    torch.testing.assert_close(full_gradient(student, teacher, "reverse"), sampled, rtol=0, atol=1e-14)


def test_k1_as_a_loss_has_no_gradient_in_expectation_while_reverse_kl_has():
    student, teacher = random_logits(rows=7)
    k1 = expected_gradient(student, teacher, lambda log_p, log_q: log_p - log_q)
    assert k1.abs().max() < 1e-15 < 1e-2 < full_gradient(student, teacher, "reverse").abs().max()


def test_k2_as_a_loss_has_the_gradient_of_reverse_kl_in_expectation():
    student, teacher = random_logits(rows=7)
    k2 = expected_gradient(student, teacher, lambda log_p, log_q: (log_p - log_q).square() / 2)
    torch.testing.assert_close(full_gradient(student, teacher, "reverse"), k2, rtol=0, atol=1e-14)


def test_k3_as_a_loss_has_the_gradient_of_forward_and_not_reverse_kl_in_expectation():
    student, teacher = random_logits(rows=7)
    k3 = expected_gradient(student, teacher, lambda log_p, log_q: (log_q - log_p).exp() - 1 - (log_q - log_p))
    torch.testing.assert_close(full_gradient(student, teacher, "forward"), k3, rtol=0, atol=1e-14)
    assert (full_gradient(student, teacher, "reverse") - k3).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_distributions_have_divergence_and_gradient_of_exactly_zero(direction, dtype):
    student, _ = random_logits(rows=7, scale=9.0)
    student = student.to(dtype)
    compared, gradient = compare(student, student, DIRECTIONS[direction])
    assert torch.count_nonzero(compared.divergence) == torch.count_nonzero(compared.reverse_kl) == 0
    assert torch.equal(compared.student_logprob, compared.teacher_logprob)
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_float32_divergence_of_nearly_equal_logits_is_right_to_1e_10_nats(direction):
    student, noise = (half.float() for half in random_logits(rows=200, scale=5.0))
    teacher = student + noise * 1e-6
    objective = DIRECTIONS[direction]
    compared, _ = compare(student, teacher, objective)
    exact = dense_divergence(student.double().log_softmax(-1), teacher.double().log_softmax(-1), objective)
    assert (compared.divergence - exact).abs().max() < 1e-10
    plain = dense_divergence(student.log_softmax(-1), teacher.log_softmax(-1), objective)
    assert (plain - exact).abs().max() > 1e-8, "the plain formula would do as well"


@pytest.mark.parametrize(
    ("direction", "scale"),
    # the mass outside of the top k is a number of its own: at 300 it would be below the smallest float
    [(name, scale) for name in DIRECTIONS for scale in (1.0, 30.0, 300.0) if "top" not in name or scale < 300],
)
def test_float32_divergence_and_gradient_stay_right_when_probabilities_underflow(direction, scale):
    student, teacher = (half.float() for half in random_logits(rows=100, scale=scale))
    objective = DIRECTIONS[direction]
    logits = student.double().requires_grad_()
    exact = dense_divergence_of_any_size(logits.log_softmax(-1), teacher.double().log_softmax(-1), objective)
    exact_gradient = torch.autograd.grad(exact.sum(), logits)[0]
    compared, gradient = compare(student, teacher, objective)
    rounding = 3e-7 * max(1.0, float(torch.maximum(student, teacher).max()))
    torch.testing.assert_close(compared.divergence.double(), exact.detach(), rtol=1e-6, atol=rounding)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-6, atol=rounding)


def dense_divergence_of_any_size(log_p: Tensor, log_q: Tensor, objective: Distill) -> Tensor:
    """As dense_divergence, where a mixture's probability may underflow in float64 too."""
    if objective.direction != "jsd":
        return dense_divergence(log_p, log_q, objective)
    log_weights = torch.tensor([1 - objective.jsd_beta, objective.jsd_beta], dtype=torch.float64).log()
    log_m = torch.logaddexp(log_p + log_weights[0], log_q + log_weights[1])
    to_student, to_teacher = (log_p.exp() * (log_p - log_m)).sum(-1), (log_q.exp() * (log_q - log_m)).sum(-1)
    return (1 - objective.jsd_beta) * to_student + objective.jsd_beta * to_teacher


def test_jsd_of_small_weight_tends_to_forward_and_of_large_weight_to_reverse_kl():
    student, teacher = random_logits(rows=7, scale=0.5)
    small, large = (compare(student, teacher, Distill(direction="jsd", jsd_beta=beta))[0] for beta in (1e-6, 1 - 1e-6))
    forward, reverse = (compare(student, teacher, DIRECTIONS[name])[0].divergence for name in ("forward", "reverse"))
    torch.testing.assert_close(small.divergence / 1e-6, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(large.divergence / 1e-6, reverse, rtol=1e-4, atol=0)


def test_vocab_shards_leave_padding_out_and_may_be_empty():
    shards = [VocabShard.of(16, 35, Axis("tp", rank, 4)) for rank in range(4)]
    assert [(shard.start, shard.width) for shard in shards] == [(0, 16), (16, 16), (32, 3), (48, 0)]


def test_a_head_smaller_than_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="holds 16 rows on each of 2 tp ranks, fewer than vocab_size 35"):
        VocabShard.of(16, 35, Axis("tp", 0, 2))
