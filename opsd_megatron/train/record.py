"""What a run leaves beside its weights: its whole config, the environment it ran in, and every metric as JSONL."""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsd_megatron.config import LogConfig, RunConfig
from opsd_megatron.errors import ConfigError
from opsd_megatron.parallel.axis import Axis
from opsd_megatron.rollout.recording import RecordedRollout, write_step
from opsd_megatron.types import Rollout

PACKAGES = ("opsd-megatron", "torch", "megatron-core", "transformers", "transformer-engine", "safetensors", "numpy")


def describe_run(config: RunConfig, mesh_description: str) -> dict[str, Any]:
    """Everything needed to know what ran: config, versions, git commit, command line, layout. No secrets."""
    return {
        "config": plain(config),
        "command": sys.argv,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "mesh": mesh_description,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def plain(value: Any) -> Any:
    """A config as JSON types; a variant of a union carries its class name under "kind"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def record_rollouts(
    config: RunConfig,
    vocabulary: str,
    step: int,
    dp: Axis,
    rollouts: Sequence[Rollout],
    values: Mapping[str, Sequence[float]],
) -> None:
    """This replica's file of the step in `rollout.record_to`; `values` are columns over all response tokens."""
    directory = config.rollout.record_to
    assert directory is not None
    about = {
        "temperature": config.rollout.temperature,
        "tokenizer": str(config.model.path),
        "vocabulary": vocabulary,
    }
    rows, start = [], 0
    for rollout in rollouts:
        end = start + len(rollout.token_ids)
        rows.append(RecordedRollout(rollout, {name: tuple(column[start:end]) for name, column in values.items()}))
        start = end
    write_step(directory, step, dp.rank, dp.size, about, rows)


class RunRecord:
    """run.jsonl-style record of one run on global rank 0: `run.json`, `metrics.jsonl`, optionally wandb."""

    def __init__(self, directory: Path, description: Mapping[str, Any], log: LogConfig, resumed_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "run.json").write_text(json.dumps(description, indent=2) + "\n")
        _drop_later_steps(directory / "metrics.jsonl", resumed_step)
        self._file = (directory / "metrics.jsonl").open("a", buffering=1)
        self._wandb = _start_wandb(log, description, directory) if log.wandb_project else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _drop_later_steps(path: Path, resumed_step: int) -> None:
    """Steps after the checkpoint will be written again; a half-written last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= resumed_step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    path.write_text("".join(kept))


def _start_wandb(log: LogConfig, description: Mapping[str, Any], directory: Path):
    """A resumed run goes on in the same wandb run: its id lies beside the metrics."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"log.wandb_project={log.wandb_project} needs wandb: pip install opsd-megatron[wandb]"
        ) from error
    kept = directory / "wandb_id"
    if not kept.exists():
        kept.write_text(uuid.uuid4().hex[:12])
    return wandb.init(
        project=log.wandb_project,
        id=kept.read_text(),
        name=directory.name,
        config=dict(description),
        dir=str(directory),
        resume="allow",
    )
