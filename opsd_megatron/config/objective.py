"""What is learned, and from whom."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opsd_megatron.config.check import require


@dataclass(frozen=True)
class NoCorrection:
    """Every token counts as if the trainer itself had sampled it."""


@dataclass(frozen=True)
class TokenTis:
    """Truncated importance sampling: each token's loss times min(r, cap), r its train/rollout probability ratio."""

    cap: float = 2.0
    """Largest factor."""

    def __post_init__(self):
        require(self.cap > 0, f"objective.correction.cap={self.cap}: must be above 0")


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
        require(self.cap > 0, f"objective.correction.cap={self.cap}: must be above 0")


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
    require(
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

    def is_compiled(self, on_gpu: bool) -> bool:
        """`compiled` with the default filled in."""
        return on_gpu if self.compiled is None else self.compiled

    def __post_init__(self):
        require(
            self.estimator == "full" or self.direction == "reverse",
            f"objective.estimator=sampled knows objective.direction=reverse only, got {self.direction}",
        )
        require(0 < self.jsd_beta < 1, f"objective.jsd_beta={self.jsd_beta}: strictly between 0 and 1")
        require(
            self.top_k is None or (self.top_k >= 1 and self.estimator == "full" and self.direction != "jsd"),
            f"objective.top_k={self.top_k}: 1 or more, with estimator=full and direction=reverse or forward",
        )
        for name in ("student_temperature", "teacher_temperature"):
            value = getattr(self, name)
            require(value is None or value > 0, f"objective.{name}={value}: above 0, or None for the rollouts'")
        require(self.chunk_tokens >= 1, f"objective.chunk_tokens={self.chunk_tokens}: 1 or more")
        require(
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
        require(0 < self.rate < 1, f"teacher.rate={self.rate}: strictly between 0 (frozen) and 1 (live)")


@dataclass(frozen=True)
class OtherTeacher:
    """Another model with the student's tokenizer, of any size: it is cut over the same ranks and never trained."""

    path: Path = Path("teacher")
    """Its Hugging Face directory."""
