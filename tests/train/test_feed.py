"""Whole runs whose rollouts are recorded, replayed, or sampled one step ahead."""

import json
import shutil
from pathlib import Path

import pytest

from opsd_megatron.launch import generate
from opsd_megatron.rollout.recording import read_step, recorded_steps
from tests.ranks import Job
from tests.train.runs import TOKEN, make_world

OVERLAP = ("--rollout.overlap", "one_step_off")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"))
    yield world
    world.server.stop()


@pytest.fixture(scope="module")
def recorded(world):
    """A run on two replicas and what it recorded."""
    directory = world.directory / "rollouts"
    assert world.finish("recorded", 2, "--rollout.record-to", str(directory)) == 0, world.log("recorded")
    return directory


def test_a_replayed_run_has_the_same_losses_bit_for_bit_without_a_server(world, recorded):
    flags = ("--rollout.replay-from", str(recorded), "--rollout.url", "http://127.0.0.1:9")
    assert world.finish("replayed", 2, *flags, token="") == 0, world.log("replayed")
    assert sorted(world.losses("replayed")) == [1, 2, 3, 4, 5, 6]
    assert world.losses("replayed") == world.losses("recorded")


def test_a_recording_holds_every_rollout_with_the_advantages_of_its_tokens(world, recorded):
    assert recorded_steps(recorded) == [1, 2, 3, 4, 5, 6]
    metrics = world.rows("recorded")
    for step in (1, 6):
        recording = read_step(recorded, step)
        assert len(recording.rollouts) == 4 and recording.header["replicas"] == 2
        advantages = [value for row in recording.rollouts for value in row.values["advantage"]]
        assert len(advantages) == sum(len(row.rollout.token_ids) for row in recording.rollouts)
        mean = sum(advantages) / len(advantages)
        assert mean == pytest.approx(metrics[step]["advantage/mean_nats"], rel=1e-6)
        assert {span.version for row in recording.rollouts for span in row.rollout.version_spans} == {
            f"step-{step - 1}"
        }


def test_generating_without_a_trainer_records_what_a_run_replays(world):
    directory = world.directory / "generated"
    flags = [*world._flags("generated"), "--rollout.record-to", str(directory), "--steps", "2"]
    flags += ["--batch.prompts-per-step", "4"]
    job = Job(Path(generate.__file__), 1, flags, world.directory / "generate.log", world._environment(TOKEN))
    assert job.wait(120) == 0, (world.directory / "generate.log").read_text()
    assert recorded_steps(directory) == [1, 2]
    replay = ("--rollout.replay-from", str(directory), "--steps", "2")
    assert world.finish("from generated", 1, *replay, token="") == 0, world.log("from generated")
    assert sorted(world.losses("from generated")) == [1, 2]


@pytest.fixture(scope="module")
def overlapped(world):
    assert world.finish("overlapped", 2, *OVERLAP) == 0, world.log("overlapped")
    return world.losses("overlapped")


def test_one_step_off_learns_from_the_weights_of_the_step_before(world, overlapped):
    staleness = {step: row["rollout/staleness_steps_max"] for step, row in world.rows("overlapped").items()}
    assert staleness == {1: 0.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0, 6: 1.0}
    mismatch = {step: row["mismatch/logprob_abs_mean_nats"] for step, row in world.rows("overlapped").items()}
    assert mismatch[1] < 1e-5 and all(mismatch[step] > 1e-5 for step in range(2, 7))


def test_an_interrupted_overlapped_run_resumes_bit_for_bit_with_what_was_in_flight(world, overlapped):
    process = world.fork("cut", 2, *OVERLAP, "--checkpoint.every-steps", "0")
    world.wait_for_step("cut", 2, process)
    process.terminate()
    process.wait(60)
    reached = max(world.losses("cut"))
    assert 2 <= reached < 6
    state = json.loads((world.directory / "cut" / f"step_{reached:06d}" / "state.json").read_text())
    assert len(state["extra"]["ahead"]) == 4
    shutil.copytree(world.directory / "cut", world.directory / "moved")
    assert world.finish("cut", 2, *OVERLAP) == 0, world.log("cut")
    assert world.losses("cut") == overlapped
    assert world.finish("moved", 1, *OVERLAP, "--steps", str(reached + 1)) == 0, world.log("moved")
    assert world.losses("moved")[reached + 1] == pytest.approx(overlapped[reached + 1], abs=1e-6)


def test_an_overlapped_run_outlives_the_restart_of_its_server(world):
    world.outlive_server("fault", 1, *OVERLAP)
    metrics = world.rows("fault")
    assert sorted(metrics) == [1, 2, 3, 4, 5, 6]
    assert {row["rollout/staleness_steps_mean"] for row in metrics.values()} == {0.0, 1.0}, "no batch of two versions"


def test_the_server_is_probed_after_every_publication(world, recorded):
    with world.server.backend() as backend:
        if not backend.capabilities().can_score:
            pytest.skip("this server does not score prompts")
    metrics = world.rows("recorded")
    assert all(row["mismatch/probe_abs_mean_nats"] < 1e-4 for row in metrics.values())
