"""How far the trainer's log-probs are from those that the inference server sampled with."""

from torch import Tensor

from opsd_megatron.objectives.metrics import MetricSums, effective_share_of, geometric_mean_of, max_of, mean_of

CLIPPED_ABOVE = 2.0
"""Probability ratio from which a token counts in `mismatch/clipped_share`, whether or not a correction clips there."""


def mismatch_metrics(train_logprobs: Tensor, behaviour_logprobs: Tensor, counted: Tensor) -> MetricSums:
    """Of one token each, at the temperature of the rollouts, where `counted` is true; r = trainer / server probability.

    With equal weights what they show is numerics; with a stale server also what the steps between have changed.
        k3_kl_nats              mean r - 1 - log r: estimates D(server || trainer)
        chi_square              mean r^2 - 1: variance of the weights that would correct it
        effective_sample_share  (sum r)^2 / (n sum r^2): what is left of the samples after that
        clipped_share           tokens with r of at least 2
        perplexity_ratio        trainer's perplexity of the responses over the server's
    """
    difference = train_logprobs.double() - behaviour_logprobs.double()
    ratio = difference.exp()
    return {
        **mean_of("mismatch/logprob_mean_nats", difference, counted),
        **mean_of("mismatch/logprob_abs_mean_nats", difference.abs(), counted),
        **max_of("mismatch/logprob_abs_max_nats", difference.abs(), counted),
        **mean_of("mismatch/k3_kl_nats", difference.expm1() - difference, counted),
        **mean_of("mismatch/chi_square", ratio.square() - 1, counted),
        **effective_share_of("mismatch/effective_sample_share", ratio, counted),
        **mean_of("mismatch/clipped_share", ratio >= CLIPPED_ABOVE, counted),
        **geometric_mean_of("mismatch/perplexity_ratio", -difference, counted),
    }
