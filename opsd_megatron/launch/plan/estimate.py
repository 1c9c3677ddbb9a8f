"""A plan: memory, FLOPs, traffic and time of one recipe in one layout on one machine."""

from dataclasses import dataclass

from opsd_megatron.config import RunConfig
from opsd_megatron.errors import ConfigError
from opsd_megatron.launch.plan.flops import ATTENTION_BACKWARD, Flops, step_flops
from opsd_megatron.launch.plan.machine import GIB, Machine
from opsd_megatron.launch.plan.memory import RankMemory, rank_memory
from opsd_megatron.launch.plan.traffic import seconds, step_traffic
from opsd_megatron.launch.plan.workload import Workload, workload_of
from opsd_megatron.models.architecture import Architecture, check_layout


@dataclass(frozen=True)
class Plan:
    """Of one recipe on one machine."""

    config: RunConfig
    machine: Machine
    dp: int
    work: Workload
    ranks: tuple[RankMemory, ...]
    """One of each pipeline stage."""
    flops: Flops
    traffic: dict[str, float]
    """Bytes that a rank sends, by axis."""
    traffic_s: dict[str, float]
    """The same at link speed."""
    bubble: float
    """Time of the pipeline over that of its microbatches alone."""
    efficiency: float
    """Share of the devices' peak that executed FLOPs reach while a pipeline is full, communication included."""

    @property
    def fullest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.peak.total)

    @property
    def host_bytes(self) -> int:
        """Of one node: every rank of the fullest stage."""
        return max(sum(rank.host.values()) for rank in self.ranks) * self.machine.devices

    @property
    def excess(self) -> float:
        """Bytes of a device that are missing; 0 or less where the plan fits."""
        return self.fullest.peak.total - self.machine.usable_bytes

    @property
    def fits(self) -> bool:
        return self.excess <= 0 and self.host_bytes <= self.machine.host_gib * GIB

    @property
    def step_s(self) -> float:
        rate = self.machine.world_size * self.machine.peak_flops * self.efficiency
        return self.flops.executed / rate * self.bubble

    @property
    def mfu(self) -> float:
        """Model FLOPs, attention's backward counted 2.5 times its forward."""
        return self.flops.model / (self.step_s * self.machine.world_size * self.machine.peak_flops)

    @property
    def mfu_twice(self) -> float:
        """The same with attention's backward counted twice its forward, as for matrices: what others report."""
        less = self.flops.attention * (1 - 3 / (1 + ATTENTION_BACKWARD))
        return self.mfu * (self.flops.model - less) / self.flops.model


def make_plan(
    config: RunConfig,
    architecture: Architecture,
    machine: Machine,
    efficiency: float = 0.4,
    other: Architecture | None = None,
) -> Plan:
    """`other` is the architecture of an `OtherTeacher`.

    Raises:
        ConfigError: the layout divides neither the model nor the machine, or the prompts not dp.
    """
    check_layout(architecture, config.parallel)
    if other is not None:
        check_layout(other, config.parallel)
    dp = config.parallel.data_parallel_size(machine.world_size)
    if config.batch.prompts_per_step % dp:
        raise ConfigError(
            f"batch.prompts_per_step={config.batch.prompts_per_step} is not a multiple of dp = {dp}; change it to "
            f"{-(-config.batch.prompts_per_step // dp) * dp}"
        )
    work = workload_of(config, dp)
    stages = range(config.parallel.pp)
    ranks = tuple(rank_memory(config, architecture, work, dp, stage, machine.is_cuda, other) for stage in stages)
    traffic = step_traffic(config, architecture, work, dp)
    runs = work.student.microbatches * (config.parallel.vpp or 1)
    return Plan(
        config=config,
        machine=machine,
        dp=dp,
        work=work,
        ranks=ranks,
        flops=step_flops(config, architecture, work, dp, other),
        traffic=traffic,
        traffic_s=seconds(traffic, config, dp, machine),
        bubble=(runs + config.parallel.pp - 1) / runs,
        efficiency=efficiency,
    )
