"""How Hugging Face tensors become Megatron's and back: merge, split, cut over tp, pad. Pure, exact to the bit.

Every merge here commutes with the tensor-parallel cut: merging the r-th slices of the parts gives the r-th shard of the
merged tensor. So a rank reads slices only, and a gathered tensor is split shard by shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

from opsd_megatron.checkpoint.weight_map import Merge


def merge_qkv(
    query: Shaped[Tensor, "query_rows *columns"],
    key: Shaped[Tensor, "kv_rows *columns"],
    value: Shaped[Tensor, "kv_rows *columns"],
    kv_heads: int,
) -> Shaped[Tensor, "merged_rows *columns"]:
    """Megatron's order: for each KV head its query heads' rows, its key rows, its value rows; weights and biases."""
    columns = query.shape[1:]
    groups = [part.reshape(kv_heads, part.shape[0] // kv_heads, *columns) for part in (query, key, value)]
    return torch.cat(groups, dim=1).reshape(-1, *columns)


def split_qkv(
    merged: Shaped[Tensor, "merged_rows *columns"], kv_heads: int, head_dim: int
) -> tuple[
    Shaped[Tensor, "query_rows *columns"], Shaped[Tensor, "kv_rows *columns"], Shaped[Tensor, "kv_rows *columns"]
]:
    """Inverse of `merge_qkv`."""
    columns = merged.shape[1:]
    groups = merged.reshape(kv_heads, -1, *columns)  # [kv_heads, (heads_per_group + 2) * head_dim, *columns]
    query, key, value = groups.split([groups.shape[1] - 2 * head_dim, head_dim, head_dim], dim=1)
    return query.reshape(-1, *columns), key.reshape(-1, *columns), value.reshape(-1, *columns)


def merge_gate_up(
    gate: Shaped[Tensor, "ffn *columns"], up: Shaped[Tensor, "ffn *columns"]
) -> Shaped[Tensor, "merged_rows *columns"]:
    """[gate; up]. A tp shard holds its own rows of both, so it is not a contiguous piece of the whole."""
    return torch.cat([gate, up])


def split_gate_up(
    merged: Shaped[Tensor, "merged_rows *columns"],
) -> tuple[Shaped[Tensor, "ffn *columns"], Shaped[Tensor, "ffn *columns"]]:
    """Inverse of `merge_gate_up`."""
    gate, up = merged.chunk(2)
    return gate, up


def shard_bounds(length: int, rank: int, size: int) -> tuple[int, int]:
    """First and past-the-last index that tp rank `rank` holds of a dimension; ValueError where it does not divide."""
    if length % size:
        raise ValueError(f"{length} does not divide into {size} tensor-parallel shards")
    step = length // size
    return rank * step, (rank + 1) * step


def cut_shard(whole: Shaped[Tensor, "*shape"], dim: int | None, rank: int, size: int) -> Shaped[Tensor, "*shard_shape"]:
    """The shard of tp rank `rank`; the tensor itself where `dim` is None (replicated)."""
    if dim is None or size == 1:
        return whole
    start, stop = shard_bounds(whole.shape[dim], rank, size)
    return whole.narrow(dim, start, stop - start)


def join_shards(shards: Sequence[Shaped[Tensor, "*shard_shape"]], dim: int | None) -> Shaped[Tensor, "*shape"]:
    """Inverse of `cut_shard` over all ranks; the first one where `dim` is None."""
    if dim is None or len(shards) == 1:
        return shards[0]
    return torch.cat(list(shards), dim=dim)


def pad_rows(table: Shaped[Tensor, "rows hidden"], rows: int) -> Shaped[Tensor, "padded_rows hidden"]:
    """`table` followed by rows of zeros up to `rows`."""
    if table.shape[0] == rows:
        return table
    return torch.cat([table, table.new_zeros(rows - table.shape[0], *table.shape[1:])])


def trim_rows(table: Shaped[Tensor, "padded_rows hidden"], rows: int) -> Shaped[Tensor, "rows hidden"]:
    """Inverse of `pad_rows`."""
    return table[:rows]


@dataclass(frozen=True)
class Piece:
    """Rows of one Hugging Face tensor that lie together in Megatron's merged tensor."""

    part: int
    part_start: int
    merged_start: int
    count: int


def pieces_of(merge: Merge, part_rows: Sequence[int], kv_heads: int) -> list[Piece]:
    """The merged tensor as rows of its parts, in its own order; the same as `merge_qkv` and `merge_gate_up`, on disk.

    `part_rows` are the parts' rows: one part is a copy, gate and up follow each other, and query, key and value
    alternate for each KV head.
    """
    groups = kv_heads if merge == "qkv" else 1
    pieces, merged = [], 0
    for group in range(groups):
        for part, rows in enumerate(part_rows):
            count = rows // groups
            pieces.append(Piece(part, group * count, merged, count))
            merged += count
    return pieces
