"""Weights between Hugging Face directories and live Megatron model chunks, cut over tp and pp.

Loading reads on each rank only the slices that it holds. Exporting delivers whole tensors on global rank 0, one by one.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from opsd_megatron.checkpoint.agreement import on_rank_zero, raise_on_all, together
from opsd_megatron.checkpoint.hf_files import HfReader
from opsd_megatron.checkpoint.hf_writer import DEFAULT_SHARD_BYTES, check_target, write_hf_directory
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
from opsd_megatron.checkpoint.weight_map import EMBEDDING, HEAD, IGNORABLE_SUFFIXES, Weight, weights_of
from opsd_megatron.errors import CheckpointError
from opsd_megatron.models.architecture import Architecture
from opsd_megatron.models.build import unwrap
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.mesh import Mesh

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


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
    _check_names(reader, weights, architecture)
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


def _check_names(reader: HfReader, weights: Sequence[Weight], architecture: Architecture) -> None:
    wanted = {name: shape for weight in weights for name, shape in zip(weight.hf_names, weight.hf_shapes, strict=True)}
    if missing := sorted(set(wanted) - reader.names):
        raise CheckpointError(f"{reader.directory} lacks {missing}, which config.json asks for")
    spare = {name for name in reader.names - set(wanted) if not name.endswith(IGNORABLE_SUFFIXES)}
    if architecture.tied:
        spare.discard("lm_head.weight")
    if spare:
        raise CheckpointError(
            f"{reader.directory} holds {sorted(spare)}, which a {architecture.family} model with this config.json has "
            "no place for; check tie_word_embeddings, attention_bias and num_hidden_layers"
        )
    for name, shape in wanted.items():
        reader.check(name, shape)


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
    if not _is_vocabulary(weight):
        return reader.read(name, dim, None if dim is None else shard_bounds(shape[dim], tp.rank, tp.size))
    rows = parameter.shape[0]  # of the padded vocabulary: the last ranks may hold fewer real rows, or none
    start = min(tp.rank * rows, shape[0])
    return pad_rows(reader.read(name, 0, (start, min(start + rows, shape[0]))), rows)


def _is_vocabulary(weight: Weight) -> bool:
    return weight.row.parts[0].shape[0] == "vocab"


def export_weights(
    chunks: Sequence[nn.Module],
    architecture: Architecture,
    mesh: Mesh,
    dtype: torch.dtype | None = None,
    value_of: Callable[[Parameter], Tensor] | None = None,
) -> Iterator[tuple[str, Tensor | None]]:
    """(name, whole tensor) in Hugging Face order on global rank 0, (name, None) on the others; one tensor at a time.

    Collective: every rank must exhaust it, whatever happens to the tensors. Only the first data- and context-parallel
    replica communicates; a tied embedding comes from the first stage. Tensors are in `dtype`, or as they are.
    `value_of` picks another tensor of the parameter's shape to export (its gradient, say).
    """
    parameters = named_parameters(chunks)
    weights = list(weights_of(architecture))
    value_of = value_of or (lambda parameter: parameter.data)

    def value(name: str) -> Tensor:
        tensor = value_of(parameters[name])
        return tensor if dtype is None else tensor.to(dtype)

    plan = _export_plan(weights, parameters, architecture, mesh, lambda p: dtype or value_of(p).dtype)
    for weight in weights:
        stage, stored = plan[weight.megatron]
        if mesh.dp_cp.rank == 0:
            held = _split(value(weight.megatron), weight, architecture, mesh.tp) if stage == mesh.pp.rank else None
        for part, name in enumerate(weight.hf_names):
            tensor = None
            if mesh.dp_cp.rank == 0:
                whole = _gather(held[part], weight, part, mesh.tp) if held is not None else None
                tensor = _deliver(whole, stage, weight.hf_shapes[part], stored, mesh)
            yield name, tensor


def _export_plan(
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
    return trim_rows(whole, weight.hf_shapes[part][0]) if _is_vocabulary(weight) else whole


def _deliver(
    whole: Tensor | None, stage: int, shape: tuple[int, ...], stored: torch.dtype, mesh: Mesh
) -> Tensor | None:
    """Moves a tensor from the first tp rank of `stage` to global rank 0, which is the first of stage 0."""
    if mesh.tp.rank:
        return None
    if stage == 0:
        return whole
    if whole is not None:
        dist.send(whole.contiguous(), dst=mesh.pp.ranks[0], group=mesh.pp.group)
    elif mesh.pp.rank == 0:
        whole = torch.empty(shape, dtype=stored, device=mesh.device)
        dist.recv(whole, src=mesh.pp.ranks[stage], group=mesh.pp.group)
    return whole if mesh.pp.rank == 0 else None


def save_hf(
    chunks: Sequence[nn.Module],
    architecture: Architecture,
    mesh: Mesh,
    source_dir: Path | None,
    out_dir: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes the model to `out_dir` in Hugging Face layout, whole or not at all; collective over the world.

    The tokenizer and the other side files are copied from `source_dir`. CheckpointError, on every rank, if `out_dir` is
    not empty and `overwrite` is not set.
    """
    on_rank_zero(lambda: check_target(Path(out_dir), overwrite))
    tensors = export_weights(chunks, architecture, mesh, dtype)
    failure = None
    if mesh.world.rank == 0:
        try:
            write_hf_directory(
                ((name, tensor) for name, tensor in tensors if tensor is not None),
                Path(out_dir),
                architecture.hf_config,
                source_dir=source_dir,
                max_shard_bytes=max_shard_bytes,
                overwrite=overwrite,
            )
        except Exception as error:
            failure = error
    for _ in tensors:  # the other ranks have nothing to write, and rank 0 must not leave them waiting when it failed
        pass
    raise_on_all(failure)
