"""Pausing, sleeping, and replacing the weights."""

import asyncio
import hashlib
import logging
from functools import partial
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field, model_validator
from starlette.requests import ClientDisconnect
from torch import Tensor

from opsd_megatron.server.refusal import Refusal
from opsd_megatron.server.requests import PauseMode
from opsd_megatron.server.service import Service
from opsd_megatron.server.sleep import Memory
from opsd_megatron.server.transfer import Described, InitInfo, beside_the_loop

log = logging.getLogger(__name__)
CHECKSUM_PREFIX = "dp0:pp0:pcp0:tp0:"
"""vLLM's key of the only shard."""


class AbortRequest(BaseModel):
    request_ids: list[str] | None = None


class DiskUpdate(BaseModel):
    path: str


class BroadcastUpdate(BaseModel):
    """All tensors of an update, in the order of their broadcasts."""

    names: list[str] = Field(min_length=1)
    dtype_names: list[Literal["float64", "float32", "float16", "bfloat16"]]
    shapes: list[list[Annotated[int, Field(ge=0)]]]

    @model_validator(mode="after")
    def _equally_many(self):
        if not len(set(self.names)) == len(self.names) == len(self.dtype_names) == len(self.shapes):
            raise ValueError("names must be unique, and dtype_names and shapes as many as they are")
        return self

    def described(self) -> Described:
        kinds = (getattr(torch, name) for name in self.dtype_names)
        return {
            name: (dtype, tuple(shape))
            for name, dtype, shape in zip(self.names, kinds, self.shapes, strict=True)
        }  # fmt: skip


class InitRequest(BaseModel):
    init_info: InitInfo


class UpdateRequest(BaseModel):
    update_info: DiskUpdate | BroadcastUpdate


class FinishRequest(BaseModel):
    weight_version: str = Field(min_length=1, max_length=256)


class CheckRequest(BaseModel):
    action: Literal["checksum"]


def control_routes(service: Service) -> APIRouter:
    router = APIRouter()
    _add_pausing(router, service)
    _add_updating(router, service)
    _add_groups(router, service)
    _add_sleeping(router, service)
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


def _add_sleeping(router: APIRouter, service: Service) -> None:
    @router.post("/sleep")
    async def sleep(level: Annotated[int, Query(ge=1, le=2)] = 1, mode: Literal["abort", "wait", "keep"] = "abort"):
        await service.sleep.sleep(level, mode)
        return {"status": "sleeping", "level": level}

    @router.post("/wake_up")
    async def wake_up(tags: Annotated[list[Memory] | None, Query()] = None):
        await service.sleep.wake(tags)
        return {"status": "awake", "tags": tags}

    @router.get("/is_sleeping")
    async def is_sleeping():
        return {"is_sleeping": bool(service.sleep.asleep)}


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
        room = weights.room_for(bucket, int(request.headers["content-length"]))
        await _fill(room, bucket, request)
        count = await asyncio.to_thread(weights.stage, bucket, room)
        return {"message": f"bucket {bucket}: {count} tensors staged"}

    @router.post("/update_weights")
    async def update(body: UpdateRequest):
        """From a directory, or through the transfer group: then it returns when everything has come."""
        info = body.update_info
        if isinstance(info, DiskUpdate):
            count = await asyncio.to_thread(weights.stage_directory, info.path)
        else:
            take = partial(weights.receive, info.described())
            count = await beside_the_loop(lambda: service.receiver.receive(take))
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
        service.receiver.interrupt()
        return {"message": "nothing is staged", "weight_version": service.version}

    @router.post("/weight_checker")
    async def check(_: CheckRequest) -> dict[str, Any]:
        sums = await service.checksums()
        return {"checksums": {CHECKSUM_PREFIX + name: value for name, value in sums.items()}}


def _add_groups(router: APIRouter, service: Service) -> None:
    @router.get("/get_world_size")
    async def world_size():
        return {"world_size": 1}

    @router.post("/init_weight_transfer_engine")
    async def join(body: InitRequest):
        await beside_the_loop(lambda: service.receiver.join(body.init_info))
        return {"message": f"joined {body.init_info.group_name} as rank {body.init_info.rank_offset}"}

    @router.post("/shutdown_weight_transfer_engine")
    async def leave():
        service.receiver.leave()
        return {"message": "in no transfer group"}


async def _fill(room: Tensor, bucket: str, request: Request) -> None:
    """With the whole body, equal to the sha256 that the header X-Content-SHA256 promised."""
    digest, view, done = hashlib.sha256(), room.numpy().data, 0
    try:
        async for part in request.stream():
            digest.update(part)
            view[done : done + len(part)] = part
            done += len(part)
    except ClientDisconnect:
        raise Refusal(400, f"bucket {bucket}: the connection ended inside the body") from None
    promised = request.headers.get("x-content-sha256", "")
    if digest.hexdigest() != promised.lower():
        raise Refusal(
            400,
            f"bucket {bucket}: sha256 of the body is {digest.hexdigest()}, header X-Content-SHA256 says '{promised}'",
        )
