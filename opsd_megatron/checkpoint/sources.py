"""Finding a checkpoint and its model: ours with its description, or one of plain Megatron beside a config.json."""

import json
from dataclasses import dataclass
from pathlib import Path

from opsd_megatron.checkpoint.state_files import DESCRIPTION, newest_checkpoint, read_description
from opsd_megatron.errors import CheckpointError
from opsd_megatron.models.architecture import Architecture, architecture_of, read_architecture

_LATEST = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class CheckpointSource:
    path: Path
    architecture: Architecture
    step: int | None
    origin: Path | None
    """Hugging Face directory that the run started from, with the tokenizer."""


def find_checkpoint(given: Path, model: Path | None) -> CheckpointSource:
    """`given` is a checkpoint, or a directory whose newest one is taken; `model` its base, in Hugging Face layout.

    Raises:
        CheckpointError: nothing complete is there, or a checkpoint of plain Megatron without `model`.
        ConfigError: the model is not supported.
    """
    if model is not None and not model.is_dir():
        raise CheckpointError(f"--model {model} is not a directory; give the one that the run started from")
    path = _choose(given)
    if not (path / DESCRIPTION).is_file():
        if model is None:
            raise CheckpointError(
                f"{path} has no {DESCRIPTION}, so it was not saved here; give --model, a directory with its config.json"
            )
        return CheckpointSource(path, read_architecture(model), _step_in(path.name), model)
    description = read_description(path)
    architecture = architecture_of(description["hf_config"], source=str(path))
    remembered = description["extra"].get("imported_from")
    origin = model or (Path(remembered) if remembered and Path(remembered).is_dir() else None)
    return CheckpointSource(path, architecture, description["step"], origin)


def check_tokenizer(origin: Path, architecture: Architecture) -> None:
    """CheckpointError where the tokenizer beside a model knows ids that its embedding has no row for."""
    path = origin / "tokenizer.json"
    if not path.is_file():
        return
    try:
        stored = json.loads(path.read_text())
        ids = [*stored["model"]["vocab"].values()] if isinstance(stored["model"]["vocab"], dict) else []
        ids += [token["id"] for token in stored.get("added_tokens", [])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a tokenizer: {error!r}") from error
    if ids and max(ids) >= architecture.vocab_size:
        raise CheckpointError(
            f"{path} has token ids up to {max(ids)}, the embedding {architecture.vocab_size} rows; "
            "give --model with the tokenizer that belongs to this checkpoint"
        )


def _choose(given: Path) -> Path:
    if (given / ".metadata").is_file():
        if (given / DESCRIPTION).is_file() or (given / "metadata.json").is_file():
            return given
        raise CheckpointError(f"{given} has no metadata.json, which is written last: the checkpoint is incomplete")
    if (newest := newest_checkpoint(given)) is not None:
        return newest
    if (given / _LATEST).is_file():
        iteration = (given / _LATEST).read_text().strip()
        path = given / (f"iter_{int(iteration):07d}" if iteration.isdigit() else iteration)
        if (path / ".metadata").is_file():
            return path
    raise CheckpointError(f"--checkpoint {given} has no complete checkpoint; give a run directory")


def _step_in(name: str) -> int | None:
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdigit() else None
