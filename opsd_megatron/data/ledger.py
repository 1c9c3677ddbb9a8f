"""Append-only output of a long job that makes records, so that it can stop at any time and go on."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from opsd_megatron.data.schema import Document
from opsd_megatron.errors import DataError

BLOCK_BYTES = 1 << 16


class Ledger:
    """The three output files: whole lines only, appended in an order in which a crash loses no finished record."""

    def __init__(self, output: Path, recipe: Mapping[str, Any]):
        stem = output.with_suffix("") if output.suffix == ".jsonl" else output
        self.corpus_path = stem.with_name(stem.name + ".corpus.jsonl")
        self.progress_path = stem.with_name(stem.name + ".progress.jsonl")
        output.parent.mkdir(parents=True, exist_ok=True)
        self._files = {path: _open_whole_lines(path) for path in (self.corpus_path, output, self.progress_path)}
        self._output = output
        tried = list(_read_rows(self.progress_path))
        self._check_recipe(tried, dict(recipe))
        self.counts = Counter(row["outcome"] for row in tried[1:])
        self.done = {row["id"] for row in tried[1:]}
        self._lines = {row["id"]: line for line, row in enumerate(_read_rows(self.corpus_path), 1)}
        for row in _read_rows(output):
            if row["id"] not in self.done:  # stopped between a record and its mark
                self.mark(row["id"], "kept")

    def _check_recipe(self, tried: Sequence[Mapping[str, Any]], recipe: dict[str, Any]) -> None:
        if not tried:
            self._append(self.progress_path, {"recipe": recipe})
        elif tried[0]["recipe"] != recipe:
            before = tried[0]["recipe"]
            changed = ", ".join(
                f"{k}={before.get(k)} then, {recipe[k]} now" for k in recipe if before.get(k) != recipe[k]
            )
            raise DataError(f"{self.progress_path} was begun with other settings ({changed}); use another --output")

    def reference(self, document: Document) -> str:
        """Where the document lies in the corpus file; it is written on first use."""
        if document.id not in self._lines:
            self._append(self.corpus_path, {"id": document.id, "title": document.title, "text": document.text})
            self._lines[document.id] = len(self._lines) + 1
        return f"{self.corpus_path.name}#{self._lines[document.id]}"

    def keep(self, row: Mapping[str, Any]) -> None:
        self._append(self._output, row)
        self.mark(row["id"], "kept")

    def mark(self, draft_id: str, outcome: str) -> None:
        self._append(self.progress_path, {"id": draft_id, "outcome": outcome})
        self.done.add(draft_id)
        self.counts[outcome] += 1

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _append(self, path: Path, row: Mapping[str, Any]) -> None:
        self._files[path].write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._files[path].flush()


def _open_whole_lines(path: Path) -> IO[bytes]:
    """The file for appending, without a last line that was cut off in writing."""
    with path.open("ab"), path.open("rb+") as file:
        end = file.seek(0, 2)
        while end:
            start = max(0, end - BLOCK_BYTES)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)
    return path.open("ab")


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        yield from map(json.loads, file)
