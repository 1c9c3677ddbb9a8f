"""Rotary positions (arXiv:2104.09864) read from the batch: plain, llama3 and YaRN (arXiv:2309.00071).

Core's own module counts positions itself, slices them for context parallelism with CUDA calls, and knows only one set
of llama3 parameters (core/models/common/embeddings/rotary_pos_embedding.py, 0.16.1); and its layers make cosines and
sines of their own, each of which is kept for the backward pass.
"""

import math

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from opsd_megatron.models.architecture import RopeConfig

Rotation = tuple[Float[Tensor, "tokens 1 half_head_dim"], Float[Tensor, "tokens 1 half_head_dim"]]
"""Cosines and sines."""


class TreeRotary(torch.nn.Module):
    """Cosines and sines for the positions of a microbatch, made once for all of its layers."""

    def __init__(self, rope: RopeConfig, head_dim: int):
        super().__init__()
        # a plain attribute: as a buffer it would follow the model to bfloat16 and lose the positions
        self.inverse_frequencies = inverse_frequencies(rope, head_dim)

    def forward(self, position_ids: Int64[Tensor, "tokens"], dtype: torch.dtype) -> Rotation:
        """In `dtype`, from angles in float32."""
        self.inverse_frequencies = self.inverse_frequencies.to(position_ids.device)
        angles = position_ids.float()[:, None] * self.inverse_frequencies  # [tokens, head_dim / 2]
        return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def rotate(heads: Float[Tensor, "tokens heads head_dim"], by: Rotation) -> Float[Tensor, "tokens heads head_dim"]:
    """Every pair (i, i + head_dim / 2) turned by its angle; for the backward pass only `by` is kept."""
    return _Rotate.apply(heads, *by)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turned(heads, cosines, sines)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        cosines, sines = ctx.saved_tensors
        return _turned(gradient, cosines, -sines), None, None


def _turned(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    turned = torch.empty_like(heads, memory_format=torch.contiguous_format)
    out_first, out_second = turned.chunk(2, dim=-1)
    torch.mul(first, cosines, out=out_first).sub_(second * sines)
    torch.mul(second, cosines, out=out_second).add_(first * sines)
    return turned


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Float32[Tensor, "half_head_dim"]:
    """Radians per token of each pair of dimensions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "llama3":
        return _stretch_long_waves(plain, rope)
    if rope.kind == "yarn":
        return _interpolate_by_parts(rope, exponents, head_dim)
    return plain


def attention_factor(rope: RopeConfig) -> float:
    """YaRN's factor on queries and on keys (its equation 22); 1 elsewhere. Scores are multiplied by its square."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return float(rope.attention_factor)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _stretch_long_waves(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: waves longer than original / low are slowed by `factor`, shorter than original / high are kept."""
    wavelength = 2 * math.pi / plain
    longest = rope.original_max_positions / rope.low_freq_factor
    shortest = rope.original_max_positions / rope.high_freq_factor
    share = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - share) * plain / rope.factor + share * plain
    slowed = torch.where(wavelength > longest, plain / rope.factor, plain)
    between = (wavelength <= longest) & (wavelength >= shortest)
    return torch.where(between, blended, slowed)


def _interpolate_by_parts(rope: RopeConfig, exponents: Tensor, head_dim: int) -> Tensor:
    """YaRN, "NTK-by-parts": dimensions with few turns over the original context are slowed, fast ones are kept."""

    def dimension_of(turns: float) -> float:
        return head_dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high  # a ramp of no width
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    periods = rope.theta**exponents
    return 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept
