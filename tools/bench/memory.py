"""The planner's memory against the allocator's, layout by layout; prints a table, and the same as JSON.

    python tools/bench/memory.py --output runs/bench/memory.json

Every layout runs one real training step on gloo ranks: teacher's pass, student's pass, optimizer. Measured is the peak
of live bytes in torch's allocator (memory events of torch.profiler: allocations minus frees, from before the model is
built), predicted is the peak of `opsd_megatron.launch.plan.memory` for the same recipe. Of a pipeline stage's ranks the
one with the largest peak is shown; beside it the peak of resident memory above what the process held before. A gradient
step of zeros goes first, so that optimizer states exist. A second table has the bytes that a rank sends in the step.

Layouts marked * were chosen before the model of memory was written, and measured for the first time when it was done.
"""

import argparse
import json
import os
import resource
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from memory_cases import CASES, Case, make_rollouts
from rich import box
from rich.console import Console
from rich.table import Table
from side_by_side import versions

from opsd_megatron.config import OtherTeacher
from opsd_megatron.launch.plan.memory import PARTS, RankMemory, rank_memory
from opsd_megatron.launch.plan.traffic import step_traffic
from opsd_megatron.launch.plan.workload import workload_of
from opsd_megatron.models.architecture import architecture_of
from opsd_megatron.models.build import build_model
from opsd_megatron.models.teacher import build_teacher
from opsd_megatron.objectives.build import build_objective
from opsd_megatron.parallel.mesh import Mesh, build_mesh
from opsd_megatron.parallel.traffic import count_traffic
from opsd_megatron.train.layout import lay_out
from opsd_megatron.train.optimizer import apply_gradients, make_trainable
from opsd_megatron.train.step import score_responses, student_pass


@dataclass(frozen=True)
class Measured:
    """What one rank saw."""

    stage: int
    peaks: dict[str, int]
    """Most live bytes by phase."""
    resident: int
    traffic: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


def train_one_step(case: Case, mesh: Mesh, begin: Callable[[str], None]) -> dict[str, int]:
    """All of a step of `train/loop.py` between rollouts and metrics, from an empty process on; bytes sent by axis."""
    config, architecture = case.recipe, architecture_of(case.model)
    dtype = getattr(torch, config.model.dtype)
    assert not isinstance(config.teacher, OtherTeacher)  # it would need files
    modules = build_model(architecture, mesh, dtype, config.model.recompute)
    teacher = build_teacher(config.teacher, modules, mesh)
    chunks, optimizer = make_trainable(modules, mesh, config.optimizer, dtype)
    apply_gradients(optimizer, 0.0)
    objective = build_objective(config.objective, config.rollout.temperature, mesh.tp, mesh.cp, architecture.vocab_size)
    prompts = config.batch.prompts_per_step // mesh.dp.size
    rollouts = make_rollouts(config, prompts, architecture.vocab_size, seed=mesh.dp.rank)
    layout = lay_out(rollouts, mesh, config.batch, architecture.pair_cost)
    axes = {"tp": mesh.tp.group, "cp": mesh.cp.group, "pp": mesh.pp.group, "dp x cp": mesh.dp_cp.group}
    with count_traffic(axes) as traffic:
        begin("teacher pass")
        hidden = score_responses(teacher, layout, mesh) if objective.needs_teacher else None
        begin("student pass")
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        student_pass(chunks, layout, objective, hidden, teacher.head_weight(), mesh)
        begin("optimizer step")
        apply_gradients(optimizer, 1e-6)
        teacher.update()
    return {axis: sent for axis, sent in traffic.bytes_sent.items() if sent}


def measure_here(case: Case) -> Measured:
    """One step on this rank of a job that has begun."""
    mesh = build_mesh(case.parallel)
    begun: list[tuple[int, str]] = [(time.time_ns(), "setup")]
    held = psutil.Process().memory_info().rss
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        traffic = train_one_step(case, mesh, lambda phase: begun.append((time.time_ns(), phase)))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held
    return Measured(mesh.pp.rank, peak_by_phase(profiler, begun), resident, traffic)


def measure_rank(rank: int, case: Case, port: int, results) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks))
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=case.ranks)
    results.put(measure_here(case))
    dist.barrier()


def peak_by_phase(profiler: torch.profiler.profile, begun: list[tuple[int, str]]) -> dict[str, int]:
    """Most live bytes in each phase: what was allocated and has not been freed.

    gloo's threads free some of the tensors that they have sent, which the profiler does not see. A block also counts as
    freed when its addresses are given out again.
    """
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    coming, phase = list(begun), ""
    peaks = dict.fromkeys([name for _, name in begun], 0)
    starts: list[int] = []  # sorted
    sizes: dict[int, int] = {}
    live = 0
    for time_ns, address, size in sorted(_memory_events(profiler.profiler.kineto_results.experimental_event_tree())):
        while coming and time_ns >= coming[0][0]:
            phase = coming.pop(0)[1]
        at = bisect_left(starts, address)
        if at and starts[at - 1] + sizes[starts[at - 1]] > address:
            at -= 1
        while at < len(starts) and starts[at] < address + max(size, 1):
            live -= sizes.pop(starts.pop(at))
        if size > 0:
            starts.insert(at, address)
            sizes[address] = size
            live += size
        peaks[phase] = max(peaks[phase], live)
    return peaks


def _memory_events(nodes) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes) of each allocation, and of each free with negative bytes."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        waiting.extend(node.children)
        if node.tag == torch._C._profiler._EventType.Allocation:
            yield node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size


def measure(case: Case) -> list[Measured]:
    """Every rank's figures, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    results = context.Queue()
    processes = [
        context.Process(target=measure_rank, args=(rank, case, store.port, results)) for rank in range(case.ranks)
    ]
    for process in processes:
        process.start()
    try:
        return [results.get(timeout=1200) for _ in processes]
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def predict(case: Case, stage: int) -> RankMemory:
    architecture, work = architecture_of(case.model), workload_of(case.recipe, case.dp)
    return rank_memory(case.recipe, architecture, work, case.dp, stage, is_cuda=False)


def predict_traffic(case: Case) -> dict[str, float]:
    return step_traffic(case.recipe, architecture_of(case.model), workload_of(case.recipe, case.dp), case.dp)


def compare(name: str, case: Case) -> list[dict[str, Any]]:
    """Predicted and measured peak of each pipeline stage; traffic with the first."""
    figures, rows = measure(case), []
    traffic = {axis: max(one.traffic.get(axis, 0) for one in figures) for axis in predict_traffic(case)}
    for stage in range(case.parallel.pp):
        memory = predict(case, stage)
        fullest = max((one for one in figures if one.stage == stage), key=lambda one: one.peak)
        rows.append(
            {
                "layout": name + (f", stage {stage}" if case.parallel.pp > 1 else ""),
                "held_out": case.held_out,
                "predicted_parts": {part: memory.peak.part(part) for part in PARTS},
                "predicted_at": memory.peak.name,
                "predicted": memory.peak.total,
                "measured_phases": fullest.peaks,
                "measured": fullest.peak,
                "resident": fullest.resident,
                "ratio": memory.peak.total / fullest.peak,
                "predicted_traffic": predict_traffic(case) if stage == 0 else {},
                "measured_traffic": traffic if stage == 0 else {},
            }
        )
    return rows


def report(rows: list[dict[str, Any]], output: Path | None) -> None:
    parts = [part for part in PARTS if any(row["predicted_parts"][part] for row in rows)]
    memory = _table("Peak of one rank in MiB: predicted by part, and measured")
    for column in ("layout", *parts, "peak at", "predicted", "measured", "resident", "ratio"):
        memory.add_column(column, justify="left" if column in ("layout", "peak at") else "right")
    sent = _table("MB sent by the rank that sends most, predicted / measured")
    axes = list(dict.fromkeys(axis for row in rows for axis in row["predicted_traffic"]))
    for column in ("layout", *axes):
        sent.add_column(column)
    for row in rows:
        label = row["layout"] + (" *" if row["held_out"] else "")
        sizes = [f"{row['predicted_parts'][part] / 2**20:.0f}" for part in parts]
        totals = [f"{row[name] / 2**20:.0f}" for name in ("predicted", "measured", "resident")]
        memory.add_row(label, *sizes, row["predicted_at"], *totals, f"{row['ratio']:.3f}")
        if row["predicted_traffic"]:
            pairs = {
                axis: (row["predicted_traffic"].get(axis, 0), row["measured_traffic"].get(axis, 0)) for axis in axes
            }
            sent.add_row(label, *(f"{one / 1e6:.1f} / {two / 1e6:.1f}" if one else "" for one, two in pairs.values()))
    worst = max(abs(row["ratio"] - 1) for row in rows)
    Console(width=200).print(memory, sent, f"largest deviation of a peak: {worst:.1%}")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=2) + "\n")


def _table(title: str) -> Table:
    return Table(title=title, box=box.MARKDOWN, title_justify="left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(CASES), help="one layout; may be repeated")
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only or CASES:
        rows += compare(name, CASES[name])
        print(f"{name}: " + ", ".join(f"{row['ratio']:.3f}" for row in rows[-CASES[name].parallel.pp :]), flush=True)
    report(rows, arguments.output)


if __name__ == "__main__":
    main()
