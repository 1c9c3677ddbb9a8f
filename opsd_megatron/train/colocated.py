"""Trainer and server on the same GPUs, taking turns: neither takes its memory while the other holds its own.

    trainer --release--> parked --wake weights--> loading --publish--> loaded --wake cache--> server
       ^                                                                                        |
       +------restore------ asleep <-----------------------------sleep---------------------------+

Every arrow may fail. The turn then stays where it was: the same call goes on from there, and `rescue` brings the
trainer's state back from anywhere, so that a run can save it and end.
"""

import logging
from collections.abc import Callable
from typing import Literal

from opsd_megatron.checkpoint.agreement import raise_on_all, together
from opsd_megatron.errors import ServerError
from opsd_megatron.rollout.backend import RolloutBackend, Unsupported
from opsd_megatron.train.parking import Parking

log = logging.getLogger(__name__)
Turn = Literal["trainer", "parked", "loading", "loaded", "server", "asleep"]


class Turns:
    """Whose turn it is; collective: every rank has one and makes the same calls. `backend` on global rank 0 only."""

    def __init__(self, backend: RolloutBackend | None, parking: Parking):
        """The server is asleep: `put_to_sleep` came before the trainer's model was built."""
        self._backend, self.parking = backend, parking
        self.turn: Turn = "trainer"

    def to_server(self, publish: Callable[[], object]) -> None:
        """The server answers with what `publish` sends it; a call in the server's turn only publishes."""
        if self.turn in ("trainer", "asleep"):
            together(self.parking.release)
            self.turn = "parked"
        if self.turn == "parked":
            self._ask("wake its weights", lambda backend: backend.wake(["weights"]))
            self.turn = "loading"
        was_serving = self.turn == "server"
        if not was_serving:
            self.turn = "loading"  # after a failure beyond this point the weights are sent again
        publish()
        if not was_serving:
            self.turn = "loaded"
            self._ask("wake its cache", lambda backend: backend.wake(["kv_cache"]))
            self.turn = "server"

    def to_trainer(self) -> None:
        """The trainer's state is on its device again, and the server holds nothing there."""
        if self.turn == "trainer":
            return
        if self.turn != "asleep":
            self._ask("sleep", lambda backend: backend.sleep())
            self.turn = "asleep"
        self._restore()

    def rescue(self) -> None:
        """The trainer's state back on its device, whatever has become of the server: a dead one holds no memory."""
        if self.turn == "trainer":
            return
        try:
            self._ask("sleep", lambda backend: backend.sleep())
        except ServerError as error:
            log.warning("the trainer takes its memory without knowing what the server holds: %s", error)
        self.turn = "asleep"
        self._restore()

    def _restore(self) -> None:
        try:
            together(self.parking.restore)
        except Exception as error:
            raise RuntimeError(
                f"the trainer could not take its memory back ({error}); something else holds it. Its last checkpoint "
                "is whole: free the device and resume"
            ) from error
        self.turn = "trainer"

    def _ask(self, what: str, call: Callable[[RolloutBackend], object]) -> None:
        """On rank 0; a failure is raised on every rank."""
        problem: Exception | None = None
        if self._backend is not None:
            try:
                call(self._backend)
            except ServerError as error:
                words = f"the server did not {what}: {error}. The trainer's state is safe in host memory"
                problem = type(error)(words)
            except Exception as error:
                problem = error
        raise_on_all(problem)


def put_to_sleep(backend: RolloutBackend | None) -> None:
    """Before the trainer takes any memory; collective, `backend` on global rank 0 only."""

    def ask() -> None:
        if backend is None:
            return
        if not backend.capabilities().can_sleep:
            raise Unsupported(
                "rollout.colocated=True: this server cannot give its memory back; start it so that it can (vLLM: "
                "--enable-sleep-mode, SGLang: --enable-memory-saver), or set rollout.colocated=False"
            )
        backend.sleep()

    together(ask)
