"""A safetensors file: its header, and its bytes read at known places without mapping the file into memory."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd_megatron.errors import CheckpointError
from opsd_megatron.safetensors_header import Entry, parse_header


@dataclass(frozen=True)
class Header:
    entries: Mapping[str, Entry]
    num_bytes: int
    """Where in the file the first tensor begins."""


def read_header(path: Path) -> Header:
    """CheckpointError where the file is missing or cut, or its header makes no sense."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 + length:
                raise ValueError(f"its header has {length} bytes, the file {size}")
            return Header(parse_header(file.read(length), size - 8 - length), 8 + length)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is cut or not a safetensors file: {error}; fetch it again") from error


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
