"""The header of a safetensors file, and its bytes read at known places without mapping the file into memory."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opsd_megatron.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class HeaderEntry:
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """Every tensor's place in a safetensors file; CheckpointError where the file is cut or its places make no sense."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 + length:
                raise ValueError(f"its header has {length} bytes, the file {size}")
            described = json.loads(file.read(length))
        described.pop("__metadata__", None)
        entries, end = {}, 0
        for name, entry in described.items():
            start, stop = entry["data_offsets"]
            entries[name] = HeaderEntry(tuple(entry["shape"]), 8 + length + start)
            end = max(end, stop)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is cut or not a safetensors file: {error}; fetch it again") from error
    if size != 8 + length + end:
        raise CheckpointError(f"{path} has {size} bytes, its header says {8 + length + end}; fetch it again")
    return entries


def read_exactly(path: Path, wanted: Any, start: int) -> None:
    """Fills a contiguous array of bytes from byte `start` of a file; CheckpointError where the file ends before."""
    view, done = memoryview(wanted), 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], start + done)
            if count == 0:
                raise CheckpointError(f"{path} ends at byte {start + done}, {len(view) - done} are missing; it is cut")
            done += count
    finally:
        os.close(descriptor)
