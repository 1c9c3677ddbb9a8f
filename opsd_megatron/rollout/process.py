"""An inference server beside a run: started, waited for, and stopped with it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from opsd_megatron.errors import ConfigError
from opsd_megatron.rollout.backend import ServerUnreachable
from opsd_megatron.rollout.embedded import EmbeddedBackend

STOP_S = 15.0


class ServerProcess:
    """`python -m opsd_megatron.server` as a child process that cannot outlive this one.

    As a context manager it is ready inside the block and gone after it. Its standard input is a pipe: when this
    process dies, whatever the cause, the pipe closes and the server stops.
    """

    def __init__(
        self,
        model: Path,
        token: str,
        log_path: Path,
        *,
        port: int = 0,
        engine: str = "fast",
        dtype: str = "float32",
        threads: int | None = None,
        arguments: Sequence[str] = (),
        token_variable: str = "OPSD_SERVER_TOKEN",
        start_timeout_s: float = 180.0,
    ):
        """`port` 0 takes a free one; `arguments` are further flags of the server."""
        self._reservation = None if port else reserve_port()
        self.port = self._reservation.getsockname()[1] if self._reservation else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.token, self.log_path, self.start_timeout_s = token, log_path, start_timeout_s
        self._command = [sys.executable, "-m", "opsd_megatron.server", "--model", str(model), "--port", str(self.port)]
        self._command += ["--engine", engine, "--dtype", dtype, "--token-variable", token_variable]
        self._command += ["--stop-with-parent", *arguments]
        self._environment = os.environ | {token_variable: token, "TOKENIZERS_PARALLELISM": "false"}
        if threads:
            self._environment["OMP_NUM_THREADS"] = str(threads)
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "ServerProcess":
        if self._process is None:
            self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def backend(self, **arguments) -> EmbeddedBackend:
        """A client of this server; `arguments` as for EmbeddedBackend."""
        return EmbeddedBackend(self.url, self.token, **arguments)

    def start(self) -> None:
        """Returns when the server is ready; ConfigError where it refuses its options, with the reason from its log."""
        self.launch()
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def launch(self) -> None:
        """Starts the process and does not wait for it to be ready."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # ctrl-C reaches the run, which stops the server when it is done with it
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        with self.backend() as backend:
            while not backend.health():
                code = self._process.poll() if self._process else None
                if code is not None:
                    kind = ConfigError if code == 2 else ServerUnreachable
                    raise kind(f"the server ended with exit code {code} while starting; {self._last_words()}")
                if time.monotonic() > deadline:
                    raise ServerUnreachable(
                        f"the server was not ready within {self.start_timeout_s:.0f} s; {self._last_words()}"
                    )
                time.sleep(0.1)

    def stop(self) -> int | None:
        """Its exit code; asks first, and kills what does not end in time."""
        process, self._process = self._process, None
        if self._reservation:
            self._reservation.close()
        if process is None:
            return None
        if process.stdin:
            process.stdin.close()
        process.terminate()
        try:
            return process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _last_words(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines() if self.log_path.exists() else []
        return f"log {self.log_path} ends with: " + " | ".join(lines[-3:])


def start_server(model: Path, token: str, log_path: Path, **options) -> ServerProcess:
    """A running, ready server, to be used as a context manager or stopped with `.stop()`; options of ServerProcess."""
    server = ServerProcess(model, token, log_path, **options)
    server.start()
    return server


def reserve_port() -> socket.socket:
    """A free port on 127.0.0.1, for a server that sets SO_REUSEADDR: bound, not listening, the server's until closed.

    A port that was only looked up may be anybody's by the time the server has started.
    """
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind(("127.0.0.1", 0))
    return reservation
