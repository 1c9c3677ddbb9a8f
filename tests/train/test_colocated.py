"""Turns of a trainer and a server that share a device: order, peaks of memory, and failures at every point."""

import pytest
import torch

from opsd_megatron.config import OptimizerConfig, ParallelConfig, RolloutConfig
from opsd_megatron.models.architecture import read_architecture
from opsd_megatron.models.build import build_model
from opsd_megatron.parallel.mesh import build_mesh
from opsd_megatron.rollout.backend import ServerUnreachable, Unsupported
from opsd_megatron.train.colocated import Turns, put_to_sleep
from opsd_megatron.train.optimizer import apply_gradients, make_trainable
from opsd_megatron.train.parking import park_training
from tests.ranks import run_on_ranks
from tests.server.serving import NEW, OLD, served, shared_root, shared_servers
from tests.train.publishing import Publishing, publish_parked
from tests.train.runs import TOKEN, make_world
from tests.train.test_weight_sync import sums_of

SERVER_BYTES = {"weights": 700, "kv_cache": 500}


class Trainer:
    """A model with optimizer that takes steps along gradients made from a seed."""

    def __init__(self, dtype: torch.dtype, distributed: bool):
        mesh = build_mesh(ParallelConfig())
        modules = build_model(read_architecture(shared_root() / OLD), mesh, dtype, "none")
        self.chunks, self.optimizer = make_trainable(modules, mesh, OptimizerConfig(distributed=distributed), dtype)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.chunks[0].parameters():
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        self.optimizer.reload_model_params()
        self.parking = park_training(self.chunks, self.optimizer, [], mesh.device)

    def step(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for parameter in self.chunks[0].parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        assert apply_gradients(self.optimizer, 1e-2)[1]

    def values(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.chunks[0].parameters()]


class Sleeper:
    """A server that holds memory, writes down who holds how much at each of its moves, and can fail once."""

    def __init__(self, parking, fails_at: str | None = None):
        self.parking, self.fails_at = parking, fails_at
        self.held = dict(SERVER_BYTES)
        self.moves: list[tuple[str, int, int]] = []

    def sleep(self) -> None:
        self._move("sleep")
        self.held = {}

    def wake(self, what) -> None:
        for name in what:
            self._move(name)
            self.held[name] = SERVER_BYTES[name]

    def publish(self) -> None:
        self._move("publish")

    def _move(self, name: str) -> None:
        self.moves.append((name, self.parking.device_bytes(), sum(self.held.values())))
        if name == self.fails_at:
            self.fails_at = None
            raise ServerUnreachable(f"no answer to {name}")


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parked_trainer_holds_nothing_and_goes_on_bit_for_bit(dtype, distributed):
    parked, other = Trainer(dtype, distributed), Trainer(dtype, distributed)
    for seed in range(3):
        parked.step(seed)
        other.step(seed)
        held, before = parked.parking.device_bytes(), parked.values()
        parked.parking.release()
        assert parked.parking.device_bytes() == 0
        seen = [parked.parking.value_of(parameter) for parameter in parked.chunks[0].parameters()]
        assert all(map(torch.equal, seen, before))
        parked.parking.restore()
        assert parked.parking.device_bytes() == held and all(map(torch.equal, parked.values(), before))
    assert all(map(torch.equal, parked.values(), other.values()))


def test_neither_takes_its_memory_while_the_other_holds_its_own():
    trainer = Trainer(torch.float32, True)
    trainer.step(0)
    full = trainer.parking.device_bytes()
    server = Sleeper(trainer.parking)
    server.held = {}
    turns = Turns(server, trainer.parking)  # type: ignore[arg-type]
    for _ in range(2):
        turns.to_server(server.publish)
        turns.to_server(server.publish)  # the server's turn already: only new weights
        turns.to_trainer()
        turns.to_trainer()
        assert trainer.parking.device_bytes() == full and not server.held
    weights, both = SERVER_BYTES["weights"], sum(SERVER_BYTES.values())
    one_round = [("weights", 0, 0), ("publish", 0, weights), ("kv_cache", 0, weights), ("publish", 0, both)]
    assert server.moves == [*one_round, ("sleep", 0, both)] * 2


@pytest.mark.parametrize("rescued", [False, True])
@pytest.mark.parametrize("fails_at", ["weights", "publish", "kv_cache", "sleep"])
def test_a_failure_in_any_turn_can_be_repeated_or_saved_from(fails_at, rescued):
    trainer = Trainer(torch.float32, True)
    trainer.step(0)
    before, full = trainer.values(), trainer.parking.device_bytes()
    server = Sleeper(trainer.parking, fails_at)
    server.held = {}
    turns = Turns(server, trainer.parking)  # type: ignore[arg-type]
    with pytest.raises(ServerUnreachable, match=f"no answer to {fails_at}"):
        turns.to_server(server.publish)
        turns.to_trainer()
    assert trainer.parking.device_bytes() == 0
    if rescued:
        server.fails_at = "sleep"  # and the server is past helping
        turns.rescue()
        assert trainer.parking.device_bytes() == full and all(map(torch.equal, trainer.values(), before))
        server.held = {}
    else:
        turns.to_server(server.publish)
        assert server.held == SERVER_BYTES
    turns.to_server(server.publish)
    turns.to_trainer()
    assert turns.turn == "trainer" and all(map(torch.equal, trainer.values(), before))
    assert all(not (ours and theirs) for name, ours, theirs in server.moves if name != "sleep")


def test_memory_that_does_not_come_back_is_said_and_can_be_asked_for_again(monkeypatch):
    trainer = Trainer(torch.float32, True)
    before = trainer.values()
    server = Sleeper(trainer.parking)
    turns = Turns(server, trainer.parking)  # type: ignore[arg-type]
    turns.to_server(server.publish)
    with monkeypatch.context() as patch:
        patch.setattr("opsd_megatron.train.parking._bytes_of", lambda storage: 1 / 0)
        with pytest.raises(RuntimeError, match="free the device and resume"):
            turns.to_trainer()
    turns.to_trainer()
    assert all(map(torch.equal, trainer.values(), before))


def test_parked_shards_are_published_from_host_memory_and_failures_reach_every_rank():
    with served(shared_servers()["exact"], OLD) as server:
        seen = run_on_ranks(2, publish_parked, shared_root() / NEW, server.url, ParallelConfig(tp=2))
    assert seen[0] == (sums_of(shared_root() / NEW), 0, "ServerUnreachable", "trainer")
    assert seen[1] == (None, 0, "ServerUnreachable", "trainer")


def test_a_server_that_cannot_sleep_is_refused():
    with served(shared_servers()["exact"], OLD) as server:
        one = Publishing(shared_root() / OLD, server.url, ParallelConfig(), RolloutConfig())
        assert one.backend is not None
        if one.backend.capabilities().can_sleep:
            pytest.skip("this one can")
        with pytest.raises(Unsupported, match=r"set rollout\.colocated=False"):
            put_to_sleep(one.backend)
        one.close()


def test_a_colocated_run_learns_what_any_other_learns(tmp_path):
    with served(shared_servers()["exact"], OLD) as server, server.backend() as backend:
        if not backend.capabilities().can_sleep:
            pytest.skip("the embedded server cannot sleep")
    world = make_world(tmp_path)
    try:
        flags = ("--checkpoint.every-steps", "0", "--checkpoint.no-export-hf")
        assert world.finish("apart", 2, *flags, token=TOKEN) == 0, world.log("apart")
        assert world.finish("together", 2, *flags, "--rollout.colocated") == 0, world.log("together")
        assert world.losses("together") == world.losses("apart")
    finally:
        world.server.stop()
