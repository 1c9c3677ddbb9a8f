"""The two passes of one optimizer step: the teacher's, in its own layout, and the student's with the loss."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from opsd_megatron.models.build import head_weight
from opsd_megatron.models.forward import run_schedule
from opsd_megatron.models.teacher import Teacher, score
from opsd_megatron.objectives.metrics import MetricSums, add_metrics
from opsd_megatron.objectives.objective import Objective
from opsd_megatron.parallel.mesh import Mesh
from opsd_megatron.train.layout import StepLayout
from opsd_megatron.train.token_values import TokenValues


def score_responses(teacher: Teacher, layout: StepLayout, mesh: Mesh) -> list[Float[Tensor, "head_rows hidden"]] | None:
    """For each student microbatch the teacher's hidden rows that this rank's head needs; None off the last stage.

    The teacher runs without grad in its own layout: every cp rank scores other samples.
    """
    with teacher.active() as chunks:
        rows = score(chunks, layout.teacher, mesh)
    if rows is None:
        return None
    rows = layout.teacher_to_head.move(rows)
    return list(rows.split([len(microbatch.responses) for microbatch in layout.student]))


def student_pass(
    chunks: Sequence[nn.Module],
    layout: StepLayout,
    objective: Objective,
    teacher_hidden: list[Tensor] | None,
    teacher_weight: Tensor | None,
    mesh: Mesh,
    kept: TokenValues | None = None,
) -> MetricSums:
    """Forward and backward of all microbatches; leaves the gradient of the global mean in the main gradients.

    Returns this rank's metric sums over its microbatches on the last stage, nothing elsewhere. `kept` is given the
    values of single tokens.
    """

    def loss_of(index: int, hidden: Tensor):
        microbatch = layout.student[index]
        rows = microbatch.to_head.move(hidden[microbatch.shard.rows])
        share = objective.loss(
            rows,
            head_weight(chunks[-1]),
            None if teacher_hidden is None else teacher_hidden[index],
            teacher_weight,
            layout.table.select(microbatch.responses),
        )
        if kept is not None:
            kept.add(microbatch.responses, share.token_values)
        return share

    shards = [microbatch.shard for microbatch in layout.student]
    total: MetricSums = {}
    for sums in run_schedule(chunks, shards, mesh, loss_of, forward_only=False):
        total = add_metrics(total, sums)
    return total
