"""Bytes that one rank sends on each axis in one step, by the formulas of `parallel/traffic.py` and the ring's."""

from opsd_megatron.config import Distill, RunConfig
from opsd_megatron.launch.plan.machine import Machine
from opsd_megatron.launch.plan.parameters import stage_parameters
from opsd_megatron.launch.plan.workload import Workload
from opsd_megatron.models.architecture import Architecture

EXACT = 4
"""Bytes of float32, in which gradients are reduced."""


def step_traffic(config: RunConfig, architecture: Architecture, work: Workload, dp: int) -> dict[str, float]:
    """Axis name -> bytes of a rank of the busiest stage; axes of one rank are left out.

    Rows of the row exchange, counts, norms and metrics are left out: they are small beside the others.
    """
    parallel = config.parallel
    value = 2 if config.model.dtype == "bfloat16" else 4
    sent: dict[str, float] = {}
    if parallel.tp > 1:
        sent["tp"] = _tensor(config, architecture, work, value)
    if parallel.cp > 1:
        sent["cp"] = _ring(config, architecture, work, value)
    if parallel.pp > 1:
        sent["pp"] = _pipeline(config, architecture, work, value)
    if dp * parallel.cp > 1:
        sent["dp x cp"] = _gradients(config, architecture, dp, value)
    return sent


def seconds(traffic: dict[str, float], config: RunConfig, dp: int, machine: Machine) -> dict[str, float]:
    """At link speed: tp ranks are neighbours, then cp, then dp, and pipeline stages are farthest apart."""
    parallel = config.parallel
    span = {"tp": parallel.tp, "cp": parallel.tp * parallel.cp, "dp x cp": parallel.tp * parallel.cp * dp}
    return {axis: sent / machine.link(span.get(axis, machine.world_size)) for axis, sent in traffic.items()}


def _ring(config: RunConfig, a: Architecture, work: Workload, value: int) -> float:
    """2 (W-1) c for keys and values in forward and in backward, 2 (W-1) c' for their gradients."""
    parallel, layers = config.parallel, a.num_layers // config.parallel.pp
    numbers = work.student.tokens * a.kv_heads * a.head_dim // parallel.tp
    forwards = 3 if config.model.recompute == "full" else 2  # backward passes keys and values round once more
    hops = 2 * (parallel.cp - 1) * numbers
    return work.student.microbatches * layers * hops * (forwards * value + EXACT)


def _tensor(config: RunConfig, a: Architecture, work: Workload, value: int) -> float:
    """Per layer and pass over it: two matrices that sum their outputs, two that sum their inputs' gradients.

    An all-reduce is a reduce-scatter and an all-gather. Sequence parallelism does either where it is needed, and
    gathers the inputs of two matrices again for their weights' gradients. The first stage sums the embedding's parts;
    the last one gathers what comes out of it under sequence parallelism, and sums the gradient of the rows.
    """
    parallel = config.parallel
    layers, share = a.num_layers // parallel.pp, (parallel.tp - 1) / parallel.tp
    is_cut = parallel.sequence_parallel
    again = {"full": 4, "mlp": 2, "mlp+norms": 2}.get(config.model.recompute, 0)
    student = work.student.microbatches * work.student.tokens * value
    teacher = isinstance(config.objective, Distill) * work.teacher.microbatches * work.teacher.tokens * value
    rows = 2 * work.student.microbatches * work.student.rows * EXACT
    inside = layers * (student * (4 + (6 if is_cut else 4) + again) + teacher * 4)
    first = 2 * student + (1 if is_cut else 2) * teacher
    last = is_cut * (student + teacher) + rows
    ends = first + last if parallel.pp == 1 else max(first, last)
    return (inside + ends) * a.hidden_size * share


def _pipeline(config: RunConfig, a: Architecture, work: Workload, value: int) -> float:
    """Activations on for each model chunk but the last, gradients back for each but the first."""
    parallel = config.parallel
    width = a.hidden_size * value / (parallel.tp if parallel.sequence_parallel else 1)
    chunks = parallel.vpp or 1
    # with two stages each has one of the ends; with more, those between have none
    sent = work.student.microbatches * work.student.tokens * (2 * chunks - (parallel.pp == 2))
    if isinstance(config.objective, Distill):
        sent += work.teacher.microbatches * work.teacher.tokens * chunks
    return sent * width


def _gradients(config: RunConfig, a: Architecture, dp: int, value: int) -> float:
    """Distributed optimizer: gradients scattered, parameters gathered; otherwise gradients all-reduced."""
    ranks = dp * config.parallel.cp
    stages = {0, config.parallel.pp - 1}
    count = max(stage_parameters(a, config.parallel, stage).total for stage in stages)
    per_parameter = EXACT + value if config.optimizer.distributed else 2 * EXACT
    return (ranks - 1) / ranks * count * per_parameter
