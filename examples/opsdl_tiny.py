"""OPSDL on two CPU cores: the recipe that `make demo` runs, and its neighbours.

    torchrun --nproc-per-node 2 examples/opsdl_tiny.py --recipe ema --rollout.url http://127.0.0.1:8199

It needs a running inference server and its token in OPSD_SERVER_TOKEN; `examples/opsdl_demo.py` starts both.
"""

from dataclasses import replace
from pathlib import Path

from tiny_task import DOCUMENT_TEMPLATE, QUESTION_TEMPLATE

from opsd_megatron.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    Distill,
    EmaTeacher,
    FrozenTeacher,
    LiveTeacher,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PlainTemplate,
    RolloutConfig,
    RunConfig,
    SelfSft,
)
from opsd_megatron.launch.command import run_recipe

TEMPLATE = PlainTemplate(document=DOCUMENT_TEMPLATE, question=QUESTION_TEMPLATE)
BASE = RunConfig(
    model=ModelConfig(path=Path(__file__).parent / "tiny"),
    parallel=ParallelConfig(cp=2),
    data=DataConfig(path=Path("runs/demo/train.jsonl"), template=TEMPLATE, student_tokens=1024, shuffle=False),
    rollout=RolloutConfig(max_response_tokens=6),
    optimizer=OptimizerConfig(lr=1e-3, warmup_steps=10, schedule="linear", betas=(0.9, 0.95)),
    batch=BatchConfig(prompts_per_step=64, student_microbatch_tokens=8192, teacher_microbatch_tokens=4096),
    checkpoint=CheckpointConfig(directory=Path("runs/demo/run"), every_steps=50),
    log=LogConfig(probe_every_steps=50, probe_items=16),
    steps=200,
)

RECIPES = {
    "frozen": replace(BASE, teacher=FrozenTeacher()),
    "ema": replace(BASE, teacher=EmaTeacher(rate=0.01)),
    "live": replace(BASE, teacher=LiveTeacher(), optimizer=replace(BASE.optimizer, lr=3e-4)),
    "sampled": replace(
        BASE, teacher=LiveTeacher(), objective=Distill(estimator="sampled"), optimizer=replace(BASE.optimizer, lr=3e-4)
    ),
    "self-sft": replace(BASE, objective=SelfSft(), teacher=FrozenTeacher()),
}

if __name__ == "__main__":
    run_recipe(RECIPES, default="frozen")
