"""Recipes of OPSDL for Qwen2.5 and Qwen3 from 7B to 32B at 32k to 256k tokens, and the plan of each.

    torchrun --nnodes 4 --nproc-per-node 8 examples/opsdl_recipes.py --recipe qwen3-32b-128k --model.path ...
    python -m opsd_megatron.launch.plan --recipe examples/opsdl_recipes.py:qwen3-32b-128k
    python examples/opsdl_recipes.py --write-plans docs/recipes.md

The last one rewrites the plans in docs/recipes.md; a test holds them up to date. Each recipe also rehearses
(`--rehearse`), as `opsdl_32b.py` explains.
"""

import io
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from opsd_megatron.config import (
    BatchConfig,
    ChatTemplate,
    CheckpointConfig,
    DataConfig,
    Distill,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
)
from opsd_megatron.launch.command import choose, exit_with, parse_fields, start, take_flag
from opsd_megatron.launch.plan.machine import MACHINES
from opsd_megatron.launch.plan.request import Request, answer
from opsd_megatron.launch.plan.shapes import hf_config_of

RESPONSE_TOKENS = 1_024
NATIVE_TOKENS = 32_768
MARKER = "<!-- plans: written by examples/opsdl_recipes.py -->\n"


def recipe(model: str, context_tokens: int, parallel: ParallelConfig, nodes: int, offload: bool = False) -> Request:
    """The paper's setting at this context: eight responses to each, live teacher on a quarter of it, 32k at most.

    All these models are native at 32k; beyond, YaRN stretches positions for trainer and server alike.
    """
    factor = context_tokens / NATIVE_TOKENS
    extract = min(context_tokens // 4, 32_768)
    samples = 8
    responses = samples * (RESPONSE_TOKENS - 1)
    run = RunConfig(
        model=ModelConfig(
            path=Path(model),
            dtype="bfloat16",
            recompute="mlp+norms",
            yarn_factor=factor if factor > 1 else None,
            yarn_original_positions=NATIVE_TOKENS if factor > 1 else None,
        ),
        parallel=parallel,
        data=DataConfig(
            path=Path("triplets.jsonl"),
            template=ChatTemplate(),
            student_tokens=context_tokens - RESPONSE_TOKENS,
            teacher_tokens=extract,
        ),
        rollout=RolloutConfig(
            url="http://127.0.0.1:8000",
            samples_per_prompt=samples,
            max_response_tokens=RESPONSE_TOKENS,
            request_timeout_s=1_800.0,
            retry_s=1_800.0,
        ),
        objective=Distill(),
        optimizer=OptimizerConfig(lr=1e-6, warmup_steps=5, weight_decay=0.01, cpu_offload=offload),
        batch=BatchConfig(
            prompts_per_step=16,
            student_microbatch_tokens=context_tokens + responses,
            teacher_microbatch_tokens=extract + responses,
            min_shared_tokens=256,
        ),
        checkpoint=CheckpointConfig(
            directory=Path(f"runs/opsdl-{model.lower()}-{context_tokens // 1024}k"), every_steps=10
        ),
    )
    return Request(run, replace(MACHINES["h100-80gb"], nodes=nodes))


def layout(tp: int, pp: int = 1, cp: int = 1, vpp: int | None = None) -> ParallelConfig:
    return ParallelConfig(tp=tp, pp=pp, cp=cp, vpp=vpp, sequence_parallel=tp > 1)


K = 1_024
RECIPES = {
    "qwen2.5-7b-128k": recipe("Qwen2.5-7B-Instruct", 128 * K, layout(tp=4, cp=2), nodes=1),
    "qwen3-8b-128k": recipe("Qwen3-8B", 128 * K, layout(tp=4, cp=2), nodes=1),
    "qwen2.5-14b-128k": recipe("Qwen2.5-14B-Instruct", 128 * K, layout(tp=8, cp=2), nodes=2),
    "qwen3-14b-128k": recipe("Qwen3-14B", 128 * K, layout(tp=8, cp=2), nodes=2),
    "qwen2.5-32b-32k": recipe("Qwen2.5-32B-Instruct", 32 * K, layout(tp=8), nodes=1, offload=True),
    "qwen3-32b-32k": recipe("Qwen3-32B", 32 * K, layout(tp=8), nodes=1, offload=True),
    "qwen2.5-32b-128k": recipe("Qwen2.5-32B-Instruct", 128 * K, layout(tp=8, cp=4), nodes=4),
    "qwen3-32b-128k": recipe("Qwen3-32B", 128 * K, layout(tp=8, cp=4), nodes=4),
    "qwen2.5-32b-256k": recipe("Qwen2.5-32B-Instruct", 256 * K, layout(tp=8, cp=8), nodes=8),
    "qwen3-32b-256k": recipe("Qwen3-32B", 256 * K, layout(tp=8, cp=8), nodes=8),
}


def plans() -> str:
    """Every recipe's plan, as docs/recipes.md shows it."""
    sections = []
    for name, request in RECIPES.items():
        console = Console(file=io.StringIO(), width=160, color_system=None)
        answer(request, name, console)
        text = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
        sections.append(f"### {name}\n\n```\n{text}\n```\n")
    return "\n".join(sections)


def main() -> None:
    if sys.argv[1:2] == ["--write-plans"]:
        document = Path(sys.argv[2])
        document.write_text(document.read_text().split(MARKER)[0] + MARKER + "\n" + plans())
        return
    name = choose("--recipe", list(RECIPES), "qwen3-32b-128k")
    is_rehearsal = take_flag("--rehearse")
    chosen = RECIPES[name].run
    notes = [
        f"--recipe {{{', '.join(RECIPES)}}} picks the starting point; docs/recipes.md has the plan of each.",
        "--rehearse walks through recipe and layout on CPU ranks with a tiny random model.",
        "Start the inference server first, elsewhere, as examples/opsdl_32b.py shows.",
    ]
    config = parse_fields(chosen, notes)
    exit_with(lambda: start(config, hf_config_of(chosen.model.path), is_rehearsal))


if __name__ == "__main__":
    main()
