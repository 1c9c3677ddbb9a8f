"""RMSNorm as Megatron's layers take it, and a layer that computes its norms again in backward.

Megatron's own recompute mode "layernorm" calls Transformer Engine (CheckpointWithoutOutput in
tensor_parallel/random.py, 0.16.1).
"""

from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opsd_megatron.parallel import device as devices


class RmsNorm(torch.nn.RMSNorm):
    """RMSNorm with the arguments of a Megatron norm; core's own wrapper refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **unused):
        super().__init__(hidden_size, eps=eps, device=devices.device(), dtype=config.params_dtype)
        # under sequence parallelism each tp rank sees other tokens: core sums the gradients of weights marked so
        self.weight.sequence_parallel = config.sequence_parallel


class RecomputedRmsNorm(RmsNorm):
    """Keeps its input only."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class _Normed:
    """A norm's output, or what takes its place until backward."""

    norm: RecomputedRmsNorm
    input: Tensor
    output: Tensor | None

    def is_output(self, tensor: Tensor) -> bool:
        output = self.output
        return output is not None and tensor.data_ptr() == output.data_ptr() and tensor.shape == output.shape


class NormRecomputingLayer(TransformerLayer):
    """Megatron's layer with `RecomputedRmsNorm` before attention and MLP, whose outputs nobody keeps.

    An autograd node that would save one of them saves the norm's input, which is the residual stream, and computes
    the same numbers again when backward asks.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._latest: _Normed | None = None  # holds the output, so that its memory is not given to another tensor
        for norm in (self.input_layernorm, self.pre_mlp_layernorm):
            norm.register_forward_hook(self._remember)

    def forward(self, *arguments, **options):
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                return super().forward(*arguments, **options)
        finally:
            self._latest = None

    def _remember(self, norm: RecomputedRmsNorm, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._latest = _Normed(norm, inputs[0].detach(), output)

    def _pack(self, tensor: Tensor) -> Tensor | _Normed:
        latest = self._latest
        if latest is None or not latest.is_output(tensor):
            return tensor
        return _Normed(latest.norm, latest.input, None)


def _unpack(saved: Tensor | _Normed) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    with torch.no_grad():
        return saved.norm.forward(saved.input)
