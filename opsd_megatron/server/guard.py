"""What stands before every route: the bearer token and the size of bodies."""

import hmac
import json

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opsd_megatron.server.refusal import error_body

OPEN_PATHS = frozenset({"/health", "/version"})


class Guard:
    """ASGI middleware: 401 without the token (compared in constant time), 413 for a body over its limit."""

    def __init__(self, app: ASGIApp, token: str, body_bytes: int, bucket_bytes: int):
        """`bucket_bytes` limits PUT /weights/..., `body_bytes` everything else."""
        self.app = app
        self.expected = f"Bearer {token}".encode()
        self.body_bytes, self.bucket_bytes = body_bytes, bucket_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN_PATHS and not hmac.compare_digest(
            headers.get(b"authorization", b""), self.expected
        ):
            await _reply(send, 401, {"error": "Unauthorized"})
            return
        limit = self.bucket_bytes if scope["path"].startswith("/weights/") else self.body_bytes
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > limit:
            await _discard(receive, 2 * limit)
            await _reply(send, 413, error_body(413, too_large(declared.decode("latin-1"), limit)))
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
