"""The application: generation, completions and information about the server."""

import asyncio
import math
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from opsd_megatron.server import wire
from opsd_megatron.server.engine import Job
from opsd_megatron.server.refusal import Refusal, error_body
from opsd_megatron.server.service import Sample, Service
from opsd_megatron.server.text import Text


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


def build_app(service: Service, identity: Identity, text: Text | None) -> FastAPI:
    from opsd_megatron.server.control_routes import control_routes

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start(identity.vocab_size)
        yield
        await service.stop()

    app = FastAPI(title="opsd_megatron.server", version=identity.package_version, lifespan=lifespan)
    app.add_exception_handler(Refusal, lambda _, error: _error(error.status, error.message, error.kind))  # type: ignore[attr-defined]
    app.add_exception_handler(RequestValidationError, lambda _, error: _error(400, _explain(error)))
    app.add_exception_handler(HTTPException, lambda _, error: _error(error.status_code, str(error.detail)))  # type: ignore[attr-defined]
    app.add_exception_handler(RuntimeError, lambda _, error: _error(500, str(error)))
    app.include_router(control_routes(service))
    _add_generation(app, service, identity, text)
    _add_information(app, service, identity, text)
    return app


def _add_generation(app: FastAPI, service: Service, identity: Identity, text: Text | None) -> None:
    @app.post("/inference/v1/generate")
    async def generate(request: Request, body: wire.GenerateRequest):
        request_id = body.request_id or uuid.uuid4().hex
        job = make_job(service, identity, body.token_ids, body.sampling_params, body.cache_salt)
        samples = await _unless_gone(request, service.generate(job, request_id))
        more = {"prompt_token_ids": body.token_ids} if body.return_token_ids else {}
        return _json(wire.generate_reply(request_id, identity.model, identity.server_id, body.token_ids, samples, more))

    @app.post("/v1/completions")
    async def complete(request: Request, body: wire.CompletionRequest):
        request_id = body.request_id or uuid.uuid4().hex
        prompts = _as_token_ids(body, text)
        jobs = [make_job(service, identity, prompt, body, body.cache_salt) for prompt in prompts]
        answers = await _unless_gone(request, asyncio.gather(*(service.generate(job, request_id) for job in jobs)))
        choices = []
        for prompt, samples in zip(prompts, answers, strict=True):
            for sample in samples:
                written, sample = _as_text(sample, body, text)
                choices.append(wire.completion_choice(len(choices), sample, written, prompt, body))
        made = sum(len(sample.token_ids) for samples in answers for sample in samples)
        cached = sum(samples[0].cached_tokens for samples in answers)
        return _json({
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "model": identity.model,
            "choices": choices,
            "usage": wire.usage(sum(map(len, prompts)), made, cached),
        })  # fmt: skip


def _add_information(app: FastAPI, service: Service, identity: Identity, text: Text | None) -> None:
    @app.get("/health")
    async def health():
        return Response(status_code=200 if service.is_healthy else 503)

    @app.get("/version")
    async def version():
        return {"version": identity.package_version}

    @app.get("/v1/models")
    async def models():
        card = {"id": identity.model, "object": "model", "owned_by": "opsd_megatron"}
        return {"object": "list", "data": [card | {"max_model_len": identity.max_model_len}]}

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/server_info")
    async def server_info():
        return {
            "server_id": identity.server_id,
            "engine": identity.engine,
            "seeded": service.engine.seeded,
            "dtype": identity.dtype,
            "vocab_size": identity.vocab_size,
            "max_model_len": identity.max_model_len,
            "logprob_kind": "processed",
            "weight_version": service.version,
            "sleeping": bool(service.sleep.asleep),
        }

    @app.get("/tokenizer_info")
    async def tokenizer_info():
        if text is None:
            raise Refusal(404, "the model directory has no tokenizer")
        return text.info()


def make_job(
    service: Service, identity: Identity, prompt: list[int], params: wire.SamplingParams, cache_salt: str | None
) -> Job:
    """Refusal 400 where the prompt does not fit the model."""
    wrong = next((token for token in prompt if not 0 <= token < identity.vocab_size), None)
    if not prompt or wrong is not None:
        what = "The prompt is empty" if not prompt else f"Token id {wrong} is out of vocabulary"
        raise Refusal(400, f"{what}; ids from 0 to {identity.vocab_size - 1} are expected")
    room = identity.max_model_len - len(prompt)
    if params.max_tokens > room:
        raise Refusal(
            400,
            f"prompt of {len(prompt)} tokens and max_tokens={params.max_tokens} are longer than the maximum model "
            f"length of {identity.max_model_len}; shorten them or raise --max-model-len",
        )
    stops = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else identity.end_token_ids)
    return Job(
        job_id=service.next_job_id(cache_salt),
        prompt=tuple(prompt),
        samples=params.n,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        seed=params.seed,
        stop_token_ids=stops,
    )


async def _unless_gone(request: Request, work: Awaitable) -> Any:
    """The result of `work`, which is cancelled when the client hangs up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refusal(499, "the client hung up")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _as_token_ids(body: wire.CompletionRequest, text: Text | None) -> list[Any]:
    prompts: list = [body.prompt] if isinstance(body.prompt, str) or not body.prompt else body.prompt  # type: ignore[assignment]
    if prompts and isinstance(prompts[0], int):
        prompts = [prompts]
    if any(isinstance(prompt, str) for prompt in prompts) and text is None:
        raise Refusal(400, "the model directory has no tokenizer; send token ids as the prompt")
    return [
        text.encode(prompt, body.add_special_tokens) if isinstance(prompt, str) and text else prompt
        for prompt in prompts
    ]


def _as_text(sample: Sample, body: wire.CompletionRequest, text: Text | None) -> tuple[str, Sample]:
    """The text up to the first stop string; empty without a tokenizer."""
    if text is None:
        return "", sample
    ids = sample.token_ids[:-1] if sample.stop_token is not None else sample.token_ids
    written = text.decode(ids, body.skip_special_tokens)
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    cuts = [written.find(stop) for stop in stops if stop and stop in written]
    return written[: min(cuts)] if cuts else written, sample


def _explain(error: Any) -> str:
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())


def _json(body: dict) -> JSONResponse:
    """Not-a-number cannot be JSON; it is an error of this server, said as such."""
    for choice in body["choices"]:
        content = (choice["logprobs"] or {}).get("content") or []
        if not all(math.isfinite(item["logprob"]) for item in content):
            raise RuntimeError("the model gave log-probabilities that are not finite; its weights may be broken")
    return JSONResponse(body)


def _error(status: int, message: str, kind: str | None = None) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse(error_body(status, message, kind), status_code=status, headers=headers)
