"""The layout noun: a forest of token nodes in which a token sees its ancestors and, causally, its own node.

A plain sequence is one node. Two responses to one context are a context node with two children: the context is
computed once, and the branches cannot see each other. Nothing here knows tensors' devices or process groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import numpy as np

NO_PARENT = -1
PADDING = -1  # node number of a padding block: nothing sees it, it sees nothing


@dataclass(frozen=True)
class Node:
    """A run of tokens; its first token's predecessor is the parent's last token."""

    parent: int
    length: int
    first_position: int


@dataclass(frozen=True)
class Block:
    """Tokens [start, start + length) of one node: the unit that is dealt to context-parallel ranks."""

    node: int
    start: int
    length: int


class Relation(Enum):
    """What a query block sees of a key block."""

    NONE = "none"
    FULL = "full"
    CAUSAL = "causal"


@dataclass(frozen=True)
class TokenTree:
    """A forest; parents come before children, and the tokens of node i follow those of node i - 1."""

    nodes: tuple[Node, ...]

    def __post_init__(self):
        for index, node in enumerate(self.nodes):
            if not NO_PARENT <= node.parent < index:
                raise ValueError(f"node {index} has parent {node.parent}; parents come before their children")
            if node.length < 1:
                raise ValueError(f"node {index} is empty")

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Index of each node's first token, and the number of tokens as the last entry."""
        return tuple(np.cumsum([0] + [node.length for node in self.nodes]).tolist())

    @property
    def num_tokens(self) -> int:
        return self.offsets[-1]

    @cached_property
    def ancestors(self) -> tuple[frozenset[int], ...]:
        """For each node the nodes above it, without itself."""
        above: list[frozenset[int]] = []
        for node in self.nodes:
            above.append(frozenset() if node.parent == NO_PARENT else above[node.parent] | {node.parent})
        return tuple(above)

    @cached_property
    def is_ancestor(self) -> np.ndarray:
        """Bool [nodes, nodes]: the column's node is above the row's."""
        above = np.zeros((len(self.nodes), len(self.nodes)), dtype=bool)
        for index, node in enumerate(self.nodes):
            if node.parent != NO_PARENT:
                above[index] = above[node.parent]
                above[index, node.parent] = True
        return above

    def position_ids(self) -> np.ndarray:
        """Int64 [tokens]: a branch goes on where its parent ended."""
        runs = [np.arange(node.first_position, node.first_position + node.length) for node in self.nodes]
        return np.concatenate(runs) if runs else np.zeros(0, dtype=np.int64)

    def relation(self, query: Block, key: Block) -> Relation:
        """What `query` sees of `key`, for blocks cut from the nodes in one consistent partition."""
        if PADDING in (query.node, key.node):
            return Relation.NONE
        if query.node == key.node:
            if key.start == query.start:
                return Relation.CAUSAL
            return Relation.FULL if key.start < query.start else Relation.NONE
        return Relation.FULL if key.node in self.ancestors[query.node] else Relation.NONE

    def attention_pairs(self) -> int:
        """Number of (query, key) token pairs that attention computes: the quadratic part of the cost."""
        return sum(node.length * node.first_position + node.length * (node.length + 1) // 2 for node in self.nodes)


@dataclass
class _Branch:
    tokens: list[int]
    children: list["_Branch"] = field(default_factory=list)
    visits: list[tuple[int, int, int]] = field(default_factory=list)  # (sequence, its start here, its length here)


@dataclass(frozen=True)
class GrownTree:
    """A tree and where each sequence lies in it."""

    tree: TokenTree
    token_ids: np.ndarray  # int64 [tokens], in tree order
    rows: tuple[np.ndarray, ...]  # per sequence: int64 [len(sequence)], index of its t-th token in the tree


def grow_tree(sequences: Sequence[Sequence[int]], min_shared_tokens: int = 32) -> GrownTree:
    """Joins sequences at their common prefixes.

    A prefix is shared where at least `min_shared_tokens` further tokens agree (or a whole sequence does), because
    every node costs its own kernel calls; identical sequences always share.
    """
    if min_shared_tokens < 1:
        raise ValueError(f"min_shared_tokens is {min_shared_tokens}; sharing needs at least 1 token")
    roots: list[_Branch] = []
    for number, sequence in enumerate(sequences):
        _insert(roots, list(sequence), number, min_shared_tokens)
    return _flatten(roots, sequences)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading tokens that are equal."""
    short = min(len(left), len(right))
    if list(left[:short]) == list(right[:short]):
        return short
    differs = np.asarray(left[:short]) != np.asarray(right[:short])
    return int(differs.argmax())


def _insert(roots: list[_Branch], tokens: list[int], number: int, min_shared: int) -> None:
    siblings, start = roots, 0
    while start < len(tokens):
        rest = tokens[start:]
        shared = [common_prefix(branch.tokens, rest) for branch in siblings]
        best = int(np.argmax(shared)) if shared else -1
        worth = best >= 0 and shared[best] >= min(min_shared, len(rest), len(siblings[best].tokens))
        if not worth:
            siblings.append(_Branch(rest, visits=[(number, start, len(rest))]))
            return
        branch, length = siblings[best], shared[best]
        if length < min(len(branch.tokens), len(rest)):
            _split(branch, length)
        branch.visits.append((number, start, length))
        siblings, start = branch.children, start + length


def _split(branch: _Branch, at: int) -> None:
    lower = _Branch(branch.tokens[at:], branch.children)
    lower.visits = [(n, start + at, length - at) for n, start, length in branch.visits if length > at]
    branch.visits = [(n, start, min(length, at)) for n, start, length in branch.visits]
    branch.tokens, branch.children = branch.tokens[:at], [lower]


def _flatten(roots: list[_Branch], sequences: Sequence[Sequence[int]]) -> GrownTree:
    nodes: list[Node] = []
    token_ids: list[int] = []
    rows = [np.zeros(len(sequence), dtype=np.int64) for sequence in sequences]
    pending = [(branch, NO_PARENT, 0) for branch in reversed(roots)]
    while pending:
        branch, parent, position = pending.pop()
        offset, index = len(token_ids), len(nodes)
        nodes.append(Node(parent, len(branch.tokens), position))
        token_ids.extend(branch.tokens)
        for number, start, length in branch.visits:
            rows[number][start : start + length] = np.arange(offset, offset + length)
        below = position + len(branch.tokens)
        pending.extend((child, index, below) for child in reversed(branch.children))
    return GrownTree(TokenTree(tuple(nodes)), np.asarray(token_ids, dtype=np.int64), tuple(rows))
