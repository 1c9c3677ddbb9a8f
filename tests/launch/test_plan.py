"""The planner's arithmetic against hand counts, published sizes, and what it says of 32B on small machines."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from opsd_megatron.config import BatchConfig, DataConfig, EmaTeacher, ParallelConfig, RolloutConfig, RunConfig
from opsd_megatron.errors import ConfigError
from opsd_megatron.launch.plan.activations import kept_by_layer, widths_of
from opsd_megatron.launch.plan.estimate import make_plan
from opsd_megatron.launch.plan.flops import step_flops
from opsd_megatron.launch.plan.machine import GIB, MACHINES
from opsd_megatron.launch.plan.memory import rank_memory
from opsd_megatron.launch.plan.parameters import count_parameters
from opsd_megatron.launch.plan.search import fitting_layouts
from opsd_megatron.launch.plan.shapes import SHAPES, hf_config_of
from opsd_megatron.launch.plan.traffic import step_traffic
from opsd_megatron.launch.plan.workload import workload_of
from opsd_megatron.models.architecture import architecture_of

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import opsdl_recipes

PUBLISHED = {
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
}
ONE_NODE = MACHINES["h100-80gb"]


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_published_model(name):
    assert count_parameters(architecture_of(SHAPES[name])) == PUBLISHED[name]


def one_prompt(prompt: int, samples: int, response: int, **changes) -> RunConfig:
    return RunConfig(
        data=DataConfig(student_tokens=prompt, teacher_tokens=prompt // 2),
        rollout=RolloutConfig(samples_per_prompt=samples, max_response_tokens=response),
        batch=BatchConfig(prompts_per_step=1, student_microbatch_tokens=prompt + samples * response),
        **changes,
    )


def test_a_workload_counts_the_tree():
    work = workload_of(one_prompt(prompt=100, samples=3, response=5), dp=1)
    tokens = 100 + 3 * 4  # the last response token is only a target
    assert (work.student.microbatches, work.student.tokens, work.student.total_tokens) == (1, tokens, tokens)
    assert work.student.total_pairs == 100 * 101 // 2 + 3 * sum(100 + position for position in (1, 2, 3, 4))
    assert work.student.rows == work.student.total_rows == 15
    assert work.teacher.total_tokens == 50 + 3 * 4


def test_qwen3_32b_at_128k_costs_what_the_formulas_say():
    config, architecture = one_prompt(131_072, samples=1, response=2_048), architecture_of(SHAPES["qwen3-32b"])
    work = workload_of(config, dp=1)
    flops = step_flops(config, architecture, work, dp=1)
    length = 131_072 + 2_047
    assert flops.linear == pytest.approx(3 * 62.4e9 * length, rel=0.002)
    assert flops.attention == pytest.approx(3.5 * 2 * 64 * 128 * 64 * length**2, rel=1e-4)
    assert flops.recompute == 0
    assert step_flops(
        replace(config, model=replace(config.model, recompute="full")), architecture, work, 1
    ).recompute == pytest.approx(26.9e15, rel=0.01)


def test_kept_activations_of_a_layer_on_a_gpu_are_the_hand_count():
    a = architecture_of(SHAPES["qwen3-32b"])
    w = widths_of(a, ParallelConfig(tp=8, sequence_parallel=True), "bfloat16", tokens=8_000, cp=1, is_cuda=True)
    stream, queries, keys, ffn = 8_000 * 5120 // 8, 8_000 * 1024, 8_000 * 128, 8_000 * 3200
    attention = queries + 2 * keys + queries + 2 * keys + queries  # projected, rotated and kv, out
    assert sum(kept_by_layer(w, "full").values()) == 2 * stream
    kept = 2 * (4 * stream + attention + 5 * ffn) + 4 * 8_000 * 8
    assert sum(kept_by_layer(w, "none").values()) == kept
    assert sum(kept_by_layer(w, "mlp").values()) == kept - 2 * 5 * ffn
    assert sum(kept_by_layer(w, "mlp+norms").values()) == kept - 2 * (5 * ffn + 2 * stream)


def test_optimizer_states_are_cut_or_offloaded_and_teachers_wait_in_host_memory():
    a = architecture_of(SHAPES["qwen3-8b"])
    config = one_prompt(100, 1, 5, parallel=ParallelConfig(cp=2), teacher=EmaTeacher())
    config = replace(config, model=replace(config.model, dtype="bfloat16"))
    count = count_parameters(a)

    def memory(run):
        return rank_memory(run, a, workload_of(run, dp=2), dp=2, stage=0, is_cuda=True)

    offloaded = replace(config, optimizer=replace(config.optimizer, cpu_offload=True))
    assert memory(config).moments[-1].tensors["optimizer"]["exp_avg"] == count // 4 * 4
    assert sum(memory(config).host.values()) == count * (4 + 2)
    assert sum(memory(offloaded).host.values()) == count * (4 + 2) + count // 4 * 16
    assert set(memory(offloaded).moments[-1].tensors["optimizer"]) == {"main parameters", "AdamW's square roots"}
    assert memory(offloaded).moments[-1].part("optimizer") == count // 4 * 4


def test_the_ring_sends_what_its_formula_says():
    a = architecture_of(SHAPES["qwen3-8b"])
    config = one_prompt(8_000, 1, 1, parallel=ParallelConfig(cp=4))
    sent = step_traffic(config, a, workload_of(config, dp=1), dp=1)["cp"]
    assert sent == a.num_layers * 2 * 3 * (2_000 * 8 * 128) * (4 + 4 + 4)


def test_one_node_of_80_gb_holds_32b_only_with_the_optimizer_offloaded():
    request = opsdl_recipes.RECIPES["qwen3-32b-32k"]
    a = architecture_of(hf_config_of(request.run.model.path))
    config = replace(request.run, optimizer=replace(request.run.optimizer, cpu_offload=False))
    plan = make_plan(config, a, ONE_NODE)
    states = sum(sum(plan.fullest.peak.tensors[part].values()) for part in ("parameters", "gradients", "optimizer"))
    assert 8 * states == pytest.approx(590e9, rel=0.01)
    assert not plan.fits
    nearest = fitting_layouts(config, a, ONE_NODE)
    assert nearest and all(other.fits and other.config.optimizer.cpu_offload for other in nearest)
    assert make_plan(config, a, MACHINES["h200-141gb"]).fits


def test_every_recipe_fits_its_machine():
    for name, request in opsdl_recipes.RECIPES.items():
        a = architecture_of(hf_config_of(request.run.model.path))
        assert make_plan(request.run, a, request.machine).fits, name


def test_the_plans_in_the_document_are_those_of_the_recipes():
    document = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    written = document.split(opsdl_recipes.MARKER)[1]
    assert written.strip() == opsdl_recipes.plans().strip(), (
        "run `python examples/opsdl_recipes.py --write-plans docs/recipes.md`"
    )


def test_what_does_not_go_together_is_refused_by_name():
    a = architecture_of(SHAPES["qwen3-32b"])
    with pytest.raises(ConfigError, match=r"world size 8 is not a multiple of tp\*pp\*cp"):
        make_plan(replace(RunConfig(), parallel=ParallelConfig(tp=4, cp=4)), a, ONE_NODE)
    with pytest.raises(ConfigError, match="change it to 16"):
        make_plan(one_prompt(10, 1, 5, parallel=ParallelConfig(tp=2)), a, replace(ONE_NODE, nodes=4))
    with pytest.raises(ConfigError, match="not the name of a known model"):
        hf_config_of(Path("no-such-model"))


def test_headroom_and_host_memory_decide_too():
    request = opsdl_recipes.RECIPES["qwen3-32b-32k"]
    a = architecture_of(hf_config_of(request.run.model.path))
    plan = make_plan(request.run, a, request.machine)
    assert plan.fits and plan.host_bytes > 400 * GIB
    assert not make_plan(request.run, a, replace(request.machine, host_gib=400)).fits
    full = replace(request.machine, headroom_gib=request.machine.memory_gib - plan.fullest.peak.total / GIB + 0.1)
    assert not make_plan(request.run, a, full).fits
