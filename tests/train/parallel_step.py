"""One real training step on the ranks of a layout, up to the gradients, as the tests of this folder run it."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from opsd_megatron.config import BatchConfig, Distill, LiveTeacher, OptimizerConfig, OtherTeacher, ParallelConfig
from opsd_megatron.types import PromptPair, Rollout, Turn, VersionSpan
from tests.tiny_models import VOCAB

CONTEXTS = ((90, 20, 3, 2), (37, 12, 1, 1), (61, 33, 2, 1), (45, 9, 1, 5))
"""Long tokens, short tokens, questions, responses to each: unequal on purpose, one rank may hold no response row."""
BATCH = BatchConfig(student_microbatch_tokens=150, teacher_microbatch_tokens=90, min_shared_tokens=8)


def make_rollouts(contexts=CONTEXTS, seed: int = 1, equal_contexts: bool = False) -> list[Rollout]:
    """Random tokens; some responses have one token, and longer ones have a token outside the loss mask."""
    draw = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCAB) for _ in range(count))

    rollouts = []
    for number, (long, short, questions, samples) in enumerate(contexts):
        context = tokens(long)
        extract = context if equal_contexts else tokens(short)
        for question_number in range(questions):
            question = tokens(5 + question_number)
            pair = PromptPair(f"{number}-{question_number}", context + question, extract + question)
            for sample in range(samples):
                rollouts.append(make_rollout(pair, sample, tokens(draw.randrange(1, 12))))
    return rollouts


def make_rollout(pair: PromptPair, sample: int, response: tuple[int, ...]) -> Rollout:
    count = len(response)
    return Rollout(
        pair=pair,
        sample=sample,
        token_ids=response,
        logprobs=(-1.0,) * count,
        logprob_kind="processed",
        loss_mask=tuple(index != 1 or count < 3 for index in range(count)),
        finish_reason="stop",
        version_spans=(VersionSpan("step-0", 0, count),),
        turns=(Turn("model", 0, count),),
        server_id="none",
    )


@dataclass(frozen=True)
class Measured:
    """What one rank saw; gradients, by Hugging Face name, on rank 0 only."""

    loss: float | None
    gradients: dict[str, torch.Tensor]
    metrics: dict[str, float]
    rows_by_rank: tuple[int, ...]
    grad_norm: float


def parallel_step(
    directory: Path,
    rollouts: list[Rollout],
    parallel: ParallelConfig,
    objective: Distill,
    dtype: torch.dtype = torch.float32,
    batch: BatchConfig = BATCH,
    recompute: str = "none",
    distributed_optimizer: bool = False,
    teacher_directory: Path | None = None,
) -> Measured:
    """Loss and gradients of the global mean over dp replicas that share the rollouts out.

    The teacher is the live one, or the model in `teacher_directory`.
    """
    before = torch.get_default_dtype()
    if dtype == torch.float64:
        torch.set_default_dtype(dtype)  # core divides gradients by 1.0 / count, which is of the default dtype
    try:
        return _parallel_step(
            directory, rollouts, parallel, objective, dtype, batch, recompute, distributed_optimizer, teacher_directory
        )
    finally:
        torch.set_default_dtype(before)


def _parallel_step(
    directory, rollouts, parallel, objective, dtype, batch, recompute, distributed_optimizer, teacher_directory
) -> Measured:
    from opsd_megatron.checkpoint.model_weights import export_weights, load_weights
    from opsd_megatron.data.tokenizer import load_tokenizer
    from opsd_megatron.models.architecture import read_architecture
    from opsd_megatron.models.build import build_model
    from opsd_megatron.models.teacher import build_teacher
    from opsd_megatron.objectives.build import build_objective
    from opsd_megatron.objectives.metrics import finish_metrics, reduce_metrics
    from opsd_megatron.parallel.mesh import build_mesh
    from opsd_megatron.train.layout import lay_out
    from opsd_megatron.train.optimizer import make_trainable
    from opsd_megatron.train.step import score_responses, student_pass
    from opsd_megatron.train.teacher import make_teacher

    mesh = build_mesh(parallel)
    architecture = read_architecture(directory)
    modules = build_model(architecture, mesh, dtype, recompute)
    load_weights(modules, architecture, directory, mesh)
    teacher, vocab_size = build_teacher(LiveTeacher(), modules, mesh), architecture.vocab_size
    if teacher_directory is not None:
        other = OtherTeacher(teacher_directory)
        teacher, vocab_size = make_teacher(other, modules, architecture, load_tokenizer(directory), mesh, dtype)
    chunks, optimizer = make_trainable(modules, mesh, OptimizerConfig(distributed=distributed_optimizer), dtype)
    share = [
        rollout for number, rollout in enumerate(rollouts) if _replica(number, len(rollouts), mesh) == mesh.dp.rank
    ]
    layout = lay_out(share, mesh, batch)
    head = build_objective(objective, 1.0, mesh.tp, mesh.cp, vocab_size)
    teacher_hidden = score_responses(teacher, layout, mesh)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    sums = student_pass(chunks, layout, head, teacher_hidden, teacher.head_weight(), mesh)
    metrics = finish_metrics(reduce_metrics(sums, mesh.dp_cp)) if mesh.is_last_stage else {}
    gradients = {
        name: tensor.clone()
        for name, tensor in export_weights(chunks, architecture, mesh, value_of=lambda weight: weight.main_grad)
        if tensor is not None
    }
    rows = tuple(sum(len(m.shard.rows_by_rank[rank]) for m in layout.student) for rank in range(mesh.cp.size))
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    return Measured(metrics.get("loss/per_token"), gradients, metrics, rows, norm)


def _replica(number: int, count: int, mesh) -> int:
    """Unequal shares: the first replica gets about a third of what the others get."""
    return min(max(0, (number * mesh.dp.size * 3 // count + 1) // 3), mesh.dp.size - 1)
