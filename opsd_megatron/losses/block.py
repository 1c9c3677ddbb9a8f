"""What a block of logits gives between two reductions over tp: pure functions of whole tensors, no communication.

Each reads the logits again rather than keep a tensor of their size: compiled, it is one pass over them with nothing as
large stored, and on a GPU that reading is all it costs. Eager, it is a pass and a tensor for every operation.

Shapes: logits [rows, vocab_shard]; peaks (row maxima over all tp ranks) and totals (sums of exp(logit - peak)) have one
row for each of the given logits.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 80.0
"""exp of it is finite in float32."""


def stage(function: Callable[..., Tensor], compiled: bool, width: int) -> Callable[..., Tensor]:
    """`function`, compiled for any number of rows if wanted; without columns there is nothing to compile for."""
    return _compile(function) if compiled and width else function


@cache
def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)


def row_peaks(*logits: Tensor) -> Tensor:
    """[distributions, rows]: this rank's maxima."""
    if not logits[0].shape[1]:
        return logits[0].new_full((len(logits), len(logits[0])), -math.inf)
    return torch.stack([one.amax(-1) for one in logits])


def row_totals(peaks: Tensor, *logits: Tensor) -> Tensor:
    """[distributions, rows]: this rank's sums of exp(logit - peak)."""
    return torch.stack([(one - peak[:, None]).exp().sum(-1) for one, peak in zip(logits, peaks, strict=True)])


def row_cross(peaks: Tensor, totals: Tensor, logits: Tensor) -> Tensor:
    """[rows]: this rank's part of -sum p (logit - peak): the entropy less the logarithm of the total."""
    p, shifted = softmax(logits, peaks[0], totals[0])
    return -(p * shifted).sum(-1)


def row_sums(kind: str, beta: float, peaks: Tensor, totals: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """[4, rows]: this rank's parts of `row_cross`, the divergence, the reverse KL and sum p s (see `divergence`)."""
    p, shifted = softmax(student, peaks[0], totals[0])
    q, _ = softmax(teacher, peaks[1], totals[1])
    d = log_ratio(peaks, totals, student, teacher)
    excess = difference(p, q, d).sum(-1)
    slope_mean = (p * d).sum(-1)
    divergence = reverse = slope_mean - excess
    if kind == "forward":
        divergence = excess - (q * d).sum(-1)
    elif kind == "jsd":
        slope_mean = (p * _jsd_slope(d, beta)).sum(-1)
        divergence = slope_mean + beta * (q * _log_ratio_to_mixture(-d, 1 - beta)).sum(-1)
    return torch.stack([-(p * shifted).sum(-1), divergence, reverse, slope_mean])


def logits_to_gradient(
    kind: str,
    beta: float,
    peaks: Tensor,
    totals: Tensor,
    slope_mean: Tensor,
    student: Tensor,
    teacher: Tensor,
    factor: Tensor,
) -> Tensor:
    """Makes `student` factor * dD/dlogits, in place: a tensor of that size more would be the only one."""
    p, _ = softmax(student, peaks[0], totals[0])
    d = log_ratio(peaks, totals, student, teacher)
    if kind == "forward":
        q, _ = softmax(teacher, peaks[1], totals[1])
        slope = difference(p, q, d)
    else:
        slope = p * ((d if kind == "reverse" else _jsd_slope(d, beta)) - slope_mean[:, None])
    return student.copy_(slope * factor[:, None])


def logits_to_probs(peaks: Tensor, totals: Tensor, factor: Tensor, logits: Tensor) -> Tensor:
    """Makes `logits` factor * softmax(logits), in place."""
    return logits.copy_(softmax(logits, peaks[0], totals[0])[0] * factor[:, None])


def log_ratio(peaks: Tensor, totals: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """d = log p - log q."""
    offset = totals[0].log() - totals[1].log()
    return (student - peaks[0][:, None]) - (teacher - peaks[1][:, None]) - offset[:, None]


def difference(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """p - q, consistent with the rounding of d."""
    return torch.maximum(p, q) * torch.copysign(torch.expm1(-d.abs()), d)


def softmax(logits: Tensor, peak: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, and the logits less their peak."""
    shifted = logits - peak[:, None]
    return shifted.exp() * total.reciprocal()[:, None], shifted


def _jsd_slope(d: Tensor, beta: float) -> Tensor:
    # not log(p / m) - d: where p is far below q that difference of large numbers is all that counts
    return (1 - beta) * _log_ratio_to_mixture(d, beta)


def _log_ratio_to_mixture(d: Tensor, beta: float) -> Tensor:
    """log(p / m) = -log(1 - b + b exp(-d)), which is linear in d where exp(-d) would overflow."""
    clamped = d.clamp(min=-LARGEST_LOG_RATIO)
    return (d - clamped) - torch.log1p(beta * torch.expm1(-clamped))
