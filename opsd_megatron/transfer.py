"""Tensors from a trainer to its inference servers, broadcast in packed buckets through a process group of their own.

Both sides use this file. The group stands beside torch.distributed's default group and leaves no global state. Its
keys in the store are those of a group that SGLang makes with `init_custom_process_group`; NCCL's unique id, which is
all that vLLM asks for, is read from the same store. Every wait ends after the timeout of the group.
"""

import base64
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from math import prod
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Kind = Literal["gloo", "nccl"]
ALIGNMENT = 64
"""Bytes. A matrix product may sum in another order where its operands lie elsewhere within a cache line."""
POLL_S = 0.0005


class TransferError(RuntimeError):
    """The group could not be formed, a member went away, or a broadcast took too long."""


def open_store(host: str, timeout_s: float) -> dist.TCPStore:
    """The store at which a group meets, on a free port of this machine; it is open as long as the object lives."""
    return dist.TCPStore(
        host, 0, None, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s), use_libuv=True
    )


def join_store(host: str, port: int, name: str, timeout_s: float) -> dist.Store:
    """The keys of group `name` in the store at that address; TransferError where nobody answers."""
    try:
        store = dist.TCPStore(host, port, None, is_master=False, timeout=timedelta(seconds=timeout_s))
    except (dist.DistError, RuntimeError) as error:
        raise TransferError(f"no store of a transfer group at {host}:{port} ({_first_line(error)})") from error
    for prefix in (name, f"{name}/"):
        store = dist.PrefixStore(prefix, store)
    return store


def nccl_unique_id(host: str, port: int, name: str, timeout_s: float) -> str:
    """The 128 bytes, in base64, that vLLM's `nccl_unique_id_b64` wants; waits until the sender has made them."""
    store = dist.PrefixStore("cuda/", join_store(host, port, name, timeout_s))
    try:
        return base64.b64encode(store.get("0")).decode()
    except (dist.DistError, RuntimeError) as error:
        raise TransferError(f"the sender made no NCCL id within {timeout_s:.0f} s ({_first_line(error)})") from error


class Member:
    """One rank of a transfer group; rank 0 sends."""

    def __init__(
        self,
        kind: Kind,
        host: str,
        port: int,
        rank: int,
        world_size: int,
        name: str,
        timeout_s: float,
        device: torch.device,
    ):
        """Blocks until all ranks are there; TransferError where they are not in time. `device` is for nccl."""
        if kind == "nccl" and device.type != "cuda":
            raise TransferError(
                f"a group of kind nccl needs a CUDA device, this process computes on {device}; take gloo"
            )
        self.device = device if kind == "nccl" else torch.device("cpu")
        self.timeout_s = timeout_s
        store = join_store(host, port, name, timeout_s)
        make = _make_nccl if kind == "nccl" else _make_gloo
        try:
            self._group = make(store, rank, world_size, host, port, timeout_s, self.device)
        except (dist.DistError, RuntimeError) as error:
            raise TransferError(
                f"rank {rank} did not meet all {world_size} ranks of transfer group {name} at {host}:{port} within "
                f"{timeout_s:.0f} s ({_first_line(error)})"
            ) from error

    def broadcast(self, flat: Tensor, go_on: Callable[[], None] = lambda: None) -> None:
        """Fills `flat`, contiguous bytes on `device`, with rank 0's; returns when they are there.

        `go_on` is called while it waits, and may raise.
        """
        if self._group is None:
            raise TransferError("this rank has left its transfer group")
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        work = None
        try:
            work = self._group.broadcast([flat], options)
            deadline = time.monotonic() + self.timeout_s
            while not work.is_completed():
                go_on()
                if time.monotonic() > deadline:
                    raise TransferError(f"a broadcast of {flat.nbytes} bytes took longer than {self.timeout_s:.0f} s")
                time.sleep(POLL_S)
            work.wait()
            if flat.is_cuda:
                torch.cuda.current_stream(flat.device).synchronize()
        except BaseException as error:
            self._give_up(work)
            if isinstance(error, RuntimeError) and not isinstance(error, TransferError):
                raise TransferError(f"a broadcast failed: {_first_line(error)}") from error
            raise

    def close(self) -> None:
        """Leaves the group; the other members' broadcasts fail."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def _give_up(self, work: dist.Work | None) -> None:
        """Leaves the group at once; a broadcast that still runs is waited for by a thread of its own, for gloo's groups
        cannot be taken down before it ends or times out."""
        group = self._group
        self.close()
        if group is not None and work is not None and not work.is_completed():
            threading.Thread(target=_wait_out, args=(group, work), daemon=True).start()


def _wait_out(group: Any, work: dist.Work) -> None:
    with suppress(RuntimeError):
        work.wait()
    del group


def _make_gloo(store: dist.Store, rank: int, size: int, host: str, port: int, timeout_s: float, _) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_own_address(host, port))]
    return dist.ProcessGroupGloo(dist.PrefixStore("cpu/", store), rank, size, options)


def _make_nccl(
    store: dist.Store, rank: int, size: int, host: str, port: int, timeout_s: float, device: torch.device
) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    # torch's watchdog ends the process when this time is over; `broadcast` gives up, and aborts, well before
    options._timeout = timedelta(seconds=4 * timeout_s)
    group = dist.ProcessGroupNCCL(dist.PrefixStore("cuda/", store), rank, size, options)
    with torch.cuda.device(device):
        group.eager_connect_single_device(device)
        group.allreduce([torch.zeros(1, device=device)]).wait()  # vLLM's warm-up: every member takes part in it
        torch.cuda.current_stream().synchronize()
    return group


def _own_address(host: str, port: int) -> str:
    """The address of this machine from which `host` is reached: its hostname may stand for another interface."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]


def packed_buckets(sizes: Sequence[int], bucket_bytes: int) -> list[range]:
    """Which neighbours, of these sizes in bytes, share a broadcast: a bucket ends right after it exceeds the limit."""
    buckets, start, held = [], 0, 0
    for index, size in enumerate(sizes):
        held += size
        if held > bucket_bytes:
            buckets.append(range(start, index + 1))
            start, held = index + 1, 0
    if start < len(sizes):
        buckets.append(range(start, len(sizes)))
    return buckets


def pack(tensors: Sequence[Tensor], room: Tensor) -> Tensor:
    """The bytes of all tensors one after another: those of a single tensor where they lie, others copied to `room`.

    A single tensor on another device than `room` is copied too.
    """
    if len(tensors) == 1 and tensors[0].device == room.device and tensors[0].is_contiguous():
        return as_bytes(tensors[0])
    start = 0
    for tensor in tensors:
        room[start : start + tensor.nbytes].copy_(as_bytes(tensor), non_blocking=True)
        start += tensor.nbytes
    if tensors[0].is_cuda and not room.is_cuda:
        torch.cuda.current_stream(tensors[0].device).synchronize()
    return room[:start]


def unpack(flat: Tensor, dtypes: Sequence[torch.dtype], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The tensors that were packed: views of `flat` where they begin at a multiple of ALIGNMENT, else copies."""
    tensors, start = [], 0
    for dtype, shape in zip(dtypes, shapes, strict=True):
        part = flat[start : start + prod(shape) * dtype.itemsize]
        start += part.nbytes
        tensors.append(aligned(part).view(dtype).view(tuple(shape)))
    return tensors


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it that begins at a multiple of ALIGNMENT bytes."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
