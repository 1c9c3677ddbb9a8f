"""Every knob of a run: one frozen dataclass per concern, composed into `RunConfig`.

Defaults run on a CPU. A choice between variants is a union of dataclasses. A wrong value is a `ConfigError` that names
the field. Recipes in `examples/` build these objects in Python; command-line flags are derived from them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from opsd_megatron.config.check import require
from opsd_megatron.config.objective import (
    Correction,
    Distill,
    EmaTeacher,
    FrozenTeacher,
    LiveTeacher,
    NoCorrection,
    OtherTeacher,
    SelfSft,
    SequenceMask,
    SequenceTis,
    TokenMask,
    TokenTis,
)
from opsd_megatron.config.rollout import MismatchConfig, RolloutConfig

__all__ = [
    "BatchConfig",
    "ChatTemplate",
    "CheckpointConfig",
    "Correction",
    "DataConfig",
    "Distill",
    "EmaTeacher",
    "FrozenTeacher",
    "LiveTeacher",
    "LogConfig",
    "MismatchConfig",
    "ModelConfig",
    "NoCorrection",
    "OptimizerConfig",
    "OtherTeacher",
    "ParallelConfig",
    "PlainTemplate",
    "RolloutConfig",
    "RunConfig",
    "SelfSft",
    "SequenceMask",
    "SequenceTis",
    "TokenMask",
    "TokenTis",
]


@dataclass(frozen=True)
class ParallelConfig:
    """How one model is cut. World size = tp x pp x cp x dp; dp is what remains."""

    tp: int = 1
    """Tensor-parallel size: every matrix cut over this many ranks; must divide attention heads and KV heads."""
    pp: int = 1
    """Pipeline-parallel size: layers cut into this many stages."""
    vpp: int | None = None
    """Model chunks per pipeline stage (interleaved schedule); None is the plain 1F1B schedule."""
    cp: int = 1
    """Context-parallel size: the tokens of one microbatch cut over this many ranks, attention runs as a ring."""
    sequence_parallel: bool = False
    """Keep activations between matrices cut over tp along the tokens; needs tp > 1."""

    def __post_init__(self):
        for name in ("tp", "pp", "cp"):
            require(getattr(self, name) >= 1, f"parallel.{name}={getattr(self, name)}: must be 1 or more")
        require(self.vpp is None or self.vpp >= 2, f"parallel.vpp={self.vpp}: 2 or more, or None for no interleaving")
        require(self.vpp is None or self.pp > 1, f"parallel.vpp={self.vpp} needs parallel.pp > 1, got pp={self.pp}")
        require(
            not self.sequence_parallel or self.tp > 1,
            "parallel.sequence_parallel=True needs parallel.tp > 1; set it to False or raise tp",
        )

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one replica."""
        return self.tp * self.pp * self.cp

    def data_parallel_size(self, world_size: int) -> int:
        """dp for `world_size` ranks; ConfigError where the layout does not divide it."""
        dp, rest = divmod(world_size, self.model_ranks)
        require(
            dp >= 1 and rest == 0,
            f"world size {world_size} is not a multiple of tp*pp*cp = {self.tp}*{self.pp}*{self.cp} = "
            f"{self.model_ranks}; start torchrun with a multiple of {self.model_ranks} processes or change parallel.*",
        )
        return dp


@dataclass(frozen=True)
class ModelConfig:
    """The model to train, from a Hugging Face directory."""

    path: Path = Path("examples/tiny")
    """Directory with config.json, safetensors shards and the tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of parameters and activations; losses, reductions and optimizer states stay in float32."""
    recompute: Literal["none", "norms", "mlp", "mlp+norms", "full"] = "none"
    """Activations computed again in the backward pass: none, the norms before attention and MLP, the MLPs, both, or
    whole layers. Never core attention alone."""
    attention: Literal["ring", "te"] = "ring"
    """ring: flash attention over token trees, a ring under cp. te: Transformer Engine's, with its own ring, for
    microbatches of one plain sequence, ring for all others."""
    yarn_factor: float | None = None
    """Override: run with YaRN at this factor over the model's original context (Qwen2.5 and Qwen3 beyond 32k). The
    inference server must do the same."""
    yarn_original_positions: int | None = None
    """Context that YaRN stretches from; None takes max_position_embeddings (Qwen3 says 40960, but means 32768)."""


@dataclass(frozen=True)
class PlainTemplate:
    """Prompt text for base models without a chat template; every segment is tokenized by itself."""

    document: str = "{text}\n"
    """Text of each document; {title} and {text} are filled in."""
    question: str = "Q: {question}\nA:"
    """Text after the documents."""


@dataclass(frozen=True)
class ChatTemplate:
    """The tokenizer's own chat template, with the same flags in both views."""

    document: str = "{text}\n\n"
    """Text of each document inside the user's turn."""
    question: str = "{question}"
    """Text after the documents inside the user's turn."""
    enable_thinking: bool = False
    """Passed to templates that know it (Qwen3)."""


@dataclass(frozen=True)
class DataConfig:
    """Records and how they become prompts."""

    path: Path = Path("runs/data/train.jsonl")
    """JSONL or Parquet records, schema in docs/data.md."""
    template: PlainTemplate | ChatTemplate = field(default_factory=PlainTemplate)
    """How documents and question become a prompt."""
    student_tokens: int = 512
    """Budget of the student prompt; longer contexts are trimmed in the context only, and counted."""
    teacher_tokens: int = 256
    """Budget of the teacher prompt; evidence is never cut, so a longer one is an error."""
    shuffle: bool = True
    """Order by a seeded permutation of each epoch instead of file order."""
    contexts_together: int = 8
    """When shuffled, up to so many records of one context stay neighbours and share a token tree; 1: none."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with decoupled weight decay, on Megatron's optimizer."""

    lr: float = 1e-6
    """Peak learning rate."""
    warmup_steps: int = 0
    """Linear from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up, down to min_lr at the last step."""
    min_lr: float = 0.0
    """End of a falling schedule."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's denominator offset."""
    weight_decay: float = 0.0
    """Decoupled; norms and biases are left out."""
    clip_grad_norm: float = 1.0
    """Global L2 norm above which gradients are scaled down; 0 is off."""
    distributed: bool = True
    """Cut optimizer states over dp x cp."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over dp x cp bucket by bucket while the backward pass goes on."""
    cpu_offload: bool = False
    """Keep optimizer states in host memory (CUDA only): a 32B model with Adam needs it on 8 x 80 GB."""


@dataclass(frozen=True)
class BatchConfig:
    """How much one step and one microbatch hold."""

    prompts_per_step: int = 16
    """Prompts of one optimizer step over all dp replicas; must be a multiple of dp."""
    student_microbatch_tokens: int = 8192
    """Token budget of a student microbatch (shared contexts counted once)."""
    student_microbatch_cost: float | None = None
    """Cost budget of a student microbatch, in tokens: attention counts too, by its share of the model's FLOPs."""
    teacher_microbatch_tokens: int = 4096
    """Token budget of a teacher microbatch on each cp rank."""
    min_shared_tokens: int = 32
    """Shortest common prefix that is worth a tree node of its own."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Training state on disk."""

    directory: Path = Path("runs/opsdl")
    """Everything of the run: checkpoints, metrics, config, environment."""
    every_steps: int = 20
    """0 saves only at the end and on a signal."""
    keep: int = 2
    """Newest complete checkpoints that stay."""
    export_hf: bool = True
    """Write the final weights in Hugging Face layout to <directory>/hf."""


@dataclass(frozen=True)
class LogConfig:
    """What is shown and kept."""

    wandb_project: str | None = None
    """Log to Weights & Biases too (WANDB_MODE=offline works)."""
    progress: bool = True
    """Rich progress on a terminal; plain lines elsewhere."""
    probe_path: Path | None = None
    """Records with answers that are asked now and then: exact match by context length, never seen by the loss."""
    probe_every_steps: int = 0
    """0 asks never."""
    probe_items: int = 32
    """Records per context length in a probe."""


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """What is trained."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How it is cut."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it reads."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Who answers."""
    objective: Distill | SelfSft = field(default_factory=Distill)
    """What is learned."""
    teacher: LiveTeacher | FrozenTeacher | EmaTeacher | OtherTeacher = field(default_factory=LiveTeacher)
    """Whose distribution is the target."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How it is learned."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """How much at a time."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is shown."""
    steps: int = 100
    """Optimizer steps of the whole run; a resumed run goes on to this number."""
    seed: int = 1234
    """Data order, sampling and anything else random."""
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    """When trainer and server disagree too much."""

    def __post_init__(self):
        require(self.steps >= 1, f"steps={self.steps}: 1 or more")
        require(
            self.rollout.replay_from is None or not (self.log.probe_path and self.log.probe_every_steps),
            "log.probe_path asks the inference server, and with rollout.replay_from there is none; unset one of them",
        )
        require(
            not (isinstance(self.objective, SelfSft) and isinstance(self.teacher, OtherTeacher)),
            "objective SelfSft learns from the model's own answers: take a LiveTeacher, FrozenTeacher or EmaTeacher",
        )
        require(
            not (isinstance(self.objective, SelfSft) and self.rollout.colocated),
            "rollout.colocated=True needs objective Distill: SelfSft publishes the teacher's weights, which are in the "
            "trainer's memory only for that moment",
        )
