"""Loss and gradients of every layout against one dense float64 model that sees one sequence at a time."""

import pytest
import torch

from opsd_megatron.config import Distill, NoCorrection, ParallelConfig
from tests.oracle import dense_step
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model
from tests.train.parallel_step import make_rollouts, parallel_step

OBJECTIVES = {
    "full": Distill(),
    "sampled": Distill(estimator="sampled", correction=NoCorrection()),
    "forward": Distill(direction="forward"),
    "jsd": Distill(direction="jsd", jsd_beta=0.3),
}
LAYOUTS = {
    "one rank": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tp=2)),
    "tp2 sp": (2, ParallelConfig(tp=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pp=2)),
    "pp2 vpp2": (2, ParallelConfig(pp=2, vpp=2)),
    "cp2": (2, ParallelConfig(cp=2)),
    "cp4": (4, ParallelConfig(cp=4)),
    "dp2": (2, ParallelConfig()),
    "dp2 cp2": (4, ParallelConfig(cp=2)),
    "tp2 sp pp2 cp2": (8, ParallelConfig(tp=2, pp=2, cp=2, sequence_parallel=True)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="module")
def oracle(model):
    kept = {}

    def of(name):
        if name not in kept:
            kept[name] = dense_step(model, make_rollouts(), OBJECTIVES[name])
        return kept[name]

    return of


def worst_gradient_error(gradients, expected) -> tuple[float, str]:
    """max over parameters of |g - g64| / max(|g64|, 1e-3 * global norm), in L2 norms."""
    floor = 1e-3 * torch.stack([g.norm() for g in expected.values()]).norm()
    assert gradients.keys() == expected.keys()
    return max(
        (float((gradients[name].double() - g).norm() / torch.maximum(g.norm(), floor)), name)
        for name, g in expected.items()
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients_equal_the_dense_float64_model(model, oracle, layout, objective):
    total, count, expected = oracle(objective)
    ranks, parallel = LAYOUTS[layout]
    measured = run_on_ranks(ranks, parallel_step, model, make_rollouts(), parallel, OBJECTIVES[objective])
    losses = [rank.loss for rank in measured if rank.loss is not None]
    assert all(loss == losses[0] for loss in losses)
    scale = 1.0 if objective != "sampled" else 10.0  # a mean of |A| * |log p|: about 2 nats x 5 nats
    assert abs(losses[0] - total / count) <= 1e-7 * scale
    error, name = worst_gradient_error(measured[0].gradients, expected)
    assert error <= 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("layout", ["one rank", "tp2 sp", "cp2", "pp2 vpp2", "tp2 sp pp2 cp2"])
@pytest.mark.parametrize("objective", ["full", "sampled"])
def test_in_float64_the_difference_is_rounding(model, oracle, layout, objective):
    total, count, expected = oracle(objective)
    ranks, parallel = LAYOUTS[layout]
    objective = OBJECTIVES[objective]
    measured = run_on_ranks(ranks, parallel_step, model, make_rollouts(), parallel, objective, torch.float64)
    assert abs(measured[-1].loss - total / count) <= 1e-10
    assert worst_gradient_error(measured[0].gradients, expected)[0] <= 1e-10


def test_some_cp_rank_holds_no_response_row_of_some_microbatch(model):
    short = make_rollouts(contexts=((90, 20, 1, 1),))
    measured = run_on_ranks(4, parallel_step, model, short, ParallelConfig(cp=4), Distill())
    assert min(measured[0].rows_by_rank) == 0
    _, _, expected = dense_step(model, short, Distill())
    assert worst_gradient_error(measured[0].gradients, expected)[0] <= 1e-5


def test_three_questions_with_two_responses_on_one_context_equal_six_sequences(model):
    from dataclasses import replace

    from tests.train.parallel_step import BATCH

    rollouts = make_rollouts(contexts=((90, 20, 3, 2),))
    shared = run_on_ranks(2, parallel_step, model, rollouts, ParallelConfig(cp=2), Distill())
    alone = replace(BATCH, min_shared_tokens=10_000, student_microbatch_tokens=1)
    separate = run_on_ranks(2, parallel_step, model, rollouts, ParallelConfig(cp=2), Distill(), torch.float32, alone)
    assert abs(shared[0].loss - separate[0].loss) <= 1e-7
    gradients = {name: g.double() for name, g in separate[0].gradients.items()}
    assert worst_gradient_error(shared[0].gradients, gradients)[0] <= 1e-5


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_other_families_tied_and_untied_on_all_axes_at_once(tmp_path, family, tied):
    model = write_tiny_model(tmp_path, family, tie_word_embeddings=tied)
    total, count, expected = dense_step(model, make_rollouts(), Distill())
    ranks, parallel = LAYOUTS["tp2 sp pp2 cp2"]
    measured = run_on_ranks(ranks, parallel_step, model, make_rollouts(), parallel, Distill())
    assert abs(measured[-1].loss - total / count) <= 1e-7
    assert worst_gradient_error(measured[0].gradients, expected)[0] <= 1e-5


@pytest.mark.parametrize("recompute", ["mlp", "full"])
def test_recomputation_leaves_gradients_unchanged(model, oracle, recompute):
    _, _, expected = oracle("full")
    ranks, parallel = LAYOUTS["tp2 sp"]
    from tests.train.parallel_step import BATCH

    arguments = (model, make_rollouts(), parallel, Distill(), torch.float32, BATCH, recompute)
    measured = run_on_ranks(ranks, parallel_step, *arguments)
    assert worst_gradient_error(measured[0].gradients, expected)[0] <= 1e-5


def test_equal_contexts_with_the_live_teacher_give_no_signal(model):
    rollouts = make_rollouts(equal_contexts=True)
    for dtype, advantage_bound in ((torch.float32, 4e-6 * 3), (torch.float64, 1e-12)):
        measured = run_on_ranks(2, parallel_step, model, rollouts, ParallelConfig(cp=2), Distill(), dtype)
        assert measured[0].metrics["advantage/abs_max_nats"] <= advantage_bound
        assert measured[0].metrics["loss/reverse_kl_nats"] <= 1e-9


def test_bfloat16_keeps_log_probs_and_gradient_norm(model, oracle):
    _, _, expected = oracle("full")
    norm = float(torch.stack([g.norm() for g in expected.values()]).norm())
    exact = run_on_ranks(1, parallel_step, model, make_rollouts(), ParallelConfig(), Distill())[0]
    ranks, parallel = LAYOUTS["tp2 sp pp2 cp2"]
    measured = run_on_ranks(ranks, parallel_step, model, make_rollouts(), parallel, Distill(), torch.bfloat16)
    assert abs(measured[0].grad_norm - norm) <= 0.1 * norm
    name = "student/logprob_nats"
    assert abs(measured[-1].metrics[name] - exact.metrics[name]) <= 0.05
