import pytest
import torch
import torch.distributed as dist

from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.context import deal
from opsd_megatron.parallel.response import RowExchange, even_shares
from opsd_megatron.parallel.traffic import count_traffic
from opsd_megatron.token_tree import Node, TokenTree
from opsd_megatron.types import TokenBatch
from tests.ranks import run_on_ranks

HIDDEN = 5
# per world size: the response ids that each rank holds; some ranks hold none, ids are in no order
HELD = {
    1: [[7, 3, 9]],
    2: [[], [4, 11, 2, 30, 6]],
    4: [[8, 1], [], [20, 5, 6, 2, 13, 4], [0]],
}


def layouts(world_size: int):
    held = [torch.tensor(ids, dtype=torch.int64) for ids in HELD[world_size]]
    wanted = even_shares(torch.cat(held).sort().values, world_size)
    return held, wanted


def row(response: torch.Tensor) -> torch.Tensor:
    """The hidden state that belongs to a response id."""
    return (response[:, None] + torch.arange(HIDDEN) / 8).double()


def exchange_rows(dtype):
    """Moves rows and back-propagates sum_i (response_i + 1) * row_i on the wanted side."""
    axis = Axis.of_group("cp", dist.group.WORLD)
    held, wanted = layouts(axis.size)
    rows = row(held[axis.rank]).to(dtype).requires_grad_()
    exchange = RowExchange(held, wanted, axis)
    with count_traffic({"cp": axis.group}) as traffic:
        moved = exchange.move(rows)
        (moved * (wanted[axis.rank] + 1)[:, None].to(dtype)).sum().backward()
    return moved.detach(), rows.grad, traffic["cp"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rows_arrive_where_wanted_and_gradients_return(world_size, dtype):
    held, wanted = layouts(world_size)
    results = run_on_ranks(world_size, exchange_rows, dtype)
    sent = [0] * world_size
    for source in range(world_size):
        for target in range(world_size):
            if source != target:
                crossing = len(set(held[source].tolist()) & set(wanted[target].tolist()))
                sent[source] += crossing
                sent[target] += crossing
    for rank, (moved, grad, sent_bytes) in enumerate(results):
        assert torch.equal(moved, row(wanted[rank]).to(dtype))
        assert torch.equal(grad, (held[rank] + 1)[:, None].expand(-1, HIDDEN).to(dtype))
        assert sent_bytes == sent[rank] * HIDDEN * torch.tensor([], dtype=dtype).element_size()


def exchange_to_all():
    """Every rank wants every row: gradients of the copies must be summed."""
    axis = Axis.of_group("cp", dist.group.WORLD)
    held, _ = layouts(axis.size)
    everything = torch.cat(held)
    rows = row(held[axis.rank]).requires_grad_()
    moved = RowExchange(held, [everything] * axis.size, axis).move(rows)
    (moved * (axis.rank + 1)).sum().backward()
    return moved.detach(), rows.grad


def test_gradients_of_a_row_that_went_to_several_ranks_are_summed():
    held, _ = layouts(4)
    for moved, grad in run_on_ranks(4, exchange_to_all):
        assert torch.equal(moved, row(torch.cat(held)))
        assert (grad == 1 + 2 + 3 + 4).all()


@pytest.mark.parametrize("rows", [0, 1, 3, 8, 17])
def test_even_shares_differ_by_at_most_one_and_keep_the_order(rows):
    ids = torch.arange(100, 100 + rows)
    shares = even_shares(ids, 4)
    counts = [len(share) for share in shares]
    assert torch.equal(torch.cat(shares), ids) and max(counts) - min(counts) <= 1


def test_impossible_layouts_are_refused_by_name():
    axis = Axis("cp", 0, 2)
    one, two = torch.tensor([1]), torch.tensor([2])
    with pytest.raises(ValueError, match="response token 3 is wanted but held by no rank"):
        RowExchange([one, two], [one, torch.tensor([3])], axis)
    with pytest.raises(ValueError, match="response token 1 is held twice"):
        RowExchange([one, one], [one, one], axis)
    with pytest.raises(ValueError, match="1 and 2 layouts for the 2 ranks"):
        RowExchange([one], [one, two], axis)
    with pytest.raises(ValueError, match="2 rows where this rank holds 1"):
        RowExchange([one], [one], Axis.single("cp")).move(torch.zeros(2, HIDDEN))


def test_rows_at_the_end_of_a_long_context_are_spread_over_all_heads():
    tree = TokenTree((Node(-1, 32768 + 1024, 0),))
    rows = torch.arange(32767, 32767 + 1024)
    batch = TokenBatch(tree, torch.zeros(tree.num_tokens, dtype=torch.int64), rows, torch.arange(1024))
    axes = [Axis("cp", rank, 4, None, (0, 1, 2, 3)) for rank in range(4)]
    held = deal(batch, axes[0]).responses_by_rank
    wanted = even_shares(batch.response_index, 4)
    exchanges = [RowExchange(held, wanted, axis) for axis in axes]
    assert [exchange.held_rows for exchange in exchanges] == [1024, 0, 0, 0]
    assert [sum(exchange.receive_counts) for exchange in exchanges] == [256] * 4
