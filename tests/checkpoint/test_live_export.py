"""Live models written in Hugging Face layout by several ranks at once."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opsd_megatron.checkpoint import live_export
from opsd_megatron.checkpoint.manifest import manifest_problems, read_manifest
from opsd_megatron.checkpoint.model_weights import load_weights
from opsd_megatron.config import ParallelConfig
from opsd_megatron.models.architecture import read_architecture
from opsd_megatron.models.build import build_model
from opsd_megatron.parallel.mesh import build_mesh
from tests.models.batches import layout_name
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", tie_word_embeddings=True)


def save_and_count(directory: Path, out: Path, layout: ParallelConfig, failing_rank: int | None):
    """Files that this rank wrote, or the error that it saw."""
    mesh = build_mesh(layout)
    architecture = read_architecture(directory)
    chunks = build_model(architecture, mesh, torch.float32, "full")  # recomputation must not show in names
    load_weights(chunks, architecture, directory, mesh)
    written, write_shard = [], live_export.write_shard

    def counting(staging, shard, tensors):
        if mesh.world.rank == failing_rank:
            raise OSError("the disk is full")
        written.append(shard.file)
        return write_shard(staging, shard, tensors)

    live_export.write_shard = counting
    try:
        live_export.save_hf(chunks, architecture, mesh, directory, out, max_shard_bytes=50_000, facts={"step": 7})
    except Exception as error:
        return str(error)
    finally:
        live_export.write_shard = write_shard
    return written


@pytest.mark.parametrize(
    ("ranks", "layout", "writers"),
    [(4, ParallelConfig(pp=2), 4), (4, ParallelConfig(tp=2), 2), (4, ParallelConfig(pp=2, cp=2), 4)],
    ids=lambda value: layout_name(value),
)
def test_every_stage_of_every_replica_writes_its_share(model, tmp_path, ranks, layout, writers):
    written = run_on_ranks(ranks, save_and_count, model, tmp_path / "out", layout, None)
    files = sorted(file for own in written for file in own)
    assert files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    counts = sorted(len(own) for own in written if own)
    assert len(counts) == writers and counts[-1] - counts[0] <= 1
    saved = {}
    for file in files:
        saved |= load_file(tmp_path / "out" / file)
    original = load_file(model / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in original.items())
    assert manifest_problems(tmp_path / "out") == [] and read_manifest(tmp_path / "out")["step"] == 7


@pytest.mark.parametrize("failing_rank", [0, 3])
def test_a_rank_that_cannot_write_is_heard_by_all_and_leaves_nothing(model, tmp_path, failing_rank):
    messages = run_on_ranks(4, save_and_count, model, tmp_path / "out", ParallelConfig(pp=2), failing_rank)
    assert all("the disk is full" in message for message in messages)
    assert not list(tmp_path.iterdir())
