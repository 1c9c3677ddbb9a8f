"""What a server can do, learned from the server: its routes, what it says about itself, one short generation."""

import math
import uuid
from collections.abc import Sequence

from opsd_megatron.rollout.backend import GenerateRequest
from opsd_megatron.rollout.http import Http
from opsd_megatron.rollout.replies import LogprobKind

HOT = 1e4
"""Temperature at which every token is as likely as the next."""
FLAT_NATS = 0.01
ANY = frozenset(range(200, 600)) - {401, 502, 503, 504}


class Routes:
    """Whether a server has a route: by its OpenAPI document, or by asking for the route's methods."""

    def __init__(self, http: Http):
        self._http = http
        self.document = _document(http)
        self._known: dict[str, bool] = {}

    def __contains__(self, path: str) -> bool:
        if self.document:
            return path in self.document["paths"]
        if path not in self._known:
            # a known route answers OPTIONS so, whatever its methods are, and does nothing
            self._known[path] = self._http.request("OPTIONS", path, accept=ANY).status_code in (200, 204, 405)
        return self._known[path]

    def has_all(self, *paths: str) -> bool:
        return all(path in self for path in paths)

    def fields(self, schema: str) -> frozenset[str]:
        """Of a named request body; empty where the server does not publish it."""
        schemas = self.document.get("components", {}).get("schemas", {})
        return frozenset(schemas.get(schema, {}).get("properties", {}))


def probe_request() -> GenerateRequest:
    """Eight tokens drawn evenly from the whole vocabulary."""
    name = f"opsd-probe-{uuid.uuid4().hex[:12]}"
    return GenerateRequest(name, [1, 2, 3, 4], max_tokens=8, temperature=HOT, seed=0, ignore_eos=True)


def kind_of(logprobs: Sequence[float]) -> LogprobKind:
    """From the reply to `probe_request`: after the temperature all log-probs are equal, before it they are not."""
    return "processed" if max(logprobs) - min(logprobs) < FLAT_NATS else "raw"


def started_at(http: Http) -> str:
    """The start of the server's process, from its metrics; empty where it does not publish any."""
    reply = http.request("GET", "/metrics", accept=ANY)
    values = [line.split()[-1] for line in reply.text.splitlines() if line.startswith("process_start_time_seconds ")]
    return values[0] if reply.status_code == 200 and values and math.isfinite(float(values[0])) else ""


def _document(http: Http) -> dict:
    """The OpenAPI document; empty where the server publishes none."""
    reply = http.request("GET", "/openapi.json", accept=ANY)
    try:
        body = reply.json() if reply.status_code == 200 else {}
    except ValueError:
        body = {}
    return body if isinstance(body, dict) and isinstance(body.get("paths"), dict) else {}
