"""Saving and resuming: exact under the same layout, exact tensors under another."""

import json

import pytest
import torch

from opsd_megatron.checkpoint.training_state import load_state, save_state
from opsd_megatron.config import ParallelConfig
from tests.checkpoint.training import BF16, BF16_PLAIN, DISTRIBUTED, PLAIN, resume, start, train_and_save, write_start
from tests.ranks import run_on_ranks


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("tied"))


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, dict):
            assert_same(value, second[name])
        else:
            assert torch.equal(value, second[name]), name


LAYOUTS = {
    "one rank": (1, ParallelConfig()),
    "tp2 sp": (2, ParallelConfig(tp=2, sequence_parallel=True)),
    "pp2 vpp2": (2, ParallelConfig(pp=2, vpp=2)),
    "dp2": (2, ParallelConfig()),
    "pp2 cp2": (4, ParallelConfig(pp=2, cp=2)),
}
OPTIONS = {"plain": PLAIN, "distributed": DISTRIBUTED, "bf16": BF16, "bf16 plain": BF16_PLAIN}
RESUMED = [
    *((layout, "distributed") for layout in LAYOUTS),
    *((layout, "plain") for layout in ("one rank", "pp2 vpp2", "dp2")),
    *((layout, "bf16") for layout in ("tp2 sp", "pp2 cp2")),
    ("pp2 vpp2", "bf16 plain"),
]


@pytest.mark.parametrize(("layout", "options"), RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one(directory, tmp_path, layout, options):
    (world, layout), options = LAYOUTS[layout], OPTIONS[options]
    before = run_on_ranks(world, train_and_save, directory, tmp_path, layout, options)
    after = run_on_ranks(world, resume, directory, tmp_path, layout, options)
    for saved, loaded in zip(before[0][:4], after[0][:4], strict=True):
        assert_same(saved, loaded)
    for saved, loaded in zip(before, after, strict=True):
        assert saved[4] == loaded[4]
        assert loaded[5].exact_random_state
        assert (loaded[5].step, loaded[5].extra) == (2, {"position": [3, 4]})


LAYOUT_CHANGES = {
    "tp2 to tp1": (2, ParallelConfig(tp=2), 1, ParallelConfig()),
    "tp1 to tp2": (1, ParallelConfig(), 2, ParallelConfig(tp=2, sequence_parallel=True)),
    "pp2 to pp1": (2, ParallelConfig(pp=2), 1, ParallelConfig()),
    "pp2 vpp2 to tp2": (2, ParallelConfig(pp=2, vpp=2), 2, ParallelConfig(tp=2)),
    "dp2 to one rank": (2, ParallelConfig(), 1, ParallelConfig()),
    "tp2 dp2 to pp2 vpp2 cp2": (4, ParallelConfig(tp=2), 4, ParallelConfig(pp=2, vpp=2, cp=2)),
}


RESHARDED = [
    *((change, "distributed") for change in LAYOUT_CHANGES),
    *((change, "plain") for change in ("tp2 to tp1", "pp2 to pp1")),
    *((change, "bf16") for change in ("tp1 to tp2", "pp2 vpp2 to tp2")),
]


@pytest.mark.parametrize(("change", "options"), RESHARDED)
def test_every_tensor_survives_another_layout(directory, tmp_path, change, options):
    (world, layout, new_world, new_layout), options = LAYOUT_CHANGES[change], OPTIONS[options]
    weights, states, later, *_ = run_on_ranks(world, train_and_save, directory, tmp_path, layout, options)[0]
    loaded = run_on_ranks(new_world, resume, directory, tmp_path, new_layout, options)
    assert_same(weights, loaded[0][0])
    assert_same(states, loaded[0][1])
    for name, tensor in later.items():  # two steps on: only the order of sums in the gradient norm differs
        bound = 1e-5 if tensor.dtype == torch.float32 else 2e-2
        assert (tensor.float() - loaded[0][2][name].float()).abs().max() <= bound, name
    assert not any(rank[5].exact_random_state for rank in loaded)
    assert len({tuple(rank[4]) for rank in loaded}) == new_world


def many_buckets(directory, out):
    """Optimizer states before a save and after a load, with core's buckets small and padded."""
    options = {"distributed": True, "bucket_size": 5000}
    training = start(directory, ParallelConfig(), **options)
    training.step()
    place = training.architecture, training.mesh
    save_state(out, 1, training.chunks, *place, optimizer=training.optimizer)
    resumed = start(directory, ParallelConfig(), **options)
    load_state(out, resumed.chunks, resumed.architecture, resumed.mesh, optimizer=resumed.optimizer)
    buffers = training.optimizer.chained_optimizers[0].buffers
    padded = sum(b.numel_unpadded != b.grad_data.numel() for buffer in buffers for b in buffer.buckets)
    return training.states(), resumed.states(), padded


def test_padding_between_gradient_buckets_shifts_nothing(directory, tmp_path):
    saved, loaded, padded = run_on_ranks(2, many_buckets, directory, tmp_path)[0]
    assert padded > 1
    assert_same(saved, loaded)


def with_teacher(directory, out, layout, saving):
    """Each chunk's teacher: three times the start weights when saving, zeros to be filled when loading."""
    training = start(directory, layout, distributed=True)
    factor = 3.0 if saving else 0.0
    teacher = [
        {name: parameter.detach().float() * factor for name, parameter in chunk.module.named_parameters()}
        for chunk in training.chunks
    ]
    arguments = (training.chunks, training.architecture, training.mesh)
    if saving:
        training.step()
        save_state(out, 1, *arguments, optimizer=training.optimizer, teacher=teacher)
    else:
        load_state(out, *arguments, optimizer=training.optimizer, teacher=teacher)
    of = {
        id(parameter): tensors[name]
        for chunk, tensors in zip(training.chunks, teacher, strict=True)
        for name, parameter in chunk.module.named_parameters()
    }
    return training.export(lambda parameter: of[id(parameter)])


def test_the_teacher_is_saved_beside_the_student_and_resharded(directory, tmp_path):
    saved = run_on_ranks(2, with_teacher, directory, tmp_path, ParallelConfig(pp=2, vpp=2), True)[0]
    loaded = run_on_ranks(2, with_teacher, directory, tmp_path, ParallelConfig(tp=2), False)[0]
    assert_same(saved, loaded)
    assert torch.count_nonzero(loaded["model.embed_tokens.weight"]) > 0


def save_before_any_step(directory, out, options):
    return train_and_save(directory, out, ParallelConfig(), options, steps=0)


@pytest.mark.parametrize("options", [PLAIN, DISTRIBUTED, BF16_PLAIN], ids=["plain", "distributed", "bf16 plain"])
def test_a_run_that_was_saved_before_its_first_step_resumes(directory, tmp_path, options):
    before = run_on_ranks(1, save_before_any_step, directory, tmp_path, options)[0]
    after = run_on_ranks(1, resume, directory, tmp_path, ParallelConfig(), options)[0]
    assert after[5].step == 0
    for saved, loaded in zip(before[:4], after[:4], strict=True):
        assert_same(saved, loaded)


def save_several(directory, out, keep):
    training = start(directory, ParallelConfig(), distributed=True)
    for step in (1, 2, 3, 3):
        save_state(out, step, training.chunks, training.architecture, training.mesh, keep=keep)


def test_only_the_newest_checkpoints_stay(directory, tmp_path):
    run_on_ranks(1, save_several, directory, tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]


def test_the_description_tells_what_the_checkpoint_is(directory, tmp_path):
    run_on_ranks(1, train_and_save, directory, tmp_path, ParallelConfig(), DISTRIBUTED)
    description = json.loads((tmp_path / "step_000002/state.json").read_text())
    assert description["layout"] == {
        "tp": 1, "pp": 1, "cp": 1, "dp": 1, "vpp": None, "sequence_parallel": False
    }  # fmt: skip
    assert (description["dtype"], description["optimizer"], description["teacher"]) == (
        "float32", "DistributedOptimizer", False,
    )  # fmt: skip
    assert description["architecture"]["rope"]["theta"] == 10_000.0
