import random

import numpy as np
import pytest

from opsd_megatron.token_tree import NO_PARENT, PADDING, Block, Node, Relation, TokenTree, grow_tree


def path_of(tree: TokenTree, token: int) -> list[int]:
    """Tokens from the root down to `token`, walked one predecessor at a time."""
    path = []
    node = int(np.searchsorted(tree.offsets, token, side="right")) - 1
    while True:
        path.extend(range(token, tree.offsets[node] - 1, -1))
        node = tree.nodes[node].parent
        if node == NO_PARENT:
            return path[::-1]
        token = tree.offsets[node + 1] - 1


def assert_holds(sequences, grown) -> None:
    """Each sequence's rows are a root-to-token path that spells it, at its own positions."""
    positions = grown.tree.position_ids()
    assert len(grown.token_ids) == len(positions) == grown.tree.num_tokens
    for sequence, rows in zip(sequences, grown.rows, strict=True):
        assert grown.token_ids[rows].tolist() == list(sequence)
        assert positions[rows].tolist() == list(range(len(sequence)))
        if len(sequence):
            assert path_of(grown.tree, int(rows[-1])) == rows.tolist()
    used = set(np.concatenate(list(grown.rows) or [np.zeros(0)]).tolist())
    assert used == set(range(grown.tree.num_tokens)), "no token is kept that no sequence uses"


CONTEXT = list(range(100, 150))


def test_responses_to_one_context_share_it_once():
    sequences = [[*CONTEXT, 1, 2, 3], [*CONTEXT, 4, 5], [*CONTEXT, 6]]
    grown = grow_tree(sequences)
    assert_holds(sequences, grown)
    assert grown.tree.nodes == (Node(NO_PARENT, 50, 0), Node(0, 3, 50), Node(0, 2, 50), Node(0, 1, 50))


def test_a_node_splits_where_a_later_sequence_leaves_it():
    sequences = [CONTEXT + [1] * 40 + [2] * 9, CONTEXT + [1] * 40 + [3] * 7, CONTEXT + [4] * 8]
    grown = grow_tree(sequences)
    assert_holds(sequences, grown)
    assert [(node.parent, node.length) for node in grown.tree.nodes] == [(-1, 50), (0, 40), (1, 9), (1, 7), (0, 8)]


def test_a_sequence_may_end_inside_a_node_and_the_node_may_split_on_either_side_of_its_end():
    long, ends_early, leaves_before, leaves_after = (
        CONTEXT,
        CONTEXT[:40],
        [*CONTEXT[:35], 1, 2],
        [*CONTEXT[:45], 3, 4],
    )
    for sequences in (
        [long, ends_early],
        [ends_early, long],
        [long, ends_early, leaves_before],
        [long, ends_early, leaves_after],
        [ends_early, leaves_after, long, leaves_before],
    ):
        assert_holds(sequences, grow_tree(sequences))
    assert grow_tree([long, ends_early]).tree.nodes == (Node(NO_PARENT, 50, 0),)


def test_identical_sequences_share_everything_however_short():
    sequences = [[7, 8, 9], [7, 8, 9], CONTEXT, CONTEXT, [7, 8, 9]]
    grown = grow_tree(sequences)
    assert_holds(sequences, grown)
    assert [node.length for node in grown.tree.nodes] == [3, 50]
    assert grown.rows[0].tolist() == grown.rows[1].tolist() == grown.rows[4].tolist()


def test_a_short_common_beginning_is_not_worth_a_node():
    sequences = [[1, 2, 3, *CONTEXT], [1, 2, 3, *CONTEXT[::-1]]]
    assert len(grow_tree(sequences, min_shared_tokens=4).tree.nodes) == 2
    joined = grow_tree(sequences, min_shared_tokens=3)
    assert_holds(sequences, joined)
    assert [node.parent for node in joined.tree.nodes] == [-1, 0, 0]


def test_the_longest_common_prefix_wins_over_the_first():
    sequences = [CONTEXT[:40] + [1] * 50, CONTEXT[:2] + [2] * 50, CONTEXT[:40] + [1] * 20 + [3], CONTEXT[:2] + [2] * 40]
    grown = grow_tree(sequences, min_shared_tokens=16)
    assert_holds(sequences, grown)
    assert grown.tree.num_tokens == 90 + 52 + 1


def test_random_families_of_sequences_are_held_exactly():
    chance = random.Random(3)
    for _ in range(200):
        sequences: list[list[int]] = []
        for _ in range(chance.randint(1, 12)):
            stem = chance.choice(sequences) if sequences and chance.random() < 0.8 else []
            stem = stem[: chance.randint(0, len(stem))]
            sequences.append(stem + [chance.randint(0, 2) for _ in range(chance.randint(0, 12))])
        least = chance.choice([1, 2, 5, 32])
        grown = grow_tree(sequences, least)
        assert_holds(sequences, grown)
        assert grown.tree.num_tokens <= sum(len(sequence) for sequence in sequences)
        if least == 1:  # a full trie: as many tokens as there are different prefixes
            prefixes = {tuple(sequence[:end]) for sequence in sequences for end in range(1, len(sequence) + 1)}
            assert grown.tree.num_tokens == len(prefixes)


def test_no_sequences_and_empty_sequences_grow_nothing():
    assert grow_tree([]).tree.num_tokens == 0
    grown = grow_tree([[], [5, 6], []])
    assert_holds([[], [5, 6], []], grown)
    assert grown.tree.attention_pairs() == 3


def test_sharing_less_than_a_token_is_refused():
    with pytest.raises(ValueError, match="min_shared_tokens is 0"):
        grow_tree([[1], [2]], min_shared_tokens=0)


def test_blocks_see_their_own_node_causally_their_ancestors_fully_and_nothing_else():
    tree = TokenTree((Node(-1, 10, 0), Node(0, 4, 10), Node(1, 2, 14), Node(0, 3, 10), Node(-1, 5, 0)))
    first, second = Block(0, 0, 6), Block(0, 6, 4)
    child, grandchild, sibling, other, padding = (Block(n, 0, 2) for n in (1, 2, 3, 4, PADDING))
    assert tree.relation(first, first) is Relation.CAUSAL
    assert tree.relation(second, first) is Relation.FULL
    assert tree.relation(first, second) is Relation.NONE
    for below in (child, grandchild, sibling):
        assert tree.relation(below, first) is tree.relation(below, second) is Relation.FULL
        assert tree.relation(first, below) is Relation.NONE
    assert tree.relation(grandchild, child) is Relation.FULL
    for left, right in [(child, sibling), (sibling, grandchild), (other, first), (first, other)]:
        assert tree.relation(left, right) is Relation.NONE
    assert {tree.relation(padding, padding), tree.relation(first, padding), tree.relation(padding, first)} == {
        Relation.NONE
    }
    for node, above in enumerate(tree.ancestors):
        assert set(np.flatnonzero(tree.is_ancestor[node])) == above


def test_attention_pairs_count_what_each_token_sees():
    tree = TokenTree((Node(-1, 10, 0), Node(0, 4, 10), Node(1, 2, 14), Node(0, 3, 10), Node(-1, 5, 0)))
    assert tree.attention_pairs() == sum(len(path_of(tree, token)) for token in range(tree.num_tokens))


def test_malformed_trees_are_refused():
    with pytest.raises(ValueError, match="node 1 has parent 1"):
        TokenTree((Node(-1, 3, 0), Node(1, 2, 3)))
    with pytest.raises(ValueError, match="node 0 is empty"):
        TokenTree((Node(-1, 0, 0),))
