"""The header of the safetensors format, written and read: names, dtypes, shapes, and where in the bytes each one is."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from opsd_megatron.transfer import ALIGNMENT

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Those that we read and write; files of others have quantised weights."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte of the tensor, counted from the end of the header."""
    stop: int


def make_header(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> bytes:
    """The length in 8 bytes, then JSON, for tensors that follow in this order without gaps.

    Padded with spaces, so that tensors of a message that is received at a multiple of ALIGNMENT can be used in place.
    """
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, dtype, shape in tensors:
        stop = start + prod(shape) * dtype.itemsize
        described[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def parse_header(text: bytes, num_bytes: int) -> dict[str, Entry]:
    """What the JSON says of the `num_bytes` behind it; ValueError unless every one of them is in exactly one tensor."""
    try:
        described = json.loads(text)
        described.pop("__metadata__", None)
        entries = {
            name: Entry(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in described.items()
        }
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            size = prod(entry.shape) * DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else entry.stop - end
            if entry.start != end or entry.stop != end + size or size < 0 or min(entry.shape, default=0) < 0:
                raise ValueError(f"tensor {name} of {entry.dtype} {list(entry.shape)} at {entry.start} to {entry.stop}")
            end = entry.stop
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its header makes no sense ({type(error).__name__} {error})") from error
    if end != num_bytes:
        raise ValueError(f"{num_bytes} bytes follow the header, it says {end}")
    return entries
