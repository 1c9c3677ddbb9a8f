"""What the clients of all servers share: concurrent requests, a gate that is shut while the server is paused."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import NoReturn, Self, TypeVar

import httpx
from torch import Tensor

from opsd_megatron.rollout.backend import (
    GenerateRequest,
    GenerateResult,
    PauseMode,
    ServerRefused,
    ServerUnreachable,
    Unsupported,
)
from opsd_megatron.rollout.http import CONNECT_S, Http
from opsd_megatron.rollout.probe import Routes, kind_of, probe_request, started_at
from opsd_megatron.rollout.replies import LogprobKind

UPDATE_S = 300.0
POLL_S = 0.2
Item, Result = TypeVar("Item"), TypeVar("Result")


class Client:
    """The part of a RolloutBackend that does not depend on the server's dialect; retries are those of `Http`."""

    def __init__(
        self,
        url: str,
        token: str,
        *,
        admin_token: str | None = None,
        timeout_s: float = 120.0,
        retry_s: float = 120.0,
        max_concurrent: int = 64,
    ):
        """`timeout_s`: longest wait for a reply; `max_concurrent`: requests that are open at once.

        `admin_token` goes to the routes that change the server, `token` (where there is no other) to all.
        """
        self.http = Http(url, token, admin_token, timeout_s, retry_s)
        self.url = self.http.url
        self._pool = ThreadPoolExecutor(max_concurrent, thread_name_prefix="rollout")
        self._gate: Gate | NoGate = Gate(self._is_paused, self.url, retry_s)
        self._stopped_by_update = False

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def health(self) -> bool:
        try:
            return self.http.once("GET", "/health", timeout=CONNECT_S).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_until_healthy(self, timeout_s: float) -> None:
        """ServerUnreachable if the server is not ready in time."""
        deadline = time.monotonic() + timeout_s
        while not self.health():
            if time.monotonic() > deadline:
                raise ServerUnreachable(f"no healthy server at {self.url} within {timeout_s:.0f} s; look at its log")
            time.sleep(0.1)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        for request in requests:
            self._check_kind(request)
        return self._each(lambda request: self._ask(request, self._kind), requests)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._each(lambda ids: self._score_one(ids) if len(ids) > 1 else [], sequences)

    def pause(self, mode: PauseMode) -> None:
        raise NotImplementedError

    def resume(self) -> None:
        raise NotImplementedError

    def push(self, bucket: Mapping[str, Tensor]) -> None:
        raise Unsupported(f"{self.url} takes weights from a disk or a group, not through HTTP")

    def _ask(self, request: GenerateRequest, kind: LogprobKind) -> GenerateResult:
        """What came back for one request, its log-probs taken to be of that kind."""
        raise NotImplementedError

    def _score_one(self, sequence: Sequence[int]) -> list[float]:
        raise NotImplementedError

    def _check_kind(self, request: GenerateRequest) -> None:
        """Unsupported where the server's log-probs would not be those of the samples."""

    def _need_pause(self) -> None:
        """ServerRefused, for servers that change their weights in place, unless they stand still."""
        if not self._is_paused():
            raise ServerRefused(f"{self.url} would change its weights under running requests; pause it first")

    def _is_paused(self) -> bool:
        raise NotImplementedError

    @cached_property
    def _routes(self) -> Routes:
        return Routes(self.http)

    @cached_property
    def _kind(self) -> LogprobKind:
        """No route of a server in production says so: measured once."""
        return kind_of(self._ask(probe_request(), "processed").samples[0].logprobs)

    @cached_property
    def _server_id(self) -> str:
        return f"{self.url}@{started_at(self.http)}"

    def _ask_identity(self) -> str:
        """Asked again: the server may have been restarted."""
        self.__dict__.pop("_server_id", None)
        return self._server_id

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """Pauses a server that runs, and resumes it after success; after an error it stays paused, and the next success
        resumes it."""
        is_paused = self._is_paused()
        self._stopped_by_update |= not is_paused
        if not is_paused:
            self.pause("keep")
        yield
        if self._stopped_by_update:
            self.resume()
            self._stopped_by_update = False

    def _each(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Results in order; after an error what has not begun is dropped."""
        futures = [self._pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


class Gate:
    """Holds requests back while the server is paused, for servers that leave requests hanging then."""

    def __init__(self, is_paused: Callable[[], bool], url: str, wait_s: float):
        """`is_paused` asks the server, which others may have paused."""
        self._ask, self._url, self._wait_s = is_paused, url, wait_s
        self._changed = threading.Condition()
        self._shut, self._inside = False, 0

    @property
    def is_shut(self) -> bool:
        return self._shut

    def shut(self, *, drain: bool = False) -> None:
        """Lets no further request pass; with `drain` returns once those that had passed have their replies."""
        with self._changed:
            self._shut = True
            if drain:
                self._changed.wait_for(lambda: not self._inside)

    def open(self) -> None:
        with self._changed:
            self._shut = False
            self._changed.notify_all()

    def __enter__(self) -> None:
        deadline = time.monotonic() + self._wait_s
        with self._changed:
            if not self._changed.wait_for(lambda: not self._shut, timeout=self._wait_s):
                self._give_up()
            self._inside += 1
        try:
            while self._ask():
                if time.monotonic() > deadline:
                    self._give_up()
                time.sleep(POLL_S)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def _give_up(self) -> NoReturn:
        raise ServerUnreachable(f"{self._url} has been paused for {self._wait_s:.0f} s; who paused it? Call resume()")


class NoGate:
    """In place of a Gate, for servers that answer while they are paused."""

    is_shut = False

    def shut(self, *, drain: bool = False) -> None: ...

    def open(self) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_) -> None: ...
