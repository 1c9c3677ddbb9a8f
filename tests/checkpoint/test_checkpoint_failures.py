"""Checkpoints that were interrupted, damaged or belong to another run: never picked, never half taken."""

import os
import signal

import pytest

from opsd_megatron.checkpoint import dist_writer
from opsd_megatron.checkpoint.state_files import newest_checkpoint
from opsd_megatron.checkpoint.training_state import load_state, save_state
from opsd_megatron.config import ParallelConfig
from opsd_megatron.errors import CheckpointError
from tests.checkpoint.training import BF16, DISTRIBUTED, PLAIN, start, train_and_save, write_start
from tests.ranks import RankPool, run_on_ranks
from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("tied"))


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
