"""Distillation from the teacher's distribution at every response token (OPSDL Eq. 2 to 4)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from opsd_megatron.config import Distill
from opsd_megatron.losses.head import HeadResult, distill_head
from opsd_megatron.objectives.metrics import MetricSums, effective_share_of, max_of, mean_by_position, mean_of
from opsd_megatron.objectives.objective import LossSums
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.types import ResponseTable


@dataclass(frozen=True)
class DistillObjective:
    """Sum over response tokens of weight times divergence, or of the paper's sampled loss: see `distill_head`."""

    config: Distill
    temperature: float
    """Of the rollouts; student and teacher are scored at it unless the config gives them their own."""
    tp: Axis
    vocab_size: int
    """Real tokens, without padding."""
    needs_teacher: ClassVar[bool] = True

    def loss(
        self,
        student_hidden: Float[Tensor, "rows hidden"],
        student_weight: Float[Tensor, "vocab_shard hidden"],
        teacher_hidden: Float[Tensor, "rows teacher_hidden"] | None,
        teacher_weight: Float[Tensor, "teacher_vocab_shard teacher_hidden"] | None,
        responses: ResponseTable,
    ) -> LossSums:
        """Of the rows of `responses`, which row by row are the tokens that both hidden states predict."""
        if teacher_hidden is None or teacher_weight is None:
            raise ValueError("distillation needs the teacher's hidden states and LM head, got None")
        head = distill_head(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            responses.token_ids,
            responses.weights,
            responses.behaviour_logprobs,
            objective=self.config,
            temperature=self.temperature,
            tp=self.tp,
            vocab_size=self.vocab_size,
        )
        counted = responses.weights > 0
        return LossSums(head.loss_sum, int(counted.sum()), self._metrics(head, responses, counted))

    def _metrics(self, head: HeadResult, responses: ResponseTable, counted: Tensor) -> MetricSums:
        """Means over counted tokens, unweighted, but for the loss itself."""
        sums = {
            "sum/loss/per_token": head.loss_sum.detach().double(),
            "count/loss/per_token": counted.sum().double(),
            **mean_of("loss/reverse_kl_nats", head.reverse_kl, counted),
            **mean_by_position("loss/reverse_kl", "nats", head.reverse_kl, responses.position, counted),
            **mean_of("advantage/mean_nats", head.advantage, counted),
            **max_of("advantage/max_nats", head.advantage, counted),
            **mean_of("advantage/abs_mean_nats", head.advantage.abs(), counted),
            **max_of("advantage/abs_max_nats", head.advantage.abs(), counted),
            **mean_of("advantage/negative_share", head.advantage < 0, counted),
            **mean_of("teacher/logprob_nats", head.teacher_logprob, counted),
            **mean_of("student/logprob_nats", head.student_logprob, counted),
            **mean_of("student/entropy_nats", head.entropy, counted),
            **mismatch_metrics(head.student_logprob, responses.behaviour_logprobs, counted),
        }
        if self.config.direction != "reverse" or self.config.top_k is not None:
            name = {"reverse": "reverse_kl", "forward": "forward_kl", "jsd": "jsd"}[self.config.direction]
            over = "" if self.config.top_k is None else "top_k_"
            sums |= mean_of(f"loss/{over}{name}_nats", head.divergence, counted)
        if self.config.estimator == "sampled" and self.config.importance_cap is not None:
            sums |= mean_of("importance/mean", head.importance, counted)
            sums |= mean_of("importance/clipped_share", head.importance >= self.config.importance_cap, counted)
        return sums


def mismatch_metrics(train_logprobs: Tensor, behaviour_logprobs: Tensor, counted: Tensor) -> MetricSums:
    """How far the trainer's log-probs are from those the inference server sampled with, at the same weights.

    `k3_kl_nats` estimates D(server || trainer) by r - 1 - log r with r = trainer / server probability of each token.
    """
    difference = train_logprobs.double() - behaviour_logprobs.double()
    ratio = difference.exp()
    return {
        **mean_of("mismatch/logprob_mean_nats", difference, counted),
        **mean_of("mismatch/logprob_abs_mean_nats", difference.abs(), counted),
        **max_of("mismatch/logprob_abs_max_nats", difference.abs(), counted),
        **mean_of("mismatch/k3_kl_nats", difference.expm1() - difference, counted),
        **effective_share_of("mismatch/effective_sample_share", ratio, counted),
    }
