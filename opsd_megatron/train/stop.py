"""SIGTERM and ctrl-C as a request: the step is finished, a checkpoint written, nothing left running."""

import signal

import torch

from opsd_megatron.parallel.mesh import Mesh
from opsd_megatron.parallel.reduce import max_over

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Catches the signals from its creation until `restore`; a second one of the same kind acts as usual."""

    def __init__(self):
        self._received = False
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number, frame) -> None:
        self._received = True
        signal.signal(number, self._before[number])

    def anywhere(self, mesh: Mesh) -> bool:
        """Whether any rank was asked to stop; collective, the same answer everywhere."""
        return bool(max_over(torch.tensor(int(self._received), device=mesh.device), mesh.world))

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
