"""From configuration to objective."""

from opsd_megatron.config import Distill, SelfSft
from opsd_megatron.objectives.distill import DistillObjective
from opsd_megatron.objectives.objective import Objective
from opsd_megatron.objectives.sft import SftObjective
from opsd_megatron.parallel.axis import Axis


def build_objective(config: Distill | SelfSft, temperature: float, tp: Axis, cp: Axis, vocab_size: int) -> Objective:
    """`temperature` is that of the rollouts; self-SFT always learns at 1. `vocab_size` is without padding."""
    if isinstance(config, SelfSft):
        return SftObjective(config, 1.0, tp, vocab_size)
    return DistillObjective(config, temperature, tp, cp, vocab_size)
