"""The nouns of the program, in the order in which they flow: PromptPair, Rollout, ResponseTable, TokenBatch.

All are frozen. A student row and a teacher row are joined by the index of the response token that both predict
(`TokenBatch.response_index` into `ResponseTable`), never by slices.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from opsd_megatron.token_tree import TokenTree


@dataclass(frozen=True)
class PromptPair:
    """Two views of one record, over which one response will be scored."""

    record_id: str
    student_prompt: tuple[int, ...]
    """Token ids that the student answers under (OPSDL: the whole long context, then the question)."""
    teacher_prompt: tuple[int, ...]
    """Token ids that the teacher scores under (OPSDL: the short extract, then the question)."""
    dropped_tokens: int = 0
    """Context tokens cut from the student view to fit its budget; evidence and question are never cut."""


@dataclass(frozen=True)
class VersionSpan:
    """Response tokens [start, end) were sampled by weights `version`."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class Turn:
    """Response tokens [start, end) were written by the model or came from an environment."""

    author: Literal["model", "environment"]
    start: int
    end: int


@dataclass(frozen=True)
class Rollout:
    """One sampled response, as token ids; text is never parsed back."""

    pair: PromptPair
    sample: int
    """Number of this response among those of the same prompt."""
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Behaviour log-probabilities in nats, one per token, under the weights that sampled it."""
    logprob_kind: Literal["raw", "processed"]
    """processed = after temperature, top-k and top-p; raw = before."""
    loss_mask: tuple[bool, ...]
    finish_reason: Literal["stop", "length", "abort"]
    version_spans: tuple[VersionSpan, ...]
    turns: tuple[Turn, ...]
    server_id: str

    def __post_init__(self):
        count = len(self.token_ids)
        if not count:
            raise ValueError(f"record {self.pair.record_id}: empty response")
        if not count == len(self.logprobs) == len(self.loss_mask):
            raise ValueError(
                f"record {self.pair.record_id}: {count} tokens, {len(self.logprobs)} log-probs, "
                f"{len(self.loss_mask)} mask entries; they must be equally many"
            )


@dataclass(frozen=True)
class ResponseTable:
    """Every response token of one data-parallel replica in one step, in the order of the rollouts."""

    token_ids: Int64[Tensor, "response_tokens"]
    weights: Float32[Tensor, "response_tokens"]
    """Loss weight of each token; 0 leaves it out of the loss and, where 0, out of the count."""
    behaviour_logprobs: Float32[Tensor, "response_tokens"]
    rollout: Int64[Tensor, "response_tokens"]
    """Number of the rollout that the token belongs to."""
    position: Int64[Tensor, "response_tokens"]
    """Index of the token inside its response."""

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    def select(self, index: Int64[Tensor, "chosen"]) -> "ResponseTable":
        """The tokens `index`, in that order."""
        return ResponseTable(*(getattr(self, name.name)[index] for name in fields(self)))

    def to(self, device: torch.device) -> "ResponseTable":
        return ResponseTable(*(getattr(self, name.name).to(device) for name in fields(self)))


@dataclass(frozen=True)
class TokenBatch:
    """One microbatch of one view, whole: it is dealt to context-parallel ranks later."""

    tree: TokenTree
    token_ids: Int64[Tensor, "tokens"]
    rows: Int64[Tensor, "rows"]
    """Tokens whose hidden state predicts a response token; several rows may name the same token (branches)."""
    response_index: Int64[Tensor, "rows"]
    """For each row the response token that it predicts, as an index into the ResponseTable."""

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step measured, equal on every rank; names carry units (`loss/reverse_kl_nats`)."""

    step: int
    values: Mapping[str, float] = field(default_factory=dict)


def vocabulary_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """SHA-256, in hex, of the JSON list of [id, token] in order of id: equal where every id means the same token.

    Trainer and server exchange ids, so both compare theirs before the first rollout.
    """
    pairs = sorted((token_id, token) for token, token_id in vocabulary.items())
    return hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()
