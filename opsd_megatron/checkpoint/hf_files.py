"""Reading and writing model directories in Hugging Face layout, one tensor or slice at a time.

Everything that can be wrong with such a directory is a CheckpointError that names the file and the tensor.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opsd_megatron.checkpoint.safetensors_file import read_exactly, read_header
from opsd_megatron.checkpoint.weight_map import IGNORABLE_SUFFIXES, weights_of
from opsd_megatron.errors import CheckpointError
from opsd_megatron.models.architecture import Architecture
from opsd_megatron.safetensors_header import DTYPES, Entry

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class HfReader:
    """The tensors of a directory: `model.safetensors`, or shards with their index.

    Opening reads every header, so a missing or cut shard is found before any weight is used.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        index = self.directory / INDEX_FILE
        listed = _read_index(index) if index.exists() else None
        if listed is None and not (self.directory / SINGLE_FILE).exists():
            raise CheckpointError(
                f"{self.directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; "
                "give a directory with safetensors weights (convert .bin files with transformers' save_pretrained)"
            )
        files = [SINGLE_FILE] if listed is None else sorted(set(listed.values()))
        self._headers = {name: read_header(self.directory / name) for name in files}
        self._file_of = dict.fromkeys(self._headers[SINGLE_FILE].entries, SINGLE_FILE) if listed is None else listed
        self._opened: dict[Path, Any] = {}
        self._check_index()

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def path_of(self, name: str) -> Path:
        """The file that holds tensor `name`; CheckpointError where none does."""
        if name not in self._file_of:
            raise CheckpointError(f"{self.directory} has no tensor {name}")
        return self.directory / self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """CheckpointError for a dtype that is not a plain float (quantised weights are not read)."""
        given = self._entry(name).dtype
        if given not in DTYPES:
            raise CheckpointError(
                f"{self.path_of(name)}: tensor {name} has dtype {given}, expected one of {sorted(DTYPES)}; "
                "dequantise the checkpoint first"
            )
        return DTYPES[given]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """CheckpointError unless the tensor exists with this shape and a float dtype."""
        path, found = self.path_of(name), self.shape(name)
        if found != shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(found)}, the config asks for {list(shape)}; "
                "config.json and weights are not of the same model"
            )
        self.dtype(name)

    def read(
        self, name: str, dim: int | None = None, bounds: tuple[int, int] | None = None
    ) -> Shaped[Tensor, "*shape"]:
        """The tensor, or its indices bounds[0] to bounds[1] along `dim` (0 or 1), without reading the rest."""
        path = self.path_of(name)
        self.dtype(name)
        try:
            if path not in self._opened:
                self._opened[path] = safe_open(path, framework="pt")
            view = self._opened[path].get_slice(name)
            if dim is None or bounds is None:
                return view[:]
            start, stop = bounds
            return view[start:stop] if dim == 0 else view[:, start:stop]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read: {error}") from error

    def read_rows(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Shaped[Tensor, "rows *columns"]:
        """Rows `start` to `stop`, read and not mapped: resident memory grows by these rows only.

        With `out`, contiguous and of the stored dtype and shape, they are read there.
        """
        path, dtype = self.path_of(name), self.dtype(name)
        entry, behind = self._entry(name), self._headers[path.name].num_bytes
        rows = torch.empty(stop - start, *entry.shape[1:], dtype=dtype) if out is None else out
        first = behind + entry.start + start * rows[:1].numel() * dtype.itemsize
        read_exactly(path, rows.view(torch.uint8).numpy().reshape(-1), first)
        return rows

    def _entry(self, name: str) -> Entry:
        return self._headers[self.path_of(name).name].entries[name]

    def _check_index(self) -> None:
        for shard, header in self._headers.items():
            stored = set(header.entries)
            listed = {name for name, file in self._file_of.items() if file == shard}
            if lacking := sorted(listed - stored):
                raise CheckpointError(f"{self.directory / shard} lacks {_some(lacking)} that {INDEX_FILE} lists there")
            if unlisted := sorted(stored - listed):
                raise CheckpointError(
                    f"{self.directory / shard} holds {_some(unlisted)} that {INDEX_FILE} does not list"
                )


def problems_of(reader: HfReader, architecture: Architecture) -> list[str]:
    """What is missing, spare or of another shape or dtype for such a model, by name; empty when all is well."""
    weights = weights_of(architecture)
    wanted = {name: shape for weight in weights for name, shape in zip(weight.hf_names, weight.hf_shapes, strict=True)}
    found = [f"{name} is missing" for name in sorted(set(wanted) - reader.names)]
    spare = {name for name in reader.names - set(wanted) if not name.endswith(IGNORABLE_SUFFIXES)}
    if architecture.tied:
        spare.discard("lm_head.weight")
    found += [f"{name} has no place in the model of config.json" for name in sorted(spare)]
    for name, shape in wanted.items():
        if name in reader:
            try:
                reader.check(name, shape)
            except CheckpointError as error:
                found.append(str(error))
    return found


def refuse(problems: Sequence[str], where: Any) -> None:
    """CheckpointError that lists problems, unless there are none."""
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{where}: {'; '.join(problems[:8])}{more}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not an index with a weight_map: {error}") from error
    if missing := sorted(name for name in set(weight_map.values()) if not (path.parent / name).is_file()):
        raise CheckpointError(f"{path} names {_some(missing)}, not in {path.parent}; the download is incomplete")
    return weight_map


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
