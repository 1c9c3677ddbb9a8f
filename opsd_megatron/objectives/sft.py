"""Cross-entropy on given responses: supervised fine-tuning, and self-SFT on the teacher view's own answers."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from opsd_megatron.config import SelfSft
from opsd_megatron.losses.head import cross_entropy_head
from opsd_megatron.objectives.metrics import mean_by_position, mean_of
from opsd_megatron.objectives.objective import LossSums
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.types import ResponseTable


@dataclass(frozen=True)
class SftObjective:
    """Sum over response tokens of weight times negative log-likelihood."""

    config: SelfSft
    temperature: float
    """Of the student's distribution; 1 for plain fine-tuning."""
    tp: Axis
    vocab_size: int
    """Real tokens, without padding."""
    needs_teacher: ClassVar[bool] = False

    def loss(
        self,
        student_hidden: Float[Tensor, "rows hidden"],
        student_weight: Float[Tensor, "vocab_shard hidden"],
        teacher_hidden: Float[Tensor, "rows teacher_hidden"] | None,
        teacher_weight: Float[Tensor, "teacher_vocab_shard teacher_hidden"] | None,
        responses: ResponseTable,
    ) -> LossSums:
        """Of the rows of `responses`; the teacher's are not looked at."""
        head = cross_entropy_head(
            student_hidden,
            student_weight,
            responses.token_ids,
            responses.weights,
            temperature=self.temperature,
            tp=self.tp,
            vocab_size=self.vocab_size,
            chunk_tokens=self.config.chunk_tokens,
        )
        counted = responses.weights > 0
        metric_sums = {
            "sum/loss/per_token": head.loss_sum.detach().double(),
            "count/loss/per_token": counted.sum().double(),
            **mean_of("loss/nll_nats", -head.logprob, counted),
            **mean_by_position("loss/nll", "nats", -head.logprob, responses.position, counted),
            **mean_of("student/logprob_nats", head.logprob, counted),
            **mean_of("student/entropy_nats", head.entropy, counted),
        }
        return LossSums(head.loss_sum, int(counted.sum()), metric_sums, {"student_logprob": head.logprob})
