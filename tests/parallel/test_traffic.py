import pytest
import torch
import torch.distributed as dist

from opsd_megatron.parallel.traffic import count_traffic
from tests.ranks import run_on_ranks

NUMBERS = 24  # float32: 96 bytes, divisible by every world size here


def bytes_of_each_operation():
    """Bytes that this rank sent per kind of call, as axis "all" counts them; other groups must not be charged."""
    world, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    whole, shard = torch.ones(NUMBERS), torch.ones(NUMBERS // size)
    shards = [torch.ones(NUMBERS // size) for _ in range(size)]
    uneven = [target + 1 for target in range(size)]  # rows of 2 numbers for each target
    received = torch.empty(size * (rank + 1), 2)
    bound_early = dist.all_reduce
    operations = {
        "all_reduce": lambda: dist.all_reduce(whole, group=world),
        "all_reduce bound before": lambda: bound_early(whole),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(whole, shard),
        "all_gather": lambda: dist.all_gather(shards, shard),
        "reduce_scatter": lambda: dist.reduce_scatter(shard, shards),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(shard, whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty_like(whole), whole),
        "uneven all_to_all_single": lambda: dist.all_to_all_single(
            received, torch.ones(sum(uneven), 2), [rank + 1] * size, uneven
        ),
        "send": lambda: send_round(rank, size),
    }
    sent = {}
    for name, operation in operations.items():
        with count_traffic({"all": world, "one rank": None}) as traffic:
            operation()
        assert traffic["one rank"] == traffic["other"] == 0
        sent[name] = traffic["all"]
    with count_traffic({}) as traffic:
        dist.all_reduce(whole)
    sent["other"] = traffic["other"]
    return sent


def send_round(rank: int, size: int) -> None:
    if size > 1:
        message, arriving = torch.ones(7), torch.empty(7)
        for work in dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, message, (rank + 1) % size),
                dist.P2POp(dist.irecv, arriving, (rank - 1) % size),
            ]
        ):
            work.wait()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_operation_counts_as_its_ring_algorithm(size):
    once = (size - 1) * 4 * NUMBERS // size
    for rank, sent in enumerate(run_on_ranks(size, bytes_of_each_operation)):
        uneven = sum(target + 1 for target in range(size) if target != rank) * 2 * 4
        assert sent == {
            "all_reduce": 2 * once,
            "all_reduce bound before": 2 * once,
            "all_gather_into_tensor": once,
            "all_gather": once,
            "reduce_scatter": once,
            "reduce_scatter_tensor": once,
            "broadcast": once,
            "all_to_all_single": once,
            "uneven all_to_all_single": uneven,
            "send": 28 if size > 1 else 0,
            "other": 2 * once,
        }


def axes_apart():
    """Two ways of pairing four ranks; each charges its own name, several groups may share a name."""
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    row, column = rows[rank // 2], columns[rank % 2]
    with count_traffic({"tp": row, "dp": [column, dist.group.WORLD]}) as traffic:
        dist.all_reduce(torch.ones(2), group=row)
        dist.all_reduce(torch.ones(3), group=column)
        dist.all_reduce(torch.ones(4))
    before = dict(traffic.bytes_sent)
    dist.all_reduce(torch.ones(5), group=row)
    unchanged = dict(traffic.bytes_sent) == before
    for group in (row, column):
        dist.destroy_process_group(group)
    return before, dict(traffic.bytes_by_operation), unchanged


def test_each_axis_is_charged_for_its_own_groups_and_only_while_counting():
    for sent, by_operation, unchanged in run_on_ranks(4, axes_apart):
        assert sent == {"tp": 8, "dp": 12 + 24}
        assert by_operation == {("tp", "allreduce"): 8, ("dp", "allreduce"): 36}
        assert unchanged
