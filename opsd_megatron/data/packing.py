"""From rollouts to microbatches: sequences that share a context are joined in one token tree and computed once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from opsd_megatron.data.balance import Group, Limits, place_evenly, place_tightly
from opsd_megatron.token_tree import NO_PARENT, GrownTree, Node, TokenTree, grow_tree
from opsd_megatron.types import ResponseTable, Rollout, TokenBatch

View = Literal["student", "teacher"]


def response_table(rollouts: Sequence[Rollout]) -> ResponseTable:
    """All response tokens in the order of the rollouts; a token outside its rollout's loss mask has weight 0."""
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    positions = [torch.arange(length) for length in lengths]
    return ResponseTable(
        token_ids=torch.tensor([token for rollout in rollouts for token in rollout.token_ids], dtype=torch.int64),
        weights=torch.tensor([kept for rollout in rollouts for kept in rollout.loss_mask], dtype=torch.float32),
        behaviour_logprobs=torch.tensor([p for rollout in rollouts for p in rollout.logprobs], dtype=torch.float32),
        rollout=torch.repeat_interleave(torch.arange(len(rollouts)), torch.tensor(lengths, dtype=torch.int64)),
        position=torch.cat(positions) if positions else torch.zeros(0, dtype=torch.int64),
    )


class Packing:
    """Some rollouts of one view, grouped by context, before they are put into a number of microbatches.

    The numbers that decide (`needed`) are known first, because all replicas must run equally many microbatches.
    """

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        view: View,
        limits: Limits,
        chosen: Sequence[int] | None = None,
    ):
        """`chosen` packs only the rollouts with these numbers; `response_index` of the microbatches refers to
        `response_table(rollouts)` all the same."""
        self._rollouts, self._limits = rollouts, limits
        self._view: View = view
        numbers = range(len(rollouts)) if chosen is None else chosen
        self._forest = _Forest({number: sequence_of(rollouts[number], view) for number in numbers}, limits)
        groups = self._forest.groups_of_context({number: len(prompt_of(rollouts[number], view)) for number in numbers})
        self._groups = [run for group in groups for run in self._forest.split(group)]
        self._fewest = place_tightly(self._groups, limits)

    @property
    def needed(self) -> int:
        """Microbatches that the limits ask for."""
        return len(self._fewest)

    def microbatches(self, count: int) -> list[TokenBatch]:
        """Exactly `count` microbatches (at least `needed`) of even cost, dearest first, then fillers; the same on every
        rank."""
        if count < self.needed:
            raise ValueError(f"{count} microbatches where {self.needed} are needed")
        bins = place_evenly(self._groups, self._limits, count) or self._fewest
        batches = [self._batch([number for group in bin for number in group.members]) for bin in bins if bin]
        return batches + [filler_batch()] * (count - len(batches))

    def _batch(self, members: Sequence[int]) -> TokenBatch:
        grown = self._forest.grow(members)
        rows, responses = [], []
        first_token = np.cumsum([0, *(len(rollout.token_ids) for rollout in self._rollouts)])
        for member, where in zip(members, grown.rows, strict=True):
            prompt = len(prompt_of(self._rollouts[member], self._view))
            rows.append(where[prompt - 1 :])  # the prompt's last token predicts response token 0
            responses.append(np.arange(first_token[member], first_token[member + 1]))
        return TokenBatch(
            tree=grown.tree,
            token_ids=torch.from_numpy(grown.token_ids),
            rows=torch.from_numpy(np.concatenate(rows)),
            response_index=torch.from_numpy(np.concatenate(responses)),
        )


def pack(rollouts: Sequence[Rollout], view: View, limits: Limits) -> list[TokenBatch]:
    """All rollouts in as few microbatches as the limits allow."""
    packing = Packing(rollouts, view, limits)
    return packing.microbatches(packing.needed)


def filler_batch() -> TokenBatch:
    """One token and no rows: it keeps a rank in step that has fewer microbatches than its peers."""
    nothing = torch.zeros(0, dtype=torch.int64)
    tree = TokenTree((Node(NO_PARENT, 1, 0),))
    return TokenBatch(tree, torch.zeros(1, dtype=torch.int64), rows=nothing, response_index=nothing)


def prompt_of(rollout: Rollout, view: View) -> tuple[int, ...]:
    return rollout.pair.student_prompt if view == "student" else rollout.pair.teacher_prompt


def sequence_of(rollout: Rollout, view: View) -> np.ndarray:
    """Int64 [tokens]: what the model is fed; the last response token is only ever a target."""
    return np.asarray(prompt_of(rollout, view) + rollout.token_ids[:-1], dtype=np.int64)


@dataclass(frozen=True)
class Sharing:
    """What joining sequences saves; attention pairs are (query, key) token pairs, the quadratic part of the cost."""

    sequences: int
    microbatches: int
    separate_tokens: int
    packed_tokens: int
    separate_pairs: int
    packed_pairs: int

    def __str__(self) -> str:
        tokens = self.separate_tokens / max(1, self.packed_tokens)
        pairs = self.separate_pairs / max(1, self.packed_pairs)
        return (
            f"{self.sequences} sequences in {self.microbatches} microbatches: "
            f"{self.packed_tokens} tokens instead of {self.separate_tokens} ({tokens:.2f}x fewer), "
            f"{self.packed_pairs} attention pairs instead of {self.separate_pairs} ({pairs:.2f}x fewer)"
        )


def measure_sharing(rollouts: Sequence[Rollout], view: View, batches: Sequence[TokenBatch]) -> Sharing:
    """What `pack` saved against one sequence per rollout."""
    lengths = [len(sequence_of(rollout, view)) for rollout in rollouts]
    return Sharing(
        sequences=len(lengths),
        microbatches=len(batches),
        separate_tokens=sum(lengths),
        packed_tokens=sum(batch.num_tokens for batch in batches),
        separate_pairs=sum(length * (length + 1) // 2 for length in lengths),
        packed_pairs=sum(batch.tree.attention_pairs() for batch in batches),
    )


@dataclass(frozen=True)
class _Forest:
    """Numbered sequences, and the trees that they grow together."""

    sequences: Mapping[int, np.ndarray]
    limits: Limits

    def grow(self, members: Sequence[int]) -> GrownTree:
        return grow_tree([self.sequences[member].tolist() for member in members], self.limits.min_shared_tokens)

    def group(self, members: Sequence[int]) -> Group:
        """What all members start with is counted, not grown: contexts are long, branches short."""
        sequences = [self.sequences[member] for member in members]
        common = min(_common_prefix(sequences[0], other) for other in sequences)
        least = self.limits.min_shared_tokens
        skipped = max(0, common - max(1, least))  # what is left still joins at the root
        tree = grow_tree([one[skipped:].tolist() for one in sequences], least).tree
        # every token behind the skipped ones sees all of them
        pairs = tree.attention_pairs() + skipped * tree.num_tokens + skipped * (skipped + 1) // 2
        tokens = skipped + tree.num_tokens
        return Group(tuple(members), tokens, tokens + pairs * self.limits.pair_cost)

    def groups_of_context(self, prompt_lengths: Mapping[int, int]) -> list[list[int]]:
        """Sequences that start alike, for at least half of the shorter prompt and `min_shared_tokens`.

        In sorted order a sequence shares most with its neighbour, so one pass finds the groups. The half keeps a
        system prompt that everything shares from making one group of everything.
        """
        groups: list[list[int]] = []
        for number in sorted(
            self.sequences, key=lambda number: (self.sequences[number].astype(">i8").tobytes(), number)
        ):
            if groups and self._share_context(groups[-1][-1], number, prompt_lengths):
                groups[-1].append(number)
            else:
                groups.append([number])
        return groups

    def _share_context(self, one: int, other: int, prompt_lengths: Mapping[int, int]) -> bool:
        shared = _common_prefix(self.sequences[one], self.sequences[other])
        half = min(prompt_lengths[one], prompt_lengths[other]) / 2
        is_same = shared == len(self.sequences[one]) == len(self.sequences[other])
        return is_same or shared >= max(self.limits.min_shared_tokens, half)

    def split(self, members: Sequence[int]) -> list[Group]:
        """The members cut into runs whose tree keeps the limits; one sequence alone may exceed them."""
        runs: list[Group] = []
        for number in members:
            longer = self.group([*runs[-1].members, number]) if runs else None
            if longer is not None and longer.fits(self.limits):
                runs[-1] = longer
            else:
                runs.append(self.group([number]))
        return runs


def _common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    short = min(len(left), len(right))
    differs = left[:short] != right[:short]
    return int(differs.argmax()) if differs.any() else short
