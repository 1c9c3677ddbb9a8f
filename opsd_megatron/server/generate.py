"""/inference/v1/generate: token ids in, token ids with log-probs and weight versions out, as vLLM spells it."""

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator

from opsd_megatron.server.engine import Job
from opsd_megatron.server.jobs import STREAM, Served, reply
from opsd_megatron.server.requests import Sample
from opsd_megatron.server.scoring import TokenScore
from opsd_megatron.server.streaming import Run, stream, unless_gone
from opsd_megatron.server.text import Text
from opsd_megatron.server.wire import Sampling, Span, Streamable, Usage, spans, usage
from opsd_megatron.server.writing import Writing


class SamplingParams(Sampling):
    max_tokens: int = Field(16, ge=1)
    logprobs: Literal[0] | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    """Log-probs of the prompt's tokens at temperature 1, with so many alternatives."""

    @model_validator(mode="after")
    def refuse_stop_strings(self):
        if self.stop:
            raise ValueError("stop strings need text; use sampling_params.stop_token_ids here")
        return self


class GenerateRequest(Streamable):
    token_ids: list[int] = Field(min_length=1)
    sampling_params: SamplingParams

    @model_validator(mode="after")
    def refuse_prompt_logprobs_in_events(self):
        if self.stream and self.sampling_params.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs are not streamed; leave out stream or prompt_logprobs")
        return self


class GeneratedToken(BaseModel):
    token_id: int
    logprob: float
    top_logprobs: list


class GeneratedLogprobs(BaseModel):
    content: list[GeneratedToken]


class GenerateChoice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length", "abort"]
    stop_reason: int | None
    token_ids: list[int]
    weight_versions: list[Span]
    logprobs: GeneratedLogprobs
    logprob_kind: Literal["processed"]
    raw_logprobs: list[float] | None


class PromptLogprob(BaseModel):
    logprob: float
    rank: int
    decoded_token: str | None


class GenerateReply(BaseModel):
    request_id: str
    model: str
    created: int
    output_mode: Literal["tokens"]
    usage: Usage
    server_id: str
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None
    prompt_token_ids: list[int] | None
    choices: list[GenerateChoice]


def generate_routes(served: Served) -> APIRouter:
    router = APIRouter()

    @router.post("/inference/v1/generate", response_model=GenerateReply, responses=STREAM)
    async def generate(request: Request, body: GenerateRequest):
        request_id, params = body.request_id or uuid.uuid4().hex, body.sampling_params
        top = params.prompt_logprobs
        job = served.make_job(
            body.token_ids,
            params,
            params.max_tokens,
            is_streamed=body.stream,
            scored=None if top is None else "prompt",
            top_logprobs=top or 0,
            cache_salt=body.cache_salt,
        )
        run = Run(served.service, [job], request_id, [Writing.of_nothing() for _ in range(job.samples)])
        if body.stream:
            return await stream(request, _events(run, body, request_id))
        samples = await unless_gone(request, run.finish())
        return reply(_body(served, body, job, samples, request_id))

    return router


def _body(served: Served, body: GenerateRequest, job: Job, samples: list[Sample], request_id: str) -> dict:
    scores = samples[0].scores
    return {
        "request_id": f"generate-tokens-{request_id}",
        "model": served.identity.model,
        "created": int(time.time()),
        "output_mode": "tokens",
        "usage": usage(len(job.prompt), samples, samples[0].cached_tokens),
        "server_id": served.identity.server_id,
        "prompt_logprobs": None if scores is None else _prompt_logprobs(body.token_ids, scores, served.text),
        "prompt_token_ids": body.token_ids if body.return_token_ids else None,
        "choices": [
            _choice(index, sample.token_ids, sample.logprobs, sample)
            | {"logprob_kind": "processed", "raw_logprobs": sample.raw_logprobs}
            for index, sample in enumerate(samples)
        ],
    }


async def _events(run: Run, body: GenerateRequest, request_id: str) -> AsyncGenerator[dict, None]:
    head = {"request_id": f"generate-tokens-{request_id}", "output_mode": "tokens"}
    samples = []
    async for delta in run.deltas():
        yield head | {"choices": [_choice(delta.index, delta.token_ids, delta.logprobs, delta.sample)]}
        samples += [delta.sample] if delta.sample else []
    if body.wants_usage_event:
        yield head | {"choices": [], "usage": usage(len(body.token_ids), samples, samples[0].cached_tokens)}


def _choice(index: int, token_ids: list[int], logprobs: list[float], sample: Sample | None) -> dict:
    """`sample` None: there is more to come."""
    content = [
        {"token_id": token, "logprob": logprob, "top_logprobs": []}
        for token, logprob in zip(token_ids, logprobs, strict=True)
    ]
    return {
        "index": index,
        "finish_reason": sample.finish_reason if sample else None,
        "stop_reason": sample.stop_token if sample else None,
        "token_ids": token_ids,
        "weight_versions": spans(sample) if sample else None,
        "logprobs": {"content": content},
    }


def _prompt_logprobs(token_ids: list[int], scores: list[TokenScore], text: Text | None) -> list[dict | None]:
    """As vLLM: for each token but the first those of itself and of the likeliest, by id."""
    entries: list[dict | None] = [None]
    for token_id, score in zip(token_ids[1:], scores, strict=True):
        known = {token: (logprob, rank) for rank, (token, logprob) in enumerate(score.top, 1)}
        known[token_id] = score.logprob, score.rank
        entries.append({
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": text.piece(token) if text else None}
            for token, (logprob, rank) in known.items()
        })  # fmt: skip
    return entries
