"""Unequal microbatches of token trees for the model tests."""

import numpy as np
import torch

from opsd_megatron.config import ParallelConfig
from opsd_megatron.token_tree import grow_tree
from opsd_megatron.types import TokenBatch
from tests.tiny_models import VOCAB

SHAPES = ((37, (5, 3, 9)), (90, (2,)), (53, (7, 7, 1, 4, 2)), (11, (4, 6)))
"""Per microbatch the tokens of its context and of the responses to it."""


def random_tokens(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=generator).tolist()


def sequences_of(shape: tuple[int, tuple[int, ...]], seed: int) -> list[list[int]]:
    """Sequences with one common context."""
    generator = torch.Generator().manual_seed(seed)
    context = random_tokens(shape[0], generator)
    return [context + random_tokens(count, generator) for count in shape[1]]


def join(sequences: list[list[int]], first_row: int = 0, first_response: int = 0) -> TokenBatch:
    """One tree of the sequences; every token from `first_row` on of every sequence is a row."""
    grown = grow_tree(sequences, min_shared_tokens=8)
    rows = torch.from_numpy(np.concatenate([where[first_row:] for where in grown.rows]))
    responses = torch.arange(first_response, first_response + len(rows))
    return TokenBatch(grown.tree, torch.from_numpy(grown.token_ids), rows, responses)


def microbatches() -> list[TokenBatch]:
    """One batch for each of SHAPES; rows are the tokens that predict responses."""
    batches, responses = [], 0
    for seed, shape in enumerate(SHAPES):
        batches.append(join(sequences_of(shape, seed), shape[0] - 1, responses))
        responses += len(batches[-1].rows)
    return batches


def layout_name(value) -> str | None:
    """Test id of a layout: tp2-sp, pp2-vpp2, single."""
    if not isinstance(value, ParallelConfig):
        return None
    sizes = {"tp": value.tp, "pp": value.pp, "vpp": value.vpp or 1, "cp": value.cp}
    parts = [f"{axis}{size}" for axis, size in sizes.items() if size > 1]
    return "-".join(parts + ["sp"] * value.sequence_parallel) or "single"
