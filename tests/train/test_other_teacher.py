"""A teacher of another family, other sizes and another number of embedding rows, cut like the student."""

import pytest
import torch

from opsd_megatron.config import Distill, OtherTeacher, ParallelConfig, RunConfig, SelfSft
from opsd_megatron.errors import ConfigError
from opsd_megatron.launch.tiny_world import write_tokenizer
from tests.oracle import dense_step
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model
from tests.train.parallel_step import BATCH, make_rollouts, parallel_step
from tests.train.test_gradients import worst_gradient_error

LAYOUTS = {
    "one rank": (1, ParallelConfig()),
    "tp2 sp cp2": (4, ParallelConfig(tp=2, cp=2, sequence_parallel=True)),
    "tp2 pp2 vpp2 cp2": (8, ParallelConfig(tp=2, pp=2, vpp=2, cp=2)),
}


@pytest.fixture(scope="module", params=[(401, 389), (389, 401)], ids=["fewer rows", "more rows"])
def models(request, tmp_path_factory):
    """(student, teacher): both know the 384 tokens of one tokenizer, and have rows of their own behind them."""
    root = tmp_path_factory.mktemp("models")
    student = write_tiny_model(root / "student", "qwen3", vocab_size=request.param[0])
    sizes = {"hidden_size": 96, "num_attention_heads": 8, "num_hidden_layers": 8, "vocab_size": request.param[1]}
    teacher = write_tiny_model(root / "teacher", "qwen2", seed=3, tie_word_embeddings=True, **sizes)
    for directory in (student, teacher):
        write_tokenizer(directory)
    return student, teacher


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_the_dense_float64_models(models, layout):
    student, teacher = models
    rollouts, objective = make_rollouts(), Distill()
    total, count, expected = dense_step(student, rollouts, objective, teacher)
    ranks, parallel = LAYOUTS[layout]
    arguments = (student, rollouts, parallel, objective, torch.float32, BATCH, "none", False, teacher)
    measured = run_on_ranks(ranks, parallel_step, *arguments)
    loss = next(rank.loss for rank in measured if rank.loss is not None)
    assert abs(loss - total / count) <= 1e-6 * abs(total / count)
    assert worst_gradient_error(measured[0].gradients, expected)[0] <= 1e-5


def test_another_tokenizer_is_refused(models):
    student, teacher = models
    other = teacher / "other"
    write_tiny_model(other, "qwen2")
    write_tokenizer(other)
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"<|im_end|>"', '"<|fin|>"'))
    arguments = (student, make_rollouts(), ParallelConfig(), Distill(), torch.float32, BATCH, "none", False, other)
    with pytest.raises(AssertionError, match=r"the teacher in .* has .*both must come from the same tokenizer"):
        run_on_ranks(1, parallel_step, *arguments)


def test_self_sft_has_no_other_teacher():
    with pytest.raises(ConfigError, match="model's own answers"):
        RunConfig(objective=SelfSft(), teacher=OtherTeacher())
