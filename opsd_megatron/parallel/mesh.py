"""The grid of ranks: every process group of a run, made once, handed on as arguments.

The only place that calls Megatron's parallel_state. Ranks are ordered tp fastest, then cp, dp, pp.
"""

import gc
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from opsd_megatron.config import ParallelConfig
from opsd_megatron.parallel import device as devices
from opsd_megatron.parallel.axis import Axis

devices.install()  # before megatron's modules below

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402


@dataclass(frozen=True)
class Mesh:
    """This rank's place on every axis; axes of one rank have no group and never communicate."""

    tp: Axis
    pp: Axis
    cp: Axis
    dp: Axis
    dp_cp: Axis
    """Ranks over which gradients of one parameter shard are summed."""
    replica: Axis
    """The tp x pp x cp ranks that together hold one copy of the model and work on one share of the data."""
    world: Axis
    vpp: int | None
    sequence_parallel: bool
    device: torch.device
    collection: ProcessGroupCollection
    """The same groups as Megatron's modules take them."""

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1

    def describe(self) -> str:
        """One line with the size of every axis."""
        sizes = " ".join(f"{axis.name}={axis.size}" for axis in (self.tp, self.pp, self.cp, self.dp, self.dp_cp))
        interleaved = f" vpp={self.vpp}" if self.vpp else ""
        sequence = " sequence_parallel" if self.sequence_parallel else ""
        where = f"{self.world.size} ranks on {self.device.type} ({devices.backend()})"
        return f"{sizes} replica={self.replica.size}{interleaved}{sequence}, {where}"


def build_mesh(parallel: ParallelConfig, seed: int = 1234) -> Mesh:
    """The mesh of this layout over all ranks; every rank calls it with the same arguments.

    Joins the job of torchrun's environment variables first, or makes a job of one rank where there are none. A second
    call takes the groups of the first down. `seed` feeds Megatron's random states.

    Raises:
        ConfigError: the world size is not a multiple of tp * pp * cp.
    """
    _join_job()
    parallel.data_parallel_size(dist.get_world_size())
    if parallel_state.model_parallel_is_initialized():
        close_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        context_parallel_size=parallel.cp,
        create_gloo_process_groups=False,  # a second set for CPU tensors, which nothing here sends
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    dp = _axis("dp", groups.dp)
    return Mesh(
        tp=_axis("tp", groups.tp),
        pp=_axis("pp", groups.pp),
        cp=_axis("cp", groups.cp),
        dp=dp,
        dp_cp=_axis("dp_cp", groups.dp_cp),
        replica=_replica_axis(dp, parallel),
        world=_axis("world", dist.group.WORLD),
        vpp=parallel.vpp,
        sequence_parallel=parallel.sequence_parallel,
        device=devices.device(),
        collection=groups,
    )


def close_groups() -> None:
    """Takes every group of the last mesh down but the world's, which the job stays joined by; every rank calls it.

    Megatron makes more groups than a mesh shows, and gloo keeps threads for each that wake a hundred times a second.
    """
    parallel_state.destroy_model_parallel()
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()  # models in reference cycles hold groups, and with them their threads


def _join_job() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(devices.device())
    if dist.is_initialized():
        return
    if "RANK" in os.environ:
        dist.init_process_group(devices.backend())
    else:
        dist.init_process_group(devices.backend(), store=dist.HashStore(), rank=0, world_size=1)


def _axis(name: str, group) -> Axis:
    axis = Axis.of_group(name, group)
    return axis if axis.size > 1 else Axis.single(name)


def _replica_axis(dp: Axis, parallel: ParallelConfig) -> Axis:
    """Megatron has no group of one replica's ranks, so it is made here, on every rank for every replica."""
    if dp.size == 1:
        return _axis("replica", dist.group.WORLD)
    if parallel.model_ranks == 1:
        return Axis.single("replica")
    inner = parallel.tp * parallel.cp
    stages = [stage * inner * dp.size for stage in range(parallel.pp)]
    mine = None
    for index in range(dp.size):
        ranks = [start + index * inner + within for start in stages for within in range(inner)]
        group = dist.new_group(ranks)
        mine = group if index == dp.rank else mine
    return _axis("replica", mine)
