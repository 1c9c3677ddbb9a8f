import pytest
import torch

from opsd_megatron.parallel.attention_plan import full_relations, plan_calls
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.context import deal, deal_blocks
from opsd_megatron.token_tree import PADDING, Node, Relation, TokenTree
from opsd_megatron.types import TokenBatch
from tests.parallel.forests import SHAPES, batch_of, forest, visible


def axes(size: int) -> list[Axis]:
    """The axis as each of its ranks sees it; dealing communicates nothing, so no group is needed."""
    return [Axis("cp", rank, size, None, tuple(range(size))) for rank in range(size)]


@pytest.mark.parametrize("multiple_of", [1, 4])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_every_token_is_dealt_once_with_its_id_and_position(name, size, multiple_of):
    batch = batch_of(forest(name))
    shards = [deal(batch, axis, multiple_of) for axis in axes(size)]
    assert {shard.blocks for shard in shards} == {shards[0].blocks}
    lengths = {shard.local_tokens for shard in shards}
    assert len(lengths) == 1 and lengths.pop() % multiple_of == 0 and shards[0].local_tokens >= multiple_of
    ids = torch.cat([shard.token_ids for shard in shards])
    positions = torch.cat([shard.position_ids for shard in shards])
    assert sorted(ids[ids > 0].tolist()) == batch.token_ids.tolist()
    assert torch.equal(positions[ids > 0], torch.from_numpy(batch.tree.position_ids())[ids[ids > 0] - 100])
    assert (positions[ids == 0] == 0).all()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_every_rank_knows_which_row_of_which_rank_predicts_each_response_token(name, size):
    batch = batch_of(forest(name))
    shards = [deal(batch, axis, 2) for axis in axes(size)]
    predictor = dict(zip(batch.response_index.tolist(), batch.token_ids[batch.rows].tolist(), strict=True))
    for shard in shards:
        found = {}
        for rank, (rows, responses) in enumerate(zip(shard.rows_by_rank, shard.responses_by_rank, strict=True)):
            found |= dict(zip(responses.tolist(), shards[rank].token_ids[rows].tolist(), strict=True))
        assert found == predictor
        assert shard.rows is shard.rows_by_rank[shard.cp.rank]
        assert shard.response_index is shard.responses_by_rank[shard.cp.rank]


def test_a_rank_may_hold_no_response_row_and_a_rank_may_hold_no_token():
    deep = batch_of(forest("one_short_response"))
    held = [len(rows) for rows in deal(deep, axes(4)[0]).rows_by_rank]
    assert 0 in held and sum(held) == len(deep.rows)
    tiny = deal(batch_of(forest("shorter_than_the_ring")), axes(4)[3], multiple_of=2)
    assert tiny.local_tokens == 2 and tiny.tokens_by_rank == (2, 0, 0, 0)
    assert tiny.token_ids.tolist() == [0, 0] and all(block.node == PADDING for block in tiny.blocks[3])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_one_sequence_that_divides_is_dealt_as_transformer_engine_deals_and_nothing_else_is(size):
    def of(*nodes: Node) -> list[bool]:
        return [deal(batch_of(TokenTree(nodes)), axis, multiple_of=2).is_plain for axis in axes(size)]

    assert of(Node(-1, 16 * size, 0)) == [True] * size
    assert of(Node(-1, 16 * size - 1, 0)) == [False] * size
    assert of(Node(-1, 8 * size, 0), Node(-1, 8 * size, 0)) == [False] * size
    assert of(Node(-1, 8 * size, 0), Node(0, 8 * size, 8 * size)) == [False] * size


def test_a_batch_without_tokens_becomes_padding():
    empty = torch.zeros(0, dtype=torch.int64)
    shard = deal(TokenBatch(TokenTree(()), empty, empty, empty), axes(2)[1], multiple_of=4)
    assert shard.token_ids.tolist() == [0] * 4 and not any(shard.calls)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_calls_cover_exactly_what_is_visible_and_nothing_twice(name, size):
    tree = forest(name)
    shards = [deal(batch_of(tree), axis, 3) for axis in axes(size)]
    covered = torch.zeros(tree.num_tokens, tree.num_tokens, dtype=torch.int64)
    for shard in shards:
        started = torch.zeros(shard.local_tokens, dtype=torch.int64)
        for hop, calls in enumerate(shard.calls):
            source = shards[(shard.cp.rank - hop) % size]
            for call in calls:
                queries, keys = shard.token_ids[call.queries] - 100, source.token_ids[call.keys] - 100
                assert (queries >= 0).all() and (keys >= 0).all(), "padding must not take part"
                pairs = torch.ones(len(queries), len(keys), dtype=torch.int64)
                covered[queries[:, None], keys[None, :]] += pairs.tril() if call.is_causal else pairs
                started[call.queries] += call.is_causal
        assert torch.equal(started, (shard.token_ids > 0).long()), "each query has exactly one causal call"
    assert torch.equal(covered, visible(tree).long())


@pytest.mark.parametrize("name", SHAPES)
def test_the_plan_reads_the_same_relations_as_the_tree(name):
    tree = forest(name)
    blocks = deal(batch_of(tree), axes(2)[0], 64).blocks
    for queries in blocks:
        for keys in blocks:
            full = full_relations(tree, queries, keys)
            assert full.tolist() == [[tree.relation(q, k) is Relation.FULL for k in keys] for q in queries]


def test_zigzag_and_single_branches_need_one_call_per_hop():
    one = TokenTree((Node(-1, 4096, 0),))
    low, high = deal_blocks(one, 2)
    assert [len(plan_calls(one, low, source, source is low)) for source in (low, high)] == [1, 1]
    assert [len(plan_calls(one, high, source, source is high)) for source in (low, high)] == [1, 1]
    branched = TokenTree((Node(-1, 100, 0), Node(0, 5, 100), Node(0, 6, 100), Node(0, 7, 100)))
    (whole,) = deal_blocks(branched, 1)
    calls = plan_calls(branched, whole, whole, True)
    assert [call.is_causal for call in calls] == [True, True, True, False]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_long_contexts_with_unequal_branches_balance_within_five_percent(size, record_property):
    nodes = (
        Node(-1, 30000, 0),
        Node(0, 2100, 30000),
        Node(0, 700, 30000),
        Node(2, 300, 30700),
        Node(0, 12, 30000),
        Node(-1, 5000, 0),
    )
    shard = deal(batch_of(TokenTree(nodes)), axes(size)[0], 8)
    record_property("attention_pairs_max_over_mean", shard.work_balance)
    print(f"cp={size}: attention pairs max/mean {shard.work_balance:.4f}, tokens {shard.tokens_by_rank}")
    assert shard.work_balance <= 1.05
    assert max(shard.tokens_by_rank) * size <= 1.05 * sum(shard.tokens_by_rank)
    assert sum(shard.pairs_by_rank) == shard.tree.attention_pairs()


def test_many_short_trees_are_dealt_whole_when_that_balances():
    tree = TokenTree(tuple(Node(-1, length, 0) for length in (130, 128, 127, 131, 129, 126, 130, 131)))
    dealt = deal_blocks(tree, 2)
    assert sorted(block.node for blocks in dealt for block in blocks) == list(range(8))


def test_moving_a_shard_keeps_its_layout():
    shard = deal(batch_of(forest("unequal_trees")), axes(2)[1])
    moved = shard.to("meta")
    assert moved.blocks == shard.blocks and moved.calls == shard.calls
    assert moved.token_ids.device.type == moved.rows_by_rank[0].device.type == "meta"
