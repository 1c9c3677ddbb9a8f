"""Recorded rollouts read back whole, or not at all."""

from dataclasses import replace

import pytest

from opsd_megatron.errors import DataError
from opsd_megatron.rollout.recording import RecordedRollout, read_step, recorded_steps, write_step
from opsd_megatron.types import VersionSpan
from tests.train.parallel_step import make_rollouts


def recordings() -> list[RecordedRollout]:
    """Two versions in one of them, log-probs that no short decimal names, and the same prompt behind another."""
    rows = []
    for number, rollout in enumerate(make_rollouts()):
        count = len(rollout.token_ids)
        logprobs = tuple(-1 / (3 + number + index) for index in range(count))
        spans = (VersionSpan("step-1", 0, 1), VersionSpan("step-2", 1, count)) if count > 1 else rollout.version_spans
        rollout = replace(rollout, logprobs=logprobs, version_spans=spans)
        rows.append(RecordedRollout(rollout, {"advantage": tuple(p * 7 for p in logprobs)}))
    return [*rows, rows[0]]


def test_a_step_reads_back_equal_from_all_its_replicas(tmp_path):
    rows = recordings()
    for replica, part in enumerate((rows[:5], rows[5:])):
        write_step(tmp_path, 7, replica, 2, {"temperature": 0.7}, part)
    step = read_step(tmp_path, 7)
    assert list(step.rollouts) == rows and step.header["temperature"] == 0.7
    write_step(tmp_path, 7, 0, 1, {}, rows[:2])
    assert list(read_step(tmp_path, 7).rollouts) == rows[:2], "one replica's file takes the place of two"


def test_a_step_that_lacks_a_replica_is_not_there(tmp_path):
    write_step(tmp_path, 1, 0, 1, {}, recordings())
    write_step(tmp_path, 2, 1, 2, {}, recordings())
    assert recorded_steps(tmp_path) == [1]
    with pytest.raises(DataError, match="no complete recording of step 2; there are 1 steps, 1 to 1"):
        read_step(tmp_path, 2)


@pytest.mark.parametrize("spoil", ["cut line", "cut file", "other format", "nothing"])
def test_a_damaged_file_is_named(tmp_path, spoil):
    path = write_step(tmp_path, 1, 0, 1, {}, recordings())
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    spoiled = {
        "cut line": text[:-40],
        "cut file": "".join(lines[:-1]),
        "other format": text.replace("rollouts 1", "rollouts 9", 1),
        "nothing": "",
    }
    path.write_text(spoiled[spoil])
    with pytest.raises(DataError, match=path.name):
        read_step(tmp_path, 1)
