"""The pure functions between Hugging Face and Megatron tensors, bit for bit."""

import pytest
import torch

from opsd_megatron.checkpoint.reshard import (
    cut_shard,
    join_shards,
    merge_gate_up,
    merge_qkv,
    pad_rows,
    shard_bounds,
    split_gate_up,
    split_qkv,
    trim_rows,
)

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 6, 2, 5, 7


def qkv_parts(*columns: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    return [torch.randn(count, *columns, generator=generator) for count in rows]


@pytest.mark.parametrize("columns", [(HIDDEN,), ()], ids=["weight", "bias"])
def test_merged_qkv_holds_each_kv_head_with_its_query_heads(columns):
    query, key, value = qkv_parts(*columns)
    merged = merge_qkv(query, key, value, KV_HEADS)
    per_group = HEADS // KV_HEADS
    expected = []
    for group in range(KV_HEADS):
        heads = range(group * per_group, (group + 1) * per_group)
        expected += [query[head * HEAD_DIM : (head + 1) * HEAD_DIM] for head in heads]
        expected += [part[group * HEAD_DIM : (group + 1) * HEAD_DIM] for part in (key, value)]
    assert torch.equal(merged, torch.cat(expected))


@pytest.mark.parametrize("columns", [(HIDDEN,), ()], ids=["weight", "bias"])
def test_split_qkv_undoes_merge_qkv(columns):
    parts = qkv_parts(*columns)
    split = split_qkv(merge_qkv(*parts, kv_heads=KV_HEADS), KV_HEADS, HEAD_DIM)
    assert all(torch.equal(given, back) for given, back in zip(parts, split, strict=True))


def test_merging_slices_gives_the_slices_of_the_merged_qkv():
    parts = qkv_parts(HIDDEN)
    whole = merge_qkv(*parts, kv_heads=KV_HEADS)
    for rank in range(2):
        mine = [cut_shard(part, 0, rank, 2) for part in parts]
        assert torch.equal(merge_qkv(*mine, kv_heads=KV_HEADS // 2), cut_shard(whole, 0, rank, 2))


def test_gathered_gate_up_shards_split_to_the_whole_parts():
    gate, up = torch.randn(8, 3), torch.randn(8, 3)
    shards = [merge_gate_up(cut_shard(gate, 0, rank, 4), cut_shard(up, 0, rank, 4)) for rank in range(4)]
    gates, ups = zip(*(split_gate_up(shard) for shard in shards), strict=True)
    assert torch.equal(join_shards(gates, 0), gate)
    assert torch.equal(join_shards(ups, 0), up)
    assert not torch.equal(torch.cat(shards), merge_gate_up(gate, up))


@pytest.mark.parametrize("dim", [0, 1, None])
def test_joined_shards_are_the_whole(dim):
    whole = torch.randn(4, 6)
    assert torch.equal(join_shards([cut_shard(whole, dim, rank, 2) for rank in range(2)], dim), whole)


def test_a_length_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="7 does not divide into 2"):
        shard_bounds(7, 0, 2)


def test_padding_rows_are_zero_and_trimmed_away():
    table = torch.randn(5, 3)
    padded = pad_rows(table, 8)
    assert torch.equal(trim_rows(padded, 5), table)
    assert torch.count_nonzero(padded[5:]) == 0
    assert padded.shape == (8, 3)
