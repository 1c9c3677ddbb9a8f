"""A client for the server at an address, whichever it is."""

import time
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import Literal

from opsd_megatron.rollout.backend import ServerRefused, ServerUnreachable
from opsd_megatron.rollout.embedded import EmbeddedBackend
from opsd_megatron.rollout.http import Http
from opsd_megatron.rollout.probe import Routes
from opsd_megatron.rollout.sglang import SglangBackend
from opsd_megatron.rollout.vllm import VllmBackend

ServerKind = Literal["auto", "embedded", "vllm", "sglang"]
PROBE_S = 10.0
BACKENDS = {"embedded": EmbeddedBackend, "vllm": VllmBackend, "sglang": SglangBackend}
MARKS = {"embedded": "/weights/{bucket}", "sglang": "/pause_generation", "vllm": "/v1/completions"}
"""A route that tells each kind from those below it."""


def connect(
    url: str,
    token: str,
    *,
    admin_token: str | None = None,
    kind: ServerKind = "auto",
    ready_s: float = 120.0,
    **options,
) -> EmbeddedBackend | VllmBackend | SglangBackend:
    """A RolloutBackend of the server at `url` once it is healthy, within `ready_s`; `options` are those of Client.

    ServerUnreachable where nobody becomes healthy, ServerRefused where "auto" finds no server that it knows.
    """
    found = find_kind([url], token, kind, ready_s)
    client = BACKENDS[found](url, token, admin_token=admin_token, **options)
    try:
        client.wait_until_healthy(ready_s)
    except BaseException:
        client.close()
        raise
    return client


def find_kind(urls: Sequence[str], token: str, kind: ServerKind = "auto", ready_s: float = 120.0) -> str:
    """Which of BACKENDS speaks to the servers at `urls`, by the first that answers; they are all of one kind.

    ServerUnreachable where none answers in time, ServerRefused where it is no server that is known.
    """
    if kind != "auto":
        return kind
    deadline = time.monotonic() + ready_s
    while True:
        for url in urls:
            with closing(Http(url, token, None, PROBE_S, 0.0)) as http, suppress(ServerUnreachable):
                return _kind_of_server(http)
        if time.monotonic() > deadline:
            raise ServerUnreachable(f"no server at {', '.join(urls)} within {ready_s:.0f} s; look at its log")
        time.sleep(0.2)


def _kind_of_server(http: Http) -> str:
    routes = Routes(http)
    for kind, mark in MARKS.items():
        if mark in routes:
            return kind
    raise ServerRefused(
        f"{http.url} has none of the routes {', '.join(MARKS.values())}; is it vLLM, SGLang or opsd_megatron.server?"
    )
