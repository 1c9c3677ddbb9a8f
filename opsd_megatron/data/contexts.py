"""Which records share a context, found by hash, and how such records stay together when a file is shuffled."""

import hashlib
import json

import numpy as np

from opsd_megatron.config import DataConfig
from opsd_megatron.data.records import Records
from opsd_megatron.data.row_files import INDEX_FILE_FROM_BYTES, kept_beside
from opsd_megatron.data.stream import RecordStream

CONTEXT_FIELDS = ("system", "documents", "long_context")
"""What stands before the question in a student's prompt; a document given by reference counts by its reference."""


def ordered_stream(records: Records, data: DataConfig, seed: int, dp_rank: int, dp_size: int) -> RecordStream:
    """The records in the order in which a run of this configuration takes them."""
    together = data.contexts_together if data.shuffle else 1
    runs = runs_of_context(context_numbers(records), together) if together > 1 else None
    return RecordStream(records, seed, data.shuffle, dp_rank, dp_size, runs)


def context_numbers(records: Records) -> np.ndarray:
    """Int64 [records]: equal where two records have the same context, numbered in the order of first appearance.

    Reads the whole file once; of a large file the answer is kept in `<file>.contexts`.
    """
    path = records.rows.path
    if path.stat().st_size < INDEX_FILE_FROM_BYTES:
        return _number(records)[:, 0]
    return kept_beside(path, ".contexts", lambda: _number(records))[:, 0]


def runs_of_context(contexts: np.ndarray, together: int) -> np.ndarray:
    """Int64 [records]: the run that each record belongs to; the records of one context, in file order, are cut into
    runs of `together`."""
    seen: dict[int, int] = {}
    runs: dict[tuple[int, int], int] = {}
    numbers = np.empty(len(contexts), dtype=np.int64)
    for place, context in enumerate(contexts.tolist()):
        before = seen.get(context, 0)
        seen[context] = before + 1
        numbers[place] = runs.setdefault((context, before // together), len(runs))
    return numbers


def _number(records: Records) -> np.ndarray:
    found: dict[bytes, int] = {}
    numbers = [found.setdefault(_digest(records.rows.row(index)), len(found)) for index in range(len(records))]
    return np.asarray(numbers, dtype=np.int64)[:, None]


def _digest(row: dict) -> bytes:
    context = {name: row.get(name) for name in CONTEXT_FIELDS}
    return hashlib.sha256(json.dumps(context, sort_keys=True).encode()).digest()
