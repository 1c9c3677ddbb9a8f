import pytest
import torch
import torch.distributed as dist

from opsd_megatron.parallel import reduce
from opsd_megatron.parallel.axis import Axis
from tests.ranks import run_on_ranks


def summand_of(rank: int) -> torch.Tensor:
    return torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64) * (rank + 1)


def weights_of(rank: int) -> torch.Tensor:
    return torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64) + rank


def replicated_loss():
    """Every rank computes the same sin(sum) and the loss is counted once."""
    axis = Axis.of_group("tp", dist.group.WORLD)
    summand = summand_of(axis.rank).requires_grad_()
    total = reduce.sum_replicated(summand, axis)
    total.sin().sum().backward()
    return total.detach(), summand.grad


def consumed_loss():
    """Each rank adds its own share, sin(sum) * its weights, to one global loss."""
    axis = Axis.of_group("tp", dist.group.WORLD)
    summand = summand_of(axis.rank).requires_grad_()
    total = reduce.sum_consumed(summand, axis)
    (total.sin() * weights_of(axis.rank)).sum().backward()
    return total.detach(), summand.grad


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradient_of_a_replicated_sum_is_that_of_one_loss(world_size):
    total = sum(summand_of(rank) for rank in range(world_size)).requires_grad_()
    total.sin().sum().backward()
    for ours, grad in run_on_ranks(world_size, replicated_loss):
        torch.testing.assert_close(ours, total.detach(), rtol=1e-14, atol=0)
        torch.testing.assert_close(grad, total.grad, rtol=1e-14, atol=0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradient_of_a_consumed_sum_is_that_of_all_shares(world_size):
    total = sum(summand_of(rank) for rank in range(world_size)).requires_grad_()
    sum((total.sin() * weights_of(rank)).sum() for rank in range(world_size)).backward()
    for ours, grad in run_on_ranks(world_size, consumed_loss):
        torch.testing.assert_close(ours, total.detach(), rtol=1e-14, atol=0)
        torch.testing.assert_close(grad, total.grad, rtol=1e-14, atol=0)


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


@pytest.mark.parametrize("sum_", [reduce.sum_replicated, reduce.sum_consumed, reduce.sum_over, reduce.max_over])
def test_an_axis_of_one_rank_is_the_identity_without_a_process_group(sum_):
    tensor = torch.ones(2, requires_grad=True)
    assert sum_(tensor, Axis.single("tp")) is tensor
