"""A second set of values for a model's parameters, in host memory, exchanged with the first bucket by bucket."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import Parameter

BUCKET_BYTES = 64 << 20
"""Pinned memory is handed out in powers of two, and a copy of this size runs at the full speed of the bus."""


class Bucket:
    """Neighbouring parameters of one dtype whose values move in one copy each way.

    On a GPU the copies are asynchronous: whoever calls puts them on streams and waits for those.
    """

    def __init__(self, parameters: Sequence[Parameter], dtype: torch.dtype):
        """The other values start as copies of the parameters', kept in `dtype`."""
        self.parameters = parameters
        self._ends = [0, *accumulate(parameter.numel() for parameter in parameters)]
        self.device = parameters[0].device
        self.other = self._on_host(dtype)
        self._own = self._on_host(parameters[0].dtype)
        self.other.copy_(self._flat())

    def pairs(self) -> Iterator[tuple[Parameter, Tensor]]:
        """Each parameter with its other value, in its shape, in host memory."""
        return zip(self.parameters, self._cut(self.other), strict=True)

    def keep_own(self) -> None:
        """The parameters' values are written down, to be shown again by `show_own`."""
        self._own.copy_(self._flat(), non_blocking=True)

    def show_other(self) -> None:
        self._show(self.other)

    def show_own(self) -> None:
        self._show(self._own)

    def average(self, rate: float) -> None:
        """other = (1 - rate) * other + rate * parameters, computed on the parameters' device."""
        mean = self.other.to(self.device)
        mean.lerp_(self._flat().to(mean.dtype), rate)
        self.other.copy_(mean)

    def _show(self, values: Tensor) -> None:
        for parameter, value in zip(self.parameters, self._cut(values.to(self.device, non_blocking=True)), strict=True):
            parameter.copy_(value)

    def _flat(self) -> Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])

    def _cut(self, flat: Tensor) -> list[Tensor]:
        return [
            flat[start:end].view(parameter.shape)
            for parameter, (start, end) in zip(self.parameters, pairwise(self._ends), strict=True)
        ]

    def _on_host(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self._ends[-1], dtype=dtype, device="cpu", pin_memory=self.device.type == "cuda")


def buckets_of(parameters: Sequence[Parameter], at_least: torch.dtype | None) -> list[Bucket]:
    """In the order of `parameters`, each of at most BUCKET_BYTES or of one larger parameter; other values are kept in
    the wider of `at_least` and the parameters' dtype."""
    groups: list[list[Parameter]] = []
    held = 0
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if not groups or held + size > BUCKET_BYTES or parameter.dtype != groups[-1][0].dtype:
            groups.append([])
            held = 0
        groups[-1].append(parameter)
        held += size
    dtypes = [group[0].dtype for group in groups]
    wider = [dtype if at_least is None else torch.promote_types(dtype, at_least) for dtype in dtypes]
    return [Bucket(group, dtype) for group, dtype in zip(groups, wider, strict=True)]


class Exchange:
    """Shows the other values of all buckets and brings the own ones back.

    On a GPU one bucket's own values leave while the other values of the one before arrive: the bus works both ways.
    """

    def __init__(self, buckets: Sequence[Bucket]):
        self._buckets = buckets
        on_gpu = bool(buckets) and buckets[0].device.type == "cuda"
        self._leaving, self._arriving = (torch.cuda.Stream(), torch.cuda.Stream()) if on_gpu else (None, None)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Other values inside; own ones again after it, bitwise, also when the exchange itself fails half way."""
        kept: list[Bucket] = []
        try:
            with torch.no_grad():
                for bucket in self._buckets:
                    with _after(self._leaving, self._now()):
                        bucket.keep_own()
                    kept.append(bucket)
                    with _after(self._arriving, self._leaving):
                        bucket.show_other()
                self._wait()
            yield
        finally:
            with torch.no_grad():
                for bucket in kept:
                    with _after(self._arriving, self._now()):
                        bucket.show_own()
                self._wait()

    def _now(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream() if self._arriving else None

    def _wait(self) -> None:
        if self._arriving:
            torch.cuda.current_stream().wait_stream(self._arriving)


@contextmanager
def _after(stream: torch.cuda.Stream | None, earlier: torch.cuda.Stream | None) -> Iterator[None]:
    """What is done inside runs on `stream` after all that is on `earlier`; at once where there are no streams."""
    if stream is None or earlier is None:
        yield
        return
    stream.wait_stream(earlier)
    with torch.cuda.stream(stream):
        yield
