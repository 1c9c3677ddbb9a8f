"""Checkpoint directories of a run: which are complete, which is newest, which go.

A checkpoint is written into `step_000123.tmp`, gets its description `state.json` last, and is renamed to `step_000123`.
So a directory with the final name and a description is complete, and nothing else is ever read.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from opsd_megatron.checkpoint.staging import put_in_place, sync, write_durably
from opsd_megatron.errors import CheckpointError

DESCRIPTION = "state.json"
_STEP = re.compile(r"step_(\d{6,})")
_LEFTOVER = re.compile(r"step_\d{6,}\.(tmp|old)")


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"step_{step:06d}"


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints under `directory`, oldest step first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _STEP.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def newest_checkpoint(directory: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    complete = complete_checkpoints(Path(directory))
    return complete[-1] if complete else None


def is_complete(path: Path) -> bool:
    """Has its description, which is written last, and both files that Megatron writes last."""
    return all((path / name).is_file() for name in (DESCRIPTION, ".metadata", "metadata.json"))


def tidy(directory: Path) -> None:
    """Removes what interrupted saves left; a checkpoint that was set aside and never replaced gets its name back."""
    for path in list(directory.iterdir()) if directory.is_dir() else []:
        if not _LEFTOVER.fullmatch(path.name):
            continue
        if path.suffix == ".old" and is_complete(path) and not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))
        else:
            shutil.rmtree(path)


def begin(directory: Path, step: int) -> Path:
    """An empty directory to write into."""
    directory.mkdir(parents=True, exist_ok=True)
    tidy(directory)
    staging = step_directory(directory, step).with_suffix(".tmp")
    staging.mkdir()
    return staging


def finish(staging: Path, description: dict[str, Any], keep: int) -> Path:
    """Describes and renames what `begin` gave, then removes all but the newest `keep` complete checkpoints."""
    for path in staging.iterdir():
        sync(path)
    write_durably(staging / DESCRIPTION, json.dumps(description, indent=2))
    final = staging.with_suffix("")  # there already where a resumed run comes to the same step again
    put_in_place(staging, final, aside=final.with_suffix(".old"))
    for path in complete_checkpoints(final.parent)[:-keep] if keep else []:
        if path != final:
            shutil.rmtree(path)
    return final


def read_description(path: Path) -> dict[str, Any]:
    """What `finish` wrote; CheckpointError where it is missing or broken."""
    file = Path(path) / DESCRIPTION
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; {path} is not a complete checkpoint") from error
