"""One step's rollouts, laid out twice: the student's microbatches over cp, the teacher's over samples.

The two passes share nothing but the numbers of the response tokens. Everything here is computed from the rollouts
alone, so all ranks of a replica come to the same layout without talking.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from opsd_megatron.config import BatchConfig
from opsd_megatron.data.packing import filler_batch, pack, response_table
from opsd_megatron.models.forward import microbatch_multiple
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.context import ContextShard, deal
from opsd_megatron.parallel.mesh import Mesh
from opsd_megatron.parallel.reduce import max_over
from opsd_megatron.parallel.response import RowExchange, even_shares
from opsd_megatron.types import ResponseTable, Rollout, TokenBatch


@dataclass(frozen=True)
class StudentMicrobatch:
    """One microbatch of the student: its tokens on this cp rank, and which response rows this rank's head takes."""

    shard: ContextShard
    to_head: RowExchange
    """Moves hidden rows from the ranks that computed them to an even split over cp."""
    responses: Int64[Tensor, "head_rows"]
    """Response tokens that this cp rank's head takes, as indices into the ResponseTable."""


@dataclass(frozen=True)
class StepLayout:
    """What this rank runs in one optimizer step."""

    table: ResponseTable
    student: tuple[StudentMicrobatch, ...]
    teacher: tuple[ContextShard, ...]
    teacher_to_head: RowExchange
    """Moves all teacher rows of this replica to the ranks whose heads hold the same response tokens."""


def lay_out(rollouts: Sequence[Rollout], mesh: Mesh, config: BatchConfig) -> StepLayout:
    """Packs and deals both passes; collective over dp, which agrees on the numbers of microbatches."""
    table = response_table(rollouts).to(mesh.device)
    multiple = mesh.tp.size if mesh.sequence_parallel else 1
    batches = pack(rollouts, "student", config.student_microbatch_tokens, config.min_shared_tokens)
    batches = _fill(batches, _agreed_count(len(batches), mesh))
    shares = [even_shares(batch.response_index, mesh.cp.size) for batch in batches]
    student = []
    for batch, share in zip(batches, shares, strict=True):
        shard = deal(batch, mesh.cp, multiple).to(mesh.device)
        exchange = RowExchange(shard.responses_by_rank, share, mesh.cp)
        student.append(StudentMicrobatch(shard, exchange, share[mesh.cp.rank].to(mesh.device)))
    teacher, held = _lay_out_teacher(rollouts, mesh, config, multiple)
    wanted = [torch.cat([share[rank] for share in shares]) for rank in range(mesh.cp.size)]
    return StepLayout(table, tuple(student), teacher, RowExchange(held, wanted, mesh.cp))


def _lay_out_teacher(
    rollouts: Sequence[Rollout], mesh: Mesh, config: BatchConfig, multiple: int
) -> tuple[tuple[ContextShard, ...], list[Tensor]]:
    """This cp rank's teacher shards, and for every cp rank the response tokens that it will have scored, in order."""
    packs = [
        pack(rollouts, "teacher", config.teacher_microbatch_tokens, config.min_shared_tokens, chosen=chosen)
        for chosen in split_samples(rollouts, mesh.cp.size)
    ]
    own = _fill(packs[mesh.cp.rank], _agreed_count(max(map(len, packs)), mesh))
    shards = tuple(deal(batch, Axis.single("cp"), multiple).to(mesh.device) for batch in own)
    held = [_responses_of(batches) for batches in packs]
    return shards, held


def split_samples(rollouts: Sequence[Rollout], parts: int) -> list[list[int]]:
    """Rollout numbers for each cp rank's teacher pass, longest first to the least loaded; one prompt stays together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, rollout in enumerate(rollouts):
        groups.setdefault(rollout.pair.teacher_prompt, []).append(number)
    cost = {
        prompt: len(prompt) + sum(len(rollouts[number].token_ids) for number in numbers)
        for prompt, numbers in groups.items()
    }
    chosen: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    for prompt in sorted(groups, key=lambda prompt: (-cost[prompt], groups[prompt][0])):
        lightest = load.index(min(load))
        chosen[lightest].extend(groups[prompt])
        load[lightest] += cost[prompt]
    return [sorted(numbers) for numbers in chosen]


def _agreed_count(count: int, mesh: Mesh) -> int:
    """Microbatches that every replica runs: the largest need, rounded up to what the schedule takes."""
    multiple = microbatch_multiple(mesh)
    largest = max(int(max_over(torch.tensor(count, device=mesh.device), mesh.dp)), 1)
    return -(-largest // multiple) * multiple


def _fill(batches: list[TokenBatch], count: int) -> list[TokenBatch]:
    return batches + [filler_batch(pad_token=0)] * (count - len(batches))


def _responses_of(batches: Sequence[TokenBatch]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(batch.response_index for batch in batches)])
