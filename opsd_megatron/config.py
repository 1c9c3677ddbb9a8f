"""Every knob of a run: one frozen dataclass per concern, composed into `RunConfig`.

Defaults run on a CPU. A choice between variants is a union of dataclasses. A wrong value is a `ConfigError` that names
the field. Recipes in `examples/` build these objects in Python; command-line flags are derived from them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from opsd_megatron.errors import ConfigError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


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
            _require(getattr(self, name) >= 1, f"parallel.{name}={getattr(self, name)}: must be 1 or more")
        _require(self.vpp is None or self.vpp >= 2, f"parallel.vpp={self.vpp}: 2 or more, or None for no interleaving")
        _require(self.vpp is None or self.pp > 1, f"parallel.vpp={self.vpp} needs parallel.pp > 1, got pp={self.pp}")
        _require(
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
        _require(
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
class RolloutConfig:
    """The inference server and how it samples."""

    url: str = "http://127.0.0.1:8199"
    """Base URL of the server, or of several, separated by commas; they may run on other GPUs or nodes, or be started by
    the example."""
    token_variable: str = "OPSD_SERVER_TOKEN"
    """Environment variable that holds the bearer token; the token itself is never in a config or log."""
    samples_per_prompt: int = 1
    """Responses per prompt and step."""
    max_response_tokens: int = 16
    """Sampling stops here; the response then counts as truncated."""
    temperature: float = 1.0
    """The sampled-token estimator is unbiased only at 1; student and teacher are scored at the same temperature."""
    seeded: bool = False
    """Use the server's seeded exact mode: bitwise repeatable, slow; for tests."""
    request_timeout_s: float = 120.0
    """Constant part of the longest wait for a reply; prompt and response length add to it."""
    retry_s: float = 120.0
    """How long a step waits when no server is left before the run stops with a checkpoint."""
    transport: Literal["auto", "disk", "http", "gloo", "nccl"] = "auto"
    """How new weights reach the server. disk: files in shared_directory; http: bodies of requests; gloo and nccl: a
    broadcast from rank 0. auto takes the fastest that trainer and server share."""
    shared_directory: Path | None = None
    """For disk: a directory of this run's own that trainer and server see under the same path, below the server's
    --weights-root. Older weights in it are deleted."""
    transfer_host: str = "127.0.0.1"
    """For gloo and nccl: an address of rank 0's machine that the servers can reach."""
    pause: Literal["keep", "wait", "abort"] = "wait"
    """What happens to requests in flight while weights are exchanged: they stand still and go on with the new weights,
    are finished first, or end with what they have."""
    checksum_every: int = 0
    """Compare the sha256 of every served tensor with the trainer's after each so many updates; 0 never."""
    colocated: bool = False
    """Trainer and server share their GPUs and take turns: the server sleeps while the trainer trains, the trainer's
    state waits in host memory while the server answers."""
    overlap: Literal["none", "one_step_off"] = "none"
    """one_step_off: the server answers the next step's prompts, with this step's weights, while this step trains."""
    record_to: Path | None = None
    """Directory that keeps every step's rollouts with per-token advantages; `python -m opsd_megatron.launch.view` shows
    them."""
    replay_from: Path | None = None
    """Train on rollouts recorded there instead of asking a server; none is needed then."""
    prefill_tokens_per_s: float = 2000.0
    """A reply may take the time that the prompt takes at this speed, besides request_timeout_s."""
    decode_tokens_per_s: float = 10.0
    """And the time that max_response_tokens take at this speed."""
    max_outstanding_tokens: int | None = None
    """Prompt and response tokens that one server is given at once: what its cache holds. None: 64 requests."""
    on_abort: Literal["resume", "drop_partial"] = "resume"
    """A response that a server aborts goes on behind the tokens that it has, or starts again."""
    max_staleness: int = 0
    """Response tokens whose weights lag more steps than this behind the step's carry no loss."""
    server: Literal["auto", "embedded", "vllm", "sglang"] = "auto"
    """Kind of all servers in `url`; auto asks them."""
    admin_token_variable: str | None = None
    """Environment variable with the token for routes that change a server, where that is another one."""

    def __post_init__(self):
        _require(
            self.transport != "disk" or self.shared_directory is not None,
            "rollout.transport=disk needs rollout.shared_directory, a directory that trainer and server see",
        )
        _require(
            not (self.colocated and self.transport == "nccl"),
            "rollout.transport=nccl cannot join two processes on one GPU; with rollout.colocated=True take auto, disk, "
            "gloo or http",
        )
        _require(
            not (self.colocated and self.overlap != "none"),
            f"rollout.overlap={self.overlap} needs a server that answers while this run trains; rollout.colocated=True "
            "lets them take turns",
        )
        _require(self.checksum_every >= 0, f"rollout.checksum_every={self.checksum_every}: 0 or more")
        _require(self.temperature > 0, f"rollout.temperature={self.temperature}: must be above 0")
        _require(self.samples_per_prompt >= 1, f"rollout.samples_per_prompt={self.samples_per_prompt}: 1 or more")
        _require(self.max_response_tokens >= 1, f"rollout.max_response_tokens={self.max_response_tokens}: 1 or more")
        _require(
            self.replay_from is None or (self.overlap == "none" and self.record_to != self.replay_from),
            f"rollout.replay_from={self.replay_from} needs overlap=none, and record_to None or another directory",
        )
        _require(bool(self.urls), f"rollout.url={self.url!r}: at least one address is needed")
        _require(len(set(self.urls)) == len(self.urls), f"rollout.url={self.url!r} names a server twice")
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            _require(getattr(self, name) > 0, f"rollout.{name}={getattr(self, name)}: must be above 0")
        _require(
            self.max_outstanding_tokens is None or self.max_outstanding_tokens >= 1,
            f"rollout.max_outstanding_tokens={self.max_outstanding_tokens}: 1 or more, or None for no bound",
        )
        _require(self.max_staleness >= 0, f"rollout.max_staleness={self.max_staleness}: 0 or more")

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses in `url`."""
        return tuple(one.strip().rstrip("/") for one in self.url.split(",") if one.strip())


@dataclass(frozen=True)
class NoCorrection:
    """Every token counts as if the trainer itself had sampled it."""


@dataclass(frozen=True)
class TokenTis:
    """Truncated importance sampling: each token's loss times min(r, cap), r its train/rollout probability ratio."""

    cap: float = 2.0
    """Largest factor."""

    def __post_init__(self):
        _require(self.cap > 0, f"objective.correction.cap={self.cap}: must be above 0")


@dataclass(frozen=True)
class TokenMask:
    """Each token's loss times r where low <= r <= high, else 0 (IcePop); it stays in the count."""

    low: float = 0.5
    """Smallest ratio that is learned from."""
    high: float = 5.0
    """Largest."""

    def __post_init__(self):
        _require_range(self.low, self.high)


@dataclass(frozen=True)
class SequenceTis:
    """Every token's loss times min(r, cap), where r is one ratio for its whole response.

    Costs one more pass of the rows through the LM head, without gradient, and two small sums over cp.
    """

    cap: float = 2.0
    """Largest factor."""
    over: Literal["mean", "sum"] = "mean"
    """r = exp of the mean (a geometric mean, for long responses) or of the sum of the tokens' log-ratios."""

    def __post_init__(self):
        _require(self.cap > 0, f"objective.correction.cap={self.cap}: must be above 0")


@dataclass(frozen=True)
class SequenceMask:
    """Every token's loss times the r of its response where low <= r <= high, else 0. Costs what SequenceTis does."""

    low: float = 0.5
    """Smallest ratio that is learned from."""
    high: float = 2.0
    """Largest."""
    over: Literal["mean", "sum"] = "mean"
    """As in SequenceTis."""

    def __post_init__(self):
        _require_range(self.low, self.high)


def _require_range(low: float, high: float) -> None:
    _require(
        0 <= low < high, f"objective.correction.low={low} and high={high}: low at least 0 and below high are needed"
    )


Correction = NoCorrection | TokenTis | TokenMask | SequenceTis | SequenceMask


@dataclass(frozen=True)
class Distill:
    """Per-token distillation from the teacher's distribution (OPSDL Eq. 2 to 4)."""

    estimator: Literal["full", "sampled"] = "full"
    """full: exact divergence over the vocabulary; sampled: the paper's detached log-ratio times log-prob."""
    direction: Literal["reverse", "forward", "jsd"] = "reverse"
    """D(student || teacher) for reverse, student first everywhere. sampled knows reverse only."""
    jsd_beta: float = 0.5
    """Weight of the teacher in the mixture of jsd."""
    top_k: int | None = None
    """Compare the teacher's k likeliest tokens and all others as one outcome, reverse or forward; None: every token."""
    student_temperature: float | None = None
    """Of the student's distribution in the loss; None is the rollouts'."""
    teacher_temperature: float | None = None
    """Of the teacher's; None is the rollouts'."""
    chunk_tokens: int = 256
    """Response rows per pass through the LM head; bounds peak memory at chunk x vocabulary shard."""
    compiled: bool | None = None
    """Have torch.compile make few passes of the many over the logits, after a wait at the first step; None: on GPUs."""
    correction: NoCorrection | TokenTis | TokenMask | SequenceTis | SequenceMask | None = None
    """What makes up for rollouts that other log-probs sampled than the trainer's, because the server computes
    differently or its weights are older. None: TokenTis() for sampled, NoCorrection() for full."""

    @property
    def used_correction(self) -> Correction:
        """With the default filled in."""
        if self.correction is not None:
            return self.correction
        return TokenTis() if self.estimator == "sampled" else NoCorrection()

    def __post_init__(self):
        _require(
            self.estimator == "full" or self.direction == "reverse",
            f"objective.estimator=sampled knows objective.direction=reverse only, got {self.direction}",
        )
        _require(0 < self.jsd_beta < 1, f"objective.jsd_beta={self.jsd_beta}: strictly between 0 and 1")
        _require(
            self.top_k is None or (self.top_k >= 1 and self.estimator == "full" and self.direction != "jsd"),
            f"objective.top_k={self.top_k}: 1 or more, with estimator=full and direction=reverse or forward",
        )
        for name in ("student_temperature", "teacher_temperature"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"objective.{name}={value}: above 0, or None for the rollouts'")
        _require(self.chunk_tokens >= 1, f"objective.chunk_tokens={self.chunk_tokens}: 1 or more")
        _require(
            self.student_temperature is None or not isinstance(self.correction, SequenceTis | SequenceMask),
            f"objective.student_temperature={self.student_temperature}: leave it None with a correction by sequence, "
            "whose ratio compares log-probs at the rollouts' temperature",
        )


@dataclass(frozen=True)
class SelfSft:
    """Cross-entropy on the teacher view's own greedy answers behind the student prompt: the off-policy baseline."""

    chunk_tokens: int = 256
    """As in Distill."""


@dataclass(frozen=True)
class LiveTeacher:
    """The current weights (OPSDL section 3.3)."""


@dataclass(frozen=True)
class FrozenTeacher:
    """The weights that the run started from."""


@dataclass(frozen=True)
class EmaTeacher:
    """An exponential moving average of the student's weights."""

    rate: float = 0.02
    """teacher = (1 - rate) * teacher + rate * student after each step: 0 is frozen, 1 is live."""

    def __post_init__(self):
        _require(0 < self.rate < 1, f"teacher.rate={self.rate}: strictly between 0 (frozen) and 1 (live)")


@dataclass(frozen=True)
class OtherTeacher:
    """Another model with the student's tokenizer, of any size: it is cut over the same ranks and never trained."""

    path: Path = Path("teacher")
    """Its Hugging Face directory."""


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
class MismatchConfig:
    """How far trainer and inference server may be apart before the run stops."""

    probe_every_publications: int = 1
    """Compare both on fixed tokens after every so many weight publications, where the server can score; 0: never."""
    probe_tokens: int = 256
    """Length of the probe, from the first record's prompt; RoPE settings that differ only far out need a long one."""
    probe_limit_nats: float = 0.05
    """Largest mean |difference| of the probe's log-probs."""
    k3_limit_nats: float = 0.1
    """Largest D(server || trainer) of a step's rollouts (mismatch/k3_kl_nats) ..."""
    k3_steps: int = 3
    """... that may be exceeded for so many steps running, less one. Replayed rollouts are not held to it."""

    def __post_init__(self):
        _require(self.probe_every_publications >= 0, "mismatch.probe_every_publications: 0 or more")
        _require(self.probe_tokens >= 2, f"mismatch.probe_tokens={self.probe_tokens}: 2 or more")
        _require(self.k3_steps >= 1, f"mismatch.k3_steps={self.k3_steps}: 1 or more")


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
        _require(self.steps >= 1, f"steps={self.steps}: 1 or more")
        _require(
            self.rollout.replay_from is None or not (self.log.probe_path and self.log.probe_every_steps),
            "log.probe_path asks the inference server, and with rollout.replay_from there is none; unset one of them",
        )
        _require(
            not (isinstance(self.objective, SelfSft) and isinstance(self.teacher, OtherTeacher)),
            "objective SelfSft learns from the model's own answers: take a LiveTeacher, FrozenTeacher or EmaTeacher",
        )
        _require(
            not (isinstance(self.objective, SelfSft) and self.rollout.colocated),
            "rollout.colocated=True needs objective Distill: SelfSft publishes the teacher's weights, which are in the "
            "trainer's memory only for that moment",
        )
