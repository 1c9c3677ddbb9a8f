"""Forests of unequal trees for the parallel tests, and dense float64 attention over them as the oracle."""

import random

import torch

from opsd_megatron.token_tree import NO_PARENT, Node, TokenTree
from opsd_megatron.types import TokenBatch

# (length, parent) per node; positions follow from the parents
SHAPES = {
    "one_sequence": [(64, -1)],
    "three_questions_two_responses": [(90, -1), (11, 0), (5, 1), (7, 1), (13, 0), (3, 3), (1, 0), (9, 0)],
    "unequal_trees": [(37, -1), (5, 0), (2, 0), (81, -1), (1, 3), (1, 3), (17, 3), (6, 6), (4, 6), (21, -1), (2, -1)],
    "shorter_than_the_ring": [(2, -1)],
    "one_short_response": [(203, -1), (5, 0)],
    "long_branches": [(40, -1), (50, 0), (45, 0), (33, 2), (1, 2)],
}


def forest(name: str) -> TokenTree:
    return _tree(SHAPES[name])


def random_forest(seed: int) -> TokenTree:
    """1 to 14 nodes of 1 to 40 tokens; about every fifth starts another tree."""
    draw = random.Random(seed)
    shape: list[tuple[int, int]] = []
    for node in range(draw.randint(1, 14)):
        parent = -1 if node == 0 or draw.random() < 0.2 else draw.randrange(node)
        shape.append((draw.randint(1, draw.choice((3, 12, 40))), parent))
    return _tree(shape)


def _tree(shape: list[tuple[int, int]]) -> TokenTree:
    nodes: list[Node] = []
    for length, parent in shape:
        above = NO_PARENT if parent == -1 else nodes[parent].first_position + nodes[parent].length
        nodes.append(Node(parent, length, max(above, 0)))
    return TokenTree(tuple(nodes))


def batch_of(tree: TokenTree) -> TokenBatch:
    """Response tokens of every leaf below a root: the parent's last token predicts the first, the leaf the others."""
    parents = {node.parent for node in tree.nodes}
    rows = []
    for index, node in enumerate(tree.nodes):
        if node.parent != NO_PARENT and index not in parents:
            rows.append(tree.offsets[node.parent + 1] - 1)
            rows.extend(range(tree.offsets[index], tree.offsets[index + 1]))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5))
    return TokenBatch(tree, 100 + torch.arange(tree.num_tokens), torch.tensor(rows, dtype=torch.int64), 1000 + order)


def visible(tree: TokenTree) -> torch.Tensor:
    """Bool [tokens, tokens]: walks from each token up to its root, one predecessor at a time."""
    before = []
    for index, node in enumerate(tree.nodes):
        parent_end = tree.offsets[node.parent + 1] - 1 if node.parent != NO_PARENT else -1
        before += [parent_end, *range(tree.offsets[index], tree.offsets[index + 1] - 1)]
    mask = torch.zeros(tree.num_tokens, tree.num_tokens, dtype=torch.bool)
    for token in range(tree.num_tokens):
        seen = token
        while seen != -1:
            mask[token, seen] = True
            seen = before[seen]
    return mask


def dense_attention(query, key, value, mask, scale: float):
    """[tokens, heads, head_dim] with every score written out and the kv heads repeated."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    probabilities = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, value)


def random_inputs(tree: TokenTree, heads: int, kv_heads: int, head_dim: int):
    """float64 query, key, value and output gradient over the whole tree, the same on every rank."""
    generator = torch.Generator().manual_seed(11)
    shapes = [(heads,), (kv_heads,), (kv_heads,), (heads,)]
    return [
        torch.randn(tree.num_tokens, *shape, head_dim, generator=generator, dtype=torch.float64) for shape in shapes
    ]
