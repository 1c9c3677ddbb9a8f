"""Layouts that fit where the one asked for does not, nearest first."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from opsd_megatron.config import ParallelConfig, RunConfig
from opsd_megatron.errors import ConfigError
from opsd_megatron.launch.plan.estimate import Plan, make_plan
from opsd_megatron.launch.plan.machine import Machine
from opsd_megatron.models.architecture import Architecture

RECOMPUTE = ("none", "norms", "mlp", "mlp+norms", "full")


def fitting_layouts(
    config: RunConfig,
    architecture: Architecture,
    machine: Machine,
    efficiency: float = 0.4,
    count: int = 5,
    other: Architecture | None = None,
) -> list[Plan]:
    """At most `count` plans of the same recipe that fit: fewest changes first, then the shortest step.

    Varied are tp (inside a node), pp, vpp, cp, recomputation and the optimizer's offload; dp is what remains.
    """
    found = []
    for candidate in _candidates(config, machine):
        try:
            plan = make_plan(candidate, architecture, machine, efficiency, other)
        except ConfigError:
            continue
        if plan.fits:
            found.append(plan)
    return sorted(found, key=lambda plan: (len(changes(config, plan.config)), plan.step_s))[:count]


def changes(before: RunConfig, after: RunConfig) -> list[str]:
    """`field=value` of what the search changed."""
    names = ("parallel.tp", "parallel.pp", "parallel.vpp", "parallel.cp", "model.recompute", "optimizer.cpu_offload")
    pairs = [(name, _value(before, name), _value(after, name)) for name in names]
    return [f"{name}={now}" for name, was, now in pairs if was != now]


def _value(config: RunConfig, name: str):
    concern, field = name.split(".")
    return getattr(getattr(config, concern), field)


def _candidates(config: RunConfig, machine: Machine) -> Iterator[RunConfig]:
    powers = [1 << exponent for exponent in range(machine.world_size.bit_length())]
    sizes = [tp for tp in powers if tp <= machine.devices], powers, (None, 2), powers
    offloads = (False, True) if machine.is_cuda else (False,)
    for tp, pp, vpp, cp in product(*sizes):
        if tp * pp * cp > machine.world_size or (vpp and pp == 1):
            continue
        parallel = ParallelConfig(tp=tp, pp=pp, vpp=vpp, cp=cp, sequence_parallel=tp > 1)
        for recompute, offload in product(RECOMPUTE, offloads):
            yield replace(
                config,
                parallel=parallel,
                model=replace(config.model, recompute=recompute),
                optimizer=replace(config.optimizer, cpu_offload=offload),
            )
