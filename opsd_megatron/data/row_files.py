"""Files of rows with random access: JSON lines (also gzipped) and Parquet. What a row means is `records`' business."""

import functools
import gzip
import json
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np

from opsd_megatron.errors import DataError

INDEX_FILE_FROM_BYTES = 64 << 20
"""From this size on the line index is kept beside the file; scanning anything smaller takes a tenth of a second."""
GZIP_IN_MEMORY_BYTES = 256 << 20
CACHED_ROW_GROUPS = 4


@runtime_checkable
class RowFile(Protocol):
    """Rows by number, each with a name for messages."""

    path: Path

    def __len__(self) -> int: ...

    def row(self, index: int) -> Any:
        """The decoded row; DataError where it cannot be decoded."""
        ...

    def where(self, index: int) -> str:
        """The row as a person finds it: file and line, counted from 1."""
        ...


def open_rows(path: Path, index_file_from_bytes: int = INDEX_FILE_FROM_BYTES) -> RowFile:
    """The rows of a .jsonl, .jsonl.gz or .parquet file; DataError for anything else."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return JsonLines(path, index_file_from_bytes)
    if path.suffix == ".parquet":
        return ParquetRows(path)
    raise DataError(f"{path}: unknown kind of file; expected a name that ends in .jsonl, .jsonl.gz or .parquet")


class JsonLines:
    """One JSON value per line. Blank lines are passed over; line numbers count them."""

    def __init__(self, path: Path, index_file_from_bytes: int = INDEX_FILE_FROM_BYTES):
        self.path = path
        self._lock = threading.Lock()
        self._file: Any = _decompress(path) if path.suffix == ".gz" else path.open("rb")
        keeps_index = path.suffix != ".gz" and path.stat().st_size >= index_file_from_bytes
        scan = functools.partial(_scan_lines, self._file)
        self._index = kept_beside(path, ".idx", scan) if keeps_index else scan()

    def __len__(self) -> int:
        return len(self._index)

    def row(self, index: int) -> Any:
        with self._lock:
            self._file.seek(int(self._index[index, 0]))
            line = self._file.readline()
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{self.where(index)}: not a JSON value: {error.msg} at character {error.pos}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where(index)}: not UTF-8: {error}") from None

    def where(self, index: int) -> str:
        return f"{self.path} line {self._index[index, 1]}"

    def row_of_line(self, line: int) -> int:
        """Row number of a line, counted from 1; DataError where there is none."""
        place = int(np.searchsorted(self._index[:, 1], line))
        if place == len(self) or self._index[place, 1] != line:
            raise DataError(f"{self.path} has no row on line {line}; it has {len(self)} rows")
        return place


class ParquetRows:
    """Rows of a Parquet file; columns that are null in a row count as absent.

    A row is found through its row group, so a file that is read in random order wants small ones (some hundred rows).
    """

    def __init__(self, path: Path):
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise DataError(
                f"{path}: reading Parquet needs pyarrow; install opsd-megatron[parquet] or give JSONL"
            ) from None
        self.path = path
        self._lock = threading.Lock()
        try:
            self._file = parquet.ParquetFile(path)
        except Exception as error:  # pyarrow's own classes; they differ with what is cut
            raise DataError(f"{path}: not a readable Parquet file: {error}") from error
        meta = self._file.metadata
        sizes = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> Any:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        with self._lock:
            table = self._row_group(group)
        return table.slice(index - int(self._starts[group]), 1).to_pylist()[0]

    def where(self, index: int) -> str:
        return f"{self.path} row {index + 1}"

    def _row_group(self, group: int) -> Any:
        if group not in self._groups:
            self._groups[group] = self._file.read_row_group(group)
            while len(self._groups) > CACHED_ROW_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]


def _decompress(path: Path) -> Any:
    """The content of a gzip file, seekable: in memory, or in an unnamed temporary file where it is large."""
    content = tempfile.SpooledTemporaryFile(max_size=GZIP_IN_MEMORY_BYTES)  # noqa: SIM115 - it outlives this call
    try:
        with gzip.open(path, "rb") as packed:
            while block := packed.read(1 << 20):
                content.write(block)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}") from error
    content.seek(0)
    return content


def _scan_lines(file: IO[bytes]) -> np.ndarray:
    """Int64 [rows, 2]: byte offset and line number of every line that is not blank."""
    index, offset = [], 0
    for number, line in enumerate(file, 1):
        if not line.isspace():
            index.append((offset, number))
        offset += len(line)
    return np.asarray(index, dtype=np.int64).reshape(-1, 2)


def kept_beside(path: Path, suffix: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Int64 [rows, columns] from `<path><suffix>` where that was made for this very file, else computed, and kept if
    the folder can be written."""
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    kept_path = path.with_name(path.name + suffix)
    try:
        kept = np.load(kept_path, allow_pickle=False)
        if kept.dtype == np.int64 and kept[:2].tolist() == stamp:
            return kept[3:].reshape(-1, int(kept[2]))
    except (OSError, ValueError, EOFError):
        pass  # none there, or one that was cut: it is only a cache
    values = compute()
    _replace_file(kept_path, np.concatenate([[*stamp, values.shape[1]], values.reshape(-1)]))
    return values


def _replace_file(path: Path, values: np.ndarray) -> None:
    """Writes the array whole or not at all; a folder that cannot be written is left alone."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.save(file, values, allow_pickle=False)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
