"""What the requests and replies of all generating routes share: the shapes of vLLM and OpenAI.

A field that would change the result but cannot be honoured is refused by name; at its neutral value it passes.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from opsd_megatron.server.requests import Sample

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
    "echo": (False,),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "output_mode": ("tokens",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "prompt_logprobs": (),
    "allowed_token_ids": (),
    "logprob_token_ids": (),
    "structured_outputs": (),
    "response_format": ({"type": "text"},),
    "truncate_prompt_tokens": (),
}
"""Accepted at these values and at null."""
IRRELEVANT = frozenset({
    "user", "model", "detokenize", "spaces_between_special_tokens", "return_weight_versions",
    "skip_reading_prefix_cache", "store", "metadata",
})  # fmt: skip
"""Accepted at any value: nothing that this server returns depends on them."""


class Dialect(BaseModel):
    """Refuses fields that are neither known nor neutral."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

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


Salt = Annotated[str, Field(min_length=1, max_length=256)]
"""Requests with different salts, or with none, share nothing in the prefix cache."""


class StreamOptions(BaseModel):
    include_usage: bool = False


class Streamable(Dialect):
    request_id: str | None = Field(None, max_length=256)
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    cache_salt: Salt | None = None

    @property
    def wants_usage_event(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Sampling(Dialect):
    n: int = Field(1, ge=1, le=256)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = Field(0, ge=-1)
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    stop: list[str] | str | None = None
    skip_special_tokens: bool = True

    @model_validator(mode="after")
    def check_temperature(self):
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n must be 1 when temperature is 0 (all samples would be equal), got n={self.n}")
        if 0 < self.temperature < 0.01:
            raise ValueError(f"temperature must be 0 (the likeliest token) or 0.01 and more, got {self.temperature}")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def is_neutral(self) -> bool:
        """Tokens are drawn from the model's own distribution."""
        return (self.temperature, self.top_p) == (1, 1) and self.top_k <= 0


class TextRequest(Streamable, Sampling):
    """For clients of OpenAI's routes, which send null for every parameter that they leave alone."""

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class Span(BaseModel):
    """Weights that sampled the tokens of a response from `start` up to but not with `end`."""

    version: str
    start: int
    end: int


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class ErrorReply(BaseModel):
    error: ErrorInfo


def spans(sample: Sample) -> list[dict]:
    return [{"version": span.version, "start": span.start, "end": span.end} for span in sample.spans]


def usage(prompt_tokens: int, samples: list[Sample], cached_tokens: int) -> dict:
    made = sum(len(sample.token_ids) for sample in samples)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
