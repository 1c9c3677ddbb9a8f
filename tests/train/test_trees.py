"""Forests of several unequal trees per microbatch, on layouts that combine axes, against one sequence at a time."""

from dataclasses import replace

import pytest
import torch

from opsd_megatron.config import Distill, ParallelConfig
from opsd_megatron.data.balance import Limits
from opsd_megatron.data.packing import pack
from opsd_megatron.token_tree import NO_PARENT
from tests.oracle import dense_step
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model
from tests.train.parallel_step import BATCH, make_rollouts, parallel_step
from tests.train.test_gradients import worst_gradient_error

FOREST = replace(BATCH, student_microbatch_tokens=260, teacher_microbatch_tokens=140)
CASES = {  # (ranks, layout, layers, what is recomputed)
    "cp4": (4, ParallelConfig(cp=4), 4, "none"),
    "tp2 cp2, full": (4, ParallelConfig(tp=2, cp=2), 4, "full"),
    "tp2 sp cp2, norms": (4, ParallelConfig(tp=2, cp=2, sequence_parallel=True), 4, "norms"),
    "pp2 cp2, mlp": (4, ParallelConfig(pp=2, cp=2), 4, "mlp"),
    "pp2 vpp2 cp2": (4, ParallelConfig(pp=2, vpp=2, cp=2), 4, "none"),
    "pp2 vpp2 cp2, mlp and norms": (4, ParallelConfig(pp=2, vpp=2, cp=2), 4, "mlp+norms"),
    "pp4 vpp2": (4, ParallelConfig(pp=4, vpp=2), 8, "none"),
    "tp2 sp pp2 cp2, mlp and norms": (8, ParallelConfig(tp=2, pp=2, cp=2, sequence_parallel=True), 4, "mlp+norms"),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """For a number of layers: the model's directory, and loss sum, token count and gradients of the dense model."""
    known = {}

    def of(layers: int):
        if layers not in known:
            model = write_tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3", num_hidden_layers=layers)
            known[layers] = model, *dense_step(model, make_rollouts(), Distill())
        return known[layers]

    return of


def test_a_microbatch_of_these_tests_holds_several_trees():
    limits = Limits(FOREST.student_microbatch_tokens, FOREST.min_shared_tokens)
    batches = pack(make_rollouts(), "student", limits)
    roots = [sum(node.parent == NO_PARENT for node in batch.tree.nodes) for batch in batches]
    assert max(roots) > 1 and len({batch.num_tokens for batch in batches}) > 1


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_dense_float64_model(reference, case):
    ranks, parallel, layers, recompute = CASES[case]
    model, total, count, expected = reference(layers)
    arguments = (model, make_rollouts(), parallel, Distill(), torch.float32, FOREST, recompute)
    measured = run_on_ranks(ranks, parallel_step, *arguments)
    assert abs(measured[-1].loss - total / count) <= 1e-7
    error, name = worst_gradient_error(measured[0].gradients, expected)
    assert error <= 1e-5, f"{name}: {error:.1e}"
