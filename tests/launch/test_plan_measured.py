"""The planner against real ranks: parameters, FLOPs of matrices, bytes sent, and the peak of the allocator."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opsd_megatron.config import ParallelConfig
from opsd_megatron.launch.plan.flops import forward_flops
from opsd_megatron.launch.plan.parameters import stage_parameters
from opsd_megatron.launch.plan.workload import Pass
from opsd_megatron.models.architecture import architecture_of
from tests.ranks import run_on_ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))
from memory import measure_here, predict, predict_traffic
from memory_cases import CASES, QWEN2, QWEN3, Case

TINY = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 250}
LAYOUTS = [
    ParallelConfig(tp=2, sequence_parallel=True),
    ParallelConfig(pp=2),
    ParallelConfig(pp=2, vpp=2),
]


def built_parameters(hf_config: dict, parallel: ParallelConfig) -> int:
    from opsd_megatron.models.build import build_model
    from opsd_megatron.parallel.mesh import build_mesh

    chunks = build_model(architecture_of(hf_config), build_mesh(parallel), torch.float32)
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [QWEN2, QWEN3])
def test_parameters_of_every_stage_are_those_of_the_built_model(family, tied):
    hf_config = family | TINY | {"tie_word_embeddings": tied}
    for parallel in LAYOUTS:
        built = run_on_ranks(2, built_parameters, hf_config, parallel)
        for rank, count in enumerate(built):
            stage = rank if parallel.pp > 1 else 0
            assert stage_parameters(architecture_of(hf_config), parallel, stage).total == count


def counted_flops(hf_config: dict, tokens: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    from opsd_megatron.models.build import build_model
    from opsd_megatron.parallel.axis import Axis
    from opsd_megatron.parallel.context import deal
    from opsd_megatron.parallel.mesh import build_mesh
    from opsd_megatron.token_tree import Node, TokenTree
    from opsd_megatron.types import TokenBatch

    nothing = torch.zeros(0, dtype=torch.int64)
    batch = TokenBatch(TokenTree((Node(-1, tokens, 0),)), torch.zeros(tokens, dtype=torch.int64), nothing, nothing)
    (model,) = build_model(architecture_of(hf_config), build_mesh(ParallelConfig()), torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(deal(batch, Axis.single("cp"))).sum().backward()
    return counter.get_flop_counts()["Global"][torch.ops.aten.mm]


def test_flops_of_the_matrices_are_those_that_torch_counts():
    (counted,) = run_on_ranks(1, counted_flops, QWEN3 | TINY, 37)
    linear, _ = forward_flops(architecture_of(QWEN3 | TINY), Pass(1, 37, 0, 37, 0, 0))
    assert counted == 3 * linear


def small(name: str, **changes) -> Case:
    """A layout of the bench at widths that take a second: activations are most of what lives."""
    widths = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384, "vocab_size": 2048}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    case = CASES[name]
    tokens = replace(case.config.data, student_tokens=384, teacher_tokens=64)
    return replace(case, model=case.model | widths | heads, config=replace(case.config, data=tokens), **changes)


@pytest.mark.parametrize("name", ["tp2 sp", "pp2 vpp2", "cp2 full"])
def test_peak_and_traffic_of_a_step_are_as_planned(name):
    case = small(name)
    ranks = run_on_ranks(case.ranks, measure_here, case)
    for one in ranks:
        assert predict(case, one.stage).peak.total == pytest.approx(one.peak, rel=0.1)
    for axis, planned in predict_traffic(case).items():
        assert planned == pytest.approx(max(one.traffic[axis] for one in ranks), rel=0.02), axis
