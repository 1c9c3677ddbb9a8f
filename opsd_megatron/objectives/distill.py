"""Distillation from the teacher's distribution at every response token (OPSDL Eq. 2 to 4)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from opsd_megatron.config import Distill, NoCorrection, SequenceMask, SequenceTis
from opsd_megatron.losses.correction import clipped, sequence_factors, token_factors
from opsd_megatron.losses.head import HeadResult, distill_head, logprob_head
from opsd_megatron.objectives.metrics import MetricSums, max_of, mean_by_position, mean_of
from opsd_megatron.objectives.mismatch import mismatch_metrics
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
    cp: Axis
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
        own = self._rollout_logprobs(student_hidden, student_weight, responses)
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
            factors=None if own is None else self._factors(own, responses),
        )
        counted = responses.weights > 0
        compared = head.student_logprob if own is None else own
        metric_sums = self._metrics(head, responses, counted)
        metric_sums |= mismatch_metrics(compared, responses.behaviour_logprobs, counted)
        values = {"advantage": head.advantage, "student_logprob": head.student_logprob, "factor": head.importance}
        return LossSums(head.loss_sum, int(counted.sum()), metric_sums, values)

    def _rollout_logprobs(self, hidden: Tensor, weight: Tensor, responses: ResponseTable) -> Tensor | None:
        """Log-probs of the tokens at the rollouts' temperature, which behaviour log-probs are compared with.

        By a pass of its own, where they are needed before the loss, or the loss has another temperature; else None.
        """
        same_temperature = self.config.student_temperature in (None, self.temperature)
        if same_temperature and not isinstance(self.config.used_correction, SequenceTis | SequenceMask):
            return None
        logprobs, _ = logprob_head(
            hidden.detach(),
            weight.detach(),
            responses.token_ids,
            temperature=self.temperature,
            tp=self.tp,
            vocab_size=self.vocab_size,
            chunk_tokens=self.config.chunk_tokens,
        )
        return logprobs

    def _factors(self, logprobs: Tensor, responses: ResponseTable) -> Tensor | None:
        """Of the rows, from those log-probs; None where the head takes them from those of its own temperature.

        sampled weighs by the distribution that its gradient is of, so that it stays unbiased.
        """
        correction = self.config.used_correction
        log_ratios = logprobs - responses.behaviour_logprobs.to(logprobs.dtype)
        weights = responses.weights.to(logprobs.dtype)
        if isinstance(correction, SequenceTis | SequenceMask):
            return sequence_factors(correction, log_ratios, weights, responses.rollout, self.cp)
        return None if self.config.estimator == "sampled" else token_factors(correction, log_ratios, weights)

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
        }
        if self.config.direction != "reverse" or self.config.top_k is not None:
            name = {"reverse": "reverse_kl", "forward": "forward_kl", "jsd": "jsd"}[self.config.direction]
            over = "" if self.config.top_k is None else "top_k_"
            sums |= mean_of(f"loss/{over}{name}_nats", head.divergence, counted)
        if not isinstance(correction := self.config.used_correction, NoCorrection):
            sums |= mean_of("importance/mean", head.importance, counted)
            sums |= mean_of("importance/clipped_share", clipped(correction, head.importance), counted)
        return sums
