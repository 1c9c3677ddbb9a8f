"""A plan on the terminal."""

from collections.abc import Iterable
from dataclasses import fields

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from opsd_megatron.config import RunConfig
from opsd_megatron.launch.plan.estimate import Plan
from opsd_megatron.launch.plan.machine import GIB
from opsd_megatron.launch.plan.memory import PARTS, Moment
from opsd_megatron.launch.plan.search import changes

SHOWN_SHARE = 0.01
"""Tensors of at least this share of the peak are listed by name."""


def show(plan: Plan, title: str, console: Console, alternatives: Iterable[Plan] = ()) -> None:
    """Prints everything about a plan, and what would fit where it does not."""
    console.print(_summary(plan, title))
    console.print(_memory(plan), _tensors(plan.fullest.peak))
    if plan.fullest.host:
        console.print(_host(plan))
    console.print(_work(plan), _traffic(plan))
    if not plan.fits:
        console.print(_shortage(plan))
        console.print(_alternatives(plan.config, list(alternatives)))


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def layout_of(config: RunConfig, dp: int) -> str:
    parallel = config.parallel
    vpp = f" vpp{parallel.vpp}" if parallel.vpp else ""
    sequence = " sp" if parallel.sequence_parallel else ""
    return f"tp{parallel.tp}{sequence} pp{parallel.pp}{vpp} cp{parallel.cp} dp{dp}"


def _summary(plan: Plan, title: str) -> RenderableType:
    machine, student, teacher = plan.machine, plan.work.student, plan.work.teacher
    tokens = plan.dp * student.total_tokens
    rate = tokens / plan.step_s / machine.world_size
    offload = ", optimizer offloaded" if plan.config.optimizer.cpu_offload else ""
    lines = [
        f"{title}: {layout_of(plan.config, plan.dp)}, recompute {plan.config.model.recompute}{offload}",
        f"on {machine.nodes} x {machine.devices} devices of {machine.memory_gib:.1f} GiB, of which "
        f"{machine.headroom_gib:.1f} GiB stay free for what is not predicted (context, NCCL, fragmentation)",
        f"a rank's step: {student.microbatches} student microbatches of {student.tokens:,} tokens and {student.rows:,} "
        f"response rows; {teacher.microbatches} teacher microbatches of {teacher.tokens:,} tokens",
        f"peak {plan.fullest.peak.total / GIB:.1f} GiB at {plan.fullest.peak.name} on pipeline stage "
        f"{plan.fullest.stage}; host memory {plan.host_bytes / GIB:.0f} GiB a node"
        + ("" if plan.fits else "   DOES NOT FIT"),
        f"the trainer's part of a step takes {plan.step_s:,.0f} s if executed FLOPs reach {plan.efficiency:.0%} of the "
        f"peak (pipeline bubble x{plan.bubble:.2f}): {rate:,.0f} tokens/s a device",
        f"MFU {plan.mfu:.1%} with attention's backward counted 2.5 x its forward, {plan.mfu_twice:.1%} at 2 x",
    ]
    return Group(*lines)


def _memory(plan: Plan) -> Table:
    """GiB by part at each moment of the fullest stage: the worst of the moments of one name."""
    worst: dict[str, Moment] = {}
    for moment in plan.fullest.moments:
        if moment.name not in worst or moment.total > worst[moment.name].total:
            worst[moment.name] = moment
    table = _table("GiB a rank", *worst)
    for part in PARTS:
        sizes = [moment.part(part) / GIB for moment in worst.values()]
        if any(size >= 0.005 for size in sizes):
            table.add_row(part, *(f"{size:.2f}" for size in sizes))
    table.add_section()
    table.add_row("total", *(f"{moment.total / GIB:.2f}" for moment in worst.values()))
    return table


def _tensors(peak: Moment) -> Table:
    table = _table(f"tensors at the peak ({peak.name})", "GiB")
    named = [(part, name, size) for part, tensors in peak.tensors.items() for name, size in tensors.items()]
    rest = peak.total
    for part, name, size in sorted(named, key=lambda row: -row[2]):
        if size >= SHOWN_SHARE * peak.total:
            table.add_row(f"{part}: {name}", f"{size / GIB:.2f}")
            rest -= size
    table.add_row("others, each below 1 %", f"{rest / GIB:.2f}")
    return table


def _host(plan: Plan) -> Table:
    table = _table("host memory of a rank", "GiB")
    for name, size in plan.fullest.host.items():
        table.add_row(name, f"{size / GIB:.2f}")
    return table


def _work(plan: Plan) -> Table:
    table = _table("FLOPs of a step, all ranks", "PFLOP", "share")
    for part in fields(plan.flops):
        size = getattr(plan.flops, part.name)
        table.add_row(part.name, f"{size / 1e15:,.1f}", f"{size / plan.flops.executed:.1%}")
    table.add_row("executed", f"{plan.flops.executed / 1e15:,.1f}", "")
    return table


def _traffic(plan: Plan) -> Table:
    table = _table("sent by a rank in a step", "GB", "s at link speed", "of the step")
    for axis, sent in plan.traffic.items():
        taken = plan.traffic_s[axis]
        table.add_row(axis, f"{sent / 1e9:,.1f}", f"{taken:.2f}", f"{taken / plan.step_s:.1%}")
    return table


def _shortage(plan: Plan) -> str:
    device = f"{plan.excess / GIB:.1f} GiB too much for a device" if plan.excess > 0 else ""
    missing = plan.host_bytes / GIB - plan.machine.host_gib
    host = f"{missing:.0f} GiB too much for a node's host memory" if missing > 0 else ""
    return f"Does not fit: {' and '.join(filter(None, (device, host)))}."


def _alternatives(asked: RunConfig, plans: list[Plan]) -> RenderableType:
    if not plans:
        return "No layout, recomputation or offload makes it fit on this machine: take more nodes or shorter contexts."
    table = _table("nearest that fit", "GiB", "host GiB a node", "step s", "change")
    table.columns[-1].justify = "left"
    for plan in plans:
        peak, host = plan.fullest.peak.total / GIB, plan.host_bytes / GIB
        flags = " ".join(changes(asked, plan.config))
        table.add_row(layout_of(plan.config, plan.dp), f"{peak:.1f}", f"{host:.0f}", f"{plan.step_s:,.0f}", flags)
    return table
