"""Checkpoints for the tests of conversion: saved by Megatron under a layout, or imported."""

from pathlib import Path

import torch

from opsd_megatron.checkpoint.dist_import import ImportJob, import_checkpoint
from opsd_megatron.checkpoint.export import ExportJob, export_checkpoint
from opsd_megatron.checkpoint.stored_model import DistModel, HfModel
from opsd_megatron.checkpoint.training_state import load_state, save_state
from opsd_megatron.config import ParallelConfig
from opsd_megatron.models.architecture import read_architecture
from opsd_megatron.models.build import build_model
from opsd_megatron.parallel.mesh import build_mesh

LAYOUTS = [
    ParallelConfig(),
    ParallelConfig(tp=2),
    ParallelConfig(tp=4),
    ParallelConfig(tp=2, pp=2),
    ParallelConfig(tp=2, pp=2, vpp=2),
]


def import_model(model: Path, output: Path, **changes) -> Path:
    return import_checkpoint(HfModel(model, read_architecture(model)), ImportJob(model, output, **changes))


def export_model(checkpoint: Path, output: Path, model: Path, **changes) -> Path:
    stored = DistModel(checkpoint, read_architecture(model))
    return export_checkpoint(stored, ExportJob(checkpoint, output, side_files=model, **changes))


def pass_through_megatron(jobs: list[tuple[Path, Path, Path]], layout: ParallelConfig) -> None:
    """On every rank: loads each checkpoint into live modules under the layout and saves it from there.

    A job is (Hugging Face directory, checkpoint to load, directory to save in).
    """
    for model, checkpoint, output in jobs:
        mesh = build_mesh(layout)
        architecture = read_architecture(model)
        dtype = DistModel(checkpoint, architecture).reader.tensors["embedding.word_embeddings.weight"].dtype
        chunks = build_model(architecture, mesh, dtype)
        assert load_state(checkpoint, chunks, architecture, mesh) is not None
        save_state(output, 0, chunks, architecture, mesh)


def stacked_copy(checkpoint: Path, output: Path) -> Path:
    """The same tensors stacked over layers and under the local spec's names, as other versions of Megatron save."""
    import re

    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import FileSystemReader

    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if hasattr(entry, "chunks")
    }
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    local = {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight"}
    local["mlp.linear_fc1.layer_norm_weight"] = "pre_mlp_layernorm.weight"
    stacked, layers = {}, {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", key)
        if match:
            name = local.get(match[2], match[2])
            layers.setdefault(f"decoder.layers.{name}", {})[int(match[1])] = tensor
        else:
            stacked[key] = tensor
    stacked |= {key: torch.stack([own[layer] for layer in sorted(own)]) for key, own in layers.items()}
    dcp.save(stacked, checkpoint_id=output, no_dist=True)
    for name in ("metadata.json", "common.pt"):
        (output / name).write_bytes((checkpoint / name).read_bytes())
    return output
