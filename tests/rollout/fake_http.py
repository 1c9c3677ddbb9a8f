"""JSON over HTTP for the servers of the tests; standard library only."""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


class Failure(Exception):
    def __init__(self, status: int, body: Any):
        super().__init__(str(body))
        self.status, self.body = status, body


class Application:
    """Answers with `handle`; keeps requests that broke a rule in `violations`, to be read at GET /violations."""

    violations: list[str]

    def handle(self, method: str, path: str, query: dict[str, list[str]], body: Any, bearer: str) -> Any:
        raise NotImplementedError

    def serve(self, port: int) -> None:
        application = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = urlsplit(self.path)
                bearer = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                status = 200
                try:
                    if parts.path == "/violations":
                        reply = application.violations
                    else:
                        body = json.loads(raw) if raw else None
                        query = parse_qs(parts.query, keep_blank_values=True)
                        reply = application.handle(self.command, parts.path, query, body, bearer)
                except Failure as failure:
                    status, reply = failure.status, failure.body
                content = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_OPTIONS = answer

            def log_message(self, *_) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        server.daemon_threads = True
        server.serve_forever()


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser()
    result.add_argument("--port", type=int, required=True)
    result.add_argument("--token", default="")
    result.add_argument("--admin-token", default="")
    result.add_argument("--weights", default="old")
    result.add_argument("--logprobs", choices=("raw", "processed"), default="processed")
    return result
