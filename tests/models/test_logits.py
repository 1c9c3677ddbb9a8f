"""Logits of Megatron's modules over token trees against transformers, one sequence at a time."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from opsd_megatron.checkpoint.model_weights import load_weights
from opsd_megatron.config import ParallelConfig
from opsd_megatron.models.architecture import read_architecture
from opsd_megatron.models.build import build_model, head_weight
from opsd_megatron.models.forward import run_schedule
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.parallel.context import deal
from opsd_megatron.parallel.mesh import build_mesh
from tests.models.batches import join, sequences_of
from tests.tiny_models import LLAMA3, VOCAB, YARN, tiny_model, write_tiny_model

SEQUENCES = [*sequences_of((90, (7, 3, 12)), 1), *sequences_of((33, (0,)), 2)]

CASES = [
    pytest.param("qwen2", {}, id="qwen2"),
    pytest.param("qwen2", {"tie_word_embeddings": True}, id="qwen2-tied"),
    pytest.param("qwen2", {"rope_parameters": YARN}, id="qwen2-yarn"),
    pytest.param("qwen3", {}, id="qwen3"),
    pytest.param("qwen3", {"tie_word_embeddings": True}, id="qwen3-tied"),
    pytest.param("qwen3", {"rope_parameters": {**YARN, "attention_factor": 0.9}}, id="qwen3-yarn-attention-factor"),
    pytest.param("llama", {}, id="llama-original-32"),
    pytest.param("llama", {"tie_word_embeddings": True}, id="llama-tied"),
    pytest.param(
        "llama",
        {"rope_parameters": {**LLAMA3, "low_freq_factor": 0.5, "high_freq_factor": 6.0}},
        id="llama-frequencies",
    ),
    pytest.param("mistral", {}, id="mistral"),
    pytest.param("mistral", {"tie_word_embeddings": True, "head_dim": 32}, id="mistral-tied-wide-heads"),
]


def tree_logits(directory: Path, dtype: torch.dtype) -> Tensor:
    """[tokens of all sequences, vocab]: the sequences share one tree, on one rank."""
    mesh = build_mesh(ParallelConfig())
    architecture = read_architecture(directory)
    chunks = build_model(architecture, mesh, dtype)
    load_weights(chunks, architecture, directory, mesh)
    batch = join(SEQUENCES)
    assert len(batch.tree.nodes) == 5 and batch.num_tokens < len(batch.rows)  # one shared context, three branches
    shard = deal(batch, Axis.single("cp"))
    (hidden,) = run_schedule(chunks, [shard], mesh, lambda _, hidden: hidden[shard.rows], forward_only=True)
    return (hidden @ head_weight(chunks[-1]).T)[:, :VOCAB].detach()


def separate_logits(model) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([sequence])).logits[0] for sequence in SEQUENCES])


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_logits_over_a_tree_equal_transformers_on_each_sequence(family, changes, tmp_path):
    ours = tree_logits(write_tiny_model(tmp_path, family, **changes), torch.float32)
    theirs = separate_logits(tiny_model(family, **changes))
    assert 2.2 < theirs.abs().max() < 4
    assert (ours - theirs).abs().max() <= 5e-6


def test_float64_logits_differ_from_float32_by_rounding_only(tmp_path):
    directory = write_tiny_model(tmp_path, "qwen3")
    difference = (tree_logits(directory, torch.float64) - tree_logits(directory, torch.float32).double()).abs().max()
    assert 0 < difference <= 5e-6


def test_bfloat16_logprobs_are_as_close_to_float32_as_those_of_transformers(tmp_path):
    directory = write_tiny_model(tmp_path, "qwen3")
    exact = separate_logits(tiny_model("qwen3")).log_softmax(-1)
    ours = tree_logits(directory, torch.bfloat16).float().log_softmax(-1)
    theirs = separate_logits(tiny_model("qwen3").bfloat16()).float().log_softmax(-1)
    assert (ours - exact).abs().mean() <= 1.2 * (theirs - exact).abs().mean()
    assert (ours - exact).abs().max() <= 0.15
