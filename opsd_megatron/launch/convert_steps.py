"""What the commands of tools/convert.py share: comparing, uploading, sizes, progress and what is printed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from opsd_megatron.errors import CheckpointError, ConfigError


def verify_both(files: Path, model: Any, dtype: Any, console: Console) -> dict[str, Any]:
    """Weights and logits of finished files against their checkpoint; CheckpointError unless both agree."""
    from opsd_megatron.checkpoint.stored_model import HfModel
    from opsd_megatron.models.architecture import read_architecture

    hf = HfModel(files, read_architecture(files))
    if differing := compare_weights(hf, model, console):
        raise CheckpointError(f"the files differ from the checkpoint: {'; '.join(differing[:5])}")
    checks = compare_logits(hf, model, console)
    if failed := [check for check in checks if not check.passed]:
        raise CheckpointError(f"not released: logits {failed[0].what}: {describe(failed[0])}")
    equal = "equal bit for bit" if dtype is None else f"equal bit for bit after conversion to {dtype}"
    return {"weights": equal, "logits": [asdict(check) for check in checks]}


def compare_weights(hf: Any, model: Any, console: Console) -> list[str]:
    from opsd_megatron.checkpoint.stored_model import specs_of
    from opsd_megatron.checkpoint.verify import weight_problems

    total = sum(spec.num_bytes for spec in specs_of(hf))
    with progress(console, "comparing weights", total) as advance:
        return weight_problems(hf, model, advance)


def compare_logits(hf: Any, model: Any, console: Console) -> list[Any]:
    from opsd_megatron.checkpoint.verify import check_logits

    with console.status("comparing logits") as status:
        return check_logits(hf, model, lambda step: status.update(f"comparing logits: {step}"))


def describe(check: Any) -> str:
    first, last = check.positions
    return (
        f"largest difference {check.worst:.1e} of logits up to {check.largest:.1f}, positions {first:,} to {last:,}, "
        f"tolerance {check.tolerance:.1e}"
    )


def push(directory: Path, repository: str, public: bool) -> None:
    """Uploads a finished release with the token that huggingface_hub finds itself."""
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(repository, private=not public, exist_ok=True)
    hub.upload_folder(repo_id=repository, folder_path=directory)
    print(f"{directory} -> https://huggingface.co/{repository}")


def bytes_of(text: str | None) -> int | None:
    """Bytes from 500MB, 5GB, 2GiB or a plain number; ConfigError for anything else."""
    if text is None:
        return None
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
    wanted = text.strip().upper()
    number, unit = wanted, 1
    for name, size in units.items():
        if wanted.endswith(name):
            number, unit = wanted.removesuffix(name), size
            break
    try:
        value = int(float(number) * unit)
    except ValueError:
        value = 0
    if value <= 0:
        raise ConfigError(f"{text!r} is not a size; write it like 500MB or 5GB")
    return value


def torch_dtype(name: str | None) -> Any:
    import torch

    return getattr(torch, name) if name else None


@contextmanager
def progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, GB/s and time left; gives the function that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.update(task, advance=count)


def local_directory(model: Path) -> Path:
    """A local directory, or a hub id fetched to the hub's cache."""
    if model.is_dir():
        return model
    if str(model).count("/") != 1 or model.is_absolute():
        raise CheckpointError(f"--model {model} is not a directory")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "LICENSE*", "README.md"]
        return Path(snapshot_download(str(model), allow_patterns=wanted))
    except Exception as error:  # the hub's own errors are of many unrelated classes
        raise CheckpointError(
            f"--model {model} is no directory here, and fetching it from the hub failed: {error}"
        ) from error


def show_shards(shards: list[Any], memory: int) -> int:
    for shard in shards:
        print(f"{shard.file}  {len(shard.tensors)} tensors  {shard.num_bytes / 1e9:.3f} GB")
    total = sum(shard.num_bytes for shard in shards)
    print(f"{total / 1e9:.3f} GB in {len(shards)} files; peak memory at most {memory / 1e6:.0f} MB")
    return 0


def show_model(where: Path, model: Any, each: bool) -> None:
    from opsd_megatron.checkpoint.stored_model import parts_of

    architecture = model.architecture
    print(
        f"{where}: {architecture.family}, {architecture.num_layers} layers, hidden {architecture.hidden_size}, "
        f"{architecture.heads} heads of {architecture.head_dim}, {architecture.kv_heads} for keys and values, "
        f"vocabulary {architecture.vocab_size}, rotary {architecture.rope.kind}, "
        f"head {'tied' if architecture.tied else 'untied'}"
    )
    for part in parts_of(architecture) if each else []:
        print(f"  {part.name}  {list(part.shape)}  {str(model.dtype(part)).removeprefix('torch.')}")
