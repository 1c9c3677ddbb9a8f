"""The recipes build, fit their layouts, shrink as promised, and say what a machine lacks."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from opsd_megatron.config import ParallelConfig
from opsd_megatron.errors import ConfigError
from opsd_megatron.launch.command import require_devices
from opsd_megatron.launch.plan.estimate import make_plan
from opsd_megatron.launch.plan.machine import MACHINES
from opsd_megatron.launch.shrink import shrink, shrink_layout
from opsd_megatron.models.architecture import architecture_of, check_layout

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from opsdl_32b import LAYOUTS, NODES, SHAPES, recipe


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_32b_recipes_fit_80_gb(model, layout):
    config, architecture = recipe(model, layout), architecture_of(SHAPES[model], 4.0, 32_768)
    assert config.data.student_tokens + config.rollout.max_response_tokens <= 131_072
    assert make_plan(config, architecture, replace(MACHINES["h100-80gb"], nodes=NODES[layout])).fits


def test_a_machine_without_gpus_is_told_what_is_missing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match=r"needs 8 CUDA devices .* this machine has none\. Add --rehearse"):
        require_devices(recipe(), SHAPES["qwen3-32b"])


@pytest.mark.parametrize(
    "layout, ranks, kept",
    [
        (ParallelConfig(tp=2, pp=2, cp=2, vpp=2, sequence_parallel=True), 8, (2, 2, 2, 2)),
        (ParallelConfig(tp=4, pp=2, cp=4, sequence_parallel=True), 8, (4, 2, 1, None)),
        (ParallelConfig(tp=2, pp=4, vpp=2), 4, (2, 2, 1, 2)),
    ],
)
def test_a_layout_shrinks_cp_before_pp_and_never_tp(layout, ranks, kept):
    small = shrink_layout(layout, ranks)
    assert (small.tp, small.pp, small.cp, small.vpp) == kept


def test_a_shrunk_recipe_keeps_method_and_axes_and_says_what_it_changed(tmp_path):
    config = recipe()
    shrunk = shrink(config, SHAPES["qwen3-32b"], 8, tmp_path, steps=4)
    assert shrunk.config.parallel == config.parallel and not shrunk.lost_axes
    assert (shrunk.config.objective, shrunk.config.teacher) == (config.objective, config.teacher)
    assert "num_hidden_layers: 64 -> 2" in shrunk.changes
    check_layout(architecture_of({**shrunk.hf_config, "vocab_size": 384}), shrunk.config.parallel)
