"""FLOPs of one training step by part, over all ranks; a multiply-add is two.

Attention counts each allowed (query, key) pair of the token trees once (a causal mask halves nothing twice), its
backward 2.5 times its forward (FlashAttention-2: five products against two); matrices' backward counts twice their
forward. `model` leaves recomputation out: MFU is taken from it.
"""

from dataclasses import dataclass, fields

from opsd_megatron.config import Distill, RunConfig
from opsd_megatron.launch.plan.workload import Pass, Workload
from opsd_megatron.models.architecture import Architecture

ATTENTION_BACKWARD = 2.5
MATRIX_BACKWARD = 2


@dataclass(frozen=True)
class Flops:
    """Of one step."""

    linear: float
    """The layers' matrices, forward and backward."""
    attention: float
    head: float
    """Logits of student and teacher at the response rows, and the gradients of rows and head."""
    teacher: float
    """Its layers; its logits are part of `head`."""
    recompute: float

    @property
    def executed(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def model(self) -> float:
        return self.executed - self.recompute


def step_flops(
    config: RunConfig, architecture: Architecture, work: Workload, dp: int, other: Architecture | None = None
) -> Flops:
    """Of all dp replicas. `other` is the architecture of an `OtherTeacher`."""
    linear, attention = forward_flops(architecture, work.student)
    distils = isinstance(config.objective, Distill)
    theirs = other or architecture
    head = 2 * architecture.vocab_size * architecture.hidden_size * 3
    teacher = sum(forward_flops(theirs, work.teacher)) if distils else 0
    if distils:
        head += 2 * architecture.vocab_size * theirs.hidden_size
    return Flops(
        linear=dp * linear * (1 + MATRIX_BACKWARD),
        attention=dp * attention * (1 + ATTENTION_BACKWARD),
        head=dp * work.student.total_rows * head,
        teacher=dp * teacher,
        recompute=dp * _recomputed(config.model.recompute, architecture, work.student, linear, attention),
    )


def forward_flops(architecture: Architecture, one: Pass) -> tuple[float, float]:
    """(matrices, attention) of the layers, forward, of one replica."""
    a = architecture
    linear = 2 * a.num_layers * a.layer_weights * one.total_tokens
    return linear, 4 * a.num_layers * a.heads * a.head_dim * one.total_pairs


def _recomputed(recompute: str, a: Architecture, student: Pass, linear: float, attention: float) -> float:
    if recompute == "full":
        return linear + attention
    if "mlp" in recompute:
        return 2 * a.num_layers * 3 * a.hidden_size * a.ffn_size * student.total_tokens
    return 0.0
