"""/v1/chat/completions: a conversation in the model's own template, and the answer to it."""

import time
import uuid
from collections.abc import AsyncGenerator
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
from opsd_megatron.server.wire import Dialect, Span, TextRequest, Usage, spans, usage
from opsd_megatron.server.writing import Writing


class TextPart(Dialect):
    type: Literal["text"]
    text: str


class Message(Dialect):
    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None

    def for_template(self) -> dict:
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content or ""} | ({} if self.name is None else {"name": self.name})


class Conversation(Dialect):
    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the template, for example enable_thinking."""

    async def token_ids(self, served: Served, add_special_tokens: bool) -> list[int]:
        text = served.need_text()
        rendered = text.render(
            [message.for_template() for message in self.messages],
            self.chat_template_kwargs,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
        )
        return await served.encode(rendered, add_special_tokens)


class ChatRequest(TextRequest, Conversation):
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """Left out, with `max_tokens`: all the room that the prompt leaves."""
    logprobs: bool = False
    """At temperature 1."""
    top_logprobs: int = Field(0, ge=0, le=20)
    add_special_tokens: bool = False

    @model_validator(mode="after")
    def check_logprobs(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs need logprobs=true")
        if self.stream and self.logprobs and (self.top_logprobs or not self.is_neutral):
            raise ValueError("streamed logprobs need temperature=1, top_p=1, top_k=0 and top_logprobs=0")
        return self

    @property
    def needs_scores(self) -> bool:
        return self.logprobs and (self.top_logprobs > 0 or not self.is_neutral)


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatToken]


class Answer(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "abort"]
    stop_reason: int | str | None
    weight_versions: list[Span]
    token_ids: list[int] | None


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None


def chat_routes(served: Served) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=ChatReply, responses=STREAM)
    async def chat(request: Request, body: ChatRequest):
        prompt = await body.token_ids(served, body.add_special_tokens)
        job = served.make_job(
            prompt,
            body,
            body.max_completion_tokens or body.max_tokens,
            is_streamed=body.stream or bool(body.stops),
            scored="all" if body.needs_scores else None,
            top_logprobs=body.top_logprobs,
            cache_salt=body.cache_salt,
        )
        request_id = body.request_id or uuid.uuid4().hex
        run = Run(served.service, [job], request_id, served.writings([job], body))
        head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": served.identity.model}
        if body.stream:
            return await stream(request, _events(run, head, job, body, served.need_text()))
        samples = await unless_gone(request, run.finish())
        choices = []
        for index, (sample, writing) in enumerate(zip(samples, run.writings, strict=True)):
            content = {"role": "assistant", "content": writing.written}
            logprobs = _logprobs(sample, job, served.need_text()) if body.logprobs else None
            token_ids = sample.token_ids if body.return_token_ids else None
            frame = _frame(index, sample, writing) | {"message": content, "logprobs": logprobs, "token_ids": token_ids}
            choices.append(frame)
        return reply(
            head
            | {
                "object": "chat.completion",
                "choices": choices,
                "usage": usage(len(prompt), samples, samples[0].cached_tokens),
            }
            | {"prompt_token_ids": prompt if body.return_token_ids else None}
        )

    return router


async def _events(run: Run, head: dict, job: Job, body: ChatRequest, text: Text) -> AsyncGenerator[dict, None]:
    head = head | {"object": "chat.completion.chunk"}
    begun: set[int] = set()
    samples = []
    async for delta in run.deltas():
        if not (delta.text or delta.sample or body.logprobs or body.return_token_ids):
            continue
        content = {"content": delta.text} | ({} if delta.index in begun else {"role": "assistant"})
        begun.add(delta.index)
        choice = _frame(delta.index, delta.sample, run.writings[delta.index]) | {"delta": content, "logprobs": None}
        if body.logprobs:
            scores = [TokenScore(logprob, 0, []) for logprob in delta.logprobs]
            choice["logprobs"] = _content(delta.token_ids, scores, text)
        yield head | {"choices": [choice | ({"token_ids": delta.token_ids} if body.return_token_ids else {})]}
        samples += [delta.sample] if delta.sample else []
    if body.wants_usage_event:
        yield head | {"choices": [], "usage": usage(len(job.prompt), samples, samples[0].cached_tokens)}


def _frame(index: int, sample: Sample | None, writing: Writing) -> dict:
    """`sample` None: there is more to come."""
    return {
        "index": index,
        "finish_reason": sample.finish_reason if sample else None,
        "stop_reason": (writing.stop if sample.stop_token is None else sample.stop_token) if sample else None,
        "weight_versions": spans(sample) if sample else None,
    }


def _logprobs(sample: Sample, job: Job, text: Text) -> dict:
    if job.scored is None:
        return _content(sample.token_ids, [TokenScore(logprob, 0, []) for logprob in sample.logprobs], text)
    if sample.scores is None:
        raise Refusal(503, "the request was aborted before it was scored; ask again")
    return _content(sample.token_ids, sample.scores[len(job.prompt) - 1 :], text)


def _content(token_ids: list[int], scores: list[TokenScore], text: Text) -> dict:
    return {
        "content": [
            _entry(token_id, score.logprob, text)
            | {"top_logprobs": [_entry(other, logprob, text) for other, logprob in score.top]}
            for token_id, score in zip(token_ids, scores, strict=True)
        ]
    }


def _entry(token_id: int, logprob: float, text: Text) -> dict:
    piece = text.piece(token_id)
    return {"token": piece, "logprob": logprob, "bytes": list(piece.encode())}
