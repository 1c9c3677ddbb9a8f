"""Sleeping: the server gives the memory of its weights and of its cache back, and takes each again when asked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from fastapi import APIRouter, Query

from opsd_megatron.server.refusal import Refusal

if TYPE_CHECKING:
    from opsd_megatron.server.service import PauseMode, Service

Memory = Literal["weights", "kv_cache"]


class Sleep:
    """Which memory of `service` is given back.

    While any is, the engine is frozen and requests are refused. Weights that were dropped come back without content:
    then everything stays as it is until an update has filled them.
    """

    def __init__(self, service: "Service"):
        self._service = service
        self.asleep: frozenset[Memory] = frozenset()
        self._is_frozen = False

    @property
    def is_held(self) -> bool:
        """Nothing may run."""
        return bool(self.asleep) or self._service.weights.is_hollow

    def check_awake(self) -> None:
        if self.asleep:
            raise Refusal(503, f"the server sleeps ({', '.join(sorted(self.asleep))}); POST /wake_up first")
        if self._service.weights.is_hollow:
            raise Refusal(503, "the weights hold nothing since the server slept; publish weights first")

    async def sleep(self, level: int, mode: "PauseMode") -> None:
        """Level 1 keeps the weights in host memory, 2 drops them. `mode` says what becomes of requests in flight."""
        service = self._service
        async with service.control:
            if not self._is_frozen:
                await self._stand_still(mode)
            if "kv_cache" not in self.asleep:
                await service.in_engine_thread(service.engine.release_cache)
            self.asleep = frozenset(("kv_cache", *self.asleep))
            await service.in_engine_thread(lambda: service.weights.release(keep=level == 1))
            self.asleep = frozenset(get_args(Memory))
            service.turn_away_who_waits()

    async def wake(self, what: Sequence[Memory] | None) -> None:
        """None wakes all."""
        service = self._service
        async with service.control:
            for memory in self.asleep & frozenset(what or get_args(Memory)):
                take = service.weights.restore if memory == "weights" else service.engine.restore_cache
                await service.in_engine_thread(take)
                self.asleep -= {memory}
            await self.go_on()

    async def go_on(self) -> None:
        """The engine runs again, if nothing sleeps and the weights hold something."""
        if self._is_frozen and not self.is_held:
            await self._service.in_engine_thread(self._service.engine.thaw)
            self._is_frozen = False
            self._service.open_gate()

    async def _stand_still(self, mode: "PauseMode") -> None:
        service = self._service
        service.close_gate()
        try:
            if mode == "wait" and service.paused is None:
                await service.until_idle()
            await service.in_engine_thread(service.engine.freeze)
        except BaseException:
            service.open_gate()
            raise
        self._is_frozen = True
        if mode == "abort":
            service.end_all()


def sleep_routes(service: "Service") -> APIRouter:
    router = APIRouter()

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

    return router
