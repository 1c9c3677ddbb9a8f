"""Rollouts on disk: one JSONL file per step and data-parallel replica, whole or not there at all.

    step_000012.replica_0_of_2.jsonl
        {"format": "opsd_megatron rollouts 1", "step": 12, "rollouts": 8, ...}     what is known of the step
        {"pair": {"record_id": ..., "student_prompt": [...], ...}}                 a prompt, and the rollouts behind it
        {"rollout": {"sample": 0, "token_ids": [...], ...}, "values": {"advantage": [...], ...}}

Numbers are written so that they read back bit for bit. A step's number is that of its row in metrics.jsonl.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsd_megatron.errors import DataError
from opsd_megatron.types import PromptPair, Rollout, Turn, VersionSpan

FORMAT = "opsd_megatron rollouts 1"
NAME = re.compile(r"step_(\d{6,})\.replica_(\d+)_of_(\d+)\.jsonl")


@dataclass(frozen=True)
class RecordedRollout:
    """A rollout and what the step computed of its tokens: one number per token under each name, or nothing."""

    rollout: Rollout
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordedStep:
    """All replicas' rollouts of one step, in order."""

    header: Mapping[str, Any]
    """Of the first replica."""
    rollouts: tuple[RecordedRollout, ...]


def write_step(
    directory: Path, step: int, replica: int, replicas: int, about: Mapping[str, Any], rows: Sequence[RecordedRollout]
) -> Path:
    """The file of one replica, in place of one that the step may have left under another number of replicas."""
    directory.mkdir(parents=True, exist_ok=True)
    header = {"format": FORMAT, "step": step, "replica": replica, "replicas": replicas, "rollouts": len(rows), **about}
    lines, pair = [json.dumps(header)], None
    for row in rows:
        if row.rollout.pair != pair:
            pair = row.rollout.pair
            lines.append(json.dumps({"pair": vars(pair)}))
        line = {"rollout": response_fields(row.rollout), "values": {name: list(v) for name, v in row.values.items()}}
        lines.append(json.dumps(line))
    path = directory / f"step_{step:06d}.replica_{replica}_of_{replicas}.jsonl"
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    for other in directory.glob(f"step_{step:06d}.replica_*.jsonl"):
        if not other.name.endswith(f"_of_{replicas}.jsonl"):
            other.unlink(missing_ok=True)
    return path


def recorded_steps(directory: Path) -> list[int]:
    """Numbers of the steps of which every replica's file is there."""
    found: dict[tuple[int, int], set[int]] = {}
    for path in directory.glob("step_*.jsonl"):
        if match := NAME.fullmatch(path.name):
            step, replica, replicas = map(int, match.groups())
            found.setdefault((step, replicas), set()).add(replica)
    return sorted({step for (step, replicas), ranks in found.items() if len(ranks) == replicas})


def read_step(directory: Path, step: int) -> RecordedStep:
    """DataError where the step is not there, lacks a replica, or a file is damaged."""
    steps = recorded_steps(directory)
    if step not in steps:
        there = f"{len(steps)} steps, {steps[0]} to {steps[-1]}" if steps else "no complete step"
        raise DataError(f"{directory}: no complete recording of step {step}; there are {there}")
    paths = [path for path in directory.glob(f"step_{step:06d}.replica_*.jsonl") if NAME.fullmatch(path.name)]
    paths.sort(key=lambda path: int(path.name.split("replica_")[1].split("_")[0]))
    files = [_read_file(path) for path in paths]
    return RecordedStep(files[0][0], tuple(row for _, rows in files for row in rows))


def response_fields(rollout: Rollout) -> dict[str, Any]:
    """JSON of everything but the pair."""
    fields = {name: value for name, value in vars(rollout).items() if name != "pair"}
    return fields | {
        "version_spans": [[span.version, span.start, span.end] for span in rollout.version_spans],
        "turns": [[turn.author, turn.start, turn.end] for turn in rollout.turns],
    }


def rollout_of(pair: PromptPair, fields: Mapping[str, Any]) -> Rollout:
    """From `response_fields`."""
    lists: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    spans = tuple(VersionSpan(*span) for span in fields["version_spans"])
    turns = tuple(Turn(*turn) for turn in fields["turns"])
    return Rollout(pair=pair, **lists | {"version_spans": spans, "turns": turns})


def _read_file(path: Path) -> tuple[dict[str, Any], list[RecordedRollout]]:
    rows: list[RecordedRollout] = []
    header, number = {}, 0
    try:
        with open(path, encoding="utf-8") as file:
            header = json.loads(next(file))
            if header.get("format") != FORMAT:
                raise DataError(f"{path}: the format is {header.get('format')!r}, this version reads {FORMAT!r}")
            pair = None
            for number, line in enumerate(file, start=2):  # noqa: B007
                fields = json.loads(line)
                if "pair" in fields:
                    pair = _pair_of(fields["pair"])
                else:
                    values = {name: tuple(column) for name, column in fields["values"].items()}
                    assert pair is not None
                    rows.append(RecordedRollout(rollout_of(pair, fields["rollout"]), values))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, StopIteration) as error:
        raise DataError(f"{path}, line {number + 1}: damaged ({type(error).__name__}: {error}); remove it") from error
    if len(rows) != header["rollouts"]:
        raise DataError(f"{path}: {len(rows)} rollouts of {header['rollouts']}; the file is cut, remove it")
    return header, rows


def _pair_of(fields: Mapping[str, Any]) -> PromptPair:
    prompts = {name: tuple(fields[name]) for name in ("student_prompt", "teacher_prompt")}
    return PromptPair(**{**fields, **prompts})
