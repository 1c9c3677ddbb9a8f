"""Saving and resuming: exact under the same layout, exact tensors under another, whole or not at all."""

import json
import os
import random
import signal
from pathlib import Path

import numpy
import pytest
import torch

from opsd_megatron.checkpoint import dist_writer
from opsd_megatron.checkpoint.state_files import newest_checkpoint
from opsd_megatron.checkpoint.training_state import load_state, save_state
from opsd_megatron.config import ParallelConfig
from opsd_megatron.errors import CheckpointError
from tests.checkpoint.training import start
from tests.ranks import RankPool, run_on_ranks
from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """249 rows: another number of padding rows for tp 1 and tp 2. Tied, so that a last stage holds a copy."""
    return write_tiny_model(
        tmp_path_factory.mktemp("tied"), "qwen3", num_hidden_layers=4, vocab_size=249, tie_word_embeddings=True
    )


def draws() -> list[float]:
    return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]


def train_and_save(directory, out, layout, options, steps=2):
    """(weights, optimizer states) at the save, then weights and random draws two steps later."""
    training = start(directory, layout, **options)
    for _ in range(steps):
        training.step()
    save_state(
        out, steps, training.chunks, training.architecture, training.mesh,
        optimizer=training.optimizer, extra={"position": [3, 4]},
    )  # fmt: skip
    saved = training.weights(), training.states()
    numbers = draws()
    training.step()
    training.step()
    return *saved, training.weights(), training.states(), numbers


def resume(directory, out, layout, options):
    training = start(directory, layout, **options)
    restored = load_state(
        out, training.chunks, training.architecture, training.mesh, optimizer=training.optimizer, seed=7
    )
    loaded = training.weights(), training.states()
    numbers = draws()
    training.step()
    training.step()
    return *loaded, training.weights(), training.states(), numbers, restored


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, dict):
            assert_same(value, second[name])
        else:
            assert torch.equal(value, second[name]), name


PLAIN = {"distributed": False}
DISTRIBUTED = {"distributed": True}
BF16 = {"distributed": True, "dtype": torch.bfloat16}
BF16_PLAIN = {"distributed": False, "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    "options", [PLAIN, DISTRIBUTED, BF16, BF16_PLAIN], ids=["plain", "distributed", "bf16", "bf16 plain"]
)
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, ParallelConfig()),
        (2, ParallelConfig(tp=2, sequence_parallel=True)),
        (2, ParallelConfig(pp=2, vpp=2)),
        (2, ParallelConfig()),
        (4, ParallelConfig(pp=2, cp=2)),
    ],
    ids=["one rank", "tp2 sp", "pp2 vpp2", "dp2", "pp2 cp2"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(directory, tmp_path, world, layout, options):
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


@pytest.mark.parametrize("options", [PLAIN, DISTRIBUTED, BF16], ids=["plain", "distributed", "bf16"])
@pytest.mark.parametrize("change", LAYOUT_CHANGES.values(), ids=LAYOUT_CHANGES)
def test_every_tensor_survives_another_layout(directory, tmp_path, change, options):
    world, layout, new_world, new_layout = change
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
    return training._export(lambda parameter: of[id(parameter)])


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


def load_only(directory, out, options):
    training = start(directory, ParallelConfig(), **options)
    try:
        restored = load_state(out, training.chunks, training.architecture, training.mesh, optimizer=training.optimizer)
    except CheckpointError as error:
        return str(error)
    return restored and restored.step


def test_incomplete_checkpoints_are_never_picked_and_are_cleared_away(directory, tmp_path):
    run_on_ranks(1, train_and_save, directory, tmp_path, ParallelConfig(), DISTRIBUTED)
    complete = tmp_path / "step_000002"
    for name, lacking in (("step_000009.tmp", ()), ("step_000008", ("state.json",)), ("step_000007", (".metadata",))):
        (tmp_path / name).mkdir()
        for file in complete.iterdir():
            if file.name not in lacking:
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
    assert run_on_ranks(1, load_only, directory, tmp_path, DISTRIBUTED)[0] == 2
    assert not (tmp_path / "step_000009.tmp").exists()
    complete.rename(tmp_path / "step_000002.old")  # a save of the same step died between its two renames
    assert run_on_ranks(1, load_only, directory, tmp_path, DISTRIBUTED)[0] == 2


def test_without_a_checkpoint_nothing_is_restored(directory, tmp_path):
    assert run_on_ranks(1, load_only, directory, tmp_path / "new", DISTRIBUTED)[0] is None


def die_while_writing(directory, out):
    """Saves step 2; in the save of step 3 rank 1 is killed when it has written half of its file."""
    train_and_save(directory, out, ParallelConfig(tp=2), DISTRIBUTED)
    training = start(directory, ParallelConfig(tp=2), **DISTRIBUTED)
    write = dist_writer._write_here

    def half(writer):
        write(writer)
        if int(os.environ["RANK"]) == 1:
            file = writer.write_buckets[0][0]
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    dist_writer._write_here = half
    save_state(out, 3, training.chunks, training.architecture, training.mesh, optimizer=training.optimizer)


def test_a_rank_killed_while_writing_fails_the_save_and_the_last_checkpoint_stays(directory, tmp_path):
    pool = RankPool(2)
    try:
        with pytest.raises(AssertionError, match="rank 0 of 2 failed"):
            pool.run(die_while_writing, directory, tmp_path)
    finally:
        pool.close()
    assert (tmp_path / "step_000003.tmp").is_dir()
    assert newest_checkpoint(tmp_path) == tmp_path / "step_000002"
    assert run_on_ranks(1, load_only, directory, tmp_path, DISTRIBUTED)[0] == 2


def fail_to_write(directory, out):
    """Every rank's error when rank 1 cannot write its file."""
    training = start(directory, ParallelConfig(tp=2), **DISTRIBUTED)
    write = dist_writer._write_here

    def blocked(writer):
        if int(os.environ["RANK"]) == 1:
            os.mkdir(writer.write_buckets[0][0])  # where its file should go
        write(writer)

    dist_writer._write_here = blocked
    try:
        save_state(out, 1, training.chunks, training.architecture, training.mesh, optimizer=training.optimizer)
    except CheckpointError as error:
        return str(error)
    finally:
        dist_writer._write_here = write


def test_a_rank_that_cannot_write_fails_the_save_on_every_rank(directory, tmp_path):
    messages = run_on_ranks(2, fail_to_write, directory, tmp_path)
    assert all("step_000001.tmp cannot be written" in message for message in messages)
    assert newest_checkpoint(tmp_path) is None


@pytest.fixture(scope="module")
def saved_run(directory, tmp_path_factory):
    out = tmp_path_factory.mktemp("saved")
    run_on_ranks(1, train_and_save, directory, out, ParallelConfig(), DISTRIBUTED)
    return out


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"intermediate_size": 64}, "architecture.ffn_size=96"),
        ({"rms_norm_eps": 1e-5}, "architecture.norm_eps=1e-06"),
        ({"tie_word_embeddings": False}, "architecture.tied=True"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused_by_field(saved_run, tmp_path, changes, field):
    given = {"num_hidden_layers": 4, "vocab_size": 249, "tie_word_embeddings": True, **changes}
    other = write_tiny_model(tmp_path / "other", "qwen3", **given)
    assert field in run_on_ranks(1, load_only, other, saved_run, DISTRIBUTED)[0]


@pytest.mark.parametrize(
    ("options", "field"), [(PLAIN, "optimizer.distributed"), (BF16, "model.dtype: float32")], ids=["optimizer", "dtype"]
)
def test_a_checkpoint_of_another_setting_is_refused_by_field(directory, saved_run, options, field):
    assert field in run_on_ranks(1, load_only, directory, saved_run, options)[0]


def test_a_damaged_file_is_refused(directory, tmp_path):
    run_on_ranks(1, train_and_save, directory, tmp_path, ParallelConfig(), DISTRIBUTED)
    file = next((tmp_path / "step_000002").glob("*.distcp"))
    os.truncate(file, file.stat().st_size // 2)
    message = run_on_ranks(1, load_only, directory, tmp_path, DISTRIBUTED)[0]
    assert "step_000002 is damaged" in message


def test_the_description_tells_what_the_checkpoint_is(saved_run):
    description = json.loads((saved_run / "step_000002/state.json").read_text())
    assert description["layout"] == {
        "tp": 1, "pp": 1, "cp": 1, "dp": 1, "vpp": None, "sequence_parallel": False
    }  # fmt: skip
    assert (description["dtype"], description["optimizer"], description["teacher"]) == (
        "float32", "DistributedOptimizer", False,
    )  # fmt: skip
    assert description["architecture"]["rope"]["theta"] == 10_000.0
