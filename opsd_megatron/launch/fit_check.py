"""Will it fit: the memory of one rank by arithmetic, before anything is loaded."""

from dataclasses import dataclass

from opsd_megatron.config import RunConfig
from opsd_megatron.models.architecture import Architecture

GIB = 1 << 30


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the fullest rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        parts["activations"] = self.activations
        listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        return f"{self.total / GIB:.1f} GiB per rank ({listed})"


def plan_memory(config: RunConfig, architecture: Architecture, dp: int) -> MemoryPlan:
    """Weights, float32 main gradients, Adam's states, and the activations that recomputation leaves.

    Activations are a lower bound (layer inputs, and attention's output and log-sum-exp; without recomputation about
    34 bytes per token and hidden unit in bf16), so that a run refused here cannot fit.
    """
    parallel, bytes_per_value = config.parallel, 2 if config.model.dtype == "bfloat16" else 4
    parameters = count_parameters(architecture) // (parallel.tp * parallel.pp)
    states = parameters * (12 if config.model.dtype == "bfloat16" else 8)
    if config.optimizer.distributed:
        states //= dp * parallel.cp
    if config.optimizer.cpu_offload:
        states = 0
    tokens = config.batch.student_microbatch_tokens // parallel.cp
    layers = architecture.num_layers // parallel.pp
    in_flight = min(parallel.pp, 2)
    per_layer = tokens * architecture.hidden_size * bytes_per_value
    kept = {"full": 1.0, "mlp": 8.0, "none": 17.0}[config.model.recompute]
    activations = int(per_layer * kept * layers * in_flight) // parallel.tp
    return MemoryPlan(parameters * bytes_per_value, parameters * 4, states, activations)


def count_parameters(architecture: Architecture) -> int:
    """Parameters of the whole model."""
    a = architecture
    attention = a.hidden_size * a.head_dim * (2 * a.heads + 2 * a.kv_heads)
    layer = attention + 3 * a.hidden_size * a.ffn_size + 2 * a.hidden_size
    return a.num_layers * layer + a.vocab_size * a.hidden_size * (1 if a.tied else 2) + a.hidden_size
