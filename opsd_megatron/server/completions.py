"""/v1/completions: text or token ids in, text out, with the model's own log-probs of both on request."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator

from opsd_megatron.server.engine import Job
from opsd_megatron.server.jobs import STREAM, Served, reply
from opsd_megatron.server.refusal import Refusal
from opsd_megatron.server.requests import Sample
from opsd_megatron.server.scoring import TokenScore
from opsd_megatron.server.streaming import Run, stream, unless_gone
from opsd_megatron.server.text import Text
from opsd_megatron.server.wire import Span, TextRequest, Usage, spans, usage
from opsd_megatron.server.writing import Pieces, Writing


class CompletionRequest(TextRequest):
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)
    """Log-probs at temperature 1, with so many alternatives."""
    add_special_tokens: bool = True
    return_tokens_as_token_ids: bool | None = None

    @model_validator(mode="after")
    def refuse_what_makes_nothing(self):
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 makes nothing; use 1 or more, or echo=true to have the prompt scored")
        if self.stream and (self.echo or self.logprobs):
            raise ValueError("echo and alternatives are not streamed; leave out stream, or use echo=false, logprobs=0")
        if self.stream and self.logprobs == 0 and not self.is_neutral:
            raise ValueError("streamed logprobs need temperature=1, top_p=1 and top_k=0; leave out stream or logprobs")
        return self

    @property
    def needs_scores(self) -> bool:
        """The engine gives log-probs of what it samples, from the distribution that it sampled from, and no others."""
        return self.logprobs is not None and (self.echo or self.logprobs > 0 or not self.is_neutral)


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length", "abort"]
    stop_reason: int | str | None
    logprobs: CompletionLogprobs | None
    weight_versions: list[Span]
    token_ids: list[int] | None
    prompt_token_ids: list[int] | None


class CompletionReply(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    given: str | None
    """Its text, where it came as text."""

    def text(self, text: Text | None) -> str:
        return self.given if self.given is not None else text.decode(self.token_ids, False) if text else ""


def completion_routes(served: Served) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", response_model=CompletionReply, responses=STREAM)
    async def complete(request: Request, body: CompletionRequest):
        prompts = await _prompts(body, served)
        jobs = [
            served.make_job(
                prompt.token_ids,
                body,
                body.max_tokens,
                is_streamed=body.stream or bool(body.stops),
                scored="all" if body.needs_scores else None,
                top_logprobs=body.logprobs or 0,
                cache_salt=body.cache_salt,
            )
            for prompt in prompts
        ]
        request_id = body.request_id or uuid.uuid4().hex
        run = Run(served.service, jobs, request_id, served.writings(jobs, body))
        head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.identity.model,
        }
        if body.stream:
            return await stream(request, _events(run, head, jobs, body, served.text))
        samples = await unless_gone(request, run.finish())
        asked = [prompt for prompt in prompts for _ in range(body.n)]
        choices = [
            _choice(index, *parts, body, served.text)
            for index, parts in enumerate(zip(asked, samples, run.writings, strict=True))
        ]
        return reply(head | {"choices": choices, "usage": _usage(jobs, samples)})

    return router


async def _prompts(body: CompletionRequest, served: Served) -> list[Prompt]:
    given: Any = body.prompt
    if isinstance(given, str) or not given or isinstance(given[0], int):
        given = [given]
    prompts = []
    for prompt in given:
        if isinstance(prompt, str):
            prompts.append(Prompt(await served.encode(prompt, body.add_special_tokens), prompt))
        else:
            prompts.append(Prompt(prompt, None))
    return prompts


def _choice(
    index: int, prompt: Prompt, sample: Sample, writing: Writing, body: CompletionRequest, text: Text | None
) -> dict:
    logprobs = None
    if body.logprobs is not None:
        echoed = prompt.token_ids if body.echo else []
        scores = _scores(sample, len(prompt.token_ids), body)
        logprobs = _logprobs([*echoed, *sample.token_ids], scores, body, text)
    return _frame(index, (prompt.text(text) if body.echo else "") + writing.written, sample, writing, logprobs) | {
        "token_ids": sample.token_ids if body.return_token_ids else None,
        "prompt_token_ids": prompt.token_ids if body.return_token_ids else None,
    }


def _scores(sample: Sample, prompt_tokens: int, body: CompletionRequest) -> list[TokenScore | None]:
    """One per token of the reply; None for the very first token of an echoed prompt."""
    if not body.needs_scores:
        return [TokenScore(logprob, 0, []) for logprob in sample.logprobs]
    if sample.scores is None:
        raise Refusal(503, "the request was aborted before it was scored; ask again")
    return [None, *sample.scores] if body.echo else list(sample.scores[prompt_tokens - 1 :])


def _logprobs(
    token_ids: list[int], scores: Sequence[TokenScore | None], body: CompletionRequest, text: Text | None
) -> dict:
    names = _names(token_ids, None if body.return_tokens_as_token_ids else text)
    top: list[dict[str, float] | None] = []
    for token_id, name, score in zip(token_ids, names, scores, strict=True):
        if score is None:
            top.append(None)
            continue
        entry = {name: score.logprob}
        for other_id, logprob in score.top:
            other = name if other_id == token_id else _name(other_id, body, text)
            entry[other] = max(logprob, entry.get(other, logprob))  # two tokens may have one name
        top.append(entry)
    return {
        "tokens": names,
        "token_logprobs": [score and score.logprob for score in scores],
        "top_logprobs": top,
        "text_offset": [0, *accumulate(map(len, names[:-1]))][: len(names)],
    }


def _name(token_id: int, body: CompletionRequest, text: Text | None) -> str:
    return f"token_id:{token_id}" if text is None or body.return_tokens_as_token_ids else text.piece(token_id)


def _names(token_ids: Sequence[int], text: Text | None) -> list[str]:
    """What each token adds to the text, or its id where there is no text."""
    if text is None:
        return [f"token_id:{token_id}" for token_id in token_ids]
    pieces = Pieces(text, skip_special=False)
    return [pieces.add(token_id) for token_id in token_ids]


async def _events(
    run: Run, head: dict, jobs: list[Job], body: CompletionRequest, text: Text | None
) -> AsyncGenerator[dict, None]:
    samples = []
    async for delta in run.deltas():
        if not (delta.text or delta.sample or body.logprobs is not None or body.return_token_ids):
            continue
        logprobs = None
        if body.logprobs is not None:
            scores = [TokenScore(logprob, 0, []) for logprob in delta.logprobs]
            logprobs = _logprobs(delta.token_ids, scores, body, text)
        choice = _frame(delta.index, delta.text, delta.sample, run.writings[delta.index], logprobs)
        yield head | {"choices": [choice | ({"token_ids": delta.token_ids} if body.return_token_ids else {})]}
        samples += [delta.sample] if delta.sample else []
    if body.wants_usage_event:
        yield head | {"choices": [], "usage": _usage(jobs, samples)}


def _frame(index: int, text: str, sample: Sample | None, writing: Writing, logprobs: dict | None) -> dict:
    """`sample` None: there is more to come."""
    return {
        "index": index,
        "text": text,
        "finish_reason": sample.finish_reason if sample else None,
        "stop_reason": (writing.stop if sample.stop_token is None else sample.stop_token) if sample else None,
        "logprobs": logprobs,
        "weight_versions": spans(sample) if sample else None,
    }


def _usage(jobs: list[Job], samples: list[Sample]) -> dict:
    firsts = accumulate((job.samples for job in jobs[:-1]), initial=0)
    return usage(sum(len(job.prompt) for job in jobs), samples, sum(samples[first].cached_tokens for first in firsts))
