"""Requests and replies of the generating routes: the shapes of vLLM, as much of them as this server can honour.

A field that would change the result but cannot be honoured is refused by name; at its neutral value it passes.
"""

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from opsd_megatron.server.service import Sample

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "priority": (0,),
    "best_of": (1,),
    "bad_words": ([],),
    "logit_bias": ({},),
    "suffix": ("",),
    "stream": (False,),
    "echo": (False,),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "output_mode": ("tokens",),
    "prompt_logprobs": (),
    "allowed_token_ids": (),
    "logprob_token_ids": (),
    "structured_outputs": (),
    "response_format": (),
    "truncate_prompt_tokens": (),
    "stream_options": (),
}
"""Accepted at these values and at null."""
IRRELEVANT = frozenset({
    "user", "model", "detokenize", "spaces_between_special_tokens", "return_weight_versions",
    "skip_reading_prefix_cache",
})  # fmt: skip
"""Accepted at any value: nothing that this server returns depends on them."""


class Dialect(BaseModel):
    """Refuses fields that are neither known nor neutral."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def refuse_what_cannot_be_honoured(self):
        for name, value in (self.model_extra or {}).items():
            if value is None or name in IRRELEVANT:
                continue
            if name not in NEUTRAL:
                raise ValueError(f"{name} is not known to this server")
            if value not in NEUTRAL[name]:
                raise ValueError(f"{name}={value!r} is not supported; leave it out or use {NEUTRAL[name]}")
        return self


Probability = Annotated[float, Field(gt=0, le=1)]
Salt = Annotated[str, Field(min_length=1, max_length=256)]
"""Requests with different salts, or with none, share nothing in the prefix cache."""


class SamplingParams(Dialect):
    n: int = Field(1, ge=1, le=256)
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: Probability = 1.0
    top_k: int = Field(0, ge=-1)
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logprobs: Literal[0] | None = None
    stop: list[str] | str | None = None
    skip_special_tokens: bool = True

    @model_validator(mode="after")
    def check_greedy(self):
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n must be 1 when temperature is 0 (all samples would be equal), got n={self.n}")
        return self


class GenerateRequest(Dialect):
    token_ids: list[int] = Field(min_length=1)
    sampling_params: SamplingParams
    request_id: str | None = Field(None, max_length=256)
    return_token_ids: bool | None = None
    cache_salt: Salt | None = None

    @model_validator(mode="after")
    def refuse_stop_strings(self):
        if self.sampling_params.stop:
            raise ValueError("stop strings need text; use sampling_params.stop_token_ids here")
        return self


class CompletionRequest(SamplingParams):
    prompt: str | list[int] | list[str] | list[list[int]]
    request_id: str | None = Field(None, max_length=256)
    add_special_tokens: bool = True
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: Salt | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, data: Any) -> Any:
        """OpenAI clients send null for every parameter that they leave alone."""
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def refuse_what_text_hides(self):
        if self.stop and (self.return_token_ids or self.logprobs is not None):
            raise ValueError("stop strings cut the text only; ask for token ids or logprobs, or for stop strings")
        return self


def generate_reply(request_id: str, model: str, server_id: str, prompt: list[int], samples: list[Sample], raw: dict):
    """Body for /inference/v1/generate; `raw` holds further top-level fields."""
    made = sum(len(sample.token_ids) for sample in samples)
    return {
        "request_id": f"generate-tokens-{request_id}",
        "model": model,
        "created": int(time.time()),
        "output_mode": "tokens",
        "usage": usage(len(prompt), made, samples[0].cached_tokens),
        "server_id": server_id,
        "choices": [generate_choice(index, sample) for index, sample in enumerate(samples)],
        **raw,
    }


def generate_choice(index: int, sample: Sample) -> dict:
    content = [
        {"token_id": token, "logprob": logprob, "top_logprobs": []}
        for token, logprob in zip(sample.token_ids, sample.logprobs, strict=True)
    ]
    return {
        "index": index,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_token,
        "token_ids": sample.token_ids,
        "weight_versions": spans(sample),
        "logprobs": {"content": content},
        "logprob_kind": "processed",
        "raw_logprobs": sample.raw_logprobs,
    }


def completion_choice(index: int, sample: Sample, text: str, prompt: list[int], request: CompletionRequest) -> dict:
    choice = {
        "index": index,
        "text": text,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_token,
        "logprobs": None,
        "weight_versions": spans(sample),
    }
    if request.logprobs is not None:
        names = [f"token_id:{token}" for token in sample.token_ids]
        choice["logprobs"] = {
            "tokens": names,
            "token_logprobs": sample.logprobs,
            "top_logprobs": [{name: value} for name, value in zip(names, sample.logprobs, strict=True)],
            "text_offset": [],
        }
    if request.return_token_ids:
        choice |= {"token_ids": sample.token_ids, "prompt_token_ids": prompt}
    return choice


def spans(sample: Sample) -> list[dict]:
    return [{"version": span.version, "start": span.start, "end": span.end} for span in sample.spans]


def usage(prompt_tokens: int, made: int, cached_tokens: int) -> dict:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
