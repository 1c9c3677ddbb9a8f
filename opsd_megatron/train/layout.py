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
from opsd_megatron.data.balance import Limits
from opsd_megatron.data.packing import Packing, response_table
from opsd_megatron.models.forward import microbatch_multiple
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.context import ContextShard, deal
from opsd_megatron.parallel.mesh import Mesh
from opsd_megatron.parallel.reduce import max_over
from opsd_megatron.parallel.response import RowExchange, even_shares
from opsd_megatron.types import ResponseTable, Rollout


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


def lay_out(rollouts: Sequence[Rollout], mesh: Mesh, config: BatchConfig, pair_cost: float = 0.0) -> StepLayout:
    """Packs and deals both passes; collective over dp, which agrees on the numbers of microbatches.

    `pair_cost` is `Architecture.pair_cost`: what microbatches are balanced by, beside their tokens.
    """
    table = response_table(rollouts).to(mesh.device)
    shared, cost = config.min_shared_tokens, config.student_microbatch_cost
    packing = Packing(rollouts, "student", Limits(config.student_microbatch_tokens, shared, pair_cost, cost))
    batches = packing.microbatches(_agreed_count(packing.needed, mesh))
    shares = [even_shares(batch.response_index, mesh.cp.size) for batch in batches]
    student = []
    for batch, share in zip(batches, shares, strict=True):
        shard = deal(batch, mesh.cp, token_multiple(mesh)).to(mesh.device)
        exchange = RowExchange(shard.responses_by_rank, share, mesh.cp)
        student.append(StudentMicrobatch(shard, exchange, share[mesh.cp.rank].to(mesh.device)))
    teacher, held = _lay_out_teacher(rollouts, mesh, Limits(config.teacher_microbatch_tokens, shared, pair_cost))
    wanted = [torch.cat([share[rank] for share in shares]) for rank in range(mesh.cp.size)]
    return StepLayout(table, tuple(student), teacher, RowExchange(held, wanted, mesh.cp))


def _lay_out_teacher(
    rollouts: Sequence[Rollout], mesh: Mesh, limits: Limits
) -> tuple[tuple[ContextShard, ...], list[Tensor]]:
    """This cp rank's teacher shards, and for every cp rank the response tokens that it will have scored, in order."""
    shares = split_samples(rollouts, mesh.cp.size, limits.pair_cost)
    packings = [Packing(rollouts, "teacher", limits, chosen) for chosen in shares]
    count = _agreed_count(max(packing.needed for packing in packings), mesh)
    packs = [packing.microbatches(count) for packing in packings]
    own = packs[mesh.cp.rank]
    shards = tuple(deal(batch, Axis.single("cp"), token_multiple(mesh)).to(mesh.device) for batch in own)
    return shards, [torch.cat([batch.response_index for batch in batches]) for batches in packs]


def split_samples(rollouts: Sequence[Rollout], parts: int, pair_cost: float) -> list[list[int]]:
    """Rollout numbers for each cp rank's teacher pass, dearest first to the least loaded; one prompt stays together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, rollout in enumerate(rollouts):
        groups.setdefault(rollout.pair.teacher_prompt, []).append(number)
    cost: dict[tuple[int, ...], float] = {
        prompt: _cost_of_tree(len(prompt), [len(rollouts[number].token_ids) for number in numbers], pair_cost)
        for prompt, numbers in groups.items()
    }
    chosen: list[list[int]] = [[] for _ in range(parts)]
    load = [0.0] * parts
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


def _cost_of_tree(prompt: int, responses: Sequence[int], pair_cost: float) -> float:
    """In tokens, of a prompt that is computed once for all its responses."""
    pairs = prompt * (prompt + 1) // 2 + sum(length * prompt + length * (length + 1) // 2 for length in responses)
    return prompt + sum(responses) + pair_cost * pairs


def token_multiple(mesh: Mesh) -> int:
    """Sequence parallelism cuts the tokens of a shard over tp."""
    return mesh.tp.size if mesh.sequence_parallel else 1
