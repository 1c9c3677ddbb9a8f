"""A server that answers one request in a chosen wrong way; run as a process of its own."""

import json
import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

INFO = {
    "server_id": "s1",
    "engine": "fast",
    "seeded": False,
    "dtype": "float32",
    "vocab_size": 50,
    "max_model_len": 64,
    "weight_version": "v1",
}


def good_reply(request: dict) -> dict:
    count = request["sampling_params"]["max_tokens"]
    choice = {
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": [7] * count,
        "weight_versions": [{"version": "v1", "start": 0, "end": count}],
        "logprobs": {"content": [{"token_id": 7, "logprob": -1.5} for _ in range(count)]},
    }
    return {
        "request_id": "generate-tokens-" + request["request_id"],
        "server_id": "s1",
        "usage": {"prompt_tokens": len(request["token_ids"]), "completion_tokens": count, "total_tokens": 0},
        "choices": [{"index": index, **choice} for index in range(request["sampling_params"]["n"])],
    }


def _first(reply: dict) -> dict:
    return reply["choices"][0]


def _set(reply: dict, **values) -> None:
    _first(reply).update(values)


NONSENSE = {
    "nan": lambda reply: _first(reply)["logprobs"]["content"][0].update(logprob=float("nan")),
    "positive logprob": lambda reply: _first(reply)["logprobs"]["content"][1].update(logprob=0.01),
    "logprob of another token": lambda reply: _first(reply)["logprobs"]["content"][1].update(token_id=8),
    "missing logprob": lambda reply: _first(reply)["logprobs"]["content"].pop(),
    "missing logprobs": lambda reply: _set(reply, logprobs=None),
    "id outside of the vocabulary": lambda reply: _set(reply, token_ids=[7, 50, 7]),
    "text instead of ids": lambda reply: _set(reply, token_ids=["a", "b", "c"]),
    "too few samples": lambda reply: reply["choices"].clear(),
    "samples out of order": lambda reply: _set(reply, index=1),
    "empty response": lambda reply: _set(reply, token_ids=[], logprobs={"content": []}, weight_versions=[]),
    "cut short": lambda reply: (
        _set(reply, token_ids=[7], weight_versions=[{"version": "v1", "start": 0, "end": 1}]),
        _first(reply)["logprobs"].update(content=[{"token_id": 7, "logprob": -1.0}]),
    ),
    "gap in the spans": lambda reply: _set(
        reply, weight_versions=[{"version": "a", "start": 0, "end": 1}, {"version": "b", "start": 2, "end": 3}]
    ),
    "spans too short": lambda reply: _set(reply, weight_versions=[{"version": "v1", "start": 0, "end": 2}]),
    "unknown finish reason": lambda reply: _set(reply, finish_reason="bored"),
    "another request": lambda reply: reply.update(request_id="generate-tokens-other"),
    "another prompt length": lambda reply: reply["usage"].update(prompt_tokens=1),
    "boolean for a number": lambda reply: reply["usage"].update(prompt_tokens=True),
}
RAW = {
    "no json": b"<html>hello</html>",
    "half of the json": b'{"request_id": "generate-tokens-r", "choi',
    "a list": b"[1, 2]",
    "nothing": b"",
}


class _Answer(BaseHTTPRequestHandler):
    way: str
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(200, json.dumps(INFO).encode())

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.way in RAW:
            self._send(200, RAW[self.way])
        elif self.way == "slow":
            time.sleep(5)
        elif self.way.isdigit():
            self._send(int(self.way), json.dumps({"error": {"message": f"status {self.way}"}}).encode())
        else:
            reply = good_reply(request)
            if self.way != "good":
                NONSENSE[self.way](reply)
            self._send(200, json.dumps(reply).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


def _serve_all(servers: list[ThreadingHTTPServer]) -> None:
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    time.sleep(3600)


@contextmanager
def misbehaving_servers(ways: list[str]) -> Iterator[dict[str, str]]:
    """URL of a server for each way; all in one process."""
    servers = {way: ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (_Answer,), {"way": way})) for way in ways}
    process = multiprocessing.get_context("fork").Process(
        target=_serve_all, args=(list(servers.values()),), daemon=True
    )
    process.start()
    try:
        yield {way: f"http://127.0.0.1:{server.server_port}" for way, server in servers.items()}
    finally:
        process.kill()
        process.join()
        for server in servers.values():
            server.server_close()
