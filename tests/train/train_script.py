"""What the tests of whole runs give to torchrun: an example like those of `examples/`, with a recipe of its own."""

from opsd_megatron.config import (
    BatchConfig,
    ChatTemplate,
    CheckpointConfig,
    DataConfig,
    EmaTeacher,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
)
from opsd_megatron.launch.command import run_recipe

RECIPE = RunConfig(
    data=DataConfig(template=ChatTemplate(), student_tokens=240, teacher_tokens=200),
    rollout=RolloutConfig(max_response_tokens=5, seeded=True, retry_s=60.0),
    teacher=EmaTeacher(rate=0.1),
    optimizer=OptimizerConfig(lr=1e-3),
    batch=BatchConfig(prompts_per_step=4, student_microbatch_tokens=600, min_shared_tokens=16),
    checkpoint=CheckpointConfig(every_steps=2, export_hf=False),
    steps=6,
)

if __name__ == "__main__":
    run_recipe({"tiny": RECIPE}, default="tiny")
