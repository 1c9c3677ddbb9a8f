"""Dense float64 oracles of the losses, on full logits with autograd, and the problems that they are tried on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_megatron.config import Distill, NoCorrection, TokenMask, TokenTis

OBJECTIVES = {
    "full reverse": Distill(),
    "full forward": Distill(direction="forward"),
    "full jsd": Distill(direction="jsd", jsd_beta=0.3),
    "top 5 reverse": Distill(top_k=5),
    "top 5 forward": Distill(direction="forward", top_k=5),
    "two temperatures": Distill(student_temperature=0.8, teacher_temperature=1.7),
    "full token tis": Distill(correction=TokenTis(1.5)),
    "forward token mask": Distill(direction="forward", correction=TokenMask(0.3, 4.0)),
    "sampled token mask": Distill(estimator="sampled", correction=TokenMask()),
    "sampled": Distill(estimator="sampled"),
    "sampled without importance": Distill(estimator="sampled", correction=NoCorrection()),
}


@dataclass
class Problem:
    """Inputs of a head; rows of the weights at or beyond vocab_size are NaN, so that touching one is seen."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor
    weights: Tensor
    behaviour_logprobs: Tensor
    vocab_size: int
    temperature: float


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def gradient_tolerance(name: str, dtype: torch.dtype) -> float:
    """In reverse p (d - mean d) cancels where one outcome has nearly all of the mass."""
    return TOLERANCE[dtype] * (3 if name in ("top 5 reverse", "two temperatures") else 1)


def make_problem(
    rows: int = 37,
    hidden: int = 16,
    vocab_size: int = 101,
    held: int = 128,
    temperature: float = 1.3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Logits of about 3; every fifth weight is 0; the teacher is another model with another hidden size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student_weight, teacher_weight = (
        normal(held, hidden) * hidden**-0.5 * 3,
        normal(held, hidden + 3) * hidden**-0.5 * 3,
    )
    student_weight[vocab_size:] = teacher_weight[vocab_size:] = torch.nan
    weights = torch.rand(rows, generator=generator) + 0.5
    weights[::5] = 0
    return Problem(
        normal(rows, hidden).to(dtype),
        student_weight.to(dtype),
        normal(rows, hidden + 3).to(dtype),
        teacher_weight.to(dtype),
        torch.randint(vocab_size, (rows,), generator=generator),
        weights,
        -12 * torch.rand(rows, generator=generator),
        vocab_size,
        temperature,
    )


@dataclass
class DenseResult:
    """Losses, rows and the two gradients of the loss sum; the weight's has no padded rows."""

    loss_sum: Tensor
    divergence: Tensor
    reverse_kl: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor
    entropy: Tensor
    hidden_gradient: Tensor
    weight_gradient: Tensor


def dense_distillation(problem: Problem, objective: Distill) -> DenseResult:
    hidden = problem.student_hidden.double().requires_grad_()
    weight = problem.student_weight[: problem.vocab_size].double().requires_grad_()
    temperature = objective.student_temperature or problem.temperature
    log_p = torch.log_softmax(hidden @ weight.T / temperature, -1)
    teacher_logits = problem.teacher_hidden.double() @ problem.teacher_weight[: problem.vocab_size].double().T
    log_q = torch.log_softmax(teacher_logits / (objective.teacher_temperature or problem.temperature), -1)
    of_target = problem.targets[:, None]
    student_logprob, teacher_logprob = log_p.gather(1, of_target)[:, 0], log_q.gather(1, of_target)[:, 0]
    divergence = dense_divergence(log_p, log_q, objective)
    weights = problem.weights.double()
    ratio = (student_logprob.detach() - problem.behaviour_logprobs.double()).exp()
    weighted = weights * dense_factors(ratio, objective.used_correction)
    if objective.estimator == "full":
        loss_sum = (weighted * divergence).sum()
    else:
        advantage = (teacher_logprob - student_logprob).detach()
        loss_sum = -(weighted * advantage * student_logprob).sum()
    gradients = torch.autograd.grad(loss_sum, (hidden, weight))
    reverse_kl = dense_divergence(log_p, log_q, Distill())
    entropy = -(log_p.exp() * log_p).sum(-1)
    rows = (divergence, reverse_kl, student_logprob, teacher_logprob, entropy)
    return DenseResult(loss_sum.detach(), *(row.detach() for row in rows), *gradients)


def dense_factors(ratio: Tensor, correction) -> Tensor:
    if isinstance(correction, NoCorrection):
        return torch.ones_like(ratio)
    if hasattr(correction, "cap"):
        return ratio.clamp(max=correction.cap)
    return ratio * (ratio >= correction.low) * (ratio <= correction.high)


def dense_divergence(log_p: Tensor, log_q: Tensor, objective: Distill) -> Tensor:
    def kl(first: Tensor, second: Tensor) -> Tensor:
        return (first.exp() * (first - second)).sum(-1)

    if objective.top_k is not None:
        log_p, log_q = joined(log_p, log_q, objective.top_k)
    if objective.direction == "reverse":
        return kl(log_p, log_q)
    if objective.direction == "forward":
        return kl(log_q, log_p)
    beta = objective.jsd_beta
    log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def joined(log_p: Tensor, log_q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probs of the teacher's k likeliest tokens and, last, of all others together."""
    kept = log_q.topk(k).indices
    others = torch.ones_like(log_q).scatter_(-1, kept, 0)
    return tuple(
        torch.cat([one.gather(-1, kept), (one.exp() * others).sum(-1, keepdim=True).log()], -1)
        for one in (log_p, log_q)
    )


def assert_gradient_close(actual: Tensor, exact: Tensor, relative: float) -> None:
    """Elementwise within `relative` of the larger of the element and a hundredth of the whole gradient's norm."""
    allowed = relative * torch.maximum(exact.abs(), 1e-2 * exact.norm())
    excess = ((actual.double() - exact).abs() / allowed).max()
    assert excess <= 1, f"{float(excess):.3g} times the allowed error"
