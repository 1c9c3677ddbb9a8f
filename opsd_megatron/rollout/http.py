"""HTTP to an inference server: one client per thread, repeated attempts, errors with a name."""

import json
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable, Container
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import httpx

from opsd_megatron.rollout.backend import MalformedReply, ServerRefused, ServerUnauthorized, ServerUnreachable

log = logging.getLogger(__name__)
CONNECT_S = 5.0
AWAY = frozenset((502, 503, 504))


class Refused(ServerRefused):
    """A final error status of the server."""

    def __init__(self, message: str, status: int = 0, body: str = ""):
        super().__init__(message)
        self.status, self.body = status, body


class Http:
    """Requests to one server. Proxy settings of the environment are not used.

    A request that meets no server, a dropped connection, a timeout, 502, 503 or 504 is repeated with growing, random
    pauses for up to `retry_s`; any other error status is final. The bearer tokens go into a header and nowhere else.
    """

    def __init__(self, url: str, token: str, admin_token: str | None, timeout_s: float, retry_s: float):
        self.url, self.retry_s = url.rstrip("/"), retry_s
        self._tokens = {False: token, True: admin_token or token}
        self._timeout_s = timeout_s
        # reading the certificates takes tens of milliseconds, and nothing here follows a redirect to another scheme
        self._tls = ssl.create_default_context() if self.url.startswith("https:") else False
        self._own, self._clients = threading.local(), []
        self._closed = threading.Event()

    def close(self) -> None:
        """Requests that other threads are making fail, and are not repeated."""
        self._closed.set()
        for client in self._clients:
            client.close()

    @property
    def _client(self) -> httpx.Client:
        """This thread's client: in a shared one a thread may close, as expired, the connection that another thread has
        just been given (httpcore 1.0.9), which then waits for its reply until the timeout."""
        if not hasattr(self._own, "client"):
            self._own.client = httpx.Client(
                base_url=self.url,
                timeout=httpx.Timeout(self._timeout_s, connect=CONNECT_S),
                trust_env=False,
                verify=self._tls,
            )
            self._clients.append(self._own.client)
        return self._own.client

    def once(self, method: str, path: str, *, admin: bool = False, **arguments) -> httpx.Response:
        """Whatever comes back from one attempt; httpx.HTTPError where nothing does."""
        headers = {"Authorization": f"Bearer {self._tokens[admin]}", **arguments.pop("headers", {})}
        return self._client.request(method, path, headers=headers, **arguments)

    def request(
        self,
        method: str,
        path: str,
        *,
        repeat: bool = True,
        around: AbstractContextManager = nullcontext(),  # noqa: B008
        admin: bool = False,
        accept: Container[int] = (200,),
        body_of: Callable[[int], Any] | None = None,
        **arguments,
    ) -> httpx.Response:
        """The reply, whose status is one of `accept`; every attempt is made inside `around`.

        `body_of` makes the JSON body of an attempt from its number, where attempts must differ.
        `repeat=False` for what must not happen twice: the first failure is final.
        """
        deadline, attempt = None, 0
        while True:
            if body_of is not None:
                arguments["json"] = body_of(attempt)
            try:
                with around:
                    response = self.once(method, path, admin=admin, **arguments)
                problem = f"status {response.status_code}: {message_of(response)}"
                if response.status_code in accept or response.status_code not in AWAY:
                    return self._checked(response, method, path, admin, accept)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            pause = random.uniform(0, min(0.25 * 2**attempt, 5.0))
            now = time.monotonic()
            deadline = deadline or now + self.retry_s  # from the first failure: a reply may take long to fail to come
            if repeat and now + pause <= deadline and not self._closed.is_set():
                log.warning("%s %s: %s; trying again", method, path, problem)
                if not self._closed.wait(pause):
                    attempt += 1
                    continue
            tried = f", for {self.retry_s:.0f} s" if repeat else ""
            raise ServerUnreachable(
                f"{method} {self.url}{path}: {problem}{tried}; is the server running, and is rollout.url its address?"
            )

    def json(self, method: str, path: str, **arguments) -> Any:
        """The parsed reply."""
        response = self.request(method, path, **arguments)
        try:
            return response.json()
        except ValueError as error:
            raise MalformedReply(
                f"{method} {self.url}{path}: the reply of {len(response.content)} bytes is not JSON ({error})"
            ) from error

    def object(self, method: str, path: str, **arguments) -> dict:
        """The parsed reply, which is a JSON object."""
        body = self.json(method, path, **arguments)
        if not isinstance(body, dict):
            raise MalformedReply(f"{method} {self.url}{path}: the reply is a {type(body).__name__}, not a JSON object")
        return body

    def _checked(
        self, response: httpx.Response, method: str, path: str, admin: bool, accept: Container[int]
    ) -> httpx.Response:
        where = f"{method} {self.url}{path}"
        if response.status_code == 401 or (response.status_code == 403 and "Unauthorized" in response.text):
            which = "admin token" if admin and self._tokens[True] != self._tokens[False] else "bearer token"
            raise ServerUnauthorized(
                f"{where}: the server does not accept this {which}; start both with the same value in the "
                "environment variable that rollout.token_variable names"
            )
        if response.status_code not in accept:
            reason = message_of(response)
            raise Refused(f"{where}: status {response.status_code}: {reason}", response.status_code, response.text)
        return response


def message_of(response: httpx.Response) -> str:
    """What an error reply says: vLLM nests it below `error`, SGLang writes `message` beside `success`."""
    try:
        body = response.json()
        error = body.get("error") or body.get("message") or body["detail"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        return response.text[:200] or "no message"
