"""Convert a model between Hugging Face layout and Megatron's distributed checkpoints, in one CPU process.

    python tools/convert.py export --checkpoint runs/opsdl --model examples/tiny --output out/hf
    python tools/convert.py import --model examples/tiny --output runs/imported

export writes the newest checkpoint of a run (or the one named) as a Hugging Face directory, whatever tensor, pipeline,
data and context parallel layout it was saved under. import writes a checkpoint with weights alone, which loads under
any layout. Both hold the whole model in memory once. An output appears whole or not at all.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import track

from opsd_megatron.errors import CheckpointError, UserError

console = Console(stderr=True)


@dataclass(frozen=True)
class Export:
    """Distributed checkpoint -> Hugging Face directory."""

    checkpoint: Path
    """Run directory (its newest complete checkpoint is taken) or one step_... directory."""
    output: Path
    """Directory to write."""
    model: Path | None = None
    """Hugging Face directory that the run started from: tokenizer, generation config and chat template are copied from
    it. An imported checkpoint remembers its own."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of all tensors, norms included; as stored where not given."""
    max_shard_gb: float = 5.0
    """Largest safetensors file, in 10^9 bytes."""
    overwrite: bool = False
    """Replace an output directory that is not empty."""

    def __post_init__(self):
        if self.max_shard_gb <= 0:
            raise CheckpointError(f"--max-shard-gb {self.max_shard_gb}: must be above 0")


@dataclass(frozen=True)
class Import:
    """Hugging Face directory -> distributed checkpoint with weights alone."""

    model: Path
    """Hugging Face directory with config.json and safetensors."""
    output: Path
    """Directory in which step_000000 is written."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype to store; that of the embedding in the files where not given."""


def export_model(arguments: Export) -> Path:
    """Writes `arguments.output` and returns the checkpoint directory that it came from."""
    import torch

    from opsd_megatron.checkpoint.hf_writer import check_target, write_hf_directory
    from opsd_megatron.checkpoint.model_weights import export_weights
    from opsd_megatron.checkpoint.state_files import is_complete, newest_checkpoint, read_description
    from opsd_megatron.checkpoint.training_state import load_state
    from opsd_megatron.checkpoint.weight_map import weights_of
    from opsd_megatron.models.architecture import architecture_of

    check_target(arguments.output, arguments.overwrite)
    path = arguments.checkpoint if is_complete(arguments.checkpoint) else newest_checkpoint(arguments.checkpoint)
    if path is None:
        raise CheckpointError(f"--checkpoint {arguments.checkpoint} has no complete checkpoint; give a run directory")
    description = read_description(path)
    side_files = _side_files(arguments.model, description)
    architecture = architecture_of(description["hf_config"], source=str(path))
    mesh, chunks = _one_process_model(architecture, getattr(torch, description["dtype"]))
    with console.status(f"reading {path}"):
        load_state(path, chunks, architecture, mesh)
    count = sum(len(weight.hf_names) for weight in weights_of(architecture))
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    tensors: Iterator[Any] = export_weights(chunks, architecture, mesh, dtype)
    write_hf_directory(
        track(tensors, description=f"writing {arguments.output}", total=count, console=console),
        arguments.output,
        architecture.hf_config,
        source_dir=side_files,
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        overwrite=arguments.overwrite,
    )
    return path


def import_model(arguments: Import) -> Path:
    """Writes a checkpoint under `arguments.output` and returns its directory."""
    import torch

    from opsd_megatron.checkpoint.hf_files import HfReader
    from opsd_megatron.checkpoint.model_weights import load_weights
    from opsd_megatron.checkpoint.state_files import newest_checkpoint
    from opsd_megatron.checkpoint.training_state import save_state
    from opsd_megatron.models.architecture import read_architecture

    if (existing := newest_checkpoint(arguments.output)) is not None:
        raise CheckpointError(f"{existing} exists; give another --output")
    architecture = read_architecture(arguments.model)
    stored = HfReader(arguments.model).dtype("model.embed_tokens.weight")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else stored
    mesh, chunks = _one_process_model(architecture, dtype)
    with console.status(f"reading {arguments.model}"):
        load_weights(chunks, architecture, arguments.model, mesh)
    with console.status(f"writing {arguments.output}"):
        origin = {"imported_from": str(arguments.model.resolve())}
        return save_state(arguments.output, 0, chunks, architecture, mesh, extra=origin)


def _one_process_model(architecture: Any, dtype: Any) -> tuple[Any, Any]:
    from opsd_megatron.config import ParallelConfig
    from opsd_megatron.models.build import build_model
    from opsd_megatron.parallel.mesh import build_mesh

    mesh = build_mesh(ParallelConfig())
    return mesh, build_model(architecture, mesh, dtype)


def _side_files(given: Path | None, description: dict[str, Any]) -> Path | None:
    """Where the tokenizer comes from; CheckpointError where the user named a directory that is none."""
    if given is not None and not given.is_dir():
        raise CheckpointError(f"--model {given} is not a directory; give the one that the run started from")
    remembered = description["extra"].get("imported_from")
    source = given or (Path(remembered) if remembered and Path(remembered).is_dir() else None)
    if source is None:
        console.print("no tokenizer is copied: give --model, the Hugging Face directory that the run started from")
    return source


def main() -> None:
    warnings.filterwarnings("ignore", module="megatron")  # about packages that a conversion does not need
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: the model is built in host memory
    commands = Annotated[Export, tyro.conf.subcommand("export")] | Annotated[Import, tyro.conf.subcommand("import")]
    try:
        arguments = tyro.cli(commands, description=__doc__)  # type: ignore[arg-type]
        if isinstance(arguments, Export):
            print(f"{export_model(arguments)} -> {arguments.output}")
        else:
            print(f"{arguments.model} -> {import_model(arguments)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
