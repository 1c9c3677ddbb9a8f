"""Log-probs of given tokens under the served weights, by one pass over them."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

LOGITS_BYTES = 256 << 20
"""Most bytes of float32 logits that exist at once."""


@dataclass(frozen=True)
class TokenScore:
    """How likely a token was after those before it."""

    logprob: float
    """Nats, at temperature 1."""
    rank: int
    """1 is the likeliest token."""
    top: list[tuple[int, float]]
    """The likeliest tokens with their log-probs, in order."""


@torch.inference_mode()
def score_tokens(model: PreTrainedModel, token_ids: Sequence[int], top: int) -> list[TokenScore]:
    """The scores of all tokens but the first, each with its `top` likeliest alternatives.

    The tokens go through the model in chunks over one cache of its own, so that memory grows with the length as it does
    when generating, and not with length x vocabulary. RuntimeError where the model's numbers are not finite.
    """
    vocab = model.config.get_text_config().vocab_size
    rows = max(1, LOGITS_BYTES // (4 * vocab))
    ids = torch.tensor(token_ids, device=model.device)
    cache, scores = DynamicCache(), []
    with _dense_attention(model):
        for start in range(0, len(ids) - 1, rows):
            inputs, targets = ids[start : start + rows], ids[start + 1 : start + rows + 1]
            logits = model(input_ids=inputs[None], past_key_values=cache, use_cache=True).logits[0]
            scores += _scores(logits[: len(targets)].float(), targets, top)
    return scores


def _scores(
    logits: Float32[Tensor, "tokens vocab"], targets: Int64[Tensor, "tokens"], top: int
) -> Iterator[TokenScore]:
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, targets[:, None])
    ranks = 1 + (logits > chosen).sum(dim=-1)
    best = logits.topk(min(top, logits.shape[1]), dim=-1)
    logprobs = (chosen - normaliser)[:, 0].tolist()
    if not all(map(math.isfinite, logprobs)):
        raise RuntimeError("the model gave log-probabilities that are not finite; its weights may be broken")
    alternatives = zip(best.indices.tolist(), (best.values - normaliser).tolist(), strict=True)
    for logprob, rank, (tokens, values) in zip(logprobs, ranks.tolist(), alternatives, strict=True):
        yield TokenScore(logprob, rank, list(zip(tokens, values, strict=True)))


@contextmanager
def _dense_attention(model: PreTrainedModel) -> Iterator[None]:
    """While the engine is frozen: attention that needs no paged cache."""
    engine, model.config._attn_implementation = model.config._attn_implementation, "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = engine
