"""A recipe made small: the same methods, axes and code paths, at widths and lengths that a CPU can walk through."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opsd_megatron.config import ParallelConfig, RunConfig
from opsd_megatron.errors import ConfigError

STUDENT_TOKENS, TEACHER_TOKENS, RESPONSE_TOKENS = 512, 192, 12
HEAD_DIM = 16


@dataclass(frozen=True)
class Shrunk:
    """A recipe that runs here, and what was changed to make it so."""

    config: RunConfig
    hf_config: Mapping[str, Any]
    """config.json of the tiny model of the same family."""
    changes: tuple[str, ...]
    lost_axes: tuple[str, ...]
    """Axes of the recipe that this number of ranks has no room for."""


def shrink(config: RunConfig, hf_config: Mapping[str, Any], world_size: int, directory: Path, steps: int) -> Shrunk:
    """`config` for `world_size` CPU ranks: widths and lengths first, then, where ranks run out, dp, cp and pp."""
    parallel = shrink_layout(config.parallel, world_size)
    dp = parallel.data_parallel_size(world_size)
    small = shrink_model(hf_config, parallel)
    prompts = max(2 * dp, 4)
    shrunk = replace(
        config,
        model=replace(config.model, path=directory / "model", yarn_original_positions=None),
        parallel=parallel,
        data=replace(
            config.data,
            path=directory / "records.jsonl",
            student_tokens=STUDENT_TOKENS - RESPONSE_TOKENS,
            teacher_tokens=TEACHER_TOKENS,
        ),
        rollout=replace(config.rollout, max_response_tokens=RESPONSE_TOKENS, request_timeout_s=120.0, retry_s=60.0),
        optimizer=replace(config.optimizer, cpu_offload=False),
        batch=replace(
            config.batch,
            prompts_per_step=prompts,
            student_microbatch_tokens=STUDENT_TOKENS,
            teacher_microbatch_tokens=TEACHER_TOKENS + RESPONSE_TOKENS,
            min_shared_tokens=16,
        ),
        checkpoint=replace(config.checkpoint, directory=directory / "run", every_steps=0, keep=1),
        log=replace(config.log, wandb_project=None, probe_path=None, probe_every_steps=0),
        steps=steps,
    )
    return Shrunk(shrunk, small, _changes(config, shrunk, hf_config, small), _lost_axes(config.parallel, parallel))


def shrink_layout(parallel: ParallelConfig, world_size: int) -> ParallelConfig:
    """The layout itself where it divides `world_size`; otherwise cp is halved first, then pp."""
    while parallel.model_ranks > world_size or world_size % parallel.model_ranks:
        if parallel.cp > 1:
            parallel = replace(parallel, cp=parallel.cp // 2)
        elif parallel.pp > 1:
            fewer = parallel.pp // 2
            parallel = replace(parallel, pp=fewer, vpp=parallel.vpp if fewer > 1 else None)
        else:
            raise ConfigError(
                f"tp={parallel.tp} alone does not divide {world_size} ranks; start torchrun with a multiple of it"
            )
    return parallel


def shrink_model(hf_config: Mapping[str, Any], parallel: ParallelConfig) -> dict[str, Any]:
    """A network of the same family with as few layers and heads as the layout can cut."""
    heads = max(2 * parallel.tp, 4)
    widths = {
        "num_hidden_layers": 2 * parallel.pp * (parallel.vpp or 1),
        "num_attention_heads": heads,
        "num_key_value_heads": max(parallel.tp, 2),
        "head_dim": HEAD_DIM,
        "hidden_size": heads * HEAD_DIM,
        "intermediate_size": 2 * heads * HEAD_DIM,
        "max_position_embeddings": STUDENT_TOKENS // 4,
    }
    return dict(hf_config) | widths


def _lost_axes(wanted: ParallelConfig, got: ParallelConfig) -> tuple[str, ...]:
    return tuple(name for name in ("tp", "pp", "cp") if getattr(wanted, name) > 1 and getattr(got, name) == 1)


def _changes(
    config: RunConfig, shrunk: RunConfig, hf_config: Mapping[str, Any], small: Mapping[str, Any]
) -> tuple[str, ...]:
    values = [(name, hf_config.get(name), small[name]) for name in small if small[name] != hf_config.get(name)]
    for concern in ("parallel", "data", "rollout", "optimizer", "batch"):
        before, after = getattr(config, concern), getattr(shrunk, concern)
        values += [
            (f"{concern}.{name}", getattr(before, name), getattr(after, name))
            for name in vars(before)
            if getattr(before, name) != getattr(after, name) and name != "path"
        ]
    values.append(("steps", config.steps, shrunk.steps))
    return tuple(f"{name}: {before} -> {after}" for name, before, after in values if before != after)
