"""The client of `opsd_megatron.server`: HTTP only, so that the server may run anywhere."""

import hashlib
import json
import logging
import random
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import safetensors.torch
from torch import Tensor

from opsd_megatron.rollout.backend import (
    Capabilities,
    GenerateRequest,
    GenerateResult,
    MalformedReply,
    Memory,
    PauseMode,
    ServerInfo,
    ServerRefused,
    ServerUnauthorized,
    ServerUnreachable,
    TensorInfo,
    TransferGroup,
    Unsupported,
    UpdateLost,
)
from opsd_megatron.rollout.replies import parse_generate, parse_info

log = logging.getLogger(__name__)
CONNECT_S = 5.0
UPDATE_S = 300.0
CHECKSUM_PREFIX = "dp0:pp0:pcp0:tp0:"


class EmbeddedBackend:
    """A RolloutBackend over one server.

    A call that meets no server, a dropped connection, a timeout, 502, 503 or 504 is repeated with growing, random
    pauses for up to `retry_s`; any other error status is final. Proxy settings of the environment are not used.
    """

    def __init__(
        self, url: str, token: str, *, timeout_s: float = 120.0, retry_s: float = 120.0, max_concurrent: int = 64
    ):
        """`timeout_s`: longest wait for a reply; `max_concurrent`: requests that `generate` has open at once."""
        self.url, self.retry_s = url.rstrip("/"), retry_s
        self._bucket = 0
        self._vocab_size: int | None = None
        self._token, self._timeout_s = token, timeout_s
        self._tls = ssl.create_default_context()
        self._own, self._clients = threading.local(), []
        self._pool = ThreadPoolExecutor(max_concurrent, thread_name_prefix="rollout")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for client in self._clients:
            client.close()

    @property
    def _http(self) -> httpx.Client:
        """This thread's client: in a shared one a thread may close, as expired, the connection that another thread has
        just been given (httpcore 1.0.9), which then waits for its reply until the timeout."""
        if not hasattr(self._own, "client"):
            self._own.client = httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {self._token}"},
                timeout=httpx.Timeout(self._timeout_s, connect=CONNECT_S),
                trust_env=False,
                verify=self._tls,
            )
            self._clients.append(self._own.client)
        return self._own.client

    def __enter__(self) -> "EmbeddedBackend":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def health(self) -> bool:
        try:
            return self._http.get("/health", timeout=CONNECT_S).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_until_healthy(self, timeout_s: float) -> None:
        """ServerUnreachable if the server is not ready in time."""
        deadline = time.monotonic() + timeout_s
        while not self.health():
            if time.monotonic() > deadline:
                raise ServerUnreachable(f"no healthy server at {self.url} within {timeout_s:.0f} s; look at its log")
            time.sleep(0.1)

    def info(self) -> ServerInfo:
        return parse_info(self._call("GET", "/server_info"))

    def weight_version(self) -> str:
        return self.info().weight_version

    def tokenizer_info(self) -> dict:
        return self._call("GET", "/tokenizer_info")

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        if not requests:
            return []
        if self._vocab_size is None:
            self._vocab_size = self.info().vocab_size
        futures = [self._pool.submit(self._generate_one, request) for request in requests]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def capabilities(self) -> Capabilities:
        return Capabilities(
            logprob_kind="processed",
            seeded=self.info().seeded,
            has_spans=True,
            pause_modes=frozenset(("keep", "wait", "abort")),
            transports=frozenset(("disk", "http")),
            has_atomic_updates=True,
            has_checksum=True,
            can_score=False,
            can_sleep=True,
        )

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        raise Unsupported(f"{self.url} does not score prompts")

    def flush_cache(self) -> None:
        self._call("POST", "/reset_prefix_cache?reset_running_requests=true")

    def world_size(self) -> int:
        return 1

    def join_group(self, group: TransferGroup) -> None:
        raise Unsupported(f"{self.url} knows no {group.kind} group")

    def receive(self, tensors: Sequence[TensorInfo]) -> None:
        raise Unsupported(f"{self.url} has joined no group")

    def leave_group(self) -> None:
        pass

    def sleep(self) -> None:
        self._call("POST", "/sleep?level=2", timeout=UPDATE_S)

    def wake(self, what: Sequence[Memory]) -> None:
        self._call("POST", "/wake_up", params={"tags": list(what)}, timeout=UPDATE_S)

    def pause(self, mode: PauseMode) -> None:
        self._call("POST", f"/pause?mode={mode}", timeout=UPDATE_S)

    def resume(self) -> None:
        self._call("POST", "/resume")

    def abort(self, request_ids: Sequence[str] | None = None) -> int:
        body = {} if request_ids is None else {"request_ids": list(request_ids)}
        return int(self._call("POST", "/abort_requests", json=body)["aborted"])

    def begin_update(self, version: str) -> None:
        self._bucket = 0
        self._call("POST", "/start_weight_update", json={"weight_version": version})

    def push(self, bucket: Mapping[str, Tensor]) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in bucket.items()}
        body = safetensors.torch.save(_unshared(tensors))
        self._call(
            "PUT",
            f"/weights/{self._bucket}",
            content=body,
            headers={"X-Content-SHA256": hashlib.sha256(body).hexdigest()},
            timeout=UPDATE_S,
        )
        self._bucket += 1

    def finish_update(self, version: str) -> None:
        """A repetition after a lost reply finds its work done."""
        self._call("POST", "/finish_weight_update", json={"weight_version": version}, timeout=UPDATE_S)

    def abort_update(self) -> None:
        self._call("POST", "/abort_weight_update")

    def update_from_disk(self, path: str, version: str) -> None:
        self.begin_update(version)
        self._call("POST", "/update_weights", json={"update_info": {"path": path}}, timeout=UPDATE_S)
        self.finish_update(version)

    def checksum(self) -> dict[str, str]:
        sums = self._call("POST", "/weight_checker", json={"action": "checksum"}, timeout=UPDATE_S)["checksums"]
        return {name.removeprefix(CHECKSUM_PREFIX): value for name, value in sums.items()}

    def _generate_one(self, request: GenerateRequest) -> GenerateResult:
        assert self._vocab_size is not None
        body = self._call("POST", "/inference/v1/generate", json=as_wire(request))
        return parse_generate(body, request, self._vocab_size)

    def _call(self, method: str, path: str, **arguments) -> Any:
        """The parsed JSON of the reply."""
        deadline, attempt = None, 0
        while True:
            try:
                response = self._http.request(method, path, **arguments)
                problem = f"status {response.status_code}: {_message(response)}"
                if response.status_code not in (502, 503, 504):
                    return self._parsed(response, method, path)
            except (httpx.TransportError, httpx.RemoteProtocolError) as error:
                problem = f"{type(error).__name__}: {error}"
            pause = random.uniform(0, min(0.25 * 2**attempt, 5.0))
            now = time.monotonic()
            deadline = deadline or now + self.retry_s  # from the first failure: a reply may take long to fail to come
            if now + pause > deadline:
                raise ServerUnreachable(
                    f"{method} {self.url}{path}: {problem}, for {self.retry_s:.0f} s; is the server running, and is "
                    "rollout.url its address?"
                )
            log.warning("%s %s: %s; trying again", method, path, problem)
            time.sleep(pause)
            attempt += 1

    def _parsed(self, response: httpx.Response, method: str, path: str) -> Any:
        where = f"{method} {self.url}{path}"
        if response.status_code in (401, 403) and "Unauthorized" in response.text:
            raise ServerUnauthorized(
                f"{where}: the server does not accept this bearer token; start both with the same value in the "
                "environment variable that rollout.token_variable names"
            )
        if response.status_code == 409 and '"NoUpdateOpenError"' in response.text:
            raise UpdateLost(f"{where}: no weight update is open; did the server restart? Publish again")
        if response.status_code != 200:
            raise ServerRefused(f"{where}: status {response.status_code}: {_message(response)}")
        try:
            body = response.json()
        except ValueError as error:
            raise MalformedReply(f"{where}: the reply is not JSON ({error}): {response.text[:200]!r}") from error
        if not isinstance(body, dict):
            raise MalformedReply(f"{where}: the reply is no JSON object: {response.text[:200]!r}")
        return body


def as_wire(request: GenerateRequest) -> dict:
    """Body for /inference/v1/generate with every sampling parameter, so that no server default leaks in."""
    return {
        "request_id": request.request_id,
        "token_ids": list(request.token_ids),
        "sampling_params": {
            "n": request.n,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "min_p": request.min_p,
            "seed": request.seed,
            "stop_token_ids": list(request.stop_token_ids),
            "ignore_eos": request.ignore_eos,
            "logprobs": 0,
        },
    }


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory; tied weights may be sent under both names."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return result


def _message(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (json.JSONDecodeError, KeyError, TypeError):
        return response.text[:200] or "no message"
