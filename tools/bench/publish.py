"""Publication of a model's weights to the embedded server, beside the bare copies that it cannot do without.

    python tools/bench/publish.py                                # 1 GB; files on the disk of the temporary directory
    python tools/bench/publish.py --directory /dev/shm/publish   # where writing costs nothing but memory

disk stands beside cp with fsync of the same bytes, gloo beside a broadcast of them from buffer to buffer through a
group of the same kind. Every way has a trainer and a server of its own, each a process; the server stages while it
serves, and `paused ms` is for how long it generated nothing, by its own metrics. Its checksums must be the model's.
"""

import argparse
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import torch
from convert import make_model
from side_by_side import measure, report

from opsd_megatron.config import ParallelConfig, RolloutConfig
from opsd_megatron.rollout.embedded import EmbeddedBackend
from opsd_megatron.rollout.process import ServerProcess
from opsd_megatron.transfer import Member, TransferError, as_bytes, open_store

TOKEN = "token-of-the-bench"
CHUNK_BYTES = 64 << 20
VOCAB = 32768


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def prepare_publication(settings: Namespace, transport):
    from opsd_megatron.checkpoint.model_weights import load_weights
    from opsd_megatron.models.architecture import read_architecture
    from opsd_megatron.models.build import build_model
    from opsd_megatron.parallel.mesh import build_mesh
    from opsd_megatron.train.weight_sync import Publisher

    mesh, architecture = build_mesh(ParallelConfig()), read_architecture(settings.model)
    chunks = build_model(architecture, mesh, torch.bfloat16)
    load_weights(chunks, architecture, settings.model, mesh)
    server = ServerProcess(
        settings.model,
        TOKEN,
        settings.directory / f"server-{transport}.log",
        engine="exact",
        dtype="bfloat16",
        threads=1,
        arguments=["--weights-root", str(settings.directory)],
    )
    server.start()  # ends with this process
    backend = server.backend()
    config = RolloutConfig(transport=transport, shared_directory=settings.directory / "shared")
    publisher = Publisher(config, architecture, mesh, backend)

    def run() -> dict[str, float]:
        before = paused_seconds(backend)
        publisher.publish(list(chunks), f"bench-{transport}")
        return {"paused ms": 1e3 * (paused_seconds(backend) - before)}

    run()
    run()  # from the third update on the server stages into the memory of weights that it served before
    wanted = {
        name: hashlib.sha256(as_bytes(tensor).numpy().tobytes()).hexdigest()
        for name, tensor in weights_of(settings.model).items()
    }
    if backend.checksum() != wanted:
        raise RuntimeError("the server's weights are not those that were published")
    run.keep = server  # type: ignore[attr-defined]
    return run


def paused_seconds(backend: EmbeddedBackend) -> float:
    text = backend.http.once("GET", "/metrics").text
    lines = (line for line in text.splitlines() if line.startswith("opsd_weight_update_seconds_total"))
    return sum(float(line.split()[-1]) for line in lines)


def publish_by_disk(settings: Namespace):
    return prepare_publication(settings, "disk")


def publish_by_gloo(settings: Namespace):
    return prepare_publication(settings, "gloo")


def publish_by_http(settings: Namespace):
    return prepare_publication(settings, "http")


def copy_and_sync(settings: Namespace):
    files = sorted(settings.model.glob("*.safetensors"))
    target = settings.directory / "copied"

    def run() -> dict[str, float]:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for path in files:
            subprocess.run(["cp", path, target], check=True)
            with open(target / path.name, "rb") as copied:
                os.fsync(copied.fileno())
        return {}

    return run


def bare_broadcast(settings: Namespace):
    """In pieces, each acknowledged by the end of the last one only."""
    size = settings.bytes
    store = open_store("127.0.0.1", 60)
    done, theirs = multiprocessing.Pipe()
    receiver = multiprocessing.get_context("spawn").Process(
        target=receive_bare, args=(store.port, size, theirs), daemon=True
    )
    receiver.start()
    member = Member("gloo", "127.0.0.1", store.port, 0, 2, "bare", 600, torch.device("cpu"))
    values = torch.ones(size, dtype=torch.uint8)

    def run() -> dict[str, float]:
        for piece in values.split(CHUNK_BYTES):
            member.broadcast(piece)
        done.recv()
        return {}

    run.keep = (store, receiver)  # type: ignore[attr-defined]
    return run


def receive_bare(port: int, size: int, done) -> None:
    member = Member("gloo", "127.0.0.1", port, 1, 2, "bare", 600, torch.device("cpu"))
    values = torch.empty(size, dtype=torch.uint8)
    with suppress(TransferError):  # the end of the sender is the end
        while True:
            for piece in values.split(CHUNK_BYTES):
                member.broadcast(piece)
            done.send(True)


CONTENDERS = {
    "published by disk": publish_by_disk,
    "cp + fsync": copy_and_sync,
    "published by gloo": publish_by_gloo,
    "bare gloo broadcast": bare_broadcast,
    "published by http": publish_by_http,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where to work; a temporary directory if not given")
    parser.add_argument("--layers", type=int, default=9, help="of the shapes of Qwen2.5-1.5B; 9 are 1 GB in bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="directory for disk.json and gloo.json")
    settings = parser.parse_args()
    directory = settings.directory or Path(tempfile.mkdtemp(prefix="opsd-publish-"))
    settings.directory, settings.model = directory, directory / "model"
    try:
        compare(settings)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def compare(settings: Namespace) -> None:
    make_model(settings.model, settings.layers, {"tie_word_embeddings": False, "vocab_size": VOCAB})
    settings.bytes = sum(tensor.nbytes for tensor in weights_of(settings.model).values())
    figures = {one.name: one for one in measure(CONTENDERS, settings, settings.repeats)}
    for name, *others in (("disk", "cp + fsync"), ("gloo", "bare gloo broadcast", "published by http")):
        shown = [figures[f"published by {name}"], *(figures[other] for other in others)]
        output = settings.output / f"{name}.json" if settings.output else None
        report(f"{settings.bytes / 1e9:.2f} GB by {name}", settings, shown, output)


if __name__ == "__main__":
    main()
