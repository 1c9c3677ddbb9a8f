"""Which rectangles of the attention matrix a rank computes against one rank's keys, as few large flash calls."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opsd_megatron.token_tree import PADDING, Block, TokenTree


@dataclass(frozen=True)
class FlashCall:
    """Local queries [query_start, query_end) see all, or causally, the keys [key_start, key_end) of one rank."""

    query_start: int
    query_end: int
    key_start: int
    key_end: int
    is_causal: bool

    @property
    def queries(self) -> slice:
        return slice(self.query_start, self.query_end)

    @property
    def keys(self) -> slice:
        return slice(self.key_start, self.key_end)


def plan_calls(tree: TokenTree, queries: Sequence[Block], keys: Sequence[Block], is_own: bool) -> tuple[FlashCall, ...]:
    """Calls for `queries` against `keys`; `is_own` when both are one rank's blocks, the only case with causal pairs.

    The causal calls come first. They cover every query that is not padding exactly once, so that a caller may let
    them start its accumulator and merge all others into it.
    """
    sees_all = full_relations(tree, queries, keys)
    query_bounds, key_bounds = _bounds(queries), _bounds(keys)
    calls = []
    if is_own:
        for first, end in _causal_runs(queries, sees_all):
            calls.append(
                FlashCall(query_bounds[first], query_bounds[end], key_bounds[first], key_bounds[end], is_causal=True)
            )
            sees_all[first:end, first:end] = False
    for first, end, key_first, key_end in _rectangles(sees_all):
        calls.append(
            FlashCall(query_bounds[first], query_bounds[end], key_bounds[key_first], key_bounds[key_end], False)
        )
    return tuple(calls)


def full_relations(tree: TokenTree, queries: Sequence[Block], keys: Sequence[Block]) -> np.ndarray:
    """Bool [queries, keys]: the query block sees the whole key block (`Relation.FULL` of `tree.relation`)."""
    query_node, query_start = _columns(queries)
    key_node, key_start = _columns(keys)
    same_node = query_node[:, None] == key_node[None, :]
    above = np.zeros(same_node.shape, dtype=bool)
    if tree.nodes:
        above = tree.is_ancestor[query_node[:, None], key_node[None, :]]
    full = np.where(same_node, key_start[None, :] < query_start[:, None], above)
    return full & (query_node != PADDING)[:, None] & (key_node != PADDING)[None, :]


def _columns(blocks: Sequence[Block]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.fromiter((block.node for block in blocks), dtype=np.int64, count=len(blocks)),
        np.fromiter((block.start for block in blocks), dtype=np.int64, count=len(blocks)),
    )


def _bounds(blocks: Sequence[Block]) -> list[int]:
    return np.cumsum([0] + [block.length for block in blocks]).tolist()


def _causal_runs(blocks: Sequence[Block], sees_all: np.ndarray) -> list[tuple[int, int]]:
    """Neighbouring blocks of which each sees all of the earlier ones: one causal call serves the whole run.

    Both chunks of a zigzag cut are such a run, and so are a context and its first branch.
    """
    runs: list[tuple[int, int]] = []
    for index, block in enumerate(blocks):
        if block.node == PADDING:
            continue
        if runs and runs[-1][1] == index and sees_all[index, runs[-1][0] : index].all():
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs


def _rectangles(sees_all: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Disjoint rectangles (first row, end row, first column, end column) that cover the True cells."""
    found: list[tuple[int, int, int, int]] = []
    growing: dict[tuple[int, int], int] = {}  # columns of a rectangle -> its first row
    for row in range(sees_all.shape[0] + 1):
        spans = _spans(sees_all[row]) if row < sees_all.shape[0] else set()
        for span in sorted(growing.keys() - spans):
            found.append((growing.pop(span), row, *span))
        for span in spans:
            growing.setdefault(span, row)
    return sorted(found)


def _spans(row: np.ndarray) -> set[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], row, [False])).astype(np.int8)))
    return set(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
