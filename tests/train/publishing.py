"""What the tests of weight publication run on ranks and in processes of their own."""

import time
from pathlib import Path

import torch

from opsd_megatron.checkpoint.model_weights import load_weights
from opsd_megatron.config import OptimizerConfig, ParallelConfig, RolloutConfig
from opsd_megatron.models.architecture import read_architecture
from opsd_megatron.models.build import build_model
from opsd_megatron.parallel.mesh import build_mesh
from opsd_megatron.rollout.backend import ServerUnreachable
from opsd_megatron.rollout.embedded import EmbeddedBackend
from opsd_megatron.train.colocated import Turns
from opsd_megatron.train.optimizer import make_trainable
from opsd_megatron.train.parking import park_training
from opsd_megatron.train.transports import GroupCarrier
from opsd_megatron.train.weight_sync import Publisher
from tests.server.serving import TOKEN


class Publishing:
    """A model on the ranks of a layout, and its publisher."""

    def __init__(self, directory: Path, url: str, parallel: ParallelConfig, config: RolloutConfig):
        self.mesh = build_mesh(parallel)
        self.architecture = read_architecture(directory)
        self.chunks = build_model(self.architecture, self.mesh, torch.float32, "none")
        self.backend = EmbeddedBackend(url, TOKEN, retry_s=5.0) if self.mesh.world.rank == 0 else None
        self.publisher = Publisher(config, self.architecture, self.mesh, self.backend)
        self.load(directory)

    def load(self, directory: Path) -> None:
        load_weights(self.chunks, self.architecture, directory, self.mesh)

    def publish(self, version: str):
        return self.publisher.publish(self.chunks, version)

    def close(self) -> None:
        self.publisher.close()
        if self.backend is not None:
            self.backend.close()


def publish_by_each(root: Path, names: tuple[str, str], url: str, parallel: ParallelConfig) -> list:
    """Two updates by each transport, the checksums compared after each; what rank 0 saw of the second, and how all
    ranks end when the server refuses."""
    seen: list = []
    for transport in ("gloo", "disk", "http"):
        config = RolloutConfig(transport=transport, shared_directory=root / "shared", checksum_every=1)
        one = Publishing(root / names[0], url, parallel, config)
        one.publish("first")
        one.load(root / names[1])
        published = one.publish("second")
        seen.append((published and published.transport, one.backend and one.backend.checksum()))
        if one.backend is not None:
            one.backend.http._tokens = {False: "wrong", True: "wrong"}
        try:
            one.publish("third")
            seen.append("published without a token")
        except Exception as error:
            seen.append(type(error).__name__)
        one.close()
    return seen


def publish_parked(directory: Path, url: str, parallel: ParallelConfig) -> tuple:
    """Checksums after a colocated update, bytes held while the server had its turn, how a failure ends, whose turn."""
    one = Publishing(directory, url, parallel, RolloutConfig())
    chunks, optimizer = make_trainable(one.chunks, one.mesh, OptimizerConfig(), torch.float32)
    parking = park_training(chunks, optimizer, [], one.mesh.device)
    turns = Turns(one.backend and Wakeful(one.backend), parking)  # type: ignore[arg-type]
    turns.to_server(lambda: one.publisher.publish(chunks, "parked", parking.value_of))
    held = parking.device_bytes()
    sums = one.backend and one.backend.checksum()
    ended = "nothing was raised"
    try:
        turns.to_trainer()
    except Exception as error:
        ended = type(error).__name__
    turns.rescue()
    one.close()
    return sums, held, ended, turns.turn


class Wakeful:
    """A server that wakes, and cannot be reached when it shall sleep."""

    def __init__(self, backend: EmbeddedBackend):
        self._backend = backend

    def wake(self, what) -> None:
        pass

    def sleep(self) -> None:
        raise ServerUnreachable("nobody there")


def publish_slowly(root: Path, name: str, url: str, sent_one: Path) -> None:
    """Sends one bucket of many, writes the file, and sends nothing more."""
    GroupCarrier.bucket_bytes = 20_000
    one = Publishing(root / name, url, ParallelConfig(), RolloutConfig(transport="gloo"))
    send = GroupCarrier.send

    def send_once(carrier, cargo) -> None:
        send(carrier, cargo)
        sent_one.touch()
        time.sleep(60)

    GroupCarrier.send = send_once
    one.publish("never")
