"""Training state through Megatron's distributed checkpointing: whole or not at all, and under another layout too.

Tensors are stored under their place in the whole model, so tp, pp, vpp, dp and cp may differ between save and load.
Megatron's files contain pickles: load checkpoints from trusted places only.
"""

import json
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException

from opsd_megatron.checkpoint import dist_writer, random_state, state_files
from opsd_megatron.checkpoint.agreement import on_rank_zero, together
from opsd_megatron.checkpoint.description import check_description, describe, layout_of
from opsd_megatron.errors import CheckpointError
from opsd_megatron.models.architecture import Architecture
from opsd_megatron.models.build import unwrap
from opsd_megatron.parallel.mesh import Mesh

TeacherTensors = Sequence[Mapping[str, Tensor]]
"""For each model chunk the teacher's tensor of every parameter, under the parameter's name in the chunk."""


@dataclass(frozen=True)
class Restored:
    """What a checkpoint said besides the tensors that `load_state` put in place."""

    path: Path
    step: int
    extra: dict[str, Any]
    exact_random_state: bool
    """False under another layout: the generators were then derived anew from seed, step and rank."""
    saved_layout: dict[str, Any]


def save_state(
    directory: Path,
    step: int,
    chunks: Sequence[nn.Module],
    architecture: Architecture,
    mesh: Mesh,
    *,
    optimizer: Any | None = None,
    teacher: TeacherTensors | None = None,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Writes `directory`/step_000123 and returns it; collective over the world, on a file system that all ranks share.

    Weights, optimizer state, every rank's random generators, the teacher's tensors and `extra` (JSON, rank 0's) are
    written aside and renamed when complete; then all but the newest `keep` checkpoints are removed (0 keeps all).
    """
    directory = Path(directory)
    staging = state_files.step_directory(directory, step).with_suffix(".tmp")
    description = describe(step, chunks, architecture, mesh, optimizer, teacher is not None, extra or {})
    together(lambda: json.dumps(description))
    on_rank_zero(lambda: state_files.begin(directory, step))
    state = _sharded_state(chunks, mesh, optimizer, teacher, loading=False)
    state["random"] = _random_object(mesh, random_state.capture())
    try:
        dist_checkpointing.save(state, str(staging), sharded_strategy=dist_writer.InProcessWriter())
    except CheckpointException as error:  # a BaseException, raised on every rank
        raise CheckpointError(f"{staging} cannot be written: {error}") from error
    on_rank_zero(lambda: state_files.finish(staging, description, keep))
    return state_files.step_directory(directory, step)


def load_state(
    directory: Path,
    chunks: Sequence[nn.Module],
    architecture: Architecture,
    mesh: Mesh,
    *,
    optimizer: Any | None = None,
    teacher: TeacherTensors | None = None,
    seed: int = 0,
) -> Restored | None:
    """Puts the newest complete checkpoint under `directory` (or that very one) in place; None where there is none.

    Without `optimizer` only weights (and teacher) are read. CheckpointError, on every rank, if the checkpoint is of
    another architecture, dtype or optimizer, naming the field, or if a file is damaged.
    """
    path = _choose(Path(directory))
    if path is None:
        return None
    description = together(lambda: state_files.read_description(path))
    together(lambda: check_description(description, path, chunks, architecture, optimizer, teacher is not None))
    exact = description["layout"] == layout_of(mesh)
    state = _sharded_state(chunks, mesh, optimizer, teacher, loading=True)
    if exact and optimizer is not None:
        state["random"] = _random_object(mesh, None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)  # core's own call
            loaded: Any = dist_checkpointing.load(state, str(path))
    except (CheckpointingException, CheckpointException, OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}; remove the directory to resume from the one before it"
        ) from error
    _put_in_place(loaded, chunks, optimizer, teacher)
    if optimizer is not None:
        if exact:
            random_state.restore(loaded["random"])
        else:
            random_state.derive(seed, description["step"], mesh.world.rank)
    return Restored(path, description["step"], description["extra"], exact, description["layout"])


def _choose(directory: Path) -> Path | None:
    """Rank 0's choice, on every rank: file systems of several nodes may not agree yet."""
    on_rank_zero(lambda: state_files.tidy(directory))
    chosen = [None]
    if dist.get_rank() == 0:
        chosen = [directory if state_files.is_complete(directory) else state_files.newest_checkpoint(directory)]
    dist.broadcast_object_list(chosen, src=0)
    return chosen[0]


def _random_object(mesh: Mesh, state: dict[str, Any] | None) -> ShardedObject:
    return ShardedObject("random_state", state, (mesh.world.size,), (mesh.world.rank,))


def _sharded_state(
    chunks: Sequence[nn.Module], mesh: Mesh, optimizer: Any | None, teacher: TeacherTensors | None, loading: bool
) -> dict[str, Any]:
    """Megatron's plan of which part of which whole tensor this rank holds, pointing at the live tensors."""
    # fully_reshardable is the only form of the distributed optimizer's state in 0.16.1 that survives another tp or pp:
    # fully_sharded_model_space is still listed there, but its flattened tensors are refused by dist_checkpointing.
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": True,
        "dp_cp_group": mesh.collection.dp_cp,
    }
    models = {f"model{i}": unwrap(chunk).sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    state: dict[str, Any] = dict(models)
    if teacher is not None:
        for index, tensors in enumerate(teacher):
            state[f"teacher{index}"] = {
                name: _at_the_place_of(models[f"model{index}"][name], tensor) for name, tensor in tensors.items()
            }
    if optimizer is not None:
        for part in _parts(optimizer):
            _adam_states(part)  # core reads them, even before the first step
        with _offsets_without_padding(optimizer):
            state["optimizer"] = optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata)
    return state


def _at_the_place_of(parameter: Any, tensor: Tensor) -> Any:
    """A teacher's tensor, stored beside the parameter and cut like it."""
    changes: dict[str, Any] = {"key": f"teacher.{parameter.key}", "data": tensor.detach()}
    if hasattr(parameter, "dtype"):
        changes["dtype"] = tensor.dtype
    return replace(parameter, **changes)


def _put_in_place(
    loaded: dict[str, Any], chunks: Sequence[nn.Module], optimizer: Any | None, teacher: TeacherTensors | None
) -> None:
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[f"model{index}"])
    for index, tensors in enumerate(teacher or ()):
        for name, tensor in tensors.items():
            tensor.data.copy_(loaded[f"teacher{index}"][name])
    if optimizer is not None:
        parts = _parts(optimizer)
        states = (
            [loaded["optimizer"]] if len(parts) == 1 else [state for _, state in sorted(loaded["optimizer"].items())]
        )
        for part, state in zip(parts, states, strict=True):
            _load_optimizer(part, state)


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _adam_states(part: Any) -> list[dict[str, Any]]:
    """The states of torch's Adam, one per parameter, begun with zeros as its first step would; [] for other classes."""
    inner, states = part.optimizer, []
    if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
        for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
            state = inner.state[parameter]
            if not state:
                zeros = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
                state.update(step=torch.tensor(0.0), **zeros)
            states.append(state)
    return states


def _load_optimizer(part: Any, state: dict[str, Any]) -> None:
    """Megatron's own loading, around three flaws of core 0.16.1 with torch's Adam.

    All parameters get one step tensor, which Adam would then count up once per parameter; a step of 0 is left out of
    the file (optimizer.py); the distributed optimizer looks for a stored tensor of every state, the step included,
    and finds none (distrib_optimizer.py, _set_main_param_and_optimizer_states).
    """
    cut_tensors = state.pop("param_state", None)
    stored = state.get("optimizer", state).get("state")
    if stored is not None and _adam_states(part):
        stored.setdefault("common_step", torch.tensor(0.0))
    part.load_state_dict(state)
    states = _adam_states(part)
    steps = [adam.pop("step") for adam in states]
    if cut_tensors is not None:
        part.load_parameter_state_from_fully_reshardable(cut_tensors)
    for adam, step in zip(states, steps, strict=True):
        adam["step"] = step.clone()


@contextmanager
def _offsets_without_padding(optimizer: Any) -> Iterator[None]:
    """Inside, parameters of the distributed optimizer lie where they do in core's gathered, unpadded tensors.

    Core 0.16.1 drops the padding between gradient buckets when it gathers, but cuts the result at offsets that count
    it (distrib_optimizer.py, sharded_param_state_fully_reshardable): states behind the first padding would be stored
    shifted. A tied embedding on a last pipeline stage always has a bucket of its own.
    """
    buffers = [buffer for part in _parts(optimizer) for buffer in getattr(part, "buffers", ())]
    original = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        kept = 0
        padding = []
        for bucket in buffer.buckets:
            padding.append(bucket.offset - kept)
            kept += bucket.numel_unpadded
        buffer.param_index_map = {
            parameter: (start - padding[bucket], end - padding[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, offsets in zip(buffers, original, strict=True):
            buffer.param_index_map = offsets
