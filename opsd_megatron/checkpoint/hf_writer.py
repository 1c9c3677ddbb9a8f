"""Writing a model directory in Hugging Face layout: it appears whole or not at all."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsd_megatron.checkpoint.hf_files import INDEX_FILE
from opsd_megatron.checkpoint.manifest import MANIFEST, manifest_text
from opsd_megatron.checkpoint.shard_plan import ShardPlan, index_of
from opsd_megatron.checkpoint.staging import Block, FileRecord, put_in_place, write_file
from opsd_megatron.errors import CheckpointError

DEFAULT_SHARD_BYTES = 5_000_000_000
_SIDE_FILES = re.compile(
    r"generation_config\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|chat_template\.(json|jinja)|.*\.(model|tiktoken)|(LICENSE|NOTICE)(\..*)?"
)
_SIDE_DIRECTORIES = ("additional_chat_templates",)


def check_target(out_dir: Path, overwrite: bool) -> None:
    """CheckpointError where writing to `out_dir` would lose something that the caller did not offer."""
    if out_dir.exists() and not out_dir.is_dir():
        raise CheckpointError(f"{out_dir} is a file; give a directory")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not overwrite:
        raise CheckpointError(f"{out_dir} is not empty; give another directory or ask to overwrite it")


def side_files(source_dir: Path) -> list[Path]:
    """What belongs to a model besides weights and config: tokenizer, generation config, chat template, licence."""
    found = []
    for path in sorted(source_dir.iterdir()):
        if path.is_file() and _SIDE_FILES.fullmatch(path.name):
            found.append(path)
        elif path.is_dir() and path.name in _SIDE_DIRECTORIES:
            found += sorted(inner for inner in path.rglob("*") if inner.is_file())
    return found


def write_shard(directory: Path, shard: ShardPlan, tensors: Iterator[tuple[str, Tensor]]) -> FileRecord:
    """Writes one planned file from the next tensors, one at a time, each converted to its planned dtype.

    Raises:
        CheckpointError: another tensor came than was planned, or one of another shape.
    """

    def blocks() -> Iterator[Block]:
        yield shard.header
        for planned, (name, tensor) in zip(shard.tensors, tensors, strict=False):
            if (name, tuple(tensor.shape)) != (planned.name, planned.shape):
                raise CheckpointError(
                    f"{shard.file}: {name} of shape {list(tensor.shape)} came where {planned.name} of shape "
                    f"{list(planned.shape)} was planned"
                )
            yield block_of(tensor.detach().to("cpu", planned.dtype))

    return write_file(directory, shard.file, blocks())


def block_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in host memory."""
    values: Any = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
    return memoryview(values)


def finish_directory(
    staging: Path,
    out_dir: Path,
    shards: Sequence[ShardPlan],
    records: Iterable[FileRecord],
    hf_config: Mapping[str, Any],
    source_dir: Path | None,
    facts: Mapping[str, Any],
) -> Path:
    """Adds config, index, side files and last the manifest to written shards, and puts the directory in place."""
    records = list(records)
    for name, content in beside_weights(shards, hf_config, source_dir).items():
        records.append(write_file(staging, name, [content]))
    write_file(staging, MANIFEST, [manifest_text(records, facts).encode()])
    put_in_place(staging, out_dir, aside=staging.with_suffix(".old"))
    return out_dir


def beside_weights(
    shards: Sequence[ShardPlan], hf_config: Mapping[str, Any], source_dir: Path | None
) -> dict[str, bytes]:
    """Files by name: config.json, the index where there are several files of tensors, and what is copied."""
    dtypes = {tensor.dtype for shard in shards for tensor in shard.tensors}
    contents = {"config.json": hf_config_text(hf_config, dtypes).encode()}
    if len(shards) > 1:
        contents[INDEX_FILE] = index_of(shards).encode()
    if source_dir is not None:
        contents |= {str(path.relative_to(source_dir)): path.read_bytes() for path in side_files(source_dir)}
    return contents


def hf_config_text(hf_config: Mapping[str, Any], dtypes: set[torch.dtype]) -> str:
    """config.json for transformers 5 and 4: rotary parameters and dtype are written in the words of both."""
    config = {key: value for key, value in hf_config.items() if key not in ("torch_dtype", "dtype")}
    if len(dtypes) == 1:
        config["dtype"] = config["torch_dtype"] = str(next(iter(dtypes))).removeprefix("torch.")
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta"))
    kind = rope.setdefault("rope_type", rope.pop("type", "default"))
    if theta is not None:
        config["rope_theta"], config["rope_scaling"] = theta, None if kind == "default" else rope
        config["rope_parameters"] = {**rope, "rope_theta": theta}
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
