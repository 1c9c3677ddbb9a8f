"""Weights between Hugging Face directories and live Megatron model chunks, cut over tp and pp.

Loading reads on each rank only the slices that it holds. Exporting delivers whole tensors on global rank 0, one by one.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from opsd_megatron.checkpoint.agreement import raise_on_all, together
from opsd_megatron.checkpoint.hf_files import HfReader, problems_of, refuse
from opsd_megatron.checkpoint.reshard import (
    join_shards,
    merge_gate_up,
    merge_qkv,
    pad_rows,
    shard_bounds,
    split_gate_up,
    split_qkv,
    trim_rows,
)
from opsd_megatron.checkpoint.shard_plan import TensorSpec
from opsd_megatron.checkpoint.weight_map import EMBEDDING, HEAD, Weight, weights_of
from opsd_megatron.errors import CheckpointError
from opsd_megatron.models.architecture import Architecture
from opsd_megatron.models.build import unwrap
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.mesh import Mesh

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Writer:
    """A rank that whole tensors are delivered to: the first tp rank of a stage of one replica (dp x cp)."""

    replica: int
    stage: int


FIRST_WRITER = Writer(0, 0)
"""Global rank 0."""


def named_parameters(chunks: Sequence[nn.Module]) -> dict[str, Parameter]:
    """This rank's parameters under their names in the whole model: layers counted over all stages and chunks."""
    named = {}
    for chunk in map(unwrap, chunks):
        layers: Any = chunk.decoder.layers
        for name, parameter in chunk.named_parameters():
            if match := _LAYER.match(name):
                layer = layers[int(match[1])].layer_number - 1
                name = f"decoder.layers.{layer}.{name[match.end() :]}"
            named[name] = parameter
    return named


def load_weights(chunks: Sequence[nn.Module], architecture: Architecture, hf_dir: Path, mesh: Mesh) -> None:
    """Fills every parameter of this rank's chunks from `hf_dir`. Call it before the optimizer copies the weights.

    Strict both ways: CheckpointError, on every rank, names parameters left empty and tensors left unused. Weights are
    converted to the parameters' dtype. With tied embeddings the last stage's copy is filled from the embedding.
    """
    together(lambda: _load(named_parameters(chunks), architecture, Path(hf_dir), mesh.tp))


def _load(parameters: dict[str, Parameter], architecture: Architecture, hf_dir: Path, tp: Axis) -> None:
    weights = list(weights_of(architecture))
    reader = HfReader(hf_dir)
    refuse(problems_of(reader, architecture), hf_dir)
    if architecture.tied:
        _check_tied_copy(reader)
    unfilled = set(parameters)
    for weight in weights:
        targets = [weight.megatron]
        if architecture.tied and weight.megatron == EMBEDDING:
            targets.append(HEAD)
        for name in targets:
            if name in parameters:
                _fill(parameters[name], weight, reader, architecture, tp)
                unfilled.discard(name)
    if unfilled:
        raise CheckpointError(
            f"{hf_dir}: no row of the {architecture.family} weight table fills {sorted(unfilled)}; "
            "the model was built with parts that this checkpoint does not have"
        )


def _check_tied_copy(reader: HfReader) -> None:
    """Some files keep the tied head as a second copy, which is ignored as long as it is one."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if head in reader and not torch.equal(reader.read(head), reader.read(embedding)):
        raise CheckpointError(
            f"{reader.path_of(head)}: {head} differs from {embedding}, but config.json ties them; "
            "set tie_word_embeddings to false or remove the head"
        )


def _fill(parameter: Parameter, weight: Weight, reader: HfReader, architecture: Architecture, tp: Axis) -> None:
    parts = [
        _read_shard(reader, name, shape, weight, parameter, tp)
        for name, shape in zip(weight.hf_names, weight.hf_shapes, strict=True)
    ]
    match weight.row.merge:
        case "qkv":
            merged = merge_qkv(*parts, kv_heads=architecture.kv_heads // tp.size)
        case "gate_up":
            merged = merge_gate_up(*parts)
        case "copy":
            (merged,) = parts
    if merged.shape != parameter.shape:
        raise CheckpointError(
            f"{weight.megatron} has shape {list(parameter.shape)} on this rank, but {weight.hf_names} give "
            f"{list(merged.shape)}; the model was not built from {reader.directory / 'config.json'}"
        )
    with torch.no_grad():
        parameter.copy_(merged)


def _read_shard(
    reader: HfReader, name: str, shape: tuple[int, ...], weight: Weight, parameter: Parameter, tp: Axis
) -> Tensor:
    dim = weight.row.tp_dim
    if not weight.is_vocabulary:
        return reader.read(name, dim, None if dim is None else shard_bounds(shape[dim], tp.rank, tp.size))
    rows = parameter.shape[0]  # of the padded vocabulary: the last ranks may hold fewer real rows, or none
    start = min(tp.rank * rows, shape[0])
    return pad_rows(reader.read(name, 0, (start, min(start + rows, shape[0]))), rows)


def export_weights(
    chunks: Sequence[nn.Module],
    architecture: Architecture,
    mesh: Mesh,
    dtype: torch.dtype | None = None,
    value_of: Callable[[Parameter], Tensor] | None = None,
    writer_of: Callable[[str], Writer] = lambda _: FIRST_WRITER,
) -> Iterator[tuple[str, Tensor | None]]:
    """(name, whole tensor) in Hugging Face order where `writer_of` the name says, (name, None) on all other ranks.

    Collective: every rank must exhaust it, whatever happens to the tensors; they come one at a time. Only the writer's
    data- and context-parallel replica communicates; a tied embedding comes from the first stage. Tensors are in
    `dtype`, or as they are. `value_of` picks another tensor of the parameter's shape to export (its gradient, say).
    """
    parameters = named_parameters(chunks)
    weights = list(weights_of(architecture))
    value_of = value_of or (lambda parameter: parameter.data)

    def value(name: str) -> Tensor:
        tensor = value_of(parameters[name])
        return tensor if dtype is None else tensor.to(dtype)

    plan = export_plan(weights, parameters, architecture, mesh, lambda p: dtype or value_of(p).dtype)
    for weight in weights:
        stage, stored = plan[weight.megatron]
        held = None
        for part, name in enumerate(weight.hf_names):
            writer, tensor = writer_of(name), None
            if mesh.dp_cp.rank == writer.replica:
                if held is None and stage == mesh.pp.rank:
                    held = _split(value(weight.megatron), weight, architecture, mesh.tp)
                whole = _gather(held[part], weight, part, mesh.tp) if held is not None else None
                tensor = _deliver(whole, stage, writer.stage, weight.hf_shapes[part], stored, mesh)
            yield name, tensor


def export_specs(
    chunks: Sequence[nn.Module], architecture: Architecture, mesh: Mesh, dtype: torch.dtype | None = None
) -> list[TensorSpec]:
    """What `export_weights` will deliver, in its order; collective, without a tensor being moved."""
    weights, parameters = list(weights_of(architecture)), named_parameters(chunks)
    stored = export_plan(weights, parameters, architecture, mesh, lambda parameter: dtype or parameter.dtype)
    return [
        TensorSpec(name, stored[weight.megatron][1], shape)
        for weight in weights
        for name, shape in zip(weight.hf_names, weight.hf_shapes, strict=True)
    ]


def export_plan(
    weights: Sequence[Weight],
    parameters: dict[str, Parameter],
    architecture: Architecture,
    mesh: Mesh,
    dtype_of: Callable[[Parameter], torch.dtype],
) -> dict[str, tuple[int, torch.dtype]]:
    """Pipeline stage and dtype of every weight, agreed before the first transfer; CheckpointError on all ranks."""
    known = {weight.megatron for weight in weights}
    copies = {HEAD} if architecture.tied and EMBEDDING not in parameters else set()

    def own() -> dict[str, torch.dtype]:
        if strangers := sorted(set(parameters) - known - copies):
            raise CheckpointError(f"parameters {strangers} have no row in the {architecture.family} weight table")
        return {name: dtype_of(parameter) for name, parameter in parameters.items() if name in known}

    mine = together(own)
    stages: list[dict[str, torch.dtype]] = [mine]
    if mesh.pp.size > 1:
        stages = [{} for _ in range(mesh.pp.size)]
        dist.all_gather_object(stages, mine, group=mesh.pp.group)
    plan = {name: (stage, stored) for stage, held in enumerate(stages) for name, stored in held.items()}
    missing = sorted(known - set(plan))
    raise_on_all(CheckpointError(f"no pipeline stage holds {missing}") if missing else None)
    return plan


def _split(shard: Tensor, weight: Weight, architecture: Architecture, tp: Axis) -> tuple[Tensor, ...]:
    match weight.row.merge:
        case "qkv":
            return split_qkv(shard, architecture.kv_heads // tp.size, architecture.head_dim)
        case "gate_up":
            return split_gate_up(shard)
        case "copy":
            return (shard,)


def _gather(shard: Tensor, weight: Weight, part: int, tp: Axis) -> Tensor | None:
    """The whole Hugging Face tensor on the stage's first tp rank."""
    dim, shards = weight.row.tp_dim, [shard]
    if dim is not None and tp.size > 1:
        shard = shard.contiguous()
        shards = [torch.empty_like(shard) for _ in range(tp.size)] if tp.rank == 0 else []
        dist.gather(shard, shards or None, dst=tp.ranks[0], group=tp.group)
    if tp.rank:
        return None
    whole = join_shards(shards, dim)
    return trim_rows(whole, weight.hf_shapes[part][0]) if weight.is_vocabulary else whole


def _deliver(
    whole: Tensor | None, stage: int, to_stage: int, shape: tuple[int, ...], stored: torch.dtype, mesh: Mesh
) -> Tensor | None:
    """Moves a tensor from the first tp rank of `stage` to that of `to_stage`, inside one replica."""
    if mesh.tp.rank:
        return None
    if stage == to_stage:
        return whole
    if whole is not None:
        dist.send(whole.contiguous(), dst=mesh.pp.ranks[to_stage], group=mesh.pp.group)
    elif mesh.pp.rank == to_stage:
        whole = torch.empty(shape, dtype=stored, device=mesh.device)
        dist.recv(whole, src=mesh.pp.ranks[stage], group=mesh.pp.group)
    return whole if mesh.pp.rank == to_stage else None
