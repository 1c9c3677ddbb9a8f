"""The header against the safetensors library, and headers that make no sense."""

import json

import pytest
import safetensors.torch
import torch

from opsd_megatron.safetensors_header import make_header, parse_header
from opsd_megatron.transfer import ALIGNMENT

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "none": torch.empty(0, 4)}


def test_safetensors_reads_what_is_written():
    header = make_header((name, tensor.dtype, tensor.shape) for name, tensor in TENSORS.items())
    values = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in TENSORS.values())
    loaded = safetensors.torch.load(header + values)
    assert len(header) % ALIGNMENT == 0 and loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_what_safetensors_writes_is_read():
    body = safetensors.torch.save(TENSORS | {"quantised": torch.ones(3, dtype=torch.int8)}, {"format": "pt"})
    length = int.from_bytes(body[:8], "little")
    entries = parse_header(body[8 : 8 + length], len(body) - 8 - length)
    for name, tensor in TENSORS.items():
        values = body[8 + length :][entries[name].start : entries[name].stop]
        assert entries[name].shape == tuple(tensor.shape) and values == tensor.view(torch.uint8).numpy().tobytes()
    assert entries["quantised"].dtype == "I8"


@pytest.mark.parametrize(
    ("entries", "num_bytes"),
    [
        ({"a": ("F32", [2], [0, 8])}, 7),
        ({"a": ("F32", [2], [0, 8])}, 12),
        ({"a": ("F32", [2], [0, 12])}, 12),
        ({"a": ("F32", [2], [4, 12])}, 12),
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])}, 12),
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [1], [12, 16])}, 16),
        ({"a": ("F32", [-1, -2], [0, 8])}, 8),
        ({"a": ("I8", [4], [0, -4])}, -4),
        ({"a": ("F32", ["2"], [0, 8])}, 8),
        ({"a": ("F32", [2], [0])}, 8),
        ({"a": ("F32", [2], [0, 8, 9])}, 8),
    ],
    ids=["cut", "bytes behind", "too large", "late", "overlap", "gap", "negative", "backwards", "text", "one", "three"],
)
def test_places_that_make_no_sense_are_refused(entries, num_bytes):
    described = {name: dict(zip(("dtype", "shape", "data_offsets"), one, strict=True)) for name, one in entries.items()}
    with pytest.raises(ValueError, match="a"):
        parse_header(json.dumps(described).encode(), num_bytes)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"7", b'{"a": 1}', b'{"a": {}}', b"\xff\xfe\xff"])
def test_what_is_no_header_is_refused(text):
    with pytest.raises(ValueError):
        parse_header(text, 0)
