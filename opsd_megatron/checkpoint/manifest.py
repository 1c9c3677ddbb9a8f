"""MANIFEST.json: every file of a release with its size and hash, where it came from and what was verified."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from opsd_megatron.checkpoint.staging import FileRecord, hash_file
from opsd_megatron.errors import CheckpointError

MANIFEST = "MANIFEST.json"
"""Written last: a directory without it was never finished."""
_PACKAGES = ("opsd-megatron", "torch", "megatron-core", "transformers", "safetensors")


def manifest_text(files: Iterable[FileRecord], facts: Mapping[str, Any]) -> str:
    """The text; `facts` are source, method and verification."""
    listed = [asdict(record) for record in sorted(files, key=lambda record: record.file)]
    made = {"made": datetime.now(UTC).isoformat(timespec="seconds"), "versions": _versions()}
    return json.dumps({**made, **facts, "files": listed}, indent=2, default=str) + "\n"


def read_manifest(directory: Path) -> dict[str, Any]:
    """CheckpointError where there is none or it cannot be read."""
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        [FileRecord(**record) for record in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; the directory is no finished release") from error
    return manifest


def manifest_problems(directory: Path, on_bytes: Callable[[int], None] = lambda _: None) -> list[str]:
    """Files that are missing, spare, of another size or of another hash; empty when all is as the manifest says."""
    directory = Path(directory)
    listed = {record["file"]: FileRecord(**record) for record in read_manifest(directory)["files"]}
    problems = []
    for name, record in listed.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != record.bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes, the manifest says {record.bytes}")
        elif hash_file(directory, name, on_bytes) != record:
            problems.append(f"{name} differs from what was written: its sha256 is another")
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    return problems + [f"{name} is not in the manifest" for name in sorted(present - set(listed) - {MANIFEST})]


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
