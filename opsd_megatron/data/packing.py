"""From rollouts to microbatches: sequences that share a context are joined in one token tree and computed once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

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


def pack(
    rollouts: Sequence[Rollout],
    view: View,
    budget_tokens: int,
    min_shared_tokens: int = 32,
    chosen: Sequence[int] | None = None,
) -> list[TokenBatch]:
    """Microbatches of at most `budget_tokens` tokens each (shared ones counted once), the same on every rank.

    Rollouts of one context come together; groups are placed first-fit, the largest first. A rollout that is longer
    than the budget gets a microbatch of its own. `chosen` packs only the rollouts with these numbers;
    `response_index` refers to `response_table(rollouts)` all the same.
    """
    numbers = range(len(rollouts)) if chosen is None else chosen
    forest = _Forest({number: sequence_of(rollouts[number], view) for number in numbers}, min_shared_tokens)
    groups = forest.groups_of_context({number: len(prompt_of(rollouts[number], view)) for number in numbers})
    groups = [run for group in groups for run in forest.split(group, budget_tokens)]
    first_token = np.cumsum([0, *(len(rollout.token_ids) for rollout in rollouts)])
    batches = []
    for members in forest.place(groups, budget_tokens):
        grown = forest.grow(members)
        rows, responses = [], []
        for member, where in zip(members, grown.rows, strict=True):
            rows.append(where[len(prompt_of(rollouts[member], view)) - 1 :])  # the prompt's last token predicts token 0
            responses.append(np.arange(first_token[member], first_token[member + 1]))
        batches.append(
            TokenBatch(
                tree=grown.tree,
                token_ids=torch.from_numpy(grown.token_ids),
                rows=torch.from_numpy(np.concatenate(rows)),
                response_index=torch.from_numpy(np.concatenate(responses)),
            )
        )
    return batches


def filler_batch(pad_token: int = 0) -> TokenBatch:
    """One token and no rows: it keeps a rank in step that has fewer microbatches than its peers."""
    nothing = torch.zeros(0, dtype=torch.int64)
    tree = TokenTree((Node(NO_PARENT, 1, 0),))
    return TokenBatch(tree, torch.tensor([pad_token], dtype=torch.int64), rows=nothing, response_index=nothing)


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
    """Numbered sequences, and the ways to put them together."""

    sequences: Mapping[int, np.ndarray]
    min_shared_tokens: int

    def grow(self, members: Sequence[int]) -> GrownTree:
        return grow_tree([self.sequences[member].tolist() for member in members], self.min_shared_tokens)

    def size(self, members: Sequence[int]) -> int:
        """Tokens of the tree. What all members start with is counted, not grown: contexts are long, branches short."""
        sequences = [self.sequences[member] for member in members]
        common = min(_common_prefix(sequences[0], other) for other in sequences)
        skipped = max(0, common - max(1, self.min_shared_tokens))  # what is left still joins at the root
        return (
            skipped + grow_tree([one[skipped:].tolist() for one in sequences], self.min_shared_tokens).tree.num_tokens
        )

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
        return is_same or shared >= max(self.min_shared_tokens, half)

    def split(self, group: Sequence[int], budget_tokens: int) -> list[list[int]]:
        """The group cut into runs whose tree fits the budget; one sequence alone may exceed it."""
        runs: list[list[int]] = []
        for number in group:
            if runs and self.size([*runs[-1], number]) <= budget_tokens:
                runs[-1].append(number)
            else:
                runs.append([number])
        return runs

    def place(self, groups: Sequence[Sequence[int]], budget_tokens: int) -> list[list[int]]:
        """First-fit, largest group first. Groups of other contexts share nothing worth counting: their sizes add up."""
        bins: list[list[int]] = []
        filled: list[int] = []
        sizes = [(self.size(group), group) for group in groups]
        for tokens, group in sorted(sizes, key=lambda item: (-item[0], item[1])):
            place = next((at for at, taken in enumerate(filled) if taken + tokens <= budget_tokens), len(bins))
            if place == len(bins):
                bins.append([])
                filled.append(0)
            bins[place].extend(group)
            filled[place] += tokens
        return bins


def _common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    short = min(len(left), len(right))
    differs = left[:short] != right[:short]
    return int(differs.argmax()) if differs.any() else short
