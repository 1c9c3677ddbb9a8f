"""A proxy in front of real servers, in a process of its own, that spoils their traffic in chosen ways."""

import asyncio
import json
import multiprocessing
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

GENERATE = "/inference/v1/generate"


@dataclass(frozen=True)
class Fault:
    """`kind` for the next `times` requests whose path starts with `path`."""

    kind: str
    path: str = GENERATE
    times: int = 10**9


def _truncate(body: bytes) -> bytes:
    return body[: len(body) // 2]


def _shorten(body: bytes) -> bytes:
    reply = json.loads(body)
    reply["choices"][0]["token_ids"].pop()
    return json.dumps(reply).encode()


def _nan(body: bytes) -> bytes:
    reply = json.loads(body)
    reply["choices"][0]["logprobs"]["content"][0]["logprob"] = float("nan")
    return json.dumps(reply).encode()


SPOIL: dict[str, Callable[[bytes], bytes]] = {"truncated": _truncate, "short": _shorten, "nan": _nan}
STATUS = {
    "503": (503, {"error": {"message": "busy"}}),
    "500": (500, {"error": {"message": "out of memory"}}),
    "401": (401, {"error": "Unauthorized"}),
}


class Faults:
    """The test's end: sets what goes wrong at which server."""

    def __init__(self, urls: Sequence[str], control: Connection):
        self.urls, self._control = urls, control

    def set(self, server: int, fault: Fault | None) -> None:
        """None: the traffic is left alone from now on."""
        self._control.send((server, fault))
        assert self._control.recv() == "ok"

    def hits(self, server: int) -> int:
        """Requests that were spoilt since the last `set`."""
        self._control.send((server, "hits"))
        return self._control.recv()


class _Line:
    """The way to one server."""

    def __init__(self, port: int):
        self.port = port
        self.fault: Fault | None = None
        self.hits = 0
        self.writers: set[asyncio.StreamWriter] = set()

    def set(self, fault: Fault | None) -> None:
        self.fault, self.hits = fault, 0
        if fault is not None and fault.kind == "cut":
            for writer in self.writers:
                writer.transport.abort()

    def spoils(self, path: str) -> str | None:
        fault = self.fault
        if fault is None or self.hits >= fault.times or not path.startswith(fault.path):
            return None
        self.hits += 1
        return fault.kind

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            while (request := await _read_message(reader)) is not None:
                kind = self.spoils(request[0].split(b" ")[1].decode())
                if kind == "cut":
                    break
                await self._answer(kind, *request, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.writers.discard(writer)
            writer.transport.abort()

    async def _answer(self, kind: str | None, first: bytes, headers: bytes, body: bytes, writer) -> None:
        if kind == "hang":
            await asyncio.sleep(3600)
        if kind in STATUS:
            status, content = STATUS[kind]
            writer.write(_message(b"HTTP/1.1 %d Spoilt" % status, json.dumps(content).encode()))
            await writer.drain()
            return
        line, reply_headers, reply = await self._forward(first, headers, body, slowly=kind == "slow client")
        if kind == "lost reply":
            raise ConnectionResetError
        if kind in SPOIL:
            writer.write(_message(line, SPOIL[kind](reply)))
        else:
            writer.write(line + b"\r\n" + reply_headers + b"\r\n" + reply)
        await writer.drain()

    async def _forward(self, first: bytes, headers: bytes, body: bytes, slowly: bool) -> tuple[bytes, bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(first + b"\r\n" + headers + b"\r\n")
            pieces = [body[start : start + 100] for start in range(0, len(body), 100)] if slowly else [body]
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.1 if slowly else 0)
            reply = await _read_message(reader)
            if reply is None:
                raise ConnectionResetError
            return reply
        finally:
            writer.close()


async def _read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes, bytes] | None:
    """(first line, header lines, body) of a request or reply that declares its length; None at the end."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, _, headers = head[:-2].partition(b"\r\n")
    length = 0
    for header in headers.split(b"\r\n"):
        name, _, value = header.partition(b":")
        length = int(value) if name.lower() == b"content-length" else length
    return first, headers, await reader.readexactly(length)


def _message(first: bytes, body: bytes) -> bytes:
    return first + b"\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body


async def _run(listeners: Sequence[socket.socket], upstream: Sequence[int], control: Connection) -> None:
    lines = [_Line(port) for port in upstream]
    for listener, line in zip(listeners, lines, strict=True):
        await asyncio.start_server(line.serve, sock=listener, limit=1 << 26)
    while True:
        number, order = await asyncio.get_running_loop().run_in_executor(None, control.recv)
        if order == "hits":
            control.send(lines[number].hits)
        else:
            lines[number].set(order)
            control.send("ok")


def _start(listeners: Sequence[socket.socket], upstream: Sequence[int], control: Connection) -> None:
    with suppress(EOFError):
        asyncio.run(_run(listeners, upstream, control))


@contextmanager
def proxied(upstream: Sequence[int]) -> Iterator[Faults]:
    """A proxy for each port of `upstream`."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in upstream]
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_start, args=(listeners, upstream, theirs), daemon=True
    )
    process.start()
    try:
        yield Faults([f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in listeners], ours)
    finally:
        process.kill()
        process.join()
        for listener in listeners:
            listener.close()
