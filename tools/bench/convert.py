"""Conversion beside a plain copy of the same bytes and beside transformers' own load and save.

    python tools/bench/convert.py                                      # 3 GB, on the disk of the temporary directory
    python tools/bench/convert.py --directory /dev/shm/convert         # where writing costs nothing but memory

A bfloat16 model of the shapes of Qwen2.5-1.5B with arbitrary bytes, in files of 500 MB. Every run is a process of its
own and does its work twice, of which the second time counts: a virtual machine may have to find memory for so many
bytes first. fsync counts too, but transformers does not ask for it. Peak memory is the process's, interpreter and
libraries included. Megatron-Bridge needs Transformer Engine to be imported and mbridge a CUDA device to build a model:
neither runs here.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from side_by_side import versions

SHARD_BYTES = 500_000_000
QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def make_model(directory: Path, layers: int, changes: Mapping[str, Any] | None = None) -> None:
    """The model, written with the exporter's own files of known places; values are one random block repeated."""
    import torch

    from opsd_megatron.checkpoint.hf_writer import beside_weights, write_shard
    from opsd_megatron.checkpoint.shard_plan import TensorSpec, plan_shards
    from opsd_megatron.checkpoint.stored_model import parts_of
    from opsd_megatron.models.architecture import architecture_of

    config = QWEN | {"num_hidden_layers": layers} | dict(changes or {})
    parts = parts_of(architecture_of(config))
    shards = plan_shards([TensorSpec(part.name, torch.bfloat16, part.shape) for part in parts], SHARD_BYTES)
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def tensors():
        for part in parts:
            count = torch.Size(part.shape).numel()
            yield part.name, block.repeat(-(-count // len(block)))[:count].view(part.shape)

    directory.mkdir(parents=True)
    coming = tensors()
    for shard in shards:
        write_shard(directory, shard, coming)
    for name, content in beside_weights(shards, config, None).items():
        (directory / name).write_bytes(content)


def copy(root: Path) -> None:
    (root / "copied").mkdir()
    for path in sorted((root / "model").glob("*.safetensors")):
        subprocess.run(["cp", path, root / "copied"], check=True)
        with open(root / "copied" / path.name, "rb") as file:
            os.fsync(file.fileno())


def import_ours(root: Path) -> None:
    from opsd_megatron.checkpoint.dist_import import ImportJob, import_checkpoint
    from opsd_megatron.checkpoint.stored_model import HfModel
    from opsd_megatron.models.architecture import read_architecture

    model = HfModel(root / "model", read_architecture(root / "model"))
    import_checkpoint(model, ImportJob(root / "model", root / "imported"))


def export_ours(root: Path) -> None:
    from opsd_megatron.checkpoint.export import ExportJob, export_checkpoint
    from opsd_megatron.checkpoint.stored_model import DistModel
    from opsd_megatron.models.architecture import read_architecture

    checkpoint = root / "source" / "step_000000"
    model = DistModel(checkpoint, read_architecture(root / "model"))
    export_checkpoint(model, ExportJob(checkpoint, root / "exported", max_shard_bytes=SHARD_BYTES))


def transformers_load_and_save(root: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.bfloat16)
    model.save_pretrained(root / "saved", max_shard_size=SHARD_BYTES)


CONTENDERS = {
    "cp + fsync": copy,
    "import, this project": import_ours,
    "export, this project": export_ours,
    "transformers, load + save": transformers_load_and_save,
}
OUTPUTS = ("copied", "imported", "exported", "saved")


def warm_up(name: str) -> None:
    """Imports what the contender needs, which is start and not work."""
    if "project" in name:
        import opsd_megatron.checkpoint.dist_import
        import opsd_megatron.checkpoint.export  # noqa: F401
    elif "transformers" in name:
        from transformers import AutoModelForCausalLM  # noqa: F401


def clear(root: Path) -> None:
    for output in OUTPUTS:
        shutil.rmtree(root / output, ignore_errors=True)
    os.sync()


def run_one(name: str, root: Path) -> None:
    warm_up(name)
    clear(root)
    CONTENDERS[name](root)  # not counted: a virtual machine may have to find memory for as many bytes first
    clear(root)
    started = time.perf_counter()
    CONTENDERS[name](root)
    seconds = time.perf_counter() - started
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({"seconds": seconds, "peak_mb": int(status["VmHWM"].split()[0]) * 1024 / 1e6}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where to work; a temporary directory if not given")
    parser.add_argument("--layers", type=int, default=QWEN["num_hidden_layers"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one, arguments.directory)
        return
    root = arguments.directory or Path(tempfile.mkdtemp(prefix="opsd-convert-"))
    try:
        compare(root, arguments)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def compare(root: Path, arguments: argparse.Namespace) -> None:
    make_model(root / "model", arguments.layers)
    import_ours(root)
    (root / "imported").rename(root / "source")
    size = sum(path.stat().st_size for path in (root / "model").glob("*.safetensors"))
    runs: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.repeats):
        for name, found in runs.items():
            command = [sys.executable, "-W", "ignore", __file__, "--one", name, "--directory", str(root)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table(title=f"{size / 1e9:.2f} GB in bfloat16", caption=", ".join(map(" ".join, versions().items())))
    for column in ("", "min s", "median s", "GB/s", "peak MB", "speed / cp"):
        table.add_column(column, justify="right" if column else "left")
    medians = {name: statistics.median(run["seconds"] for run in found) for name, found in runs.items()}
    for name, found in runs.items():
        table.add_row(
            name,
            f"{min(run['seconds'] for run in found):.2f}",
            f"{medians[name]:.2f}",
            f"{size / 1e9 / medians[name]:.2f}",
            f"{max(run['peak_mb'] for run in found):.0f}",
            f"{medians['cp + fsync'] / medians[name]:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        record = {"bytes": size, "versions": versions(), "runs": runs}
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
