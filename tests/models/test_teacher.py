"""Teachers as views of weights; the student's come back bitwise whatever happens."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opsd_megatron import config as configs
from opsd_megatron.checkpoint.model_weights import load_weights
from opsd_megatron.config import ParallelConfig
from opsd_megatron.models import swap
from opsd_megatron.models.architecture import read_architecture
from opsd_megatron.models.build import TreeModel, build_model, head_weight
from opsd_megatron.models.teacher import EmaTeacher, FrozenTeacher, LiveTeacher, build_teacher, score
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.context import deal
from opsd_megatron.parallel.mesh import Mesh, build_mesh
from tests.models.batches import layout_name, microbatches
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model

KINDS = [configs.LiveTeacher(), configs.FrozenTeacher(), configs.EmaTeacher(rate=0.25)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("teacher"), "qwen3", tie_word_embeddings=True)


def load(directory: Path, layout: ParallelConfig, dtype=torch.float32) -> tuple[Mesh, list[TreeModel]]:
    mesh = build_mesh(layout)
    architecture = read_architecture(directory)
    chunks = build_model(architecture, mesh, dtype)
    load_weights(chunks, architecture, directory, mesh)
    return mesh, chunks


def checksum(chunks) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            digest.update(name.encode() + parameter.detach().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def take_a_step(chunks, seed: int, size: float = 0.01) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def hidden_of(chunks, mesh: Mesh) -> Tensor:
    shards = [deal(batch, Axis.single("cp")) for batch in microbatches()]
    hidden = score(chunks, shards, mesh)
    assert hidden is not None
    return hidden


@pytest.mark.parametrize("config", KINDS, ids=lambda kind: type(kind).__name__)
def test_at_the_start_every_teacher_scores_as_the_student_does_bit_for_bit(directory, config):
    mesh, chunks = load(directory, ParallelConfig())
    teacher = build_teacher(config, chunks, mesh)
    student = hidden_of(chunks, mesh)
    with teacher.active():
        assert torch.equal(hidden_of(chunks, mesh), student)
    assert torch.equal(teacher.head_weight(), head_weight(chunks[-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_teacher_is_the_start_and_leaves_the_student_bitwise_alone(directory, dtype):
    mesh, chunks = load(directory, ParallelConfig(), dtype)
    teacher, start, start_hidden = FrozenTeacher(chunks, mesh), checksum(chunks), hidden_of(chunks, mesh)
    start_head = head_weight(chunks[-1]).detach().clone()
    for step in range(3):
        take_a_step(chunks, step)
        teacher.update()
        student, student_hidden = checksum(chunks), hidden_of(chunks, mesh)
        assert not teacher.is_active
        with teacher.active():
            assert teacher.is_active and checksum(chunks) == start
            assert torch.equal(hidden_of(chunks, mesh), start_hidden)
        assert not teacher.is_active and checksum(chunks) == student
        assert torch.equal(hidden_of(chunks, mesh), student_hidden)
        assert torch.equal(teacher.head_weight(), start_head)
        assert not torch.equal(teacher.head_weight(), head_weight(chunks[-1]))
    assert teacher.tensors() is None


def test_a_live_teacher_follows_the_student(directory):
    mesh, chunks = load(directory, ParallelConfig())
    teacher = LiveTeacher(chunks, mesh)
    take_a_step(chunks, 0)
    teacher.update()
    student = checksum(chunks)
    with teacher.active():
        assert checksum(chunks) == student
    assert torch.equal(teacher.head_weight(), head_weight(chunks[-1])) and not teacher.head_weight().requires_grad


def test_the_ema_rate_is_the_share_of_the_student(directory):
    """teacher = (1 - rate) * teacher + rate * student: taking the rate for the retention gives a near-copy."""
    mesh, chunks = load(directory, ParallelConfig(), torch.float64)
    teacher = EmaTeacher(chunks, mesh, rate=0.1)
    weight = chunks[0].decoder.layers[2].mlp.linear_fc1.weight
    expected = weight.detach().clone()
    for step in range(4):
        take_a_step(chunks, step)
        teacher.update()
        expected = 0.9 * expected + 0.1 * weight.detach()
    with teacher.active():
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-14, atol=1e-15)
    assert teacher.tensors() is not None
    assert [set(tensors) for tensors in teacher.tensors()] == [
        dict(chunk.named_parameters()).keys() for chunk in chunks
    ]
    torch.testing.assert_close(teacher.tensors()[0]["decoder.layers.2.mlp.linear_fc1.weight"], expected)


def test_an_ema_of_a_bfloat16_student_follows_steps_below_its_resolution(directory):
    """At rate 0.02 one step moves the average by less than half a unit in the last place of bfloat16."""
    mesh, chunks = load(directory, ParallelConfig(), torch.bfloat16)
    teacher = EmaTeacher(chunks, mesh, rate=0.02)
    norm = chunks[0].decoder.final_layernorm.weight
    with torch.no_grad():
        norm.fill_(1.0)
        teacher.weights[0]["decoder.final_layernorm.weight"].fill_(1.0)
        norm.fill_(1.0625)
    for _ in range(100):
        teacher.update()
    expected = 1.0625 - 0.0625 * 0.98**100
    assert teacher.weights[0]["decoder.final_layernorm.weight"].dtype == torch.float32
    torch.testing.assert_close(
        teacher.weights[0]["decoder.final_layernorm.weight"], torch.full((64,), expected), rtol=1e-5, atol=0
    )
    student = checksum(chunks)
    with teacher.active():
        assert torch.equal(norm, torch.full((64,), expected).bfloat16())
    assert checksum(chunks) == student
    assert teacher.head_weight().dtype == torch.bfloat16


def test_the_student_comes_back_when_scoring_fails(directory):
    mesh, chunks = load(directory, ParallelConfig())
    teacher = FrozenTeacher(chunks, mesh)
    take_a_step(chunks, 0)
    student = checksum(chunks)
    with pytest.raises(ZeroDivisionError), teacher.active():
        raise ZeroDivisionError
    assert not teacher.is_active and checksum(chunks) == student


def test_the_student_comes_back_when_the_swap_itself_fails(directory, monkeypatch):
    monkeypatch.setattr(swap, "BUCKET_BYTES", 50_000)
    mesh, chunks = load(directory, ParallelConfig())
    teacher = FrozenTeacher(chunks, mesh)
    take_a_step(chunks, 0)
    student = checksum(chunks)
    assert len(teacher.buckets) > 2
    teacher.buckets[1].other = torch.zeros(3)
    with pytest.raises(RuntimeError), teacher.active():
        pass
    assert not teacher.is_active and checksum(chunks) == student


def test_an_active_teacher_is_neither_activated_again_nor_averaged_with_itself(directory):
    mesh, chunks = load(directory, ParallelConfig())
    teacher = EmaTeacher(chunks, mesh, rate=0.5)
    with teacher.active():
        with pytest.raises(RuntimeError, match="active already"), teacher.active():
            pass
        with pytest.raises(RuntimeError, match="average would be taken with itself"):
            teacher.update()
        assert teacher.is_active


def scored_by_each_rank(directory: Path, layout: ParallelConfig) -> tuple[tuple[int, int], Tensor | None, bool]:
    mesh, chunks = load(directory, layout)
    teacher = FrozenTeacher(chunks, mesh)
    take_a_step(chunks, 0)
    student = checksum(chunks)
    mine = microbatches()[: 1 + mesh.cp.rank] if mesh.vpp is None else microbatches()
    shards = [deal(batch, Axis.single("cp"), multiple_of=mesh.tp.size) for batch in mine]
    with teacher.active():
        rows = score(chunks, shards, mesh)
    assert (teacher.head_weight() is None) == (not mesh.is_last_stage)
    return (mesh.cp.rank, len(mine)), rows, checksum(chunks) == student


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, ParallelConfig(cp=2)),
        (4, ParallelConfig(pp=2, cp=2)),
        (4, ParallelConfig(tp=2, pp=2, sequence_parallel=True)),
        (4, ParallelConfig(pp=2, vpp=2, cp=2)),
    ],
    ids=layout_name,
)
def test_each_cp_rank_scores_its_own_samples_as_one_rank_does(directory, world_size, layout):
    mesh, chunks = load(directory, ParallelConfig())
    expected = hidden_of(chunks, mesh)
    found = run_on_ranks(world_size, scored_by_each_rank, directory, layout)
    stages = {rows is None for _, rows, _ in found}
    assert stages == ({True, False} if layout.pp > 1 else {False})
    for (_, count), rows, student_is_back in found:
        assert student_is_back
        if rows is not None:
            length = sum(len(batch.rows) for batch in microbatches()[:count])
            torch.testing.assert_close(rows, expected[:length], rtol=0, atol=5e-6)


def test_buckets_hold_neighbours_up_to_their_size_and_larger_parameters_alone(directory, monkeypatch):
    _, chunks = load(directory, ParallelConfig())
    parameters = list(chunks[0].parameters())
    monkeypatch.setattr(swap, "BUCKET_BYTES", 50_000)
    buckets = swap.buckets_of(parameters, None)
    assert [parameter for bucket in buckets for parameter in bucket.parameters] == parameters
    assert len(buckets) > 2
    for bucket in buckets:
        size = sum(parameter.numel() * parameter.element_size() for parameter in bucket.parameters)
        assert size <= 50_000 or len(bucket.parameters) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_exchanged_on_a_gpus_streams_are_whole_and_come_back_bitwise():
    parameters = [torch.nn.Parameter(torch.randn(4096, 4096, device="cuda").bfloat16()) for _ in range(16)]
    for at_least in (None, torch.float32):
        exchange = swap.Exchange(swap.buckets_of(parameters, at_least))
        start = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(1.0)
        student = [parameter.detach().clone() for parameter in parameters]
        for _ in range(3):
            with exchange.shown():
                assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, start, strict=True))
            assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, student, strict=True))
