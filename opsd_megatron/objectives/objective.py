"""What an objective is: something that turns this rank's response rows into a loss, its count and metric sums."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from opsd_megatron.objectives.metrics import MetricSums
from opsd_megatron.types import ResponseTable


class LossSums(NamedTuple):
    """One rank's share of one microbatch. The global loss is the sum of `loss_sum` over the sum of `count`."""

    loss_sum: Float[Tensor, ""]
    """Differentiable, equal on all tp ranks, connected to hidden states and head even without rows."""
    count: int
    """Response tokens with a weight above 0."""
    metric_sums: MetricSums
    """Detached; the same keys whatever the rows."""
    token_values: Mapping[str, Float[Tensor, "rows"]] = MappingProxyType({})
    """Detached, of each row, for people to look at."""


@runtime_checkable
class Objective(Protocol):
    needs_teacher: ClassVar[bool]

    def loss(
        self,
        student_hidden: Float[Tensor, "rows hidden"],
        student_weight: Float[Tensor, "vocab_shard hidden"],
        teacher_hidden: Float[Tensor, "rows teacher_hidden"] | None,
        teacher_weight: Float[Tensor, "teacher_vocab_shard teacher_hidden"] | None,
        responses: ResponseTable,
    ) -> LossSums:
        """Of the rows of `responses`, which row by row are the tokens that the hidden states predict."""
        ...
