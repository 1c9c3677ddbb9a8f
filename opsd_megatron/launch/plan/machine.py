"""Machines to plan for."""

from dataclasses import dataclass
from typing import Literal

GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """Equal nodes of equal devices. Rates are peaks of the data sheet, of one device and one direction."""

    nodes: int
    """Nodes of the run; the inference server is elsewhere."""
    devices: int
    """Devices (ranks) of one node."""
    memory_gib: float
    """Memory of one device; on a CPU one rank's share of host memory."""
    peak_flops: float
    """Dense bfloat16 FLOP/s of one device."""
    node_link: float
    """Bytes per second from one device to others of its node."""
    network_link: float
    """Bytes per second from one device to other nodes."""
    host_gib: float
    """Host memory of one node."""
    headroom_gib: float = 4.0
    """Left free on each device: CUDA context, NCCL's channels, fragmentation. None of these is predicted."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Decides which kernels run, and so which tensors they keep and need."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.devices

    @property
    def usable_bytes(self) -> float:
        return (self.memory_gib - self.headroom_gib) * GIB

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    def link(self, span: int) -> float:
        """Bytes per second between ranks of which neighbours on the axis span `span` consecutive global ranks."""
        return self.node_link if span <= self.devices else self.network_link


def _cuda(memory_gb: float, peak: float, nvlink: float, host_gib: float) -> Machine:
    return Machine(1, 8, memory_gb * 1e9 / GIB, peak, nvlink, 50e9, host_gib)


MACHINES = {
    "a100-80gb": _cuda(80, 312e12, 300e9, 1024),
    "h100-80gb": _cuda(80, 989e12, 450e9, 2048),
    "h200-141gb": _cuda(141, 989e12, 450e9, 2048),
    "cpu-2-cores": Machine(1, 2, 12, 160e9, 5e9, 1e9, 24, headroom_gib=1, device="cpu"),
}
"""NVLink per direction, 400 Gbit/s of network for each GPU. The CPU: float32 matrix products with two threads."""
