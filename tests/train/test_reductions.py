"""Each parallel reduction earns its place: without it the gradients are wrong by far more than the suite allows."""

import importlib

import pytest

from opsd_megatron.config import Distill, ParallelConfig
from tests.oracle import dense_step
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model
from tests.train.parallel_step import Measured, make_rollouts, parallel_step
from tests.train.test_gradients import worst_gradient_error

CASES = {  # what is left out: (ranks, layout, tied embedding)
    "norm gradients over tp": (2, ParallelConfig(tp=2, sequence_parallel=True), False),
    "tied embedding over pp": (2, ParallelConfig(pp=2), True),
    "gradient sum over cp": (2, ParallelConfig(cp=2), False),
    "token count over dp": (2, ParallelConfig(), False),
    "log-sum-exp over tp": (2, ParallelConfig(tp=2), False),
    "hidden gradient over tp": (2, ParallelConfig(tp=2), False),
}


def step_without(left_out: str | None, directory, rollouts, parallel) -> Measured:
    """The step of the gradient tests with one reduction replaced by nothing; the ranks are restored afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        if left_out is not None:
            _leave_out(patch, left_out)
        return parallel_step(directory, rollouts, parallel, Distill())


def _leave_out(patch, name: str) -> None:
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel

    from opsd_megatron.losses import chunked, divergence

    # the package has a function of the same name as this module
    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    all_reduce = dist.all_reduce

    def without_counts(tensor, *arguments, **options):
        return None if not tensor.is_floating_point() else all_reduce(tensor, *arguments, **options)

    match name:
        case "norm gradients over tp":
            patch.setattr(finalize, "_allreduce_non_tensor_model_parallel_grads", lambda *_: None)
        case "tied embedding over pp":
            patch.setattr(finalize, "_allreduce_word_embedding_grads", lambda *_: None)
        case "gradient sum over cp":
            patch.setattr(DistributedDataParallel, "finish_grad_sync", lambda *_, **__: None)
        case "token count over dp":
            patch.setattr(dist, "all_reduce", without_counts)
        case "log-sum-exp over tp":
            patch.setattr(divergence, "sum_over", lambda summand, axis: summand)
        case "hidden gradient over tp":
            patch.setattr(chunked, "sum_over", lambda summand, axis: summand)


@pytest.mark.parametrize("left_out", CASES)
def test_leaving_out_a_reduction_is_noticed(tmp_path, left_out):
    ranks, parallel, tied = CASES[left_out]
    model = write_tiny_model(tmp_path, "qwen3", tie_word_embeddings=tied)
    rollouts = make_rollouts(contexts=((90, 20, 3, 2), (37, 12, 1, 1)))
    _, _, expected = dense_step(model, rollouts, Distill())

    def error_of(what):
        measured = run_on_ranks(ranks, step_without, what, model, rollouts, parallel)
        return worst_gradient_error(measured[0].gradients, expected)[0]

    assert error_of(None) <= 1e-5
    assert error_of(left_out) > 1e-3
