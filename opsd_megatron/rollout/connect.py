"""A client for the server at an address, whichever it is."""

from typing import Any, Literal

from opsd_megatron.rollout.backend import ServerRefused
from opsd_megatron.rollout.client import Client
from opsd_megatron.rollout.embedded import EmbeddedBackend
from opsd_megatron.rollout.http import Http
from opsd_megatron.rollout.probe import Routes
from opsd_megatron.rollout.sglang import SglangBackend
from opsd_megatron.rollout.vllm import VllmBackend

ServerKind = Literal["auto", "embedded", "vllm", "sglang"]
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
    client: Any = BACKENDS.get(kind, Client)(url, token, admin_token=admin_token, **options)
    try:
        client.wait_until_healthy(ready_s)
        if kind != "auto":
            return client
        found = _kind_of_server(client.http)
    except BaseException:
        client.close()
        raise
    client.close()
    return BACKENDS[found](url, token, admin_token=admin_token, **options)


def _kind_of_server(http: Http) -> str:
    routes = Routes(http)
    for kind, mark in MARKS.items():
        if mark in routes:
            return kind
    raise ServerRefused(
        f"{http.url} has none of the routes {', '.join(MARKS.values())}; is it vLLM, SGLang or opsd_megatron.server?"
    )
