"""The head's gradient in Megatron's own buffers: tied and untied, over pipelines, overlapped, after an evaluation."""

import pytest
import torch

from opsd_megatron.config import Distill, LiveTeacher, OptimizerConfig, ParallelConfig
from tests.oracle import dense_step
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model
from tests.train.parallel_step import BATCH, _replica, make_rollouts
from tests.train.test_gradients import worst_gradient_error

CONTEXTS = ((90, 20, 3, 2), (61, 33, 2, 1), (45, 9, 1, 3))
CASES = {  # (ranks, layout, tied embedding, overlapped reduction)
    "tied": (1, ParallelConfig(), True, False),
    "tied pp2 vpp2": (2, ParallelConfig(pp=2, vpp=2), True, False),
    "tied pp2, overlapped": (2, ParallelConfig(pp=2), True, True),
    "tied dp2, overlapped": (2, ParallelConfig(), True, True),
    "untied dp2, overlapped": (2, ParallelConfig(), False, True),
    "untied dp2 pp2 vpp2, overlapped": (4, ParallelConfig(pp=2, vpp=2), False, True),
}


def gradients_on_rank(directory, rollouts, parallel: ParallelConfig, overlapped: bool, forgets_embedding: bool = False):
    """Of the second of two equal steps (core overlaps from the second on), each with an evaluation in its middle.

    Returns (gradients by Hugging Face name on rank 0, microbatches of a step).
    """
    from opsd_megatron.checkpoint.model_weights import export_weights, load_weights
    from opsd_megatron.models.architecture import read_architecture
    from opsd_megatron.models.build import build_model, head_weight
    from opsd_megatron.models.forward import run_schedule
    from opsd_megatron.models.teacher import build_teacher
    from opsd_megatron.objectives.build import build_objective
    from opsd_megatron.parallel.mesh import build_mesh
    from opsd_megatron.train.layout import lay_out
    from opsd_megatron.train.optimizer import make_trainable
    from opsd_megatron.train.step import score_responses, student_pass

    mesh = build_mesh(parallel)
    architecture = read_architecture(directory)
    modules = build_model(architecture, mesh, torch.float32)
    load_weights(modules, architecture, directory, mesh)
    teacher = build_teacher(LiveTeacher(), modules, mesh)
    chunks, _ = make_trainable(
        modules, mesh, OptimizerConfig(distributed=False, overlap_grad_reduce=overlapped), torch.float32
    )
    share = [one for number, one in enumerate(rollouts) if _replica(number, len(rollouts), mesh) == mesh.dp.rank]
    layout = lay_out(share, mesh, BATCH)
    objective = build_objective(Distill(), 1.0, mesh.tp, mesh.cp, architecture.vocab_size)
    teacher_hidden = score_responses(teacher, layout, mesh)
    if forgets_embedding:  # as if the head's share were all of the gradient
        head_weight(chunks[-1]).register_hook(torch.zeros_like)

    def evaluate(index: int, hidden: torch.Tensor) -> float:
        microbatch = layout.student[index]
        rows = microbatch.to_head.move(hidden[microbatch.shard.rows])
        table = layout.table.select(microbatch.responses)
        arguments = (head_weight(chunks[-1]), teacher_hidden[index], teacher.head_weight(), table)
        return float(objective.loss(rows, *arguments).loss_sum)

    shards = [microbatch.shard for microbatch in layout.student]
    for _ in range(2):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        run_schedule(chunks, shards, mesh, evaluate, forward_only=True)
        student_pass(chunks, layout, objective, teacher_hidden, teacher.head_weight(), mesh)
    exported = export_weights(chunks, architecture, mesh, value_of=lambda weight: weight.main_grad)
    return {name: tensor.clone() for name, tensor in exported if tensor is not None}, len(shards)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By whether the embedding is tied: (directory, gradients of the dense model)."""
    found = {}
    for tied in (False, True):
        directory = write_tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3", tie_word_embeddings=tied)
        found[tied] = directory, dense_step(directory, make_rollouts(CONTEXTS), Distill())[2]
    return found


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_dense_model(models, case):
    ranks, parallel, tied, overlapped = CASES[case]
    directory, expected = models[tied]
    measured = run_on_ranks(ranks, gradients_on_rank, directory, make_rollouts(CONTEXTS), parallel, overlapped)
    gradients, microbatches = measured[0]
    error, name = worst_gradient_error(gradients, expected)
    assert error <= 1e-5 and microbatches > 1, f"{name}: {error:.1e}"


def test_forgetting_the_tied_embeddings_own_gradient_is_noticed(models):
    directory, expected = models[True]
    arguments = (directory, make_rollouts(CONTEXTS), ParallelConfig(), False, True)
    gradients, _ = run_on_ranks(1, gradients_on_rank, *arguments)[0]
    error, name = worst_gradient_error(gradients, expected)
    assert error > 1e-3 and name == "model.embed_tokens.weight"
