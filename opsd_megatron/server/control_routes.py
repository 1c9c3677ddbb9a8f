"""Pausing, and replacing the weights."""

import asyncio
import hashlib
import logging
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from opsd_megatron.server.refusal import Refusal
from opsd_megatron.server.service import PauseMode, Service
from opsd_megatron.server.sleep import sleep_routes

log = logging.getLogger(__name__)
CHECKSUM_PREFIX = "dp0:pp0:pcp0:tp0:"
"""vLLM's key of the only shard."""


class AbortRequest(BaseModel):
    request_ids: list[str] | None = None


class UpdateInfo(BaseModel):
    path: str


class UpdateRequest(BaseModel):
    update_info: UpdateInfo


class FinishRequest(BaseModel):
    weight_version: str = Field(min_length=1, max_length=256)


class CheckRequest(BaseModel):
    action: Literal["checksum"]


def control_routes(service: Service) -> APIRouter:
    router = APIRouter()
    _add_pausing(router, service)
    _add_updating(router, service)
    router.include_router(sleep_routes(service))
    return router


def _add_pausing(router: APIRouter, service: Service) -> None:
    @router.post("/pause")
    async def pause(mode: PauseMode = "abort"):
        await service.pause(mode)
        return {"status": "paused"}

    @router.post("/resume")
    async def resume():
        await service.resume()
        return {"status": "resumed"}

    @router.get("/is_paused")
    async def is_paused():
        return {"is_paused": service.paused is not None}

    @router.post("/abort_requests")
    async def abort_requests(body: AbortRequest | None = None):
        ids = body.request_ids if body else None
        return {"status": "aborted", "aborted": await service.abort(ids or None)}

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache(reset_running_requests: bool = False):
        return {"success": await service.reset_prefix_cache(reset_running_requests)}


def _add_updating(router: APIRouter, service: Service) -> None:
    weights = service.weights

    @router.get("/weight_info")
    async def weight_info():
        return {"weight_version": service.version}

    @router.post("/start_weight_update")
    async def start():
        dropped = weights.is_updating
        weights.begin()
        return {"message": "staging" + (", an unfinished update was dropped" if dropped else "")}

    @router.put("/weights/{bucket}")
    async def put_bucket(bucket: str, request: Request):
        body = await _verified_body(bucket, request)
        count = await asyncio.to_thread(weights.stage, bucket, body)
        return {"message": f"bucket {bucket}: {count} tensors staged"}

    @router.post("/update_weights")
    async def update_from_disk(body: UpdateRequest):
        count = await asyncio.to_thread(weights.stage_directory, body.update_info.path)
        return {"message": f"{count} tensors staged"}

    @router.post("/finish_weight_update")
    async def finish(body: FinishRequest):
        if not weights.is_updating and body.weight_version == service.version:
            return {"message": "already served", "weight_version": service.version, "swap_seconds": 0.0}
        try:
            seconds = await service.publish_staged(body.weight_version)
        except Exception:
            service.metrics.add("weight_updates_total", outcome="refused")
            raise
        service.metrics.add("weight_updates_total", outcome="ok")
        log.info("now serving %s; nothing was generated for %.1f ms", body.weight_version, 1e3 * seconds)
        return {"message": "swapped", "weight_version": service.version, "swap_seconds": seconds}

    @router.post("/abort_weight_update")
    async def abort():
        weights.abort()
        return {"message": "nothing is staged", "weight_version": service.version}

    @router.post("/weight_checker")
    async def check(_: CheckRequest) -> dict[str, Any]:
        sums = await service.checksums()
        return {"checksums": {CHECKSUM_PREFIX + name: value for name, value in sums.items()}}


async def _verified_body(bucket: str, request: Request) -> bytes:
    """The whole body, equal to the sha256 that the header X-Content-SHA256 promised."""
    digest, parts = hashlib.sha256(), []
    try:
        async for part in request.stream():
            digest.update(part)
            parts.append(part)
    except ClientDisconnect:
        raise Refusal(400, f"bucket {bucket}: the connection ended inside the body") from None
    promised = request.headers.get("x-content-sha256", "")
    if digest.hexdigest() != promised.lower():
        raise Refusal(
            400,
            f"bucket {bucket}: sha256 of the body is {digest.hexdigest()}, header X-Content-SHA256 says '{promised}'",
        )
    return b"".join(parts)
