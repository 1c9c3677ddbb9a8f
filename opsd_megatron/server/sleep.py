"""Sleeping: the server gives the memory of its weights and of its cache back, and takes each again when asked."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args

from opsd_megatron.server.engine import Engine
from opsd_megatron.server.in_flight import InFlight
from opsd_megatron.server.refusal import Refusal
from opsd_megatron.server.requests import PauseMode
from opsd_megatron.server.weights import WeightStore

Memory = Literal["weights", "kv_cache"]


class Served(Protocol):
    """What sleeping needs of the service."""

    engine: Engine
    weights: WeightStore
    paused: PauseMode | None
    control: asyncio.Lock
    requests: InFlight

    async def in_engine_thread(self, function: Callable[[], Any]) -> Any: ...

    def open_gate(self) -> None: ...

    def close_gate(self) -> None: ...

    def turn_away_who_waits(self) -> None: ...


class Sleep:
    """Which memory of `service` is given back.

    While any is, the engine is frozen and requests are refused. Weights that were dropped come back without content:
    then everything stays as it is until an update has filled them.
    """

    def __init__(self, service: Served):
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

    async def sleep(self, level: int, mode: PauseMode) -> None:
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

    async def _stand_still(self, mode: PauseMode) -> None:
        service = self._service
        service.close_gate()
        try:
            if mode == "wait" and service.paused is None:
                await service.requests.until_idle()
            await service.in_engine_thread(service.engine.freeze)
        except BaseException:
            service.open_gate()
            raise
        self._is_frozen = True
        if mode == "abort":
            service.requests.end(service.requests)
