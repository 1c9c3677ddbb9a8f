import json

import pytest

from opsd_megatron.data.stream import RecordStream
from opsd_megatron.errors import ConfigError, DataError

RECORDS = range(37)  # not a multiple of anything below


def global_batches(dp_size: int, steps: int, shuffle: bool = True, seed: int = 5) -> list[tuple[int, ...]]:
    ranks = [RecordStream(RECORDS, seed, shuffle, rank, dp_size) for rank in range(dp_size)]
    return [tuple(record for rank in ranks for record in rank.next_batch(8)) for _ in range(steps)]


@pytest.mark.parametrize("dp_size", [2, 4, 8])
def test_every_dp_sees_the_same_global_batches(dp_size: int):
    assert global_batches(dp_size, steps=12) == global_batches(1, steps=12)


def test_every_epoch_reads_every_record_once_in_another_order():
    records = [record for batch in global_batches(1, steps=37) for record in batch]
    epochs = [records[start : start + 37] for start in range(0, 8 * 37, 37)]
    assert all(sorted(epoch) == list(RECORDS) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 8


def test_without_shuffle_records_come_in_file_order():
    assert global_batches(1, steps=5, shuffle=False) == [tuple((8 * s + i) % 37 for i in range(8)) for s in range(5)]


def test_the_order_depends_on_the_seed_alone():
    assert global_batches(1, 3, seed=1) == global_batches(1, 3, seed=1)
    assert global_batches(1, 3, seed=1) != global_batches(1, 3, seed=2)


@pytest.mark.parametrize("resumed_dp", [1, 2, 4])
@pytest.mark.parametrize("done", [0, 3, 4, 5, 14])
def test_resuming_in_the_middle_of_an_epoch_equals_going_on(done: int, resumed_dp: int):
    stream = RecordStream(RECORDS, 5, True, 1, 2)
    for _ in range(done):
        stream.next_batch(8)
    state = json.loads(json.dumps(stream.state_dict()))
    ranks = [RecordStream(RECORDS, 5, True, rank, resumed_dp) for rank in range(resumed_dp)]
    for rank in ranks:
        rank.load_state_dict(state)
    resumed = [tuple(record for rank in ranks for record in rank.next_batch(8)) for _ in range(8)]
    assert resumed == global_batches(1, done + 8)[done:]


@pytest.mark.parametrize(("field", "value"), [("seed", 6), ("shuffle", False), ("num_records", 36)])
def test_a_position_of_another_order_is_refused_by_name(field: str, value: object):
    state = RecordStream(RECORDS, 5, True, 0, 1).state_dict() | {field: value}
    with pytest.raises(DataError, match=f"{field}={value}"):
        RecordStream(RECORDS, 5, True, 0, 1).load_state_dict(state)


def test_a_batch_that_dp_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"prompts_per_step=6 is not a multiple of dp=4; set it to 4 or 8"):
        RecordStream(RECORDS, 5, True, 0, 4).next_batch(6)


def test_an_empty_stream_is_refused():
    with pytest.raises(DataError, match="no records"):
        RecordStream([], 5, True, 0, 1)
