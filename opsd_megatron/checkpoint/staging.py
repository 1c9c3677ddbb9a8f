"""A directory that appears whole or not at all, and whose making can be interrupted and taken up again."""

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

from opsd_megatron.errors import CheckpointError

Block = bytes | memoryview
_CACHED_BYTES = 1 << 20
"""What is still in the processor's cache when it is written, having been hashed."""


@dataclass(frozen=True)
class FileRecord:
    file: str
    bytes: int
    sha256: str


class Staging:
    """`.NAME.partial` beside the target: files/ becomes the target, done.jsonl records what is finished there.

    A later process with the same `job` takes up where this one stopped, and hashes again what it keeps; what belongs
    to another job is thrown away. Use as a context manager; `finish` puts the directory in place.

    Raises:
        CheckpointError: another process works on the same target.
    """

    def __init__(self, target: Path, job: Mapping[str, Any], on_bytes: Callable[[int], None] = lambda _: None):
        """`on_bytes` is told of all bytes written or kept, as they come."""
        self.target = Path(target)
        self._root = self.target.with_name(f".{self.target.name}.partial")
        self.files = self._root / "files"
        self._job, self._on_bytes = json.dumps(job, sort_keys=True), on_bytes
        self._records: dict[str, FileRecord] = {}
        self._recording = threading.Lock()

    def __enter__(self) -> "Staging":
        self._root.mkdir(parents=True, exist_ok=True)
        self._lock = open(self._root / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise CheckpointError(f"another process is writing {self.target}; wait for it or stop it") from None
        job = self._root / "job.json"
        if not job.is_file() or job.read_text() != self._job:
            shutil.rmtree(self.files, ignore_errors=True)
            (self._root / "done.jsonl").unlink(missing_ok=True)
            write_durably(job, self._job)
        self.files.mkdir(exist_ok=True)
        self._take_up()
        return self

    def __exit__(self, *_) -> None:
        self._lock.close()

    @property
    def records(self) -> dict[str, FileRecord]:
        """Finished files by name."""
        return dict(self._records)

    def write(self, file: str, blocks: Iterable[Block]) -> FileRecord:
        """Writes the blocks as one file, hashed meanwhile; does nothing where it is finished already. Threads may write
        several files at once."""
        if file in self._records:
            return self._records[file]
        return self._record(write_file(self.files, file, blocks, self._on_bytes))

    def finish(self) -> Path:
        """The directory under its own name, in place of what was there."""
        put_in_place(self.files, self.target, aside=self._root / "replaced")
        shutil.rmtree(self._root)
        return self.target

    def _take_up(self) -> None:
        done = self._root / "done.jsonl"
        for line in done.read_text().splitlines() if done.is_file() else []:
            try:
                record = FileRecord(**json.loads(line))
            except (ValueError, TypeError):
                break  # the line at which the other process was stopped
            path = self.files / record.file
            if path.is_file() and hash_file(self.files, record.file, self._on_bytes) == record:
                self._records[record.file] = record
        for path in list(self.files.rglob("*")):
            if path.is_file() and str(path.relative_to(self.files)) not in self._records:
                path.unlink()

    def _record(self, record: FileRecord) -> FileRecord:
        with self._recording:
            with open(self._root / "done.jsonl", "a") as done:
                done.write(json.dumps(asdict(record)) + "\n")
                done.flush()
                os.fsync(done.fileno())
            self._records[record.file] = record
        return record


def write_file(
    directory: Path, name: str, blocks: Iterable[Block], on_bytes: Callable[[int], None] = lambda _: None
) -> FileRecord:
    """Writes the blocks as one file below `directory`, durably and under its name only when whole.

    A block is hashed and written before the next one is asked for; what follows the last one is waiting for the disk.
    """
    digest, size, path = hashlib.sha256(), 0, directory / name
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb", buffering=0) as out:
        for block in blocks:
            for start in range(0, len(block), _CACHED_BYTES):
                piece = block[start : start + _CACHED_BYTES]
                digest.update(piece)
                write_all(out, piece)
            size += len(block)
            on_bytes(len(block))
        os.fsync(out.fileno())
    temporary.rename(path)
    return FileRecord(name, size, digest.hexdigest())


def write_all(out: RawIOBase, block: Block) -> None:
    """An unbuffered file may take less than it is given."""
    written = 0
    while written < len(block):
        written += out.write(block[written:]) or 0


def put_in_place(directory: Path, target: Path, aside: Path) -> None:
    """Renames; a target that is replaced is set aside first, so that it is never half old and half new."""
    sync(directory)
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    directory.rename(target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def hash_file(directory: Path, name: str, on_bytes: Callable[[int], None] = lambda _: None) -> FileRecord:
    digest, size = hashlib.sha256(), 0
    with open(directory / name, "rb", buffering=0) as file:
        block = bytearray(8 << 20)
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
            size += count
            on_bytes(count)
    return FileRecord(name, size, digest.hexdigest())


def write_durably(path: Path, text: str) -> None:
    path.write_text(text)
    sync(path)


def sync(path: Path) -> None:
    """fsync of a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
