"""What a checkpoint says about itself in state.json, and whether it belongs to the run that wants to resume from it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from opsd_megatron.errors import CheckpointError
from opsd_megatron.models.architecture import Architecture
from opsd_megatron.parallel.mesh import Mesh

FORMAT = 1


def describe(
    step: int,
    chunks: Sequence[nn.Module],
    architecture: Architecture,
    mesh: Mesh,
    optimizer: Any | None,
    has_teacher: bool,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """The JSON description: everything that must agree on resume, what may differ, and the caller's `extra`."""
    return {
        **plain_description(step, architecture, dtype_of(chunks), extra),
        "optimizer": optimizer_kind(optimizer),
        "teacher": has_teacher,
        "layout": layout_of(mesh),
    }


def plain_description(step: int, architecture: Architecture, dtype: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """That of weights alone, which no run has saved."""
    return {
        "format": FORMAT,
        "step": step,
        "architecture": architecture_fields(architecture),
        "hf_config": dict(architecture.hf_config),
        "dtype": dtype,
        "optimizer": None,
        "teacher": False,
        "layout": None,
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "extra": dict(extra),
    }


def architecture_fields(architecture: Architecture) -> dict[str, Any]:
    """The fields that decide shapes and computation; hf_config also holds what has no effect."""
    fields = asdict(architecture)
    del fields["hf_config"]
    return fields


def dtype_of(chunks: Sequence[nn.Module]) -> str:
    return str(next(chunks[0].parameters()).dtype).removeprefix("torch.")


def layout_of(mesh: Mesh) -> dict[str, Any]:
    return {
        **{axis.name: axis.size for axis in (mesh.tp, mesh.pp, mesh.cp, mesh.dp)},
        "vpp": mesh.vpp,
        "sequence_parallel": mesh.sequence_parallel,
    }


def optimizer_kind(optimizer: Any | None) -> str | None:
    """Class of Megatron's optimizer, which decides what is stored."""
    if optimizer is None:
        return None
    return type(getattr(optimizer, "chained_optimizers", [optimizer])[0]).__name__


def check_description(
    description: Mapping[str, Any],
    path: Path,
    chunks: Sequence[nn.Module],
    architecture: Architecture,
    optimizer: Any | None,
    has_teacher: bool,
) -> None:
    """CheckpointError that names the first field in which the checkpoint and this run differ."""
    if description.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {description.get('format')}, this version reads {FORMAT}")
    saved = description["architecture"]
    for name, value in architecture_fields(architecture).items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"{path} has architecture.{name}={saved.get(name)!r}, the model of this run {value!r}; "
                "resume with the model that the run started from, or give another checkpoint.directory"
            )
    _same(path, "model.dtype", description["dtype"], dtype_of(chunks))
    if optimizer is not None:
        _same(
            path, "optimizer (optimizer.distributed, model.dtype)", description["optimizer"], optimizer_kind(optimizer)
        )
        _same(path, "teacher weights (teacher)", description["teacher"], has_teacher)
    elif has_teacher and not description["teacher"]:
        raise CheckpointError(f"{path} holds no teacher weights")


def _same(path: Path, name: str, saved: Any, wanted: Any) -> None:
    if saved != wanted:
        raise CheckpointError(
            f"{path} was saved with {name}: {saved}, this run has {wanted}; "
            "resume with the same setting, or give another checkpoint.directory"
        )
