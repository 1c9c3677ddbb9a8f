"""The servers that the conformance cases run against, each in a process of its own, started at first use."""

import atexit
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from opsd_megatron.rollout.connect import connect
from opsd_megatron.rollout.process import reserve_port
from tests.server.serving import TOKEN, served, shared_servers

ADMIN = "admin-token-of-the-tests"
FAKES = {
    "vllm": ["fake_vllm.py", "--nccl"],
    "vllm-completions": ["fake_vllm.py", "--without-scale-out"],
    "vllm-raw": ["fake_vllm.py", "--logprobs", "raw"],
    "sglang": ["fake_sglang.py"],
    "sglang-raw": ["fake_sglang.py", "--logprobs", "raw", "--without-openapi"],
}


@dataclass
class Subject:
    """A server that serves weights `old`, and how to reach it."""

    url: str
    kind: str
    admin_token: str = TOKEN
    paths: dict[str, str] = field(default_factory=lambda: {"old": "old", "new": "new", "broken": "broken"})

    def connect(self, token: str = TOKEN, **options) -> Any:
        options = {"admin_token": self.admin_token, "retry_s": 20.0, "timeout_s": 30.0, "max_concurrent": 8} | options
        return connect(self.url, token, kind=self.kind, **options)  # type: ignore[arg-type]

    def violations(self) -> list[str]:
        """Rules of the server that a client broke since the start."""
        if self.kind == "embedded":
            return []
        return httpx.get(self.url + "/violations", trust_env=False).json()


@cache
def fake(name: str) -> Subject:
    script, *flags = FAKES[name]
    reservation = reserve_port()
    port = reservation.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name(script)), "--port", str(port), *flags]
    process = subprocess.Popen([*command, "--token", TOKEN, "--admin-token", ADMIN])
    atexit.register(process.kill)
    atexit.register(reservation.close)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            httpx.get(url + "/violations", trust_env=False)
            return Subject(url, name.split("-")[0], ADMIN)
        except httpx.TransportError:
            assert process.poll() is None, f"{script} ended"
            time.sleep(0.05)
    raise AssertionError(f"{script} did not start")


@contextmanager
def serving(name: str) -> Iterator[Subject]:
    """The named server, awake and running on its old weights."""
    if name.startswith("embedded-"):
        with served(shared_servers()[name.removeprefix("embedded-")], "old") as server:
            yield Subject(server.url, "embedded")
        return
    subject = fake(name)
    with subject.connect(ready_s=0) if subject.kind == "vllm" else _unpaused(subject) as backend:
        backend.resume()
        if backend.weight_version() != "old":
            backend.update_from_disk("old", "old")
    yield subject


def _unpaused(subject: Subject) -> Any:
    """SGLang is not healthy while it is paused."""
    httpx.post(
        subject.url + "/continue_generation",
        json={"torch_empty_cache": True},
        headers={"Authorization": f"Bearer {subject.admin_token}"},
        trust_env=False,
    )
    return subject.connect()
