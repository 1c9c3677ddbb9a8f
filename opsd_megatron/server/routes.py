"""The application: all routes, and how errors look."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from opsd_megatron.server.chat import chat_routes
from opsd_megatron.server.completions import completion_routes
from opsd_megatron.server.control_routes import control_routes
from opsd_megatron.server.generate import generate_routes
from opsd_megatron.server.jobs import RESPONSES, Identity, Served
from opsd_megatron.server.refusal import Refusal, error_body
from opsd_megatron.server.service import Service
from opsd_megatron.server.text import Text
from opsd_megatron.server.tokenizing import tokenizing_routes


class Version(BaseModel):
    version: str


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class ServerInfo(BaseModel):
    server_id: str
    engine: str
    seeded: bool
    dtype: str
    vocab_size: int
    max_model_len: int
    logprob_kind: Literal["processed"]
    weight_version: str
    transports: list[str]
    sleeping: bool


def build_app(service: Service, identity: Identity, text: Text | None) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start(identity.vocab_size)
        yield
        await service.stop()

    app = FastAPI(
        title="opsd_megatron.server",
        version=identity.package_version,
        lifespan=lifespan,
        responses=RESPONSES,
        docs_url=None,  # the pages load scripts from elsewhere and cannot send the bearer token
        redoc_url=None,
    )
    app.add_exception_handler(Refusal, lambda _, error: _error(error.status, error.message, error.kind))  # type: ignore[attr-defined]
    app.add_exception_handler(RequestValidationError, lambda _, error: _error(400, _explain(error)))
    app.add_exception_handler(HTTPException, lambda _, error: _error(error.status_code, str(error.detail)))  # type: ignore[attr-defined]
    app.add_exception_handler(RuntimeError, lambda _, error: _error(500, str(error)))
    served = Served(service, identity, text)
    for router in (generate_routes(served), completion_routes(served), chat_routes(served), tokenizing_routes(served)):
        app.include_router(router)
    app.include_router(_information(served))
    app.include_router(control_routes(service))
    return app


def _information(served: Served) -> APIRouter:
    router, identity, service = APIRouter(), served.identity, served.service
    started = int(time.time())

    @router.get("/health", response_class=Response, responses={503: {"description": "Cannot generate"}})
    async def health():
        return Response(status_code=200 if service.is_healthy else 503)

    @router.get("/version")
    async def version() -> Version:
        return Version(version=identity.package_version)

    @router.get("/v1/models")
    async def models() -> ModelList:
        card = ModelCard(
            id=identity.model,
            object="model",
            created=started,
            owned_by="opsd_megatron",
            root=identity.model,
            parent=None,
            max_model_len=identity.max_model_len,
        )
        return ModelList(object="list", data=[card])

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics():
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @router.get("/server_info", response_model=ServerInfo)
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
            "transports": service.transports,
            "sleeping": bool(service.sleep.asleep),
        }

    return router


def _explain(error: Any) -> str:
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())


def _error(status: int, message: str, kind: str | None = None) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse(error_body(status, message, kind), status_code=status, headers=headers)
