"""Writing a model directory in Hugging Face layout: it appears whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from opsd_megatron.checkpoint.hf_files import INDEX_FILE, SINGLE_FILE
from opsd_megatron.errors import CheckpointError

DEFAULT_SHARD_BYTES = 5_000_000_000
_SIDE_FILES = re.compile(
    r"generation_config\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|chat_template\.(json|jinja)|.*\.(model|tiktoken)|(LICENSE|NOTICE)(\..*)?"
)
_SIDE_DIRECTORIES = ("additional_chat_templates",)


def write_hf_directory(
    tensors: Iterable[tuple[str, Tensor]],
    out_dir: Path,
    hf_config: Mapping[str, Any],
    *,
    source_dir: Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Writes weights, config and side files; holds at most one shard in memory; `out_dir`.

    Tokenizer, generation config, chat template and licence come from `source_dir`. Everything is first written into a
    sibling directory that is renamed at the end. CheckpointError if `out_dir` is not empty and `overwrite` is not set.
    """
    out_dir = Path(out_dir)
    check_target(out_dir, overwrite)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        dtypes = _write_shards(tensors, staging, max_shard_bytes)
        if source_dir is not None:
            copy_side_files(Path(source_dir), staging)
        _write_config(staging, hf_config, dtypes)
        _put_in_place(staging, out_dir)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return out_dir


def check_target(out_dir: Path, overwrite: bool) -> None:
    """CheckpointError where writing to `out_dir` would lose something that the caller did not offer."""
    if out_dir.exists() and not out_dir.is_dir():
        raise CheckpointError(f"{out_dir} is a file; give a directory")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not overwrite:
        raise CheckpointError(f"{out_dir} is not empty; give another directory or ask to overwrite it")


def copy_side_files(source_dir: Path, out_dir: Path) -> None:
    """Copies what belongs to the model besides weights and config: tokenizer, generation config, template, licence."""
    for path in sorted(source_dir.iterdir()):
        if path.is_file() and _SIDE_FILES.fullmatch(path.name):
            shutil.copyfile(path, out_dir / path.name)
        elif path.is_dir() and path.name in _SIDE_DIRECTORIES:
            shutil.copytree(path, out_dir / path.name)


def _write_shards(tensors: Iterable[tuple[str, Tensor]], directory: Path, max_bytes: int) -> set[torch.dtype]:
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    shard_bytes = total_bytes = 0
    dtypes = set()

    def flush() -> None:
        nonlocal shard, shard_bytes
        if shard:
            _save(shard, directory / f"part-{len(shards)}")
            shards.append(list(shard))
        shard, shard_bytes = {}, 0

    for name, tensor in tensors:
        if any(name in names for names in (*shards, shard)):
            raise CheckpointError(f"tensor {name} was given twice")
        size = tensor.numel() * tensor.element_size()
        if shard_bytes + size > max_bytes:
            flush()
        # A copy: the caller's tensor may be a view of a parameter or of a buffer that it uses again.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        shard_bytes, total_bytes = shard_bytes + size, total_bytes + size
        dtypes.add(tensor.dtype)
    flush()
    if not shards:
        raise CheckpointError("no tensors were given to write")
    _name_shards(directory, shards, total_bytes)
    return dtypes


def _name_shards(directory: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Gives the parts their Hugging Face names (counted from 1), known only when the last one is written."""
    if len(shards) == 1:
        (directory / "part-0").rename(directory / SINGLE_FILE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"part-{number}").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_text(directory / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _save(shard: dict[str, Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors makes files that only their owner can read, whatever the umask
    _sync(path)


def _write_config(directory: Path, hf_config: Mapping[str, Any], dtypes: set[torch.dtype]) -> None:
    config = {key: value for key, value in hf_config.items() if key not in ("torch_dtype", "dtype")}
    if len(dtypes) == 1:
        config["dtype"] = str(next(iter(dtypes))).removeprefix("torch.")
    _write_text(directory / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(staging: Path, out_dir: Path) -> None:
    """Renames; a directory that is replaced is set aside first, so that out_dir is never half old and half new."""
    aside = staging.with_suffix(".old")
    if out_dir.exists():
        out_dir.rename(aside)
    staging.rename(out_dir)
    shutil.rmtree(aside, ignore_errors=True)
    _sync(out_dir.parent)
