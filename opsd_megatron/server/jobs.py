"""From a checked request to jobs for the engine."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastapi.responses import JSONResponse

from opsd_megatron.server.engine import Job
from opsd_megatron.server.refusal import Refusal
from opsd_megatron.server.service import Service
from opsd_megatron.server.text import Text
from opsd_megatron.server.wire import ErrorReply, Sampling
from opsd_megatron.server.writing import Writing

RESPONSES: dict[int | str, dict] = {
    401: {"description": "The bearer token is missing or wrong"},
    "4XX": {"model": ErrorReply, "description": "Refused; the message says why"},
    "5XX": {"model": ErrorReply, "description": "Failed, or not now (503)"},
}
STREAM: dict[int | str, dict] = {200: {"content": {"text/event-stream": {}}, "description": "JSON, or events if asked"}}


@dataclass(frozen=True)
class Identity:
    """What this server is, for clients that want to know before they ask."""

    server_id: str
    model: str
    engine: str
    dtype: str
    package_version: str
    vocab_size: int
    max_model_len: int
    end_token_ids: frozenset[int]


@dataclass(frozen=True)
class Served:
    """What the routes answer from; without a tokenizer `text` is None."""

    service: Service
    identity: Identity
    text: Text | None

    def need_text(self) -> Text:
        if self.text is None:
            raise Refusal(400, "the model directory has no tokenizer; send token ids as the prompt")
        return self.text

    async def encode(self, text: str, add_special: bool) -> list[int]:
        """Off the event loop: a long text takes long."""
        return await asyncio.to_thread(self.need_text().encode, text, add_special)

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Refusal 400 for an id that the model does not have."""
        vocab = self.identity.vocab_size
        wrong = next((token for token in token_ids if not 0 <= token < vocab), None)
        if wrong is not None:
            raise Refusal(400, f"Token id {wrong} is out of vocabulary; ids from 0 to {vocab - 1} are expected")

    def make_job(
        self,
        prompt: Sequence[int],
        params: Sampling,
        max_tokens: int | None,
        *,
        is_streamed: bool = False,
        scored: Literal["prompt", "all"] | None = None,
        top_logprobs: int = 0,
        cache_salt: str | None = None,
    ) -> Job:
        """Refusal 400 where the prompt does not fit the model; `max_tokens` None takes the room that is left."""
        vocab, longest = self.identity.vocab_size, self.identity.max_model_len
        self.check_ids(prompt)
        if not prompt:
            raise Refusal(400, f"The prompt is empty; ids from 0 to {vocab - 1} are expected")
        room = longest - len(prompt)
        max_tokens = max(room, 1) if max_tokens is None else max_tokens
        if max_tokens > room:
            raise Refusal(
                400,
                f"prompt of {len(prompt)} tokens and max_tokens={max_tokens} are longer than the maximum model "
                f"length of {longest}; shorten them or raise --max-model-len",
            )
        ends = frozenset() if params.ignore_eos else self.identity.end_token_ids
        return Job(
            job_id=self.service.next_job_id(cache_salt),
            prompt=tuple(prompt),
            samples=params.n,
            max_tokens=max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k if 0 < params.top_k < vocab else 0,
            seed=params.seed,
            stop_token_ids=frozenset(params.stop_token_ids or ()) | ends,
            is_streamed=is_streamed,
            scored=scored,
            top_logprobs=top_logprobs,
        )

    def writings(self, jobs: Sequence[Job], params: Sampling) -> list[Writing]:
        """One per sample of the jobs."""
        return [
            Writing(self.text, params.stops, job.stop_token_ids, params.skip_special_tokens)
            for job in jobs
            for _ in range(job.samples)
        ]


def reply(body: dict) -> JSONResponse:
    """Not-a-number cannot be JSON; it is an error of this server, said as such."""
    try:
        return JSONResponse(body)
    except ValueError as error:
        raise RuntimeError("the model gave log-probabilities that are not finite; its weights may be broken") from error
