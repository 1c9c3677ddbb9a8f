"""A token tree dealt to context-parallel ranks: which rank holds which tokens, and which of them answer for what.

Every rank computes the whole deal from the batch alone, so that no rank has to ask another.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from opsd_megatron.parallel.attention_plan import FlashCall, plan_calls
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.token_tree import PADDING, Block, TokenTree
from opsd_megatron.types import TokenBatch

BALANCED = 1.05
"""Max/mean over ranks, of tokens and of attention pairs, below which cutting nodes further is not worth its calls."""
CUT_ABOVE_MEAN_OVER = (0, 1, 2, 4, 8, 16, 32, 64)
"""A node is cut when its load exceeds the mean load of a rank divided by this; 0 cuts nothing. Tried in turn."""


@dataclass(frozen=True, eq=False)
class ContextShard:
    """What one cp rank holds of a TokenBatch, and what the others hold."""

    tree: TokenTree
    blocks: tuple[tuple[Block, ...], ...]
    """Per cp rank its blocks in local order; padding last, so that all ranks hold equally many tokens."""
    cp: Axis
    token_ids: Int64[Tensor, "local_tokens"]
    """Ids of this rank's tokens; padding is 0."""
    position_ids: Int64[Tensor, "local_tokens"]
    """Positions inside the sequence, for the rotary angles; padding is 0."""
    rows_by_rank: tuple[Int64[Tensor, "_"], ...]
    """Per cp rank the local tokens whose hidden states predict a response token; may repeat a token (branches)."""
    responses_by_rank: tuple[Int64[Tensor, "_"], ...]
    """Per cp rank the response token (index into the ResponseTable) that each of its rows predicts."""

    @property
    def local_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def rows(self) -> Tensor:
        """This rank's entry of `rows_by_rank`."""
        return self.rows_by_rank[self.cp.rank]

    @property
    def response_index(self) -> Tensor:
        """This rank's entry of `responses_by_rank`."""
        return self.responses_by_rank[self.cp.rank]

    @cached_property
    def calls(self) -> tuple[tuple[FlashCall, ...], ...]:
        """For each hop of the ring the flash calls on the keys that arrive: planned once, used by every layer."""
        size, rank = self.cp.size, self.cp.rank
        sources = [self.blocks[(rank - hop) % size] for hop in range(size)]
        return tuple(plan_calls(self.tree, self.blocks[rank], source, hop == 0) for hop, source in enumerate(sources))

    @cached_property
    def is_plain(self) -> bool:
        """Whether this is one sequence without padding, of which rank k holds chunks k and 2*size-1-k of 2*size."""
        length, pieces = self.tree.num_tokens, 2 * self.cp.size
        if len(self.tree.nodes) != 1 or length % pieces or self.local_tokens * self.cp.size != length:
            return False
        first, second = (length // pieces * chunk for chunk in (self.cp.rank, pieces - 1 - self.cp.rank))
        chunk = np.arange(length // pieces)
        return bool((self.position_ids.cpu().numpy() == np.concatenate((first + chunk, second + chunk))).all())

    @property
    def tokens_by_rank(self) -> tuple[int, ...]:
        """Tokens of each cp rank, padding not counted."""
        return tuple(sum(block.length for block in blocks if block.node != PADDING) for blocks in self.blocks)

    @property
    def pairs_by_rank(self) -> tuple[int, ...]:
        """(query, key) pairs that each cp rank's attention computes: its quadratic work."""
        return tuple(sum(_pairs(self.tree, block) for block in blocks) for blocks in self.blocks)

    @property
    def work_balance(self) -> float:
        """Attention pairs of the busiest cp rank over the mean: 1 is perfect, cp.size is one rank doing it all."""
        return _max_over_mean(self.pairs_by_rank)

    def to(self, device: torch.device | str) -> "ContextShard":
        """The same shard with its token ids, positions and rows on `device`."""
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            position_ids=self.position_ids.to(device),
            rows_by_rank=tuple(rows.to(device) for rows in self.rows_by_rank),
            responses_by_rank=tuple(responses.to(device) for responses in self.responses_by_rank),
        )


def deal(batch: TokenBatch, cp: Axis, multiple_of: int = 1) -> ContextShard:
    """This rank's shard of `batch`; on every rank `local_tokens` is the same positive multiple of `multiple_of`."""
    blocks = _pad(deal_blocks(batch.tree, cp.size), multiple_of)
    local_tokens = sum(block.length for block in blocks[0])
    tokens = np.stack([_tokens_of(batch.tree, own, local_tokens) for own in blocks])  # [cp, local_tokens], -1 = padding
    mine = tokens[cp.rank]
    place = np.zeros(batch.num_tokens, dtype=np.int64)
    place[tokens[tokens >= 0]] = np.flatnonzero(tokens.reshape(-1) >= 0)
    holder, local_row = np.divmod(place[batch.rows.cpu().numpy()], local_tokens)
    responses = batch.response_index.cpu().numpy()
    held = [holder == rank for rank in range(cp.size)]
    return ContextShard(
        tree=batch.tree,
        blocks=blocks,
        cp=cp,
        token_ids=_gather(batch.token_ids.cpu().numpy(), mine),
        position_ids=_gather(batch.tree.position_ids(), mine),
        rows_by_rank=tuple(torch.from_numpy(local_row[rank]) for rank in held),
        responses_by_rank=tuple(torch.from_numpy(responses[rank]) for rank in held),
    )


def deal_blocks(tree: TokenTree, size: int) -> tuple[tuple[Block, ...], ...]:
    """Per rank its blocks in tree order: the coarsest cut of the nodes that balances tokens and attention pairs.

    A node that is cut is cut zigzag: rank k gets chunks k and 2*size-1-k of 2*size, which balances causal attention.
    """
    if size == 1:
        return (tuple(Block(index, 0, node.length) for index, node in enumerate(tree.nodes)),)
    best, least = (), float("inf")
    for denominator in CUT_ABOVE_MEAN_OVER:
        dealt = _deal_cut(tree, size, denominator)
        tokens = [sum(block.length for block in blocks) for blocks in dealt]
        pairs = [sum(_pairs(tree, block) for block in blocks) for blocks in dealt]
        excess = max(_max_over_mean(tokens), _max_over_mean(pairs))
        if excess < least:
            best, least = dealt, excess
        if least <= BALANCED:
            break
    return tuple(_coalesce(sorted(blocks, key=lambda block: (block.node, block.start))) for blocks in best)


def _deal_cut(tree: TokenTree, size: int, denominator: int) -> list[list[Block]]:
    whole = [Block(index, 0, node.length) for index, node in enumerate(tree.nodes)]
    all_pairs = max(tree.attention_pairs(), 1)

    def load(block: Block) -> int:  # tokens and attention pairs as shares of their totals, kept in exact integers
        return block.length * all_pairs + _pairs(tree, block) * tree.num_tokens

    total = 2 * tree.num_tokens * all_pairs
    dealt: list[list[Block]] = [[] for _ in range(size)]
    loads = [0] * size
    uncut = []
    for block in whole:
        if load(block) * size * denominator <= total or block.length < 2 * size:
            uncut.append(block)
            continue
        bounds = [block.length * chunk // (2 * size) for chunk in range(2 * size + 1)]
        for chunk, (start, end) in enumerate(pairwise(bounds)):
            rank = min(chunk, 2 * size - 1 - chunk)
            dealt[rank].append(Block(block.node, start, end - start))
            loads[rank] += load(dealt[rank][-1])
    for block in sorted(uncut, key=load, reverse=True):
        rank = loads.index(min(loads))
        dealt[rank].append(block)
        loads[rank] += load(block)
    return dealt


def _coalesce(blocks: list[Block]) -> tuple[Block, ...]:
    joined: list[Block] = []
    for block in blocks:
        if joined and joined[-1].node == block.node and joined[-1].start + joined[-1].length == block.start:
            joined[-1] = Block(block.node, joined[-1].start, joined[-1].length + block.length)
        else:
            joined.append(block)
    return tuple(joined)


def _pad(blocks: tuple[tuple[Block, ...], ...], multiple_of: int) -> tuple[tuple[Block, ...], ...]:
    lengths = [sum(block.length for block in own) for own in blocks]
    target = -(-max(*lengths, 1) // multiple_of) * multiple_of
    return tuple(
        (*own, Block(PADDING, 0, target - length)) if length < target else own
        for own, length in zip(blocks, lengths, strict=True)
    )


def _pairs(tree: TokenTree, block: Block) -> int:
    if block.node == PADDING:
        return 0
    before = tree.nodes[block.node].first_position + block.start
    return block.length * before + block.length * (block.length + 1) // 2


def _max_over_mean(values) -> float:
    return max(values) * len(values) / max(sum(values), 1)


def _tokens_of(tree: TokenTree, blocks: tuple[Block, ...], local_tokens: int) -> np.ndarray:
    tokens = np.full(local_tokens, -1, dtype=np.int64)
    at = 0
    for block in blocks:
        if block.node != PADDING:
            first = tree.offsets[block.node] + block.start
            tokens[at : at + block.length] = np.arange(first, first + block.length)
        at += block.length
    return tokens


def _gather(values: np.ndarray, tokens: np.ndarray) -> Tensor:
    padded = np.append(values, 0)  # index -1, a padding token, finds the 0 at the end
    return torch.from_numpy(padded[tokens].astype(np.int64))
