"""Records of a file: indexed once, read by number, checked as they are read (schema: docs/data.md)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opsd_megatron.data.row_files import INDEX_FILE_FROM_BYTES, JsonLines, RowFile, open_rows
from opsd_megatron.data.schema import Record, parse_record
from opsd_megatron.errors import DataError

CHECK_ALL_BELOW_BYTES = 256 << 20
"""Files below this size are checked whole when they are opened; larger ones row by row as they are read."""
SHOWN_PROBLEMS = 10


def read_records(path: Path | str, check_all_below_bytes: int = CHECK_ALL_BELOW_BYTES) -> "Records":
    """The records of a .jsonl, .jsonl.gz or .parquet file.

    DataError where the file is missing, unreadable or empty, and where a small file holds a bad row: the message lists
    the first ten with line and field.
    """
    records = Records(open_rows(Path(path)))
    if not len(records):
        raise DataError(f"{path}: no records")
    if Path(path).stat().st_size < check_all_below_bytes:
        records.check()
    return records


class Records:
    """A sequence of records; only the index stays in memory."""

    def __init__(self, rows: RowFile):
        self.rows = rows
        self._corpora: dict[Path, JsonLines] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        return parse_record(self.rows.row(index), self.rows.where(index), self._resolve)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def problems(self) -> Iterator[str]:
        """One message for each bad row, in file order, and for each id that an earlier row has."""
        first: dict[str, str] = {}
        for index in range(len(self)):
            try:
                record = self[index]
            except DataError as error:
                yield str(error)
                continue
            if record.id in first:
                yield f"{record.where}: field 'id': {record.id!r} is the id of {first[record.id]} too; ids are unique"
            first.setdefault(record.id, record.where)

    def check(self) -> None:
        """DataError with the first problems and their number, if there are any."""
        problems = list(self.problems())
        if problems:
            shown = problems[:SHOWN_PROBLEMS]
            rest = len(problems) - len(shown)
            tail = [f"... and {rest} more bad rows"] if rest else []
            raise DataError("\n".join(shown + tail))

    def _resolve(self, reference: str) -> Any:
        """The row that "corpus.jsonl#12" names: line 12, counted from 1, of a file beside the records' file."""
        name, mark, line = reference.rpartition("#")
        if not mark or not name or not line.isdecimal():
            raise DataError("expected '<file>#<line>' with lines counted from 1")
        path = self.rows.path.parent / name
        if path not in self._corpora:
            if not path.is_file():
                raise DataError(f"{path}: no such file; references are relative to the folder of the records' file")
            self._corpora[path] = JsonLines(path, INDEX_FILE_FROM_BYTES)
        corpus = self._corpora[path]
        return corpus.row(corpus.row_of_line(int(line)))
