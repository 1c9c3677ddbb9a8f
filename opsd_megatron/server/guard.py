"""What stands before every route: the bearer tokens and the size of bodies."""

import hmac
import json

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opsd_megatron.server.refusal import error_body

OPEN_PATHS = frozenset({"/health", "/version"})
GENERATE_PATHS = frozenset({
    "/inference/v1/generate", "/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize",
    "/tokenizer_info", "/server_info", "/weight_info", "/is_paused", "/metrics", "/openapi.json",
})  # fmt: skip
"""What the generate token opens; every other path wants the admin token."""


class Guard:
    """ASGI middleware: 401 without a token (compared in constant time), 403 where it takes the other one, 413 for a
    body over its limit."""

    def __init__(self, app: ASGIApp, token: str, admin_token: str | None, body_bytes: int, bucket_bytes: int):
        """`admin_token` opens everything; where it is None, `token` does. `bucket_bytes` limits PUT /weights/...,
        `body_bytes` everything else."""
        self.app = app
        self.expected = f"Bearer {token}".encode()
        self.expected_admin = self.expected if admin_token is None else f"Bearer {admin_token}".encode()
        self.body_bytes, self.bucket_bytes = body_bytes, bucket_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given, path = headers.get(b"authorization", b""), scope["path"]
        is_user, is_admin = hmac.compare_digest(given, self.expected), hmac.compare_digest(given, self.expected_admin)
        if path not in OPEN_PATHS and not (is_user or is_admin):
            await _reply(send, 401, {"error": "Unauthorized"})
            return
        if path not in OPEN_PATHS | GENERATE_PATHS and not is_admin:
            await _reply(send, 403, error_body(403, f"Unauthorized: {path} wants the admin token of this server"))
            return
        limit = self.bucket_bytes if path.startswith("/weights/") else self.body_bytes
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > limit:
            await _discard(receive, 2 * limit)
            await _reply(send, 413, error_body(413, too_large(declared.decode("latin-1"), limit)))
            return
        if path.startswith("/weights/") and b"content-length" not in headers:
            await _discard(receive, 2 * limit)
            await _reply(send, 411, error_body(411, "the body of a bucket has to declare its Content-Length"))
            return
        await self.app(scope, _counted(receive, limit), send)


def too_large(size: str, limit: int) -> str:
    return f"the body has {size} bytes, the limit is {limit}; send smaller buckets or raise --max-bucket-mb"


def _counted(receive: Receive, limit: int) -> Receive:
    """`receive` that refuses a body which outgrows `limit` without having declared its length."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            if message.get("more_body"):
                await _discard(receive, 2 * limit)
            raise HTTPException(413, too_large(f"over {limit}", limit))
        return message

    return counted


async def _discard(receive: Receive, at_most: int) -> None:
    """Reads some of the body away, so that a client which sends first and reads later sees the reply."""
    seen = 0
    while seen <= at_most:
        message = await receive()
        seen += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


async def _reply(send: Send, status: int, body: dict) -> None:
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": content})
