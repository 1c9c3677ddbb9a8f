import pytest
import torch
import torch.distributed as dist

from opsd_megatron.parallel import reduce
from opsd_megatron.parallel.axis import Axis
from tests.ranks import run_on_ranks


def reductions():
    axis = Axis.of_group("dp", dist.group.WORLD)
    values = torch.tensor([axis.rank, -axis.rank, 5])
    before = values.clone()
    total, largest = reduce.sum_over(values, axis), reduce.max_over(values, axis)
    assert torch.equal(values, before), "the input must stay as it was"
    transposed = reduce.sum_over(torch.arange(6.0).view(2, 3).T * (axis.rank + 1), axis)
    last = reduce.broadcast_object({"from": axis.rank}, axis, axis.size - 1)
    return total, largest, transposed, last, reduce.gather_objects(("rank", axis.rank), axis)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sums_maxima_and_objects_agree_on_every_rank(world_size):
    ranks = range(world_size)
    for total, largest, transposed, last, everyone in run_on_ranks(world_size, reductions):
        assert total.tolist() == [sum(ranks), -sum(ranks), 5 * world_size]
        assert largest.tolist() == [world_size - 1, 0, 5]
        assert torch.equal(transposed, torch.arange(6.0).view(2, 3).T * sum(rank + 1 for rank in ranks))
        assert last == {"from": world_size - 1}
        assert everyone == [("rank", rank) for rank in ranks]


@pytest.mark.parametrize("sum_", [reduce.sum_over, reduce.max_over])
def test_an_axis_of_one_rank_is_the_identity_without_a_process_group(sum_):
    tensor = torch.ones(2, requires_grad=True)
    assert sum_(tensor, Axis.single("tp")) is tensor
