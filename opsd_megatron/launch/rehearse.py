"""A recipe walked through on CPU ranks: rollouts, both passes, publication, a checkpoint, a resume; bytes per axis."""

import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opsd_megatron.config import ModelConfig, ParallelConfig, RunConfig
from opsd_megatron.errors import UserError
from opsd_megatron.launch.shrink import Shrunk, shrink
from opsd_megatron.launch.tiny_world import write_tiny_world
from opsd_megatron.models.architecture import read_architecture
from opsd_megatron.parallel.mesh import Mesh, build_mesh
from opsd_megatron.parallel.traffic import Traffic, count_traffic
from opsd_megatron.rollout.process import ServerProcess
from opsd_megatron.train.loop import fit

STEPS_BEFORE_RESUME, STEPS = 2, 4
AXES = {"cp": "ring (cp)", "pp": "pipeline (pp)", "tp": "tensor (tp)", "dp_cp": "gradients and counts (dp x cp)"}


def rehearse(config: RunConfig, hf_config: Mapping[str, Any], directory: Path) -> None:
    """Every rank of torchrun calls it. UserError if an axis that the recipe has, and that fits here, moved nothing."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    shrunk = shrink(config, hf_config, world_size, directory, STEPS)
    mesh = build_mesh(shrunk.config.parallel)
    is_first = mesh.world.rank == 0
    if is_first:
        _say(f"rehearsal of the recipe on {world_size} ranks; shrunk:", *(f"  {line}" for line in shrunk.changes))
        shutil.rmtree(directory, ignore_errors=True)
        records = shrunk.config.batch.prompts_per_step * (STEPS + 1)
        write_tiny_world(directory, shrunk.hf_config, records, shrunk.config.data.student_tokens)
        _write_served_model(directory, shrunk.config.model)
    with _server(shrunk, directory, is_first) as url:
        local = replace(shrunk.config, rollout=replace(shrunk.config.rollout, url=url))
        sent: Counter[str] = Counter()
        sizes: list[str] = []
        watch = _watcher(sent, sizes)
        first = fit(replace(local, steps=STEPS_BEFORE_RESUME), watch)
        reached = fit(local, watch)
    totals: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(totals, dict(sent))
    moved = sum((Counter(part) for part in totals), Counter())
    if is_first:
        _say(f"groups: {sizes[-1]}", *(f"  {label}: {moved[axis]:,} bytes" for axis, label in AXES.items()))
        _say(f"{first} steps, a checkpoint, a resume, {reached - first} more steps; whole files under {directory}")
        for axis in shrunk.lost_axes:
            _say(f"note: {axis} of the recipe has no room on {world_size} ranks and was not rehearsed")
    _require_traffic(local.parallel, moved, mesh)


def _write_served_model(directory: Path, model: ModelConfig) -> None:
    """The model with the recipe's YaRN in its config.json: server and trainer must turn positions alike."""
    served = shutil.copytree(directory / "model", directory / "served")
    hf_config = read_architecture(model.path, model.yarn_factor, model.yarn_original_positions).hf_config
    (Path(served) / "config.json").write_text(json.dumps(dict(hf_config), indent=2))


def _require_traffic(parallel: ParallelConfig, moved: Mapping[str, int], mesh: Mesh) -> None:
    sizes = {"tp": parallel.tp, "pp": parallel.pp, "cp": parallel.cp, "dp_cp": mesh.dp_cp.size}
    silent = [axis for axis, size in sizes.items() if size > 1 and not moved.get(axis)]
    if silent:
        raise UserError(f"rehearsal failed: axes {silent} have more than one rank and moved no byte")


def _watcher(sent: Counter[str], sizes: list[str]):
    """Adds what each run moves on every axis to `sent`."""

    @contextmanager
    def watch(mesh: Mesh) -> Iterator[Traffic]:
        sizes.append(mesh.describe())
        groups = {axis: getattr(mesh, axis).group for axis in AXES}
        with count_traffic({name: group for name, group in groups.items() if group is not None}) as traffic:
            yield traffic
        sent.update(traffic.bytes_sent)

    return watch


@contextmanager
def _server(shrunk: Shrunk, directory: Path, is_first: bool) -> Iterator[str]:
    """The embedded server beside rank 0; its URL and, through the environment, its token on every rank."""
    server, box = None, [None, None]
    variable = shrunk.config.rollout.token_variable
    if is_first:
        token = secrets.token_urlsafe(32)
        dtype = shrunk.config.model.dtype
        server = ServerProcess(directory / "served", token, directory / "server.log", dtype=dtype, threads=1)
        server.start()
        box = [server.url, token]
    try:
        dist.broadcast_object_list(box, src=0)
        os.environ[variable] = str(box[1])
        yield str(box[0])
    finally:
        if server is not None:
            server.stop()


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)
