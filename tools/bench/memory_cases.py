"""Layouts whose memory is measured, and rollouts that fill their budgets."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from opsd_megatron.config import (
    BatchConfig,
    DataConfig,
    EmaTeacher,
    FrozenTeacher,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    SelfSft,
)
from opsd_megatron.types import PromptPair, Rollout, Turn, VersionSpan

QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 8,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 16384,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
QWEN2 = {key: value for key, value in QWEN3.items() if key != "head_dim"} | {"model_type": "qwen2"}
PROMPT, EXTRACT, RESPONSE, SAMPLES = 1920, 320, 65, 2
TREE = PROMPT + SAMPLES * (RESPONSE - 1)


@dataclass(frozen=True)
class Case:
    """A layout and what else decides on memory."""

    parallel: ParallelConfig
    ranks: int
    model: dict[str, Any] = field(default_factory=lambda: QWEN3)
    config: RunConfig = field(default_factory=RunConfig)
    held_out: bool = False
    """Chosen before the model of memory was written, and not looked at until it was done."""

    @property
    def recipe(self) -> RunConfig:
        return replace(self.config, parallel=self.parallel)

    @property
    def dp(self) -> int:
        return self.parallel.data_parallel_size(self.ranks)


def _run(
    prompts: int, recompute: str = "none", dtype: str = "float32", distributed: bool = False, **changes
) -> RunConfig:
    """`prompts` of one step over all replicas, one to a microbatch."""
    return RunConfig(
        model=ModelConfig(dtype=dtype, recompute=recompute),  # type: ignore[arg-type]
        data=DataConfig(student_tokens=PROMPT, teacher_tokens=EXTRACT),
        rollout=RolloutConfig(samples_per_prompt=SAMPLES, max_response_tokens=RESPONSE),
        optimizer=OptimizerConfig(distributed=distributed),
        batch=BatchConfig(
            prompts_per_step=prompts,
            student_microbatch_tokens=TREE,
            teacher_microbatch_tokens=EXTRACT + SAMPLES * (RESPONSE - 1),
        ),
        **changes,
    )


CASES = {
    "one rank": Case(ParallelConfig(), 1, config=_run(1)),
    "recompute mlp, frozen": Case(ParallelConfig(), 1, config=_run(2, "mlp", teacher=FrozenTeacher())),
    "tp2 sp": Case(ParallelConfig(tp=2, sequence_parallel=True), 2, config=_run(1)),
    "pp2": Case(ParallelConfig(pp=2), 2, config=_run(3)),
    "pp2 vpp2": Case(ParallelConfig(pp=2, vpp=2), 2, config=_run(4, "mlp")),
    "cp2 full": Case(ParallelConfig(cp=2), 2, config=_run(2, "full", distributed=True)),
    "dp2 tied": Case(
        ParallelConfig(), 2, QWEN3 | {"tie_word_embeddings": True}, config=_run(2, "mlp+norms", distributed=True)
    ),
    "bfloat16": Case(ParallelConfig(), 1, config=_run(1, dtype="bfloat16", distributed=True)),
    "tp2 tied mlp ema": Case(
        ParallelConfig(tp=2),
        2,
        QWEN3 | {"tie_word_embeddings": True},
        _run(2, "mlp", teacher=EmaTeacher()),
        held_out=True,
    ),
    "pp2 cp2 qwen2": Case(ParallelConfig(pp=2, cp=2), 4, QWEN2, _run(4), held_out=True),
    "tp2 pp2 sp full frozen": Case(
        ParallelConfig(tp=2, pp=2, sequence_parallel=True),
        4,
        config=_run(4, "full", distributed=True, teacher=FrozenTeacher()),
        held_out=True,
    ),
    "dp2 cp2 sft norms": Case(
        ParallelConfig(cp=2), 4, config=_run(4, "norms", distributed=True, objective=SelfSft()), held_out=True
    ),
    "pp2 vpp2 tp2 sp bfloat16": Case(
        ParallelConfig(tp=2, pp=2, vpp=2, sequence_parallel=True),
        4,
        config=_run(4, dtype="bfloat16"),
        held_out=True,
    ),
}


def make_rollouts(config: RunConfig, prompts: int, vocab: int, seed: int) -> list[Rollout]:
    """Responses of the longest kind under prompts of the longest kind, of random tokens."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab, (count,), generator=draw).tolist())

    count = config.rollout.max_response_tokens
    about = ((-1.0,) * count, "processed", (True,) * count, "stop", (VersionSpan("step-0", 0, count),))
    turns = (Turn("model", 0, count),)
    rollouts = []
    for number in range(prompts):
        pair = PromptPair(str(number), tokens(config.data.student_tokens), tokens(config.data.teacher_tokens))
        for sample in range(config.rollout.samples_per_prompt):
            rollouts.append(Rollout(pair, sample, tokens(count), *about, turns, "none"))  # type: ignore[arg-type]
    return rollouts
